"""The report of a training, on trainings by nnU-Net's own life cycle."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_dataset
from typer.testing import CliRunner

from gasnet_nnunet import training_report
from gasnet_nnunet.cli import app
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.progress import TrainingCurves
from gasnet_nnunet.settings import GASNetSettings, load_preset, preset_names
from gasnet_nnunet.trainers import SupervisedBaselineTrainer
from gasnet_nnunet.training_report import (
    closest_preset,
    read_log,
    training_state,
    validation_cases,
    write_training_report,
)


@pytest.fixture
def fold(trained_fold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished training, copied so that a test may change it."""
    monkeypatch.setenv("nnUNet_raw", str(trained_fold.parents[3] / "raw"))
    model = tmp_path / trained_fold.parent.name
    shutil.copytree(trained_fold.parent, model)
    return model / "fold_0"


def text_of(path: Path) -> str:
    """The page without its pictures, as a reader sees the text."""
    page = re.sub(r'"data:[^"]*"', '""', path.read_text(encoding="utf-8"))
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]).split()))


def rewrite_curves(fold: Path, rows: pd.DataFrame) -> None:
    rows.to_csv(fold / "gasnet_progress.csv", index=False)


def test_finished_training_is_shown_whole(fold: Path) -> None:
    path = write_training_report(fold)
    assert path == fold / "report.html"
    text, page = text_of(path), path.read_text(encoding="utf-8")
    assert "Dataset501_Tiny: GASNetTrainer, 3d_fullres" in text
    assert "Finished: 2 epochs" in text
    assert "Fold 0: 1 masks to learn from" in text
    assert "Too early to tell" in text
    assert page.count("data:image/svg+xml") == 1
    last = TrainingCurves(fold).read().iloc[-1]
    assert f"L_lab {last['L_lab']:.3g}" in page
    assert re.findall(r'data-epoch="(\d+)"', page) == ["0", "1"]
    assert page.count("data:image/webp") == 2
    (case,) = validation_cases(fold, ".nii.gz")["case"]
    assert page.count("data:image/png") == 1
    assert case in text
    assert "pseudo_start 0.25 0.3" in text
    assert "default-src 'none'" in page


def test_model_folder_shows_every_fold(fold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(fold, fold.with_name("fold_1"))
    (fold.with_name("fold_2")).mkdir()
    result = CliRunner().invoke(app, ["report", str(fold.parent), "-o", str(fold.parents[1] / "both.html")])
    assert result.exit_code == 0, result.output
    assert "both.html" in result.output
    page = (fold.parents[1] / "both.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Fold 0", "Fold 1"]
    assert not (fold.parent / "report.html").exists()


def test_baseline_is_shown_without_g_and_d(trained_fold: Path) -> None:
    fold = tiny_dataset.train(trained_fold.parents[3], SupervisedBaselineTrainer, num_epochs=1)
    text = text_of(write_training_report(fold))
    assert "SupervisedBaselineTrainer" in text
    assert "Finished" in text
    # What the trainer itself switches off is no difference from the preset.
    settings = text[text.index("Settings") : text.index("All settings")]
    assert "num_epochs" in settings
    assert "weight_mil" not in settings


def test_training_on_one_mask_warns(fold: Path) -> None:
    log = next(fold.glob("training_log_*.txt"))
    log.write_text(
        f"{log.read_text(encoding='utf-8')}\n2026-01-01: WARNING: a: THE SAME MASK. The <Dice> says nothing. \n"
    )
    assert read_log(fold).warnings == ("a: THE SAME MASK. The <Dice> says nothing.",)
    assert "The <Dice> says nothing." in text_of(write_training_report(fold))


def test_settings_are_those_of_the_last_start(fold: Path) -> None:
    log = next(fold.glob("training_log_*.txt"))
    text = log.read_text(encoding="utf-8")
    assert read_log(fold).settings == GASNetSettings.from_dict(read_log(fold).settings).to_dict()
    log.with_name("training_log_2100_1_1_00_00_00.txt").write_text(text.replace("'seed': 1,", "'seed': 7,"))
    log.with_name("training_log_2100_1_2_00_00_00.txt").write_text("--val writes a log, too")
    assert read_log(fold).settings["seed"] == 7


@pytest.mark.parametrize(
    ("epochs", "left", "age", "level", "words"),
    [
        (3, ("checkpoint_final.pth", "validation/summary.json"), 0, "good", "3 epochs in 3 min, and validated."),
        (3, ("checkpoint_final.pth",), 0, "bad", "not validated.*--val"),
        (2, (), 60, "unknown", "Running: 2 of 3 epochs done, about 1 min left."),
        (2, ("checkpoint_final.pth",), 60, "unknown", "Running.*of an earlier training"),
        (2, ("checkpoint_latest.pth", "checkpoint_best.pth"), 3600, "bad", "Interrupted: 2 of 3.*--c.*latest"),
        (2, ("checkpoint_best.pth",), 3600, "bad", "go on with --c, which starts from checkpoint_best"),
        (0, (), 3600, "bad", "Interrupted: 0 of 3.*start again"),
        (0, (), 60, "unknown", "Running: 0 of 3 epochs done."),
    ],
)
def test_state_of_a_training(
    epochs: int, left: tuple[str, ...], age: float, level: str, words: str, tmp_path: Path
) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "training_log_x.txt").touch()
    now = time.time()
    os.utime(tmp_path / "training_log_x.txt", (now - age, now - age))
    state = training_state(tmp_path, pd.DataFrame({"epoch": range(epochs), "seconds": 60.0}), 3, now)
    assert state.level == level
    assert re.search(words, state.text), state.text


