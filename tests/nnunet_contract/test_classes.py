"""Several lesion classes, by nnU-Net's own commands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import tiny_dataset
from nnunet_workspace import DATASET, MODEL, Workspace

from gasnet_nnunet.phantom import Phantom

pytestmark = pytest.mark.slow

ON_CPU = ("-tr", "GASNetTrainer", "-device", "cpu")
GROUND_GLASS, CONSOLIDATION = -550.0, 40.0
"""HU."""


def read(path: Path) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def two_sorts(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A patient's CT with ground glass (1) in one half of the body and consolidation (2) in the other, and the mask."""
    kind, number = name.split("_")
    patient = tiny_dataset.patient(f"healthy_{int(number) + {'labelled': 10, 'diseased': 20, 'healthy': 0}[kind]}")
    ct, classes = patient.ct.astype(np.float32), patient.lesion.copy()
    if kind == "healthy":
        return ct, classes
    rng = np.random.default_rng(int(number))
    for value, half in ((1, slice(None, 24)), (2, slice(24, None))):
        inside = np.zeros_like(classes)
        inside[4:-4, :, half] = patient.lung[4:-4, :, half]
        centre = rng.choice(np.argwhere(inside))
        distance = sum(
            ((grid - c) / r) ** 2 for grid, c, r in zip(np.indices(ct.shape), centre, (3, 10, 10), strict=True)
        )
        blob = (distance <= 1) & (patient.lung == 1)
        classes[blob] = value
        ct[blob] = rng.normal((GROUND_GLASS, CONSOLIDATION)[value - 1], 25, int(blob.sum()))
    return ct, classes


LABELS: dict[str, dict[str, Any]] = {
    "classes": {"labels": {"background": 0, "ground_glass": 1, "consolidation": 2, "ignore": 3}},
    "regions": {
        "labels": {"background": 0, "lesion": [1, 2], "consolidation": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    },
}


@pytest.mark.parametrize("kind", LABELS)
def test_two_lesion_classes_come_out(kind: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path / "results", str(Path(__file__).parents[2] / "nnunet_ext"))
    workspace.results.mkdir()
    dataset_json = {**tiny_dataset.DATASET_JSON, **LABELS[kind]}
    cases = tiny_dataset.names(1, 3, 3)

    def mask(name: str, phantom: Phantom) -> np.ndarray:
        return np.full_like(phantom.lesion, 3) if name.startswith("diseased") else two_sorts(name)[1]

    tiny_dataset.write_raw(workspace.raw, cases, mask=mask, dataset_json=dataset_json)
    for name in (*cases, "diseased_7"):
        folder = "imagesTr" if name in cases else "imagesTs"
        ct, _ = two_sorts(name)
        tiny_dataset.write_image(ct, workspace.raw / folder / f"{name}_0000.nii.gz")
    # A step as large as Adam allows, and most of it from the masked case: what else is on has to leave the classes
    # apart, but so few updates are not enough to be sure of them against it.
    settings = {"patches": "volume", "num_epochs": 3, "iterations_per_epoch": 60, "pseudo_start": 0.6}
    settings |= {"optimizer_s": "adam", "learning_rate_s": 0.01, "healthy_outside": 0.0}
    settings |= {"weight_labelled": 5.0, "lesion_threshold": 0.5, "pasted_share": 0.5}
    plans = tiny_dataset.plans(DATASET, settings={**tiny_dataset.SETTINGS, **settings})
    architecture = copy.deepcopy(tiny_dataset.ARCHITECTURE)
    architecture["arch_kwargs"]["features_per_stage"] = [8, 16, 32]
    plans["configurations"]["3d_fullres"] |= {"architecture": architecture}
    tiny_dataset.preprocess(workspace.raw, workspace.preprocessed, plans)

    workspace.call("nnUNetv2_train", 501, "3d_fullres", 0, *ON_CPU)
    folders = ("-i", workspace.raw / "imagesTs", "-o", tmp_path / "out", "-d", 501, "-c", "3d_fullres", "-f", 0)
    one_process = ("-npp", 0, "-nps", 0, "--disable_progress_bar")
    workspace.call("nnUNetv2_predict", *folders, *ON_CPU, *one_process)

    found, truth = read(tmp_path / "out" / "diseased_7.nii.gz"), two_sorts("diseased_7")[1]
    matches = np.histogram2d(truth.ravel(), found.ravel(), bins=np.arange(4) - 0.5)[0]
    for value in (1, 2):
        dice = 2 * matches[value, value] / (matches[value].sum() + matches[:, value].sum())
        assert dice > 0.3, f"class {value} has Dice {dice:.2f}; truth down, prediction across:\n{matches}"
    curves = pd.read_csv(workspace.results / DATASET / MODEL / "fold_0" / "gasnet_progress.csv")
    assert np.isfinite(curves[["L_ps", "L_adv", "L_IgToD", "L_recons", "L_D_restored"]].to_numpy()[-1]).all()
