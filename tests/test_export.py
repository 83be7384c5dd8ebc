"""`gasnet-nnunet export`: what goes into the archive, what never does, and when nothing is written at all."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
import tiny_dataset
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from PIL import Image, PngImagePlugin
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.transform import resize
from typer.testing import CliRunner

from gasnet_nnunet import export as export_module
from gasnet_nnunet import onnx_export
from gasnet_nnunet.cli import app
from gasnet_nnunet.decision import HEADS_KEY, weights_in_training
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.model_card import model_card
from gasnet_nnunet.trained_model import read_model
from gasnet_nnunet.trainers import GASNetTrainer

DATASET = "Dataset501_Tiny"
MODEL = "GASNetTrainer__nnUNetPlans__3d_fullres"
EXPORTED = f"{DATASET}/nnUNetTrainer__nnUNetPlans__3d_fullres"
SECRETS = ("Erika Mustermann", "radiology-pc-7", "/data/hospital")
"""A patient, a machine and a folder that stand all over the trained model's folder."""


class ForeignUNet(PlainConvUNet):  # type: ignore[misc]
    """A network that stock nnU-Net cannot import."""


@dataclass(frozen=True)
class Trained:
    """A model, trained and validated by nnU-Net's own life cycle, and the folders around it."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "results" / DATASET / MODEL

    @property
    def fold(self) -> Path:
        return self.model / "fold_0"

    @property
    def ct(self) -> Path:
        return self.root / "raw" / DATASET / "imagesTr" / "labelled_0_0000.nii.gz"

    def change(self, file: str, changes: dict[str, Any]) -> None:
        """Change a JSON file of the model."""
        content = json.loads((self.model / file).read_text(encoding="utf-8"))
        (self.model / file).write_text(json.dumps({**content, **changes}))


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    root = tmp_path_factory.mktemp("trained")
    made = Trained(root)
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    tiny_dataset.write_raw(raw, tiny_dataset.names(1, 3, 3))
    # After two iterations the network's masks are neither empty nor full by this threshold, and its average is another
    # network.
    settings = {**tiny_dataset.SETTINGS, "num_epochs": 1, "averaged_iterations": 4, "lesion_threshold": 0.4}
    plans = tiny_dataset.plans(DATASET, settings=settings)
    tiny_dataset.preprocess(raw, preprocessed, plans)
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        patch.setitem(matplotlib.rcParams, "savefig.dpi", 20)  # nnU-Net draws 16 million pixels an epoch
        dataset_json = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
        trainer = GASNetTrainer(
            {**plans, "continue_training": False}, "3d_fullres", 0, dataset_json, torch.device("cpu")
        )
        trainer.run_training()
        # What nnU-Net's validation writes, without the processes that it starts.
        mask = str(raw / "labelsTr" / "labelled_0.nii.gz")
        metrics = compute_metrics(mask, mask, SimpleITKIO(), [1])
        recursive_fix_for_json_export(metrics)
        mean = metrics["metrics"]
        summary = {"metric_per_case": [metrics], "mean": mean, "foreground_mean": mean[1]}
        (made.fold / "validation").mkdir()
        save_summary_json(summary, str(made.fold / "validation" / "summary.json"))
        yield made


def use_folders(environment: pytest.MonkeyPatch, root: Path) -> None:
    """Set nnU-Net's folders, and load data in this process."""
    for folder in ("raw", "preprocessed", "results"):
        environment.setenv(f"nnUNet_{folder}", str(root / folder))
    environment.setenv("nnUNet_n_proc_DA", "0")


