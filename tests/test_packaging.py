"""Once installed, nnU-Net finds our trainers with nothing to set, and uninstalling leaves nothing behind.

Each combination (nnU-Net from a wheel or an editable clone, ours from a wheel or an editable clone) gets a virtual
environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from virtual_environment import Environment, copy_of_nnunet, make_environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork, forkserver and links are POSIX")

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("gasnet_nnunet", "dataset_conversion", "plans", "nnunet_ext", "pyproject.toml", "README.md", "LICENSE")

# A U-Net of two stages: enough for nnU-Net's predictor to build it and to load its weights.
STAGES = {"n_stages": 2, "features_per_stage": [2, 4], "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1] * 3, [2] * 3]}
BLOCKS = {"n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op_kwargs": {}}
KINDS = {"conv_op": "torch.nn.modules.conv.Conv3d", "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d"}
REST = {"dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {}}
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {**STAGES, **BLOCKS, **KINDS, **REST},
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
PLANS = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {"architecture": ARCHITECTURE}}}
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}

# Training, its worker processes and prediction, in one process because each costs an import of torch.
LOOK_UP = """
import contextlib, copy, inspect, io, json, multiprocessing, os, pickle, sys
from pathlib import Path

def find(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    return recursive_find_trainer_class_by_name(name)

def ours_imported():
    return [name for name in sys.modules if "gasnet" in name]

def main(our_place, nnunet_place, user_folder, model_folder):
    import nnunetv2, torch
    assert Path(nnunetv2.__path__[0]).is_relative_to(nnunet_place), nnunetv2.__path__
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        vanilla = find("nnUNetTrainer")
    assert said.getvalue() == ""
    with contextlib.suppress(RuntimeError):
        raise AssertionError(find("NobodysTrainer"))
    ours = os.environ["nnUNet_extTrainer"]
    os.environ["nnUNet_extTrainer"] = ours + os.pathsep + user_folder
    assert find("UserTrainer").__name__ == "UserTrainer"
    os.environ["nnUNet_extTrainer"] = ours
    assert ours_imported() == []

    for name in ("GASNetTrainer", "SupervisedBaselineTrainer"):
        trainer = find(name)
        assert trainer.__module__ == "gasnet_nnunet.trainers", trainer
        assert Path(inspect.getfile(trainer)).is_relative_to(our_place), inspect.getfile(trainer)
        assert issubclass(trainer, vanilla)
        assert find(name) is trainer is pickle.loads(pickle.dumps(trainer))
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(copy.copy, (trainer,)) is trainer
            if method == "spawn":  # as the ranks of a multi-GPU training do
                assert pool.apply(find, (trainer.__name__,)) is trainer

    from gasnet_nnunet.dataset_conversion import folders
    from gasnet_nnunet import settings
    from gasnet_nnunet.study.file import study_names
    for file in (folders.__file__, settings.plans_folder()):
        assert Path(file).is_relative_to(our_place), file
    assert "default" in settings.preset_names()
    assert "one-mask" in study_names()

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    model = Path(model_folder)
    plans = PlansManager(json.loads((model / "plans.json").read_text(encoding="utf-8")))
    network = vanilla.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 2, False)
    checkpoint = {"trainer_name": "GASNetTrainer", "init_args": {"configuration": "3d_fullres"}}
    torch.save({**checkpoint, "network_weights": network.state_dict()}, model / "fold_0" / "checkpoint_final.pth")
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        predictor.initialize_from_trained_model_folder(model_folder, (0,))
    assert predictor.trainer_name == "GASNetTrainer" and f"from: {ours}" in said.getvalue(), said.getvalue()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""

BROKEN = """
import sys
from pathlib import Path
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

trainers = Path(sys.argv[1])
for content, error, words in (
    ("import not_installed_anywhere", ModuleNotFoundError, "not_installed_anywhere"),
    ("import torch; torch.gone_in_this_release", ImportError, "gone_in_this_release"),
    ("this is no Python", SyntaxError, "invalid syntax"),
):
    trainers.write_text(content)
    assert find("nnUNetTrainer").__name__ == "nnUNetTrainer"
    try:
        find("GASNetTrainer")
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(content)
"""

VANILLA = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
assert find("nnUNetTrainer").__name__ == "nnUNetTrainer"
"""

PRINT_VARIABLE = "import os; print(os.environ.get('nnUNet_extTrainer'), end='')"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return make_environment(tmp_path / "environment")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this repository's package, for a test to install or to break."""
    return copy_of_project(tmp_path / "clone")


def copy_of_project(folder: Path) -> Path:
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_project(folder / "source")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def plain_nnunet(environment: Environment, tmp_path: Path) -> Path:
    """nnU-Net as a wheel installs it."""
    return copy_of_nnunet(environment.packages)


