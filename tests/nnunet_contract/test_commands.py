"""Every command of nnU-Net that must keep working, on a model trained by GASNetTrainer."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as nnunet_trainer
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import tiny_dataset
import torch
from nnunet_workspace import DATASET, MODEL, Workspace

pytestmark = pytest.mark.slow


UNSEEN = ("diseased_7", "healthy_7")


def probabilities(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npz")["probabilities"] for name in UNSEEN}


def assert_same_predictions(one: Path, other: Path) -> None:
    """Voxel for voxel and bit for bit."""
    for name in UNSEEN:
        masks = [sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.nii.gz"))) for folder in (one, other)]
        assert np.array_equal(*masks)
        assert np.array_equal(probabilities(one)[name], probabilities(other)[name])


@pytest.fixture(scope="session")
def predictions(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.predict(tmp_path_factory.mktemp("predictions"))


# Training -------------------------------------------------------------------------------------------------------------


def test_training_leaves_what_nnunets_other_commands_need(trained: Workspace) -> None:
    fold = trained.model / "fold_0"
    for name in (
        "checkpoint_final.pth",
        "checkpoint_best.pth",
        "progress.png",
        "debug.json",
        "validation/summary.json",
    ):
        assert (fold / name).stat().st_size > 0
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert (trained.model / name).exists()
    assert not (fold / "checkpoint_latest.pth").exists()
    assert not [path for path in trained.root.rglob("*") if ".tmp" in path.name]
    (masked,) = json.loads((trained.preprocessed / "splits_final.json").read_text(encoding="utf-8"))[0]["val"]
    assert sorted(path.name for path in (fold / "validation").iterdir()) == [
        *(f"{masked}.nii.gz", f"{masked}.npz", f"{masked}.pkl", "summary.json")
    ]


def test_training_leaves_something_to_look_at(trained: Workspace) -> None:
    fold = trained.model / "fold_0"
    assert pd.read_csv(fold / "gasnet_progress.csv")["epoch"].tolist() == [0, 1, 2]
    assert (fold / "gasnet_progress.png").stat().st_size > 10_000
    assert len(list((fold / "gasnet_gallery").glob("epoch_*.png"))) == 3


def test_lung_masks_and_splits_are_made_beside_the_data(trained: Workspace) -> None:
    """A stray file among nnU-Net's cases would be taken for one of them."""
    data = trained.preprocessed / "nnUNetPlans_3d_fullres"
    cases = {path.name.removesuffix(".pkl") for path in data.glob("*.pkl")}
    assert cases == set(tiny_dataset.names())
    assert {path.name for path in data.iterdir()} == {
        *(f"{case}{ending}" for case in cases for ending in (".b2nd", "_seg.b2nd", ".pkl"))
    }
    splits = json.loads((trained.preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    assert [len(split["train"]) for split in splits] == [1, 1]


def test_vanilla_trains_on_the_same_fold(vanilla: Workspace) -> None:
    folders = [vanilla.model, vanilla.results / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"]
    summaries = [
        json.loads((folder / "fold_0/validation/summary.json").read_text(encoding="utf-8")) for folder in folders
    ]
    cases = [[Path(case["prediction_file"]).name for case in summary["metric_per_case"]] for summary in summaries]
    assert cases[0] == cases[1]


@pytest.mark.parametrize("option", ["--val", "--val_best"])
def test_validation_alone(option: str, copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # nnUNet_def_n_proc is read when nnU-Net is imported, which has happened.
    monkeypatch.setattr(nnunet_trainer, "default_num_processes", 1)
    fold = copied.model / "fold_0"
    if option == "--val_best":
        best = torch.load(fold / "checkpoint_best.pth", weights_only=False)
        best["network_weights"] = {name: torch.zeros_like(w) for name, w in best["network_weights"].items()}
        torch.save(best, fold / "checkpoint_best.pth")
    before = json.loads((fold / "validation/summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(fold / "validation")
    options = {"--val": ["--val"], "--val_best": ["--val", "--val_best"]}[option]
    command = ("nnUNetv2_train", 501, "3d_fullres", 0, "-tr", "GASNetTrainer", "-device", "cpu", *options)
    assert "Validation complete" in copied.call(*command)
    after = json.loads((fold / "validation/summary.json").read_text(encoding="utf-8"))
    if option == "--val":
        assert after["metric_per_case"][0]["metrics"] == before["metric_per_case"][0]["metrics"]
    else:
        # All logits of a network of zeros are equal: the first class, background, wins everywhere.
        assert after["foreground_mean"]["n_pred"] == 0


def test_every_case_from_pretrained_weights_without_checkpoints(trained: Workspace, tmp_path: Path) -> None:
    workspace = trained.with_results(tmp_path / "results")
    workspace.write_plans("Short", num_epochs=1, gallery_every_epochs=0)
    weights = trained.model / "fold_0" / "checkpoint_final.pth"
    said = workspace.train(
        "3d_fullres", "all", "-p", "Short", "-pretrained_weights", weights, "--disable_checkpointing"
    )
    assert f"Loading pretrained weights from file  {weights}" in said
    assert "checkpointing is disabled" in said
    assert "TRAINING AND VALIDATION ON THE SAME MASK" in said
    fold = workspace.results / DATASET / "GASNetTrainer__Short__3d_fullres" / "fold_all"
    assert not list(fold.rglob("*.pth*"))
    assert {path.name for path in (fold / "validation").glob("*.nii.gz")} == {"labelled_0.nii.gz", "labelled_1.nii.gz"}


def test_finished_training_is_continued_without_another_epoch(copied: Workspace) -> None:
    fold = copied.model / "fold_0"
    curves = (fold / "gasnet_progress.csv").read_bytes()
    before = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    said = copied.train("3d_fullres", 0, "--c")
    assert not re.search(r": Epoch \d", said)
    assert "Validation complete" in said
    after = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert after["current_epoch"] == before["current_epoch"] == 3
    assert all(torch.equal(after["network_weights"][name], w) for name, w in before["network_weights"].items())
    assert (fold / "gasnet_progress.csv").read_bytes() == curves


# Prediction -----------------------------------------------------------------------------------------------------------


def test_predictions_lie_on_the_grid_of_the_ct(predictions: Path, trained: Workspace) -> None:
    for name in UNSEEN:
        ct = sitk.ReadImage(str(trained.raw / "imagesTs" / f"{name}_0000.nii.gz"))
        mask = sitk.ReadImage(str(predictions / f"{name}.nii.gz"))
        assert mask.GetSize() == ct.GetSize()
        assert mask.GetSpacing() == pytest.approx(ct.GetSpacing())
        assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}
        foreground = probabilities(predictions)[name][1]
        assert foreground.shape == ct.GetSize()[::-1]
        assert 0 <= foreground.min() < foreground.max() <= 1


def test_prediction_by_the_folder_of_a_model(trained: Workspace, predictions: Path, tmp_path: Path) -> None:
    folders = ("-i", trained.raw / "imagesTs", "-o", tmp_path, "-m", trained.model, "-f", 0)
    few = ("-npp", 1, "-nps", 1, "-device", "cpu", "--save_probabilities", "--disable_progress_bar")
    trained.run("nnUNetv2_predict_from_modelfolder", *folders, *few)
    assert_same_predictions(predictions, tmp_path)


def test_prediction_with_the_best_checkpoint(trained: Workspace, tmp_path: Path) -> None:
    trained.predict(tmp_path, checkpoint="checkpoint_best.pth")
    assert np.isfinite(probabilities(tmp_path)["diseased_7"]).all()


def test_exported_model_is_installed_elsewhere_and_predicts_the_same(
    trained: Workspace, predictions: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.zip"
    trained.call(
        "nnUNetv2_export_model_to_zip", "-d", 501, "-o", file, "-c", "3d_fullres", "-tr", "GASNetTrainer", "-f", 0
    )
    prefix = f"{DATASET}/{MODEL}/"
    assert {name.removeprefix(prefix) for name in zipfile.ZipFile(file).namelist()} >= {
        *("plans.json", "dataset.json", "dataset_fingerprint.json"),
        *("fold_0/checkpoint_final.pth", "fold_0/progress.png", "fold_0/validation/summary.json", "fold_0/debug.json"),
    }
    other = trained.with_results(tmp_path / "results")
    other.call("nnUNetv2_install_pretrained_model_from_zip", file)
    assert_same_predictions(predictions, other.predict(tmp_path / "out"))


def test_stock_nnunet_predicts_the_same_with_a_renamed_checkpoint(
    trained: Workspace, predictions: Path, tmp_path: Path
) -> None:
    """Only S exists at test time: nnU-Net needs nothing of ours."""
    other = trained.with_results(tmp_path / "results", trainers="")
    stock = "nnUNetTrainer__nnUNetPlans__3d_fullres"
    shutil.copytree(trained.model, other.results / DATASET / stock)
    path = other.results / DATASET / stock / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["gasnet"]
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainer"}, path)
    script = """
import sys
sys.modules["gasnet_nnunet"] = None  # every import of it fails
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""
    folders = ("-i", trained.raw / "imagesTs", "-o", tmp_path / "out", "-d", 501, "-c", "3d_fullres", "-f", 0)
    one_process = ("-npp", 0, "-nps", 0, "-device", "cpu", "--save_probabilities")
    other.run("python", "-c", script, *folders, *one_process)
    assert_same_predictions(predictions, tmp_path / "out")


# Afterwards -----------------------------------------------------------------------------------------------------------


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_best_configuration_is_found_among_ours_and_vanilla(vanilla: Workspace, tmp_path: Path) -> None:
    workspace = vanilla.with_results(tmp_path / "results")
    shutil.copytree(vanilla.results, workspace.results, dirs_exist_ok=True)
    models = ("-c", "3d_fullres", "-tr", "nnUNetTrainer", "GASNetTrainer", "-f", 0)
    said = workspace.call("nnUNetv2_find_best_configuration", 501, *models, "--disable_ensembling", "-np", 1)
    found = json.loads((workspace.results / DATASET / "inference_information.json").read_text(encoding="utf-8"))
    assert set(found["all_results"]) == {MODEL, "nnUNetTrainer__nnUNetPlans__3d_fullres"}
    assert "nnUNetv2_predict -d Dataset501_Tiny" in said


@pytest.fixture(scope="session")
def accumulated(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("accumulated")
    model = ("-c", "3d_fullres", "-tr", "GASNetTrainer", "-f", 0)
    trained.run("nnUNetv2_accumulate_crossval_results", 501, *model, "-o", out)
    return out


def test_folds_are_accumulated(accumulated: Path, trained: Workspace) -> None:
    ours = summary(trained.model / "fold_0" / "validation")["foreground_mean"]
    assert summary(accumulated)["foreground_mean"] == pytest.approx(ours, nan_ok=True)


def test_postprocessing_is_determined(accumulated: Path, trained: Workspace) -> None:
    truth = trained.preprocessed / "gt_segmentations"
    trained.call("nnUNetv2_determine_postprocessing", "-i", accumulated, "-ref", truth, "-np", 1)
    assert (accumulated / "postprocessing.pkl").exists()


def test_ensemble_with_vanilla_is_evaluated(vanilla: Workspace, predictions: Path, tmp_path: Path) -> None:
    other = vanilla.predict(tmp_path / "vanilla", model="nnUNetTrainer__nnUNetPlans__3d_fullres")
    out = tmp_path / "ensemble"
    vanilla.call("nnUNetv2_ensemble", "-i", predictions, other, "-o", out, "-np", 1, "--save_npz")
    mean = (probabilities(predictions)["diseased_7"] + probabilities(other)["diseased_7"]) / 2
    assert np.allclose(probabilities(out)["diseased_7"], mean, atol=1e-3)
    files = ("-djfile", predictions / "dataset.json", "-pfile", predictions / "plans.json")
    vanilla.call("nnUNetv2_evaluate_folder", vanilla.raw / "labelsTs", out, *files, "-np", 1)
    assert len(summary(out)["metric_per_case"]) == len(UNSEEN)
