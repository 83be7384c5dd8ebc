"""A dataset of a few tiny patients to run studies on, and how the tests of studies open them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_dataset

from gasnet_nnunet.study.file import load_study
from gasnet_nnunet.study.workspace import Run, Workspace, open_workspace

DATASET = "Dataset501_Tiny"
SHIM = str(Path(__file__).parents[1] / "nnunet_ext")
SHORT = {"num_epochs": 1, "iterations_per_epoch": 1}
ARMS: dict[str, Any] = {
    "supervised": {"trainer": "SupervisedBaselineTrainer", "title": "Supervised"},
    # A window for two channels where there is one: nnU-Net's command ends with status 1.
    "broken": {"settings": {"window": [[0, 1], [0, 1]]}},
    "patient": {"like": "supervised", "equal_time_with": "broken"},
}


@contextmanager
def study_folders(root: Path) -> Iterator[Path]:
    """nnU-Net's folders with a preprocessed dataset of tiny patients, set for this process and its children."""
    # nnU-Net draws its progress.png at 16 million pixels after every epoch.
    (root / "matplotlibrc").write_text("savefig.dpi: 20\n")
    variables = {
        **{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")},
        "nnUNet_extTrainer": os.environ.get("nnUNet_extTrainer") or SHIM,
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "MATPLOTLIBRC": str(root),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        (root / "results").mkdir()
        raw = root / "raw" / DATASET
        tiny_dataset.write_raw(raw, tiny_dataset.names(labelled=3, diseased=1, healthy=4))
        plans = {
            **tiny_dataset.plans(DATASET, settings={**tiny_dataset.SETTINGS, **SHORT}),
            "plans_name": "GASNetPlans",
        }
        tiny_dataset.preprocess(raw, root / "preprocessed" / DATASET, plans)
        yield root


def write_study(folder: Path, **changes: Any) -> str:
    path = folder / "study.yaml"
    folder.mkdir(exist_ok=True)
    content = {"dataset": 501, "repeats": 1, "test": 1, "mirroring": False, "arms": ARMS, **changes}
    path.write_text(json.dumps(content))  # JSON is YAML
    return str(path)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def opened(out: Path) -> Workspace:
    return open_workspace(load_study(str(out / "study.yaml")), out)


def run_of(workspace: Workspace, arm: str) -> Run:
    return next(run for run in workspace.runs if run.arm == arm)
