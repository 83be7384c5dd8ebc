"""One tiny dataset, planned, preprocessed and trained by nnU-Net's own commands, for all tests of this folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_dataset
from nnunet_workspace import DATASET, Workspace


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The dataset after `nnUNetv2_plan_and_preprocess`, with plans made small."""
    root = tmp_path_factory.mktemp("nnunet")
    # An installation names its folder of trainers when Python starts; a clone that is not installed needs telling.
    shim = os.environ.get("nnUNet_extTrainer") or str(Path(__file__).parents[2] / "nnunet_ext")
    workspace = Workspace(root, root / "results", shim)
    workspace.results.mkdir()
    # nnU-Net draws its progress.png at 16 million pixels after every epoch.
    (root / "matplotlibrc").write_text("savefig.dpi: 20\n")
    tiny_dataset.write_raw(workspace.raw, tiny_dataset.names())
    for name in ("diseased_7", "healthy_7"):
        phantom = tiny_dataset.patient(name)
        tiny_dataset.write_image(phantom.ct, workspace.raw / "imagesTs" / f"{name}_0000.nii.gz")
        tiny_dataset.write_image(phantom.lesion, workspace.raw / "labelsTs" / f"{name}.nii.gz")
    # Planning cannot do with nnUNet_n_proc_DA=0.
    one_by_one = ("-c", "3d_fullres", "-np", 1, "-npfp", 1)
    augmented = {"nnUNet_n_proc_DA": "1"}
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 501, *one_by_one, environment=augmented)
    path = workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    ours = tiny_dataset.plans(DATASET, settings={**tiny_dataset.SETTINGS, "gallery_every_epochs": 1})
    for key in ("patch_size", "batch_size", "architecture", "gasnet"):
        plans["configurations"]["3d_fullres"][key] = ours["configurations"]["3d_fullres"][key]
    path.write_text(json.dumps(plans))
    return workspace


@pytest.fixture(scope="session")
def trained(planned: Workspace) -> Workspace:
    """Fold 0 after `nnUNetv2_train 501 3d_fullres 0 -tr GASNetTrainer -device cpu --npz`."""
    planned.train("3d_fullres", 0, "--npz")
    return planned


@pytest.fixture(scope="session")
def vanilla(trained: Workspace) -> Workspace:
    """The same fold after an epoch of nnU-Net's own trainer, whose 1000 epochs no option changes."""
    script = """
import torch
from nnunetv2.run.run_training import get_trainer_from_args
if __name__ == "__main__":
    trainer = get_trainer_from_args("501", "3d_fullres", 0, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.run_training()
    trainer.perform_actual_validation(save_probabilities=True)
"""
    trained.run("python", "-c", script)
    return trained


@pytest.fixture
def elsewhere(planned: Workspace, tmp_path: Path) -> Workspace:
    """The planned dataset with results of this test's own."""
    return planned.with_results(tmp_path / "results")


@pytest.fixture
def copied(trained: Workspace, tmp_path: Path) -> Workspace:
    """The trained model, copied so that a test may change it."""
    workspace = trained.with_results(tmp_path / "results")
    shutil.copytree(trained.model, workspace.model)
    return workspace


@pytest.fixture
def restored_split(planned: Workspace) -> Iterator[Path]:
    """The path of `splits_final.json`, which is put back after the test."""
    path = planned.preprocessed / "splits_final.json"
    before = path.read_bytes() if path.exists() else None
    yield path
    if before is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(before)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """Size and time of the last change of every file below a folder."""

    def take(folder: Path) -> dict[str, tuple[int, int]]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    return take
