import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
from rich.console import Console

from gasnet_nnunet import __version__
from gasnet_nnunet.cli.demo import FULL, MARKER, QUICK, Step, chain, find_command, make_folder, run_demo, run_step
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.settings import GASNetSettings


def console(file: Path) -> Console:
    return Console(file=file.open("w"), width=100, record=True, highlight=False)


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_both_models_are_trained_alike_from_one_mask(size: object, tmp_path: Path) -> None:
    steps = chain(tmp_path, size, "cpu")  # type: ignore[arg-type]
    assert [step.command[0] for step in steps] == [
        *["gasnet-nnunet"] * 2,
        *["nnUNetv2_train"] * 2,
        *["nnUNetv2_predict"] * 2,
    ]
    baseline, gasnet = (
        [word.replace(name, "") for word in step.command]
        for step, name in zip(steps[2:4], ("SupervisedBaselineTrainer", "GASNetTrainer"), strict=True)
    )
    assert baseline == gasnet
    assert size.patients["labelled"] == 1  # type: ignore[attr-defined]
    GASNetSettings.from_dict(size.settings)  # type: ignore[attr-defined]


def test_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no earlier demo"):
        make_folder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        make_folder(tmp_path / "thesis.txt", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_earlier_demo_is_replaced_only_if_asked(tmp_path: Path) -> None:
    make_folder(tmp_path, overwrite=False)
    (tmp_path / "predictions" / "old.nii.gz").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        make_folder(tmp_path, overwrite=False)
    assert (tmp_path / "predictions" / "old.nii.gz").exists()
    make_folder(tmp_path, overwrite=True)
    assert not (tmp_path / "predictions" / "old.nii.gz").exists()
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / MARKER).exists()


def test_output_of_a_command_goes_to_its_log(tmp_path: Path) -> None:
    out = console(tmp_path / "out.txt")
    step = Step("say", ("gasnet-nnunet", "--version"))
    run_step(step, tmp_path / "log.txt", {}, out)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"gasnet-nnunet {__version__}\n"
    assert "$ gasnet-nnunet --version" in out.export_text()


def test_variables_reach_a_command(tmp_path: Path) -> None:
    step = Step("check", ("gasnet-nnunet", "check", "-d", "901"))
    folders = {f"nnUNet_{name}": f"{tmp_path}/nowhere" for name in ("raw", "preprocessed", "results")}
    with pytest.raises(UserError, match=f"{tmp_path}/nowhere"):
        run_step(step, tmp_path / "log.txt", folders, console(tmp_path / "out.txt"))


def test_failing_command_is_told_in_one_sentence(tmp_path: Path) -> None:
    step = Step("fail", ("gasnet-nnunet", "docter"))
    with pytest.raises(UserError, match=r"docter ended with status 2\. All it said is in .*log\.txt") as caught:
        run_step(step, tmp_path / "log.txt", {}, console(tmp_path / "out.txt"))
    assert "No such command 'docter'" in str(caught.value)
    assert "No such command 'docter'" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_command_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match=r"nnUNetv3_train is not installed"):
        find_command("nnUNetv3_train")


def test_command_line_refuses_a_full_folder_without_traceback(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-c", "from gasnet_nnunet.cli import main; main()", "demo", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ")
    assert "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.fixture
def unchanged_environment() -> Iterator[None]:
    with patch.dict(os.environ):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("unchanged_environment")
def test_smallest_chain_runs_to_the_figures(tmp_path: Path) -> None:
    tiny = replace(
        QUICK,
        patients={"labelled": 1, "diseased": 2, "healthy": 2, "test_diseased": 1, "test_healthy": 1},
        settings={**QUICK.settings, "num_epochs": 2, "iterations_per_epoch": 2, "gallery_every_epochs": 1},
    )
    out = console(tmp_path / "out.txt")
    run_demo(tmp_path / "demo", tiny, device="cpu", overwrite=False, console=out)
    scores = pd.read_csv(tmp_path / "demo/scores.csv")
    assert scores["model"].tolist() == ["Supervised baseline"] * 2 + ["GASNet"] * 2
    for name in ("comparison.png", "overlays.png", "comparison.md"):
        assert (tmp_path / "demo" / name).stat().st_size > 100
    plans = json.loads(
        next((tmp_path / "demo/nnUNet_preprocessed").rglob("GASNetPlans.json")).read_text(encoding="utf-8")
    )
    assert plans["configurations"]["3d_fullres"]["gasnet"]["num_epochs"] == 2
    text = out.export_text()
    assert "2 unseen phantom patients" in text
    assert text.count("$ nnUNetv2_") == 4


@pytest.mark.slow
@pytest.mark.usefixtures("unchanged_environment")
def test_gasnet_beats_its_baseline(tmp_path: Path) -> None:
    run_demo(tmp_path / "demo", FULL, device="cpu", overwrite=False, console=console(tmp_path / "out.txt"))
    scores = pd.read_csv(tmp_path / "demo/scores.csv")
    dice = scores.groupby("model")["dice"].mean()
    assert dice["GASNet"] > dice["Supervised baseline"] + 0.05