def test_slow_training_is_not_taken_for_interrupted(tmp_path: Path) -> None:
    (tmp_path / "training_log_x.txt").touch()
    slow = pd.DataFrame({"epoch": [0], "seconds": [3600.0]})
    assert training_state(tmp_path, slow, 3, time.time() + 2 * 3600).level == "unknown"
    assert training_state(tmp_path, slow, 3, time.time() + 4 * 3600).level == "bad"


def test_training_that_runs_is_shown_as_far_as_it_got(fold: Path) -> None:
    for left in ("checkpoint_final.pth", "validation/summary.json"):
        (fold / left).unlink()
    rewrite_curves(fold, TrainingCurves(fold).read().head(1))
    (fold / "gasnet_gallery" / "epoch_0000.png").write_bytes(b"half of a picture")
    text = text_of(write_training_report(fold))
    assert "Running: 1 of 2 epochs done" in text
    assert "Not validated yet." in text
    # Galleries of epochs that are not done are left from an earlier training.
    assert "data-epoch" not in (fold / "report.html").read_text(encoding="utf-8")


def test_training_in_its_first_epoch_has_no_curves_yet(fold: Path) -> None:
    (fold / "gasnet_progress.csv").unlink()
    text = text_of(write_training_report(fold))
    assert "No epoch is done yet." in text


def test_cases_stand_best_to_worst(fold: Path) -> None:
    summary = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    (only,) = summary["metric_per_case"]

    def entry(name: str, dice: float, **counts: int) -> dict[str, Any]:
        metrics = {"1": {**only["metrics"]["1"], "Dice": dice, **counts}}
        return {**only, "metrics": metrics, "prediction_file": f"/elsewhere/{name}.nii.gz"}

    summary["metric_per_case"] = [
        entry("low", 0.2),
        entry("well", math.nan, n_ref=0, n_pred=0, FP=0),
        entry("ill", 0.0, n_ref=0, n_pred=9, FP=9),
        entry("high", 0.9),
    ]
    (fold / "validation" / "summary.json").write_text(json.dumps(summary))
    cases = validation_cases(fold, ".nii.gz")
    assert cases["case"].tolist() == ["high", "low", "well", "ill"]
    np.testing.assert_array_equal(cases["dice"], [0.9, 0.2, math.nan, math.nan])
    page = text_of(write_training_report(fold))
    assert re.search(r"high 90\.0 .* low 20\.0 .* well no lesion .* ill no lesion 0 9 9", page)
    assert "4 cases have no picture" in page


def test_pictures_need_the_cts(fold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    text = text_of(write_training_report(fold))
    assert "nnUNet_raw is not set" in text


def test_of_many_galleries_a_few_are_shown_with_the_last(fold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_report, "MOST_GALLERIES", 1)
    page = write_training_report(fold).read_text(encoding="utf-8")
    assert re.findall(r'data-epoch="(\d+)"', page) == ["1"]


def test_preset_is_the_most_similar_one(fold: Path) -> None:
    presets = [load_preset(name) for name in preset_names()]
    trained = load_preset("small").settings.replace(seed=3, volumes_per_step=2, window=((0.0, 1.0),), patches="volume")
    preset, differences = closest_preset(trained, presets, "GASNetTrainer")
    assert preset.name == "small"
    assert differences == ["seed: None -> 3"]
    assert "Preset paper" in text_of(write_training_report(fold, preset="paper"))
    with pytest.raises(UserError, match="no preset 'papre'"):
        write_training_report(fold, preset="papre")


def test_other_folders_are_refused(fold: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_training_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no plans\.json and dataset\.json"):
        write_training_report(tmp_path / "empty")
    vanilla = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    shutil.copytree(fold.parent, vanilla)
    (vanilla / "fold_0" / "gasnet_progress.csv").unlink()
    for log in (vanilla / "fold_0").glob("training_log_*.txt"):
        log.write_text("Epoch 0")
    for folder in (vanilla, vanilla / "fold_0"):
        with pytest.raises(UserError, match="trained by nnUNetTrainer"):
            write_training_report(folder)
    assert not list(tmp_path.rglob("report.html"))
    for place in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(UserError, match="No page can be written"):
            write_training_report(fold, place)
