"""Kills, a full disk and plans that changed meanwhile: what `--c` makes of them."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from nnunet_workspace import DATASET, Workspace, kill_group

pytestmark = pytest.mark.slow

OFTEN: dict[str, Any] = {"save_every_minutes": 1e-6, "gallery_every_epochs": 0}
"""A checkpoint after every epoch."""

MINE = """
import torch
from gasnet_nnunet.trainers import GASNetTrainer

class MyGASNetTrainer(GASNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 4
"""


def kill_when(happened: Callable[[], bool], workspace: Workspace, *arguments: object, **options: Any) -> None:
    """Start a training and kill -9 it with its workers as soon as something has happened."""
    log = workspace.results / "killed.log"
    with log.open("w") as file:
        command = ("nnUNetv2_train", 501, *arguments, "-device", "cpu")
        process = workspace.start(*command, stdout=file, stderr=subprocess.STDOUT, **options)
        end = time.monotonic() + 600
        while not happened():
            if process.poll() is not None or time.monotonic() > end:
                kill_group(process)
                pytest.fail(
                    f"The training ended with {process.returncode} first:\n{log.read_text(encoding='utf-8')[-3000:]}"
                )
            time.sleep(0.002)
        assert process.poll() is None
        kill_group(process)


def rows(folder: Path) -> int:
    file = folder / "gasnet_progress.csv"
    return max(0, len(file.read_text(encoding="utf-8").splitlines()) - 1) if file.exists() else 0


@dataclass(frozen=True)
class Resumed:
    """A training that was killed in its second epoch and continued."""

    fold: Path
    curves_before: pd.DataFrame
    checkpoint: dict[str, Any]
    said: str

    @property
    def curves(self) -> pd.DataFrame:
        return pd.read_csv(self.fold / "gasnet_progress.csv")

    @property
    def start(self) -> int:
        return int(self.checkpoint["current_epoch"])


@pytest.fixture(scope="module")
def resumed(planned: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """A user's subclass with worker processes, killed after the curves and before the checkpoint of epoch 1."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "trainers").mkdir()
    (folder / "trainers" / "mine.py").write_text(MINE)
    trainers = os.pathsep.join(filter(None, [str(folder / "trainers"), planned.trainers]))
    workspace = planned.with_results(folder / "results", trainers=trainers)
    workspace.write_plans("Often", **OFTEN)
    fold = workspace.results / DATASET / "MyGASNetTrainer__Often__3d_fullres" / "fold_0"
    model = ("3d_fullres", 0, "-tr", "MyGASNetTrainer", "-p", "Often")
    workers = {"nnUNet_n_proc_DA": "1"}
    kill_when(lambda: rows(fold) == 2, workspace, *model, environment=workers)
    before = pd.read_csv(fold / "gasnet_progress.csv")
    checkpoint = torch.load(fold / "checkpoint_latest.pth", weights_only=False)
    workspace.write_plans("Often", **OFTEN, lambda_s=7.0)
    said = workspace.train("3d_fullres", 0, "-p", "Often", "--c", trainer="MyGASNetTrainer", environment=workers)
    return Resumed(fold, before, checkpoint, said)


def test_training_goes_on_at_the_checkpoint(resumed: Resumed) -> None:
    assert resumed.start in (1, 2)
    epochs = [int(number) for number in re.findall(r": Epoch (\d+) *$", resumed.said, flags=re.MULTILINE)]
    assert epochs == list(range(resumed.start, 4))


def test_curves_go_on_as_if_nothing_had_happened(resumed: Resumed) -> None:
    curves = resumed.curves
    assert curves["epoch"].tolist() == [0, 1, 2, 3]
    pd.testing.assert_frame_equal(curves[: resumed.start], resumed.curves_before[: resumed.start])
    assert curves["lr_S"].tolist() == pytest.approx([0.01 * (1 - epoch / 4) ** 0.9 for epoch in range(4)])
    assert curves["score"].notna().all()


def test_lists_of_nnunet_have_a_value_an_epoch(resumed: Resumed) -> None:
    checkpoint = torch.load(resumed.fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 4
    assert {name: len(values) for name, values in checkpoint["logging"].items()} == dict.fromkeys(
        checkpoint["logging"], 4
    )
    for name, values in resumed.checkpoint["logging"].items():
        assert checkpoint["logging"][name][: resumed.start] == values


def test_optimisers_count_on(resumed: Resumed) -> None:
    checkpoint = torch.load(resumed.fold / "checkpoint_final.pth", weights_only=False)
    states = [
        state["gasnet"]["adversary"]["optimizer_generator"]["state"] for state in (resumed.checkpoint, checkpoint)
    ]
    assert [int(state[0]["step"]) for state in states] == [2 * resumed.start, 2 * 4]


def test_settings_of_the_checkpoint_win(resumed: Resumed) -> None:
    assert "the checkpoint's win: lambda_s: 7.0 -> 100.0" in resumed.said
    plans = json.loads((resumed.fold.parent / "plans.json").read_text(encoding="utf-8"))
    assert plans["configurations"]["3d_fullres"]["gasnet"]["lambda_s"] == 100.0


def test_resumed_training_is_finished_and_tidy(resumed: Resumed) -> None:
    assert (resumed.fold / "validation" / "summary.json").exists()
    assert not (resumed.fold / "checkpoint_latest.pth").exists()
    assert not [path for path in resumed.fold.iterdir() if ".tmp" in path.name]


def test_full_disk_ends_in_one_sentence_and_keeps_the_old_checkpoint(elsewhere: Workspace) -> None:
    elsewhere.write_plans("Heavy", **OFTEN, iterations_per_epoch=1, generator_features=16)
    fold = elsewhere.results / DATASET / "GASNetTrainer__Heavy__3d_fullres" / "fold_0"
    latest, best = fold / "checkpoint_latest.pth", fold / "checkpoint_best.pth"
    arguments = ("3d_fullres", 0, "-p", "Heavy")
    kill_when(latest.exists, elsewhere, *arguments, "-tr", "GASNetTrainer")
    before = latest.read_bytes(), best.read_bytes()

    def limit() -> None:
        size = int(0.9 * len(before[0]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    said = elsewhere.train(*arguments, "--c", status=1, preexec_fn=limit)
    error = said.split("stderr:\n")[1]
    assert re.search(r"^Error: The checkpoint .*pth could not be written: .*go on with --c", error, re.MULTILINE)
    assert "Traceback" not in said
    assert (latest.read_bytes(), best.read_bytes()) == before
    assert not list(fold.glob(".*tmp"))


def test_kill_during_the_write_of_a_checkpoint_loses_nothing(elsewhere: Workspace) -> None:
    elsewhere.write_plans("Huge", **OFTEN, iterations_per_epoch=1, generator_features=48)
    fold = elsewhere.results / DATASET / "GASNetTrainer__Huge__3d_fullres" / "fold_0"
    latest, writing = fold / "checkpoint_latest.pth", fold / ".checkpoint_latest.pth.tmp"
    arguments = ("3d_fullres", 0, "-p", "Huge")
    kill_when(lambda: latest.exists() and writing.exists(), elsewhere, *arguments, "-tr", "GASNetTrainer")
    assert torch.load(latest, weights_only=False)["current_epoch"] == 1
    elsewhere.train(*arguments, "--c")
    assert pd.read_csv(fold / "gasnet_progress.csv")["epoch"].tolist() == [0, 1, 2]
    assert not list(fold.glob(".*tmp"))