@pytest.fixture
def trained(trained_once: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The model, in a folder of results that the test may change."""
    root = tmp_path / "nnunet"
    shutil.copytree(trained_once.root / "results", root / "results")
    for folder in ("raw", "preprocessed"):
        (root / folder).symlink_to(trained_once.root / folder)
    use_folders(monkeypatch, root)
    return Trained(root)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def export(output: Path, *words: object) -> str:
    """Run the command; what it refuses is raised as by `main`."""
    arguments = ["-d", "501", "-p", "nnUNetPlans", *words] if "-m" not in words else words
    result = CliRunner().invoke(app, ["export", "-o", str(output), "--device", "cpu", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def install(file: Path, folder: Path) -> Path:
    """What `nnUNetv2_install_pretrained_model_from_zip` does; the model's folder."""
    zipfile.ZipFile(file).extractall(folder)
    return folder / EXPORTED


def checkpoint_of(model: Path, fold: int | str = 0) -> dict[str, Any]:
    return dict(torch.load(model / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True))


# The archive ----------------------------------------------------------------------------------------------------------


def test_archive_holds_what_nnunet_needs_and_a_card(trained: Trained, out: Path) -> None:
    said = export(out / "model.zip")
    assert names(out) == ["model.zip"]
    assert sorted(zipfile.ZipFile(out / "model.zip").namelist()) == [
        f"{EXPORTED}/{name}"
        for name in (
            "README.md",
            "dataset.json",
            "dataset_fingerprint.json",
            "fold_0/checkpoint_final.pth",
            "fold_0/progress.png",
            "fold_0/validation/summary.json",
            "plans.json",
        )
    ]
    assert "predicted by both models: the same mask in all 36864 voxels" in said
    assert "Note: no lesion" not in said
    assert f"nnUNetv2_predict -d {DATASET} -p nnUNetPlans -c 3d_fullres -f 0 -i NEW_CTS -o OUT" in said
    model = install(out / "model.zip", out)
    plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
    expected = json.loads((trained.model / "plans.json").read_text(encoding="utf-8"))
    del expected["configurations"]["3d_fullres"]["gasnet"]
    assert plans == expected


def test_checkpoint_is_the_segmenter_under_nnunets_name(trained: Trained, out: Path) -> None:
    export(out / "model.zip")
    stock = checkpoint_of(install(out / "model.zip", out))
    ours = torch.load(trained.fold / "checkpoint_final.pth", weights_only=False)
    assert stock.keys() == {
        *("network_weights", "trainer_name", "inference_allowed_mirroring_axes", "current_epoch", "init_args"),
        HEADS_KEY,
    }
    assert stock["trainer_name"] == "nnUNetTrainer"
    assert stock["inference_allowed_mirroring_axes"] == ours["inference_allowed_mirroring_axes"] == (2,)
    assert stock["network_weights"].keys() == ours["network_weights"].keys()
    assert all(torch.equal(stock["network_weights"][name], w) for name, w in ours["network_weights"].items())
    back, expected = weights_in_training(stock), weights_in_training(ours)
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    goes_on = ours["gasnet"]["segmenter"]["encoder.stages.0.0.convs.0.conv.weight"]
    assert not torch.equal(stock["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"], goes_on), "the average"
    size = sum(w.nbytes for w in {w.data_ptr(): w for w in stock["network_weights"].values()}.values())
    file = zipfile.ZipFile(out / "model.zip").getinfo(f"{EXPORTED}/fold_0/checkpoint_final.pth")
    assert file.file_size < size + 100_000  # no room for G and D


def test_no_name_of_a_case_patient_machine_or_folder_gets_out(trained: Trained, out: Path) -> None:
    patient, machine, folder = SECRETS
    trained.change(
        "dataset.json",
        {
            "description": f"CTs of {patient} from {folder}",
            "dataset": {patient: {"images": [folder], "label": folder}},
            "gasnet": {"cases": {"labelled_0": {"patient": patient}}},
        },
    )
    plans = json.loads((trained.model / "plans.json").read_text(encoding="utf-8"))
    configurations = plans["configurations"]
    configurations["3d_fullres"]["gasnet"]["init_from"] = f"{folder}/weights.pth"
    configurations["3d_fullres"]["written_on"] = machine
    trained.change("plans.json", {"where": folder, "configurations": {**configurations, f"2d_{machine}": {}}})
    trained.change("dataset_fingerprint.json", {"cases": [patient], "spacings": [[2, 1, 1], [4, 3, 1], [3, 2, 1]]})
    trained.change("fold_0/validation/summary.json", {"made_on": machine})
    trained.change("fold_0/debug.json", {"hostname": machine})
    (trained.fold / f"training_log_{machine}.txt").write_text(patient)
    (trained.fold / "validation" / f"{patient}.nii.gz").touch()
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("Author", machine)
    Image.new("RGB", (8, 8), "red").save(trained.fold / "progress.png", pnginfo=metadata)

    export(out / "model.zip")
    model = install(out / "model.zip", out)
    for secret in (*SECRETS, *tiny_dataset.names(), str(trained.root), os.fspath(trained.root.parent)):
        for path in (path for path in model.rglob("*") if path.is_file()):
            assert secret not in str(path.relative_to(out))
            assert secret.encode() not in path.read_bytes(), (secret, path.name)
    assert Image.open(model / "fold_0" / "progress.png").getpixel((0, 0)) == (255, 0, 0)
    fingerprint = json.loads((model / "dataset_fingerprint.json").read_text(encoding="utf-8"))
    assert fingerprint == {"spacings": [[2, 1, 1], [3, 2, 1], [4, 3, 1]]}
    summary = json.loads((model / "fold_0/validation/summary.json").read_text(encoding="utf-8"))
    assert summary.keys() == {"foreground_mean", "mean", "metric_per_case"}
    assert summary["metric_per_case"] == []


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_but_checkpoints_is_opened(trained: Trained, out: Path) -> None:
    for place in (trained.model / "crossval_results_folds_0", trained.fold / "validation", trained.model):
        place.mkdir(exist_ok=True)
        (place / "postprocessing.pkl").write_bytes(pickle.dumps(Trap(out / "sprung")))
    export(out / "model.zip")
    assert names(out) == ["model.zip"]


def test_card_tells_what_the_model_learned_from(trained: Trained) -> None:
    trained.change("dataset_fingerprint.json", {"spacings": [[12.5, 7.0, 7.0], [12.5, 8.0, 8.0]]})
    card = model_card(read_model(trained.model), "nnUNetv2_predict -d 501")
    for words in (
        "trained by GASNet",
        "no medical device",
        "| 0 | 1 | 2 | 2 | 1 | 1 | 1 |",  # masks, diseased, healthy; the same held out
        "Voxels of the scans: 12.5 x 7 x 7 to 12.5 x 8 x 8 mm",
        "Intensities are clipped to -1000 to 200 HU",
        "| 0 | 1 of 1 | 1 | 100.00 % |",
        "on held-out volumes without a mask",
        "discriminator_steps = 1",
        "the segmenter's weights alone, averaged over about 4 iterations, with heads by which a probability of 0.5 "
        "is what training called 0.4",
        "mirror_axes = [2]",
        f"Trained with torch {torch.__version__}",
        "nnUNetv2_install_pretrained_model_from_zip model.zip",
        "nnUNetv2_predict -d 501",
        "<case>_0000.nii.gz",
    ):
        assert words in card
    assert "**Trained and validated on the same mask**" in card


def test_card_of_other_trainings(trained: Trained) -> None:
    others = "Fold(train=('a', 'b'), val=('c',), diseased=('d',), healthy=('h',), val_diseased=(), val_healthy=())"
    trained.change("fold_0/debug.json", {"_cases": others})
    shutil.copytree(trained.fold, trained.model / "fold_1")
    (trained.model / "fold_1" / "debug.json").unlink()
    shutil.rmtree(trained.model / "fold_1" / "validation")
    (trained.model / "fold_1" / "gasnet_progress.csv").write_text("epoch,M_he")
    plans = json.loads((trained.model / "plans.json").read_text(encoding="utf-8"))
    settings = plans["configurations"]["3d_fullres"]["gasnet"]
    settings |= {name: 0.0 for name in settings if name.startswith("weight_")}
    settings |= {"weight_labelled": 1.0, "pasted_share": 0.0}
    trained.change("plans.json", plans)
    checkpoint = torch.load(trained.model / "fold_1" / "checkpoint_final.pth", weights_only=False)
    del checkpoint[HEADS_KEY]  # as a baseline's
    torch.save(checkpoint, trained.model / "fold_1" / "checkpoint_final.pth")
    assert "is what training called 0.4 or 0.5" in model_card(read_model(trained.model), "")
    torch.save(checkpoint, trained.fold / "checkpoint_final.pth")
    card = model_card(read_model(trained.model), "")
    assert "is what training called" not in card
    for words in (
        "trained by supervised training",
        "| 0 | 2 | 0 of 1 | 0 of 1 | 1 | 0 | 0 |",
        "| 1 | not recorded |",
        "| 1 | 1 of 1 | not validated | not defined |",
        "volumes, of which some or all were trained on",
    ):
        assert words in card
    assert "same mask" not in card
    settings["pasted_share"] = 0.5
    trained.change("plans.json", plans)
    assert "| 0 | 2 | 0 of 1 | 1 | 1 | 0 | 0 |" in model_card(read_model(trained.model), ""), "lesions in healthy lungs"


def test_best_checkpoint_takes_the_final_ones_name_but_not_its_score(trained: Trained, out: Path) -> None:
    best = torch.load(trained.fold / "checkpoint_best.pth", weights_only=False)
    name = next(iter(best["network_weights"]))
    best["network_weights"][name] += 1
    torch.save(best, trained.fold / "checkpoint_best.pth")
    export(out / "model.zip", "-chk", "best")
    model = install(out / "model.zip", out)
    assert torch.equal(checkpoint_of(model)["network_weights"][name], best["network_weights"][name])
    assert not (model / "fold_0/validation").exists()
    assert "Dice is that of the final checkpoint" in (model / "README.md").read_text(encoding="utf-8")


def add_fold(trained: Trained) -> dict[str, Any]:
    """A fold_1 with other weights; its checkpoint."""
    shutil.copytree(trained.fold, trained.model / "fold_1")
    path = trained.model / "fold_1" / "checkpoint_final.pth"
    checkpoint: dict[str, Any] = torch.load(path, weights_only=False)
    checkpoint["network_weights"] = {name: 0.7 * w for name, w in checkpoint["network_weights"].items()}
    torch.save(checkpoint, path)
    return checkpoint


def test_folds_go_together(trained: Trained, out: Path) -> None:
    other = add_fold(trained)["network_weights"]
    shutil.copytree(trained.fold, trained.model / "fold_all")
    assert [fold.name for fold in read_model(trained.model).folds] == [0, 1]  # as nnU-Net takes them
    assert "-f 1 all -i" in export(out / "model.zip", "-f", 1, "all")
    model = install(out / "model.zip", out)
    assert sorted(path.name for path in model.glob("fold_*")) == ["fold_1", "fold_all"]
    assert all(torch.equal(checkpoint_of(model, 1)["network_weights"][name], w) for name, w in other.items())


def test_exported_model_can_be_exported_again(trained: Trained, out: Path) -> None:
    export(out / "model.zip")
    model = install(out / "model.zip", out)
    export(out / "again.zip", "-m", model)
    assert names(install(out / "again.zip", out / "again") / "fold_0") == names(model / "fold_0")


def test_raw_ct_serves_where_nothing_is_preprocessed(
    trained: Trained, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(UserError, match=r"nnUNet_preprocessed, where it would take one from, is not set.*--case"):
        export(out / "model.zip")
    assert f"{trained.ct.name} predicted by both models" in export(out / "model.zip", "--case", trained.ct)
    with pytest.raises(UserError, match=r"--case names 2 files; expected one for each of CT"):
        export(out / "other.zip", "--case", trained.ct, trained.ct)
    monkeypatch.setenv("nnUNet_preprocessed", str(out))
    with pytest.raises(UserError, match="holds no preprocessed one"):
        export(out / "other.zip")
    assert names(out) == ["model.zip"]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["network_weights", "inference_allowed_mirroring_axes"])
def test_nothing_is_written_where_the_models_disagree(
    lost: str, trained: Trained, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = export_module.stock_checkpoint

    def spoiled(*arguments: Any) -> dict[str, Any]:
        weights = {name: -weight for name, weight in stock(*arguments)["network_weights"].items()}
        changes = {"network_weights": weights, "inference_allowed_mirroring_axes": None}
        return {**stock(*arguments), lost: changes[lost]}

    monkeypatch.setattr(export_module, "stock_checkpoint", spoiled)
    with pytest.raises(UserError, match=r"Nothing was written: .* differs in \d+ of 36864 voxels"):
        export(out / "model.zip")
    assert names(out) == []


def foreign(trained: Trained) -> None:
    """Let the model's network be one of this module."""
    plans = json.loads((trained.model / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = f"{__name__}.ForeignUNet"
    (trained.model / "plans.json").write_text(json.dumps(plans))


def test_network_that_stock_nnunet_cannot_import_is_refused(trained: Trained, out: Path) -> None:
    foreign(trained)
    with pytest.raises(UserError, match=rf"{__name__}\.ForeignUNet, and .* does not have the package .*--onnx"):
        export(out / "model.zip")
    assert names(out) == []


def test_trainer_with_a_network_of_its_own_is_refused(trained: Trained, out: Path) -> None:
    path = trained.fold / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "trainer_name": "nnUNetTrainerBN"}, path)
    if importlib.util.find_spec("nnunetv2.training.nnUNetTrainer.variants.network_architecture") is None:
        pytest.skip("this nnU-Net has no variants")
    with pytest.raises(UserError, match="nnUNetTrainerBN builds its network in a way of its own"):
        export(out / "model.zip")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


BROKEN: dict[str, tuple[Callable[[Trained], object], tuple[object, ...], str]] = {
    "truncated checkpoint": (
        lambda t: cut(t.fold / "checkpoint_final.pth"),
        (),
        r"checkpoint_final\.pth cannot be read",
    ),
    "missing fold": (lambda t: None, ("-f", 0, 3), "has no fold_3; it has fold_0"),
    "still in training": (
        lambda t: (t.fold / "checkpoint_final.pth").rename(t.fold / "checkpoint_latest.pth"),
        (),
        r"fold_0 has no checkpoint_final\.pth; it has checkpoint_best\.pth, .* Let its training end",
    ),
    "second fold still in training": (
        lambda t: (t.model / "fold_1").mkdir(),
        (),
        r"fold_1 has no checkpoint_final\.pth; .*name the folds that are ready with -f",
    ),
    "nothing trained": (lambda t: shutil.rmtree(t.fold), (), "nothing was trained there yet"),
    "folds of two trainings": (
        lambda t: (
            shutil.copytree(t.fold, t.model / "fold_1"),
            torch.save(
                {**torch.load(t.fold / "checkpoint_final.pth", weights_only=False), "trainer_name": "Other"},
                t.model / "fold_1" / "checkpoint_final.pth",
            ),
        ),
        (),
        "of different trainings",
    ),
    "no checkpoint of nnU-Net": (
        lambda t: torch.save({"network_weights": {}}, t.fold / "checkpoint_final.pth"),
        (),
        "lacks what nnU-Net's predictor needs",
    ),
    "unknown trainer": (
        lambda t: torch.save(
            {**torch.load(t.fold / "checkpoint_final.pth", weights_only=False), "trainer_name": "NobodysTrainer"},
            t.fold / "checkpoint_final.pth",
        ),
        (),
        "nnU-Net does not find NobodysTrainer",
    ),
    "missing plans": (lambda t: (t.model / "plans.json").unlink(), (), r"has no plans\.json"),
    "broken plans": (lambda t: cut(t.model / "plans.json"), (), r"plans\.json is no readable JSON"),
    "plans without the configuration": (
        lambda t: t.change("plans.json", {"configurations": {}}),
        (),
        "has no configuration '3d_fullres'",
    ),
    "weights of another network": (
        lambda t: torch.save(
            {**torch.load(t.fold / "checkpoint_final.pth", weights_only=False), "network_weights": {}},
            t.fold / "checkpoint_final.pth",
        ),
        (),
        "nnU-Net cannot load .* RuntimeError",
    ),
    "unknown model": (
        lambda t: None,
        ("-c", "2d"),
        r"has no model .*__2d; it has GASNetTrainer__nnUNetPlans__3d_fullres",
    ),
    "unknown checkpoint": (lambda t: None, ("-chk", "latest"), "expected final or best"),
    "unknown device": (lambda t: None, ("--device", "tpu"), "nnU-Net knows cpu, cuda, mps"),
    "missing case": (
        lambda t: None,
        ("--case", "nowhere.nii.gz"),
        r"nowhere\.nii\.gz, named by --case, does not exist",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_shared_is_named_and_nothing_is_written(fault: str, trained: Trained, out: Path) -> None:
    damage, words, message = BROKEN[fault]
    damage(trained)
    with pytest.raises(UserError, match=message):
        export(out / "model.zip", *words)
    assert names(out) == []


def test_models_are_named_in_one_way(trained: Trained, out: Path) -> None:
    for words in ((), ("-d", "501", "-m", str(trained.model))):
        result = CliRunner().invoke(app, ["export", "-o", str(out / "model.zip"), *words])
        assert isinstance(result.exception, UserError)
        assert "either by -d" in str(result.exception)
    result = CliRunner().invoke(app, ["export", "-o", str(out / "model.zip"), "-d", "502"])
    assert f"found none. Datasets there: {DATASET}" in str(result.exception)


def test_existing_files_are_kept_unless_asked(trained: Trained, out: Path) -> None:
    (out / "model.zip").write_text("mine")
    with pytest.raises(UserError, match=r"model\.zip exists\. Replace it with --overwrite"):
        export(out / "model.zip")
    assert (out / "model.zip").read_text(encoding="utf-8") == "mine"
    export(out / "model.zip", "--overwrite")
    assert zipfile.is_zipfile(out / "model.zip")
    for output, message in (
        (out / "model", "ending in .zip"),
        (out / "nowhere" / "model.zip", "There is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            export(output)


def test_full_disk_leaves_what_was_there(trained: Trained, out: Path) -> None:
    resource = pytest.importorskip("resource")
    (out / "model.zip").write_text("mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size in (1000, 30_000):  # in the first file, in the checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(UserError, match=r"could not be written to .* Make room there"):
                export(out / "model.zip", "--overwrite")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)
    assert names(out) == ["model.zip"]
    assert (out / "model.zip").read_text(encoding="utf-8") == "mine"


# ONNX -----------------------------------------------------------------------------------------------------------------


def resample(
    volume: np.ndarray, size: list[int], old: list[float], new: list[float], step: dict[str, Any]
) -> np.ndarray:
    """What the description says under "resample"."""
    assert step["force_separate_z"] in (None, False)
    if list(volume.shape) == size:
        return volume
    volume = volume.astype(float)
    uneven = [s for s in (old, new) if max(s) / min(s) > 3 and step["force_separate_z"] is None]
    spacing = next(iter(uneven), None)
    if spacing is None or spacing.count(max(spacing)) > 1:
        return np.asarray(resize(volume, size, step["order"], mode="edge", anti_aliasing=False))
    axis = spacing.index(max(spacing))
    planes = [s for i, s in enumerate(size) if i != axis]
    slices = [resize(s, planes, step["order"], mode="edge", anti_aliasing=False) for s in np.moveaxis(volume, axis, 0)]
    stacked = np.stack(slices, axis)
    scale = np.array(stacked.shape) / size
    places = [factor * (index + 0.5) - 0.5 for factor, index in zip(scale, np.indices(size), strict=True)]
    return np.asarray(map_coordinates(stacked, places, order=step["order_z"], mode="nearest"))


def predict_by_description(description: Path, ct: Path) -> np.ndarray:
    """The mask of a CT by onnxruntime and the JSON file alone."""
    import onnxruntime

    told = json.loads(description.read_text(encoding="utf-8"))
    before = {step["step"]: step for step in told["preprocessing"]}
    after = {step["step"]: step for step in told["postprocessing"]}
    assert list(before) == ["read", "transpose", "crop", "normalise", "resample", "pad"]
    assert list(after) == ["unpad", "resample", "decide", "uncrop", "transpose"]
    assert before["transpose"]["axes"] == after["transpose"]["axes"] == [0, 1, 2]
    session = onnxruntime.InferenceSession(str(description.parent / told["file"]), providers=["CPUExecutionProvider"])

    image = sitk.ReadImage(str(ct))
    whole, spacing = sitk.GetArrayFromImage(image).astype(np.float32), list(image.GetSpacing()[::-1])
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(whole))
    (channel,) = before["normalise"]["channels"]
    volume = (np.clip(whole[box], *channel["clip"]) - channel["subtract"]) / channel["divide"]
    cropped, target = list(volume.shape), before["resample"]["spacing"]
    size = [round(s * a / b) for s, a, b in zip(cropped, spacing, target, strict=True)]
    volume = resample(volume, size, spacing, target, before["resample"])
    patch = before["pad"]["to"]
    missing = [max(0, p - s) for p, s in zip(patch, size, strict=True)]
    volume = np.pad(volume, [(m // 2, m - m // 2) for m in missing], constant_values=before["pad"]["value"])

    single = np.zeros(patch)
    single[tuple(p // 2 for p in patch)] = 1
    weights = gaussian_filter(single, [p / 8 for p in patch], mode="constant")
    weights /= weights.max()
    window = told["sliding_window"]
    starts = []
    for s, p in zip(volume.shape, patch, strict=True):
        count = int(np.ceil((s - p) / (p * window["step_size"]))) + 1
        starts.append([round((s - p) / max(1, count - 1) * i) for i in range(count)])
    assert window["mirror_axes"] == [2]
    logits = np.zeros((len(told["output"]["heads"]), *volume.shape))
    total = np.zeros(volume.shape)
    for corner in np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, 3):
        here = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        one = volume[here][None, None].astype(np.float32)
        (straight,) = session.run(["logits"], {"patch": one})
        (mirrored,) = session.run(["logits"], {"patch": one[..., ::-1].copy()})
        logits[(slice(None), *here)] += weights * (straight + mirrored[..., ::-1])[0] / 2
        total[here] += weights
    logits /= total
    kept = tuple(slice(m // 2, m // 2 + s) for m, s in zip(missing, size, strict=True))
    heads = [resample(head[kept], cropped, target, spacing, after["resample"]) for head in logits]
    mask = np.full(whole.shape, after["uncrop"]["value"])
    mask[box] = np.asarray(after["decide"]["values"])[np.argmax(heads, axis=0)]
    return mask


@pytest.fixture(scope="module")
def ensemble(trained_once: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two folds of a network that stock nnU-Net cannot import, and `model.onnx` beside their folders."""
    pytest.importorskip("onnxscript")
    made = Trained(tmp_path_factory.mktemp("ensemble"))
    shutil.copytree(trained_once.root / "results", made.root / "results")
    (made.root / "preprocessed").symlink_to(trained_once.root / "preprocessed")
    add_fold(made)
    foreign(made)
    plans = json.loads((made.model / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"]["force_separate_z"] = False
    (made.model / "plans.json").write_text(json.dumps(plans))
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, made.root)
        said = export(made.root / "model.onnx", "--onnx")
    assert "onnxruntime and torch agree on a patch of noise and the middle of labelled_0" in said
    return made


@pytest.mark.parametrize("spacing", [(10.0, 6.0, 6.0), (24.0, 7.5, 7.5)], ids=["alike", "thick slices"])
def test_description_is_all_that_a_user_of_onnx_needs(
    spacing: tuple[float, float, float], ensemble: Trained, out: Path
) -> None:
    array = tiny_dataset.patient("labelled_0").ct.astype(np.float32)
    array[:2] = array[:, -3:] = 0  # what nnU-Net crops
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(out / "ct.nii.gz"))

    predictor = read_model(ensemble.model).predictor(torch.device("cpu"))
    data, properties = SimpleITKIO().read_images([str(out / "ct.nii.gz")])
    expected = predictor.predict_single_npy_array(data, properties)
    found = predict_by_description(ensemble.root / "model.json", out / "ct.nii.gz")
    assert 0.01 < np.mean(expected > 0) < 0.99
    assert np.mean(found != expected) < 0.002  # nnU-Net adds patches up in half precision


def test_onnx_names_no_place(ensemble: Trained) -> None:
    for secret in (b"site-packages", b".py", str(ensemble.root).encode(), b"labelled_"):
        assert secret not in (ensemble.root / "model.onnx").read_bytes()
        assert secret not in (ensemble.root / "model.json").read_bytes()


def test_onnx_that_computes_something_else_is_not_written(
    ensemble: Trained, trained: Trained, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        onnx_export, "_translate", lambda network, patch, path: shutil.copy(ensemble.root / "model.onnx", path)
    )
    with pytest.raises(UserError, match=r"Nothing was written: the logits .* by onnxruntime differ from torch's"):
        export(out / "model.onnx", "--onnx")
    assert names(out) == []


def test_existing_onnx_files_are_kept(trained: Trained, out: Path) -> None:
    pytest.importorskip("onnxscript")
    for name in ("model.json", "model.onnx"):
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=rf"{name} exists"):
            export(out / "model.onnx", "--onnx")
        assert (out / name).read_text(encoding="utf-8") == "mine"


def test_onnx_is_an_extra(trained: Trained, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'gasnet-nnunet\[onnx\]'"):
        export(out / "model.onnx", "--onnx")


def test_description_of_regions(trained: Trained) -> None:
    trained.change(
        "dataset.json",
        {"labels": {"background": 0, "lesion": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
    )
    told = onnx_export.describe(read_model(trained.model), "model.onnx", "0")
    assert told["output"]["heads"] == ["lesion", "core"]
    (decide,) = (step for step in told["postprocessing"] if step["step"] == "decide")
    assert decide["values"] == [1, 2]
    assert "sigmoid" in decide["how"]