def editable_nnunet(environment: Environment, tmp_path: Path) -> Path:
    """nnU-Net as its developers install their clone."""
    folder = tmp_path / "nnUNet"
    copy_of_nnunet(folder)
    version = importlib.metadata.version("nnunetv2")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "nnunetv2"\nversion = "{version}"\n'
        '[tool.setuptools.packages.find]\ninclude = ["nnunetv2", "nnunetv2.*"]\n'
    )
    environment.install("--editable", str(folder))
    return folder


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder of a user's own trainers."""
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / "my_trainers.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class UserTrainer(nnUNetTrainer):\n    pass\n"
    )
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A trained model's folder but for its checkpoint."""
    folder = tmp_path / "GASNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


@pytest.mark.parametrize(
    ("install_nnunet", "editable"),
    [
        pytest.param(plain_nnunet, False, id="both plain"),
        pytest.param(editable_nnunet, True, id="both editable", marks=pytest.mark.slow),
        pytest.param(plain_nnunet, True, id="ours editable", marks=pytest.mark.slow),
        pytest.param(editable_nnunet, False, id="nnunet editable", marks=pytest.mark.slow),
    ],
)
def test_trainers_resolve_until_uninstalled(
    install_nnunet: Callable[[Environment, Path], Path],
    editable: bool,
    environment: Environment,
    wheel: Path,
    clone: Path,
    user_folder: Path,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    nnunet_place = install_nnunet(environment, tmp_path)
    before = environment.files()
    environment.install(*(["--editable", str(clone)] if editable else [str(wheel)]))
    our_place = clone if editable else environment.packages

    script = tmp_path / "look_up.py"
    script.write_text(LOOK_UP)
    environment.run(str(script), *map(str, (our_place, nnunet_place, user_folder, model_folder)))

    environment.uninstall()
    assert environment.files() == before
    assert environment.run("-c", PRINT_VARIABLE) == "None"


def test_broken_package_shows_its_error_and_spares_nnunet(
    environment: Environment, wheel: Path, tmp_path: Path
) -> None:
    plain_nnunet(environment, tmp_path)
    before = environment.files()
    environment.install(str(wheel))
    environment.run("-B", "-c", BROKEN, str(environment.packages / "gasnet_nnunet" / "trainers.py"))

    environment.uninstall()
    assert environment.files() == before
    environment.run("-c", VANILLA)


@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_users_own_folders_come_first(editable: bool, environment: Environment, wheel: Path, clone: Path) -> None:
    environment.install(*(["--editable", str(clone)] if editable else [str(wheel)]))
    ours = str(environment.packages / "gasnet_nnunet_ext")
    assert environment.run("-c", PRINT_VARIABLE) == ours
    assert environment.run("-c", PRINT_VARIABLE, nnUNet_extTrainer="") == ours
    users = os.pathsep.join(["/one of mine", "/two"])
    assert environment.run("-c", PRINT_VARIABLE, nnUNet_extTrainer=users) == os.pathsep.join([users, ours])
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PRINT_VARIABLE!r}], check=True)"
    assert environment.run("-c", child, nnUNet_extTrainer="/mine") == os.pathsep.join(["/mine", ours])


def test_python_starts_without_the_folder(environment: Environment, wheel: Path) -> None:
    environment.install(str(wheel))
    shutil.rmtree(environment.packages / "gasnet_nnunet_ext")
    imported = environment.run("-c", "import sys; print([name for name in sys.modules if 'gasnet' in name])")
    assert imported.strip() == "[]"


def test_editable_install_shows_nothing_but_the_package(environment: Environment, clone: Path) -> None:
    (clone / "tests").mkdir()
    (clone / "tests" / "test_nothing.py").touch()
    environment.install("--editable", str(clone))
    code = "import importlib.util as u; print([u.find_spec(f'gasnet_nnunet.{n}') for n in ('tests', 'gasnet_nnunet')])"
    assert environment.run("-c", code).strip() == "[None, None]"


def test_wheel_holds_the_documented_layout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"gasnet_nnunet_ext.pth", "gasnet_nnunet_ext/gasnet_nnunet_trainers.py"}
    for folder, place in (("gasnet_nnunet", ""), ("dataset_conversion", "gasnet_nnunet/"), ("plans", "gasnet_nnunet/")):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        expected |= {f"{place}{path.relative_to(ROOT).as_posix()}" for path in files}
    assert {name for name in names if ".dist-info/" not in name} == expected - {"gasnet_nnunet/dataset_conversion.py"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = copy_of_project(tmp_path / "source")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(tmp_path)]
    subprocess.run([*build, "--target", "sdist"], cwd=source, check=True, capture_output=True)
    archive = next(tmp_path.glob("*.tar.gz"))
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    subprocess.run([*build, "--target", "wheel"], cwd=unpacked, check=True, capture_output=True)
    again = next(tmp_path.glob("*.whl"))
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()
