"""Other segmenters and a model to go on from, by nnU-Net's own commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunet_workspace import DATASET, Workspace

from gasnet_nnunet.segmenters import SEGMENTERS, apply_segmenter

pytestmark = pytest.mark.slow

ON_CPU = ("-tr", "GASNetTrainer", "-device", "cpu")


def read(path: Path) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


# Segmenters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmenter", [name for name in SEGMENTERS if name != "plain"])
def test_segmenter_is_trained_and_predicts(segmenter: str, planned: Workspace, tmp_path: Path) -> None:
    workspace, name = planned.with_results(tmp_path / "results"), segmenter.capitalize()
    workspace.write_plans(name, num_epochs=1, gallery_every_epochs=0, pseudo_start=0.0)
    path = workspace.preprocessed / f"{name}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"] = apply_segmenter(plans["configurations"]["3d_fullres"], segmenter)
    path.write_text(json.dumps(plans))

    said = workspace.call("nnUNetv2_train", 501, "3d_fullres", 0, "-p", name, *ON_CPU)
    out = workspace.predict(tmp_path / "out", model=f"GASNetTrainer__{name}__3d_fullres")

    assert "Mean Validation Dice" in said
    ct, mask = (
        read(folder) for folder in (workspace.raw / "imagesTs/diseased_7_0000.nii.gz", out / "diseased_7.nii.gz")
    )
    assert mask.shape == ct.shape


# Fine-tuning ----------------------------------------------------------------------------------------------------------


def test_training_goes_on_from_another_model(trained: Workspace, tmp_path: Path) -> None:
    workspace = trained.with_results(tmp_path / "results")
    origin = trained.model / "fold_0" / "checkpoint_final.pth"
    workspace.write_plans("Finetuned", num_epochs=1, gallery_every_epochs=0, init_from=str(origin))

    said = workspace.call("nnUNetv2_train", 501, "3d_fullres", 0, "-p", "Finetuned", *ON_CPU)

    assert f"Training starts from the weights in {origin}" in said
    fold = workspace.results / DATASET / "GASNetTrainer__Finetuned__3d_fullres" / "fold_0"
    before, after = (torch.load(path, weights_only=False) for path in (origin, fold / "checkpoint_final.pth"))
    assert after["current_epoch"] == 1
    moved = [
        (after["network_weights"][name] - weight).abs().max() for name, weight in before["network_weights"].items()
    ]
    # Two steps away from there, and not from chance.
    assert 0 < max(moved) < 0.1
