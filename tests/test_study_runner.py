"""Studies that run nnU-Net's own commands on a few tiny patients."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import SimpleITK as sitk
import tiny_dataset
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from scipy.ndimage import binary_erosion
from tiny_study import ARMS, DATASET, SHORT, listing, opened, run_of, write_study

import gasnet_nnunet.study.workspace as workspace_module
from gasnet_nnunet.cli.study import study as command
from gasnet_nnunet.cohort import read_cohort
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.raw_dataset import NNUNET_FOLDERS
from gasnet_nnunet.splits import read_fold
from gasnet_nnunet.study.definition import Study
from gasnet_nnunet.study.file import load_study
from gasnet_nnunet.study.prepare import prepare
from gasnet_nnunet.study.progress import Estimate
from gasnet_nnunet.study.pseudo_labels import label_dataset, preprocess_command
from gasnet_nnunet.study.report import _differences, _figures, _results, _runs, write_report
from gasnet_nnunet.study.runner import CutOffError, Runner, ended_by_signals, find_script
from gasnet_nnunet.study.steps import WaitingError, epoch_seconds, record_of, state_of, steps_of
from gasnet_nnunet.study.workspace import Workspace, link, open_workspace


@pytest.fixture(scope="module")
def crashed(study_folders: Path) -> tuple[Path, set[str], set[str]]:
    """The folder of a study after its command, one arm of which crashes; the user's files before and after."""
    before = listing(study_folders)
    with pytest.raises(UserError, match="2 of 3 runs are not done"):
        command(write_study(study_folders / "files"), out=study_folders / "out", device="cpu")
    after = listing(study_folders)
    return study_folders / "out", before, {name for name in after if not name.startswith(("out/", "files/"))}


def test_an_arm_that_crashes_leaves_the_others(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    runs = pd.read_csv(out / "runs.csv").set_index("arm")
    assert dict(runs["state"]) == {"supervised": "done", "broken": "failed", "patient": "waiting"}
    assert "window" in runs.loc["broken", "reason"]
    assert "broken/masks1_repeat0_fold0" in runs.loc["patient", "reason"]
    assert (runs.loc["supervised", "epochs"], runs.loc["supervised", "updates"]) == (1, 1)
    assert runs.loc["supervised", "training_seconds"] > 0
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "| Supervised | 1 | 1 of 1 |" in summary
    assert "bounds for 2 channels" in summary
    assert "Time so far: training" in summary


def test_every_test_case_is_scored(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    deal = run_of(workspace, "supervised").deal
    results = pd.read_csv(out / "results.csv")
    assert sorted(results["case"]) == sorted(deal.test)
    healthy = results[results["lesion_ml"] == 0]
    assert len(healthy)
    assert healthy["false_positive_lung"].notna().all()
    assert results.loc[results["lesion_ml"] > 0, "dice"].notna().all()


def test_the_users_folders_stay_as_they_were(crashed: tuple[Path, set[str], set[str]]) -> None:
    _, before, after = crashed
    caches = {f"preprocessed/{DATASET}/{name}" for name in ("gasnet_cohort.json",)}
    assert after - before <= caches
    assert before <= after


def test_what_is_done_is_skipped(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    before = record_of(opened(out), run_of(opened(out), "supervised")).content
    command(str(out / "study.yaml"), out=out, device="cpu", only=["supervised"])
    content = record_of(opened(out), run_of(opened(out), "supervised")).content
    assert content["steps"] == before["steps"]


def test_done_means_with_these_settings_and_whole(crashed: tuple[Path, set[str], set[str]], tmp_path: Path) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    run = run_of(workspace, "supervised")
    assert state_of(workspace, run) == "done"
    prediction = steps_of(workspace, run, "cpu")[-1].made[0]
    moved = prediction.rename(tmp_path / prediction.name)
    try:
        assert state_of(workspace, run) != "done"
    finally:
        moved.rename(prediction)
    longer = workspace.study.model_copy(update={"settings": {"num_epochs": 2}})
    assert state_of(Workspace(longer, out, workspace.dataset), run) == "changed"
    # What the arm's trainer does not use changes nothing.
    unused = workspace.study.model_copy(update={"settings": {"discriminator_steps": 3, "gallery_every_epochs": 1}})
    assert state_of(Workspace(unused, out, workspace.dataset), run) == "done"
    # Test cases decide about the prediction alone.
    changed = workspace.study.model_copy(update={"mirroring": True})
    train, predict = steps_of(Workspace(changed, out, workspace.dataset), run, "cpu")
    noted = record_of(workspace, run)
    assert noted.step("train")["fingerprint"] == train.fingerprint
    assert noted.step("predict")["fingerprint"] != predict.fingerprint


def test_a_corrected_mask_changes_the_runs_that_learn_from_it(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    run = run_of(workspace, "supervised")
    tested = next(case for case in run.deal.test if case.startswith("labelled"))
    for case, state in ((tested, "done"), (run.deal.train[0], "changed")):
        path = workspace.base / "gt_segmentations" / f"{case}.nii.gz"
        before = path.read_bytes()
        try:
            tiny_dataset.write_image(binary_erosion(tiny_dataset.patient(case).lesion).astype("uint8"), path)
            assert state_of(Workspace(workspace.study, out, workspace.dataset), run) == state
        finally:
            path.write_bytes(before)


def test_deals_of_the_same_cases_have_folds_of_their_own(crashed: tuple[Path, set[str], set[str]]) -> None:
    # Where an arm learns from few volumes, what is tested may be all that tells two deals apart.
    out, _, _ = crashed
    workspace = opened(out)
    (deal,) = workspace.deals
    workspace.deals.append(dataclasses.replace(deal, fold=1, test=deal.test[:1]))
    workspace.write()
    try:
        assert len({run.number for run in workspace.runs if run.arm == "supervised"}) == 2
    finally:
        opened(out).write()


def test_folds_keep_their_numbers(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    content = json.loads((out / "folds.json").read_text(encoding="utf-8"))
    workspace = opened(out)
    number = run_of(workspace, "supervised").number
    more = workspace.study.model_copy(update={"masks": (1, 2), "repeats": 2, "seed": 12345})
    again = Workspace(more, out, workspace.dataset)
    again.write()
    try:
        assert (
            json.loads((out / "folds.json").read_text(encoding="utf-8"))["folds"][: len(content["folds"])]
            == content["folds"]
        )
        same = next(run for run in again.runs if run.deal.train == run_of(workspace, "supervised").deal.train)
        assert same.number == number
    finally:
        workspace.write()


def test_arms_that_wait_know_what_for(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    with pytest.raises(WaitingError, match="broken"):
        steps_of(workspace, run_of(workspace, "patient"), "cpu")


def test_commands_are_printed_and_not_run(
    crashed: tuple[Path, set[str], set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = crashed
    command(str(out / "study.yaml"), out=out, device="cpu", commands=True)
    said = capsys.readouterr().out
    assert f"# nnUNetv2_train {DATASET} 3d_fullres 0 -tr SupervisedBaselineTrainer -p supervised -device cpu" in said
    assert "--only broken/masks1_repeat0_fold0" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="what is printed is for a POSIX shell")
def test_printed_commands_are_a_script_that_makes_the_runs(
    study_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, script = tmp_path / "out", tmp_path / "study.sh"
    name = write_study(tmp_path / "files", arms={arm: ARMS[arm] for arm in ("broken", "supervised")})
    command(name, out=out, device="cpu", commands=True)
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    assert not (out / "runs").exists()
    # A new shell, which knows no more than the script says.
    environment = {name: value for name, value in os.environ.items() if name not in NNUNET_FOLDERS}
    environment["PATH"] = os.pathsep.join([str(Path(find_script("gasnet-nnunet")).parent), environment["PATH"]])
    ended = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # A run that fails does not end the script.
    assert list(pd.read_csv(out / "runs.csv")["state"]) == ["failed", "done"]


def test_nothing_is_made_to_print_or_report(study_folders: Path, tmp_path: Path) -> None:
    name = write_study(tmp_path / "files", plans="Mine", plan={"preset": "small", "patch": [16, 48, 48]})
    with pytest.raises(UserError, match=r"gasnet-nnunet plan -d 501 --name Mine --preset small --patch 16 48 48"):
        command(name, out=tmp_path / "out", device="cpu", commands=True)
    assert not list((study_folders / "preprocessed" / DATASET).glob("Mine*"))
    with pytest.raises(UserError, match="holds no study that could be reported on"):
        command(name, out=tmp_path / "nowhere", report=True)
    assert not (tmp_path / "nowhere").exists()


def test_no_phantom_patients_are_drawn_to_print(
    study_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("raw", "preprocessed", "results"):
        # The study sets them to folders of its own.
        monkeypatch.setenv(f"nnUNet_{name}", str(study_folders / name))
    phantoms = load_study("phantom").dump()
    (tmp_path / "phantom.yaml").write_text(phantoms, encoding="utf-8")
    with pytest.raises(UserError, match="phantom patients of this study have not been drawn"):
        prepare(load_study(str(tmp_path / "phantom.yaml")), tmp_path / "drawn", Console(quiet=True), make=False)
    assert not (tmp_path / "drawn" / "phantoms").exists()


def test_a_study_file_is_kept(study_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = Path(write_study(out))
    text = "# my own words\n" + path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    command(str(path), out=out, commands=True)
    assert path.read_text(encoding="utf-8") == text
    with pytest.raises(UserError, match="999"):
        command("one-mask", dataset="999", out=out, commands=True)
    assert path.read_text(encoding="utf-8") == text
    command(str(path), out=out, commands=True, set_=["num_epochs=2"])
    assert "num_epochs: 2" in path.read_text(encoding="utf-8")
    (kept,) = (out / "superseded").iterdir()
    assert kept.read_text(encoding="utf-8") == text
    assert kept.name in capsys.readouterr().out


def test_runs_of_other_settings_are_made_again_only_when_asked(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    text = (out / "study.yaml").read_text(encoding="utf-8")
    before = record_of(opened(out), run_of(opened(out), "supervised")).content
    with pytest.raises(UserError, match=r"1 of 1 runs were made with other settings.* supervised/.* --redo"):
        command(str(out / "study.yaml"), out=out, device="cpu", only=["supervised"], set_=["num_epochs=2"])
    assert (out / "study.yaml").read_text(encoding="utf-8") == text
    workspace = opened(out)
    assert record_of(workspace, run_of(workspace, "supervised")).content == before
    assert state_of(workspace, run_of(workspace, "supervised")) == "done"


def test_runs_are_made_again_when_asked(
    crashed: tuple[Path, set[str], set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(crashed[0], tmp_path / "out", symlinks=True))
    arguments: dict[str, Any] = {"out": out, "device": "cpu", "only": ["supervised"], "set_": ["learning_rate_s=0.005"]}
    command(str(out / "study.yaml"), **arguments, commands=True)
    assert "--only supervised/masks1_repeat0_fold0 --redo" in capsys.readouterr().out
    command(str(out / "study.yaml"), **arguments, redo=True)
    kept = {path.name.split("_", 1)[1] for path in (out / "superseded").iterdir()}
    assert "supervised_masks1_repeat0_fold0_train_fold_0" in kept
    workspace = opened(out)
    assert state_of(workspace, run_of(workspace, "supervised")) == "done"


def test_an_interrupted_training_of_other_settings_counts_as_changed(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    run = run_of(workspace, "supervised")
    record = record_of(workspace, run)
    content = record.path.read_bytes()
    try:
        record.note("train", done=False)
        record.note(state="unfinished")
        longer = workspace.study.model_copy(update={"settings": {"num_epochs": 2}})
        assert state_of(workspace, run) == "unfinished"
        assert state_of(Workspace(longer, out, workspace.dataset), run) == "changed"
    finally:
        record.path.write_bytes(content)


@pytest.mark.parametrize("change", [{"test": 2}, {"seed": 7}, {"volumes": ("healthy_0",)}])
def test_an_interrupted_training_of_other_cases_counts_as_changed(
    study_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Mapping[str, Any]
) -> None:
    name = write_study(tmp_path / "out", arms={"supervised": ARMS["supervised"]})
    workspace = open_workspace(load_study(name), tmp_path / "out")
    (run,) = workspace.runs
    (folder,) = (step.model for step in steps_of(workspace, run, "cpu") if step.model is not None)

    def cut_off(*_: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "checkpoint_latest.pth").touch()
        raise CutOffError("somebody ended it")

    monkeypatch.setattr(Runner, "call", cut_off)
    assert Runner(workspace, "cpu", started=time.monotonic()).run(run) == "unfinished"
    other = open_workspace(workspace.study.model_copy(update=change), workspace.out)
    assert other.runs[0].number != run.number
    assert state_of(other, other.runs[0]) == "changed"
    assert state_of(open_workspace(workspace.study, workspace.out), run) == "unfinished"


def test_runs_csv_counts_the_volumes_that_are_learnt_from(study_folders: Path, tmp_path: Path) -> None:
    arms = {"all": {}, "healthy": {"volumes": ["healthy_*"]}, "one": {"volumes": ["healthy_0", "diseased_*"]}}
    workspace = open_workspace(load_study(write_study(tmp_path / "out", arms=arms)), tmp_path / "out")
    runs = _runs(workspace).set_index("arm")
    deal = workspace.runs[0].deal
    diseased = [case for case in deal.diseased if case.startswith("diseased_")]
    assert len(diseased) < len(deal.diseased)
    assert list(runs["diseased"]) == [len(deal.diseased), 0, len(diseased)]
    assert list(runs["healthy"]) == [len(deal.healthy), len(deal.healthy), 1]


def test_cases_are_those_of_the_folders_that_are_set_now(tmp_path: Path) -> None:
    for place in ("before", "now"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "case").write_text(place)
        link(tmp_path / place, tmp_path / "folder")
        link(tmp_path / place / "case", tmp_path / "file")
    assert (tmp_path / "folder/case").read_text() == (tmp_path / "file").read_text() == "now"
    (tmp_path / "own").write_text("mine")
    link(tmp_path / "now/case", tmp_path / "own")
    assert (tmp_path / "own").read_text() == "mine"
    shutil.rmtree(tmp_path / "now")
    link(tmp_path / "before", tmp_path / "folder")
    assert (tmp_path / "folder/case").read_text() == "before", "of a link that led nowhere"


def test_lungs_of_a_case_are_found_once_for_all_choices(
    study_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    found = workspace_module.run_jobs

    def count(function: Any, jobs: Sequence[Any], **options: Any) -> Any:
        asked.extend(job[0].name for job in jobs)
        return found(function, jobs, **options)

    monkeypatch.setattr(workspace_module, "run_jobs", count)
    name = write_study(tmp_path / "out", arms={"supervised": {}}, test="rest", repeats=3, masks=[1])
    workspace = open_workspace(load_study(name), tmp_path / "out")
    tests = [workspace.test_set(deal) for deal in workspace.deals]
    cases = {case for test in tests for case in test.cases}
    assert len(tests) > 1
    assert sum(len(test.cases) for test in tests) > len(cases)
    assert sorted(asked) == sorted(f"{case}_0000.nii.gz" for case in cases)
    for test in tests:
        assert test.lungs is not None
        assert all((test.lungs / f"{case}.nii.gz").stat().st_size for case in test.cases)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    again = open_workspace(load_study(str(moved / "study.yaml")), moved)
    for deal in again.deals:
        test = again.test_set(deal)
        assert test.lungs is not None
        assert all((test.lungs / f"{case}.nii.gz").is_file() for case in test.cases)
    assert len(asked) == len(cases), "none of them twice"


def test_progress_of_a_trainer_that_takes_a_length_of_its_own(study_folders: Path, tmp_path: Path) -> None:
    name = write_study(tmp_path / "out", arms={"own": {"trainer": "nnUNetTrainer"}})
    workspace = open_workspace(load_study(name), tmp_path / "out")
    (run,) = workspace.runs
    estimate = Estimate(workspace, [run])
    estimate.start(run)
    for line in ("Epoch 90 ", "Epoch time: 60.0 s"):
        estimate.hear(f"2026-01-01 10:00:00.000000: {line}")
    assert estimate.doing.endswith(", epoch 91")
    assert estimate.text() == "time left not known yet"
    record_of(workspace, run).note(state="done", epochs=1000, updates=250000, seconds=60000.0)
    assert estimate.doing.endswith("epoch 91 of 1000")
    assert estimate.seconds() == pytest.approx(910 * 60, abs=1)


def test_time_left_of_a_study_that_was_made_longer(study_folders: Path, tmp_path: Path) -> None:
    name = write_study(tmp_path / "out", arms={"gasnet": {}}, settings={"num_epochs": 1})
    workspace = open_workspace(load_study(name), tmp_path / "out")
    record_of(workspace, workspace.runs[0]).note(state="done", seconds=60.0, updates=1)
    longer = open_workspace(workspace.study.model_copy(update={"settings": {"num_epochs": 100}}), workspace.out)
    assert Estimate(longer, longer.runs).seconds() == pytest.approx(6000)


def test_predictions_that_cannot_be_scored_leave_the_others(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    run = run_of(workspace, "supervised")
    prediction = steps_of(workspace, run, "cpu")[-1].made[0]
    content, scores = prediction.read_bytes(), record_of(workspace, run).path.with_suffix(".csv")
    try:
        prediction.write_bytes(content[: len(content) // 2])
        scores.unlink()
        report = write_report(opened(out))
        assert report.failed == [run.name]
        assert any(prediction.name in remark for remark in report.remarks)
    finally:
        prediction.write_bytes(content)
    assert write_report(opened(out)).failed == []
    assert scores.is_file()


def test_a_corrected_mask_changes_the_scores(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    run = run_of(workspace, "supervised")
    case = next(case for case in run.deal.test if workspace.cohort.cases[case].lesion_voxels)
    mask = workspace.base / "gt_segmentations" / f"{case}.nii.gz"

    def lesion_ml() -> float:
        write_report(opened(out))
        results = pd.read_csv(out / "results.csv", dtype={"case": str}).set_index("case")
        return float(results.loc[case, "lesion_ml"])

    before, content = lesion_ml(), mask.read_bytes()
    image = sitk.ReadImage(mask)
    array = sitk.GetArrayFromImage(image)
    array[: array.nonzero()[0].mean().astype(int)] = 0
    smaller = sitk.GetImageFromArray(array)
    smaller.CopyInformation(image)
    try:
        sitk.WriteImage(smaller, mask)
        assert 0 < lesion_ml() < before
    finally:
        mask.write_bytes(content)
    assert lesion_ml() == before


def test_lungs_of_an_earlier_version_are_found_again(
    crashed: tuple[Path, set[str], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = crashed
    deal = run_of(opened(out), "supervised").deal
    before = opened(out).test_set(deal)
    assert before.lungs is not None
    mask = before.lungs / f"{deal.test[0]}.nii.gz"
    content = mask.read_bytes()
    mask.write_bytes(b"lungs of an earlier version")
    with monkeypatch.context() as patch:
        patch.setattr("gasnet_nnunet.study.workspace.VERSION", -1)
        after = opened(out).test_set(deal)
    assert mask.read_bytes() == content
    assert after.stamp != before.stamp, "scored anew"
    assert after.scans == before.scans, "but not predicted"
    assert opened(out).test_set(deal) == before


def test_a_fault_in_a_run_leaves_the_others(
    crashed: tuple[Path, set[str], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    run = run_of(workspace, "broken")
    before = record_of(workspace, run).path.read_bytes()

    def fail(*_: Any) -> None:
        raise RuntimeError("sitk::ERROR: a broken file")

    monkeypatch.setattr("gasnet_nnunet.study.runner.is_done", fail)
    try:
        assert Runner(workspace, "cpu", started=time.monotonic()).run(run) == "failed"
        reason = record_of(workspace, run).content["reason"]
        assert reason.startswith("RuntimeError: sitk::ERROR: a broken file; where: ")
        assert "Traceback" in Path(reason.split("where: ")[1]).read_text(encoding="utf-8")
    finally:
        record_of(workspace, run).path.write_bytes(before)


def test_all_time_is_noted_once(crashed: tuple[Path, set[str], set[str]], tmp_path: Path) -> None:
    workspace = opened(crashed[0])
    workspace.out = tmp_path
    workspace.preparation_seconds = 30.0
    runner = Runner(workspace, "cpu", started=time.monotonic() - 100)
    runner.clock.add("train", 40)
    runner.clock.add("predict", 10)
    for _ in range(2):
        runner.note_time()
    first, second = json.loads((tmp_path / "time.json").read_text(encoding="utf-8"))["sessions"]
    assert (first["training"], first["prediction"], first["data and plans"]) == (40, 10, 30)
    assert sum(first.values()) == pytest.approx(100, abs=1)
    assert sum(second.values()) == pytest.approx(0, abs=1)
    # The command, too: what it prepares is not taken from what the study does itself.
    (session,) = json.loads((crashed[0] / "time.json").read_text(encoding="utf-8"))["sessions"][:1]
    assert session["training"] > 0
    assert all(seconds >= 0 for seconds in session.values())


def test_time_left_of_a_training_that_goes_on(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    study = opened(out).study
    longer = study.model_copy(update={"settings": {"num_epochs": 100}})
    workspace = Workspace(longer, out, opened(out).dataset)
    workspace.write()
    run = run_of(workspace, "broken")
    estimate = Estimate(workspace, [run])
    estimate.start(run)
    for line in ("Epoch 90 ", "Epoch time: 60.0 s", "Epoch 91 "):
        estimate.hear(f"2026-01-01 10:00:00.000000: {line}")
    assert estimate.seconds() == pytest.approx(600, abs=1)
    assert estimate.doing.endswith("epoch 91 of 100")
    opened(out)


def test_time_left_is_told_by_what_runs_took(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    broken = run_of(workspace, "broken")
    seconds = record_of(workspace, run_of(workspace, "supervised")).content["seconds"]
    assert Estimate(workspace, [broken]).seconds() == pytest.approx(seconds)
    estimate = Estimate(workspace, [broken])
    estimate.start(broken)
    estimate.hear("2026-01-01 10:00:00: Epoch time: 100.0 s")
    assert estimate.seconds() == pytest.approx(100, abs=1)


def test_a_misspelt_run_names_the_close_one(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    with pytest.raises(UserError, match="Did you mean 'supervised'"):
        command(str(out / "study.yaml"), out=out, only=["supervise"], device="cpu")


def test_refuses_a_folder_that_holds_something_else(study_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(UserError, match="holds no earlier study"):
        command(write_study(study_folders / "files"), out=tmp_path, device="cpu")


def test_refuses_plans_that_are_not_there(study_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gasnet-nnunet plan -d 501 --name Other"):
        command(write_study(study_folders / "files", plans="Other"), out=tmp_path / "out", device="cpu")


def test_refuses_preprocessed_data_that_lack_a_case(study_folders: Path, tmp_path: Path) -> None:
    data = study_folders / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres"
    (data / "healthy_0.pkl").rename(tmp_path / "healthy_0.pkl")
    try:
        with pytest.raises(
            UserError, match=r"lacks 1 of 8 preprocessed cases: healthy_0\. .*nnUNetv2_preprocess -d 501"
        ):
            command(write_study(study_folders / "files"), out=tmp_path / "out", device="cpu")
    finally:
        (tmp_path / "healthy_0.pkl").rename(data / "healthy_0.pkl")


def test_planning_that_was_interrupted_is_done_again(
    study_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[bool] = []
    interrupted = True

    def plan(words: Sequence[str], *_: Any) -> None:
        planned.append("--preset" in words)
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr("gasnet_nnunet.study.prepare._run", plan)
    loaded = load_study(write_study(tmp_path / "files", plans="Mine", plan={"preset": "small"}))
    plans = study_folders / "preprocessed" / DATASET / "Mine.json"
    with pytest.raises(KeyboardInterrupt):
        prepare(loaded, tmp_path / "out", Console(quiet=True))
    plans.write_text((plans.parent / "GASNetPlans.json").read_text(encoding="utf-8"))
    interrupted = False
    try:
        for _ in range(2):
            prepare(loaded, tmp_path / "out", Console(quiet=True))
    finally:
        plans.unlink()
    assert planned == [True, True]


def test_arms_are_compared_with_the_reference_whatever_it_learnt_from(
    crashed: tuple[Path, set[str], set[str]],
) -> None:
    out, _, _ = crashed
    arms = {"supervised": {**ARMS["supervised"], "masks": [2]}, "gasnet": {"title": "GASNet", "masks": [1]}}
    changed = load_study(str(out / "study.yaml")).model_dump() | {"arms": arms, "masks": [1, 2], "reference": "gasnet"}
    workspace = Workspace(Study.model_validate(changed), out, opened(out).dataset)
    rows = [("gasnet", 1, "a", 0.8), ("gasnet", 1, "b", 0.6), ("supervised", 2, "a", 0.6), ("supervised", 2, "b", 0.5)]
    results = pd.DataFrame(rows, columns=["arm", "masks", "case", "dice"]).assign(
        lesion_ml=1.0, ignored_ml=0.0, sensitivity=0.5, specificity=0.5, false_positive_lung=float("nan")
    )
    runs = pd.DataFrame({"arm": ["gasnet", "supervised"], "masks": [1, 2], "state": "done"})
    (text,) = _differences(workspace, runs, results)
    assert "## 2 masks against GASNet with 1 mask" in text
    assert "| Supervised | Dice % | 2 | -15.0 |" in text


def test_overlays_are_of_the_cases_that_their_runs_were_tested_on(
    crashed: tuple[Path, set[str], set[str]],
) -> None:
    out, _, _ = crashed
    workspace = opened(out)
    runs = _runs(workspace)
    runs = runs[runs["arm"] == "supervised"]
    results = _results(workspace, _runs(workspace))
    # As with `test: rest`: another choice of masks tests a case that this one learnt from.
    learnt = run_of(workspace, "supervised").deal.train[0]
    others = [results.iloc[:1].assign(case=learnt, lesion_ml=1e6, **{name: 1}) for name in ("masks", "repeat", "fold")]
    others[0]["masks"] = 2
    overlays = out / "overlays.png"
    overlays.unlink(missing_ok=True)
    assert overlays in _figures(workspace, runs, pd.concat([*others, results]))
    assert overlays.is_file()
    overlays.unlink()
    assert overlays not in _figures(workspace, runs.assign(repeat=7), results)


def test_a_fault_in_a_figure_costs_no_table(
    crashed: tuple[Path, set[str], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = crashed
    tables = [out / name for name in ("summary.md", "results.csv", "runs.csv")]
    for table in tables:
        table.unlink()
    monkeypatch.setattr("gasnet_nnunet.study.report._figures", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(opened(out))
    assert all(table.is_file() for table in tables)


def test_time_left_of_an_arm_of_equal_time_is_that_of_the_other(crashed: tuple[Path, set[str], set[str]]) -> None:
    out, _, _ = crashed
    arms = {**ARMS, "patient": {"like": "broken", "equal_time_with": "supervised"}}
    changed = load_study(str(out / "study.yaml")).model_dump() | {"arms": arms}
    workspace = Workspace(Study.model_validate(changed), out, opened(out).dataset)
    workspace.write()
    patient = run_of(workspace, "patient")
    seconds = record_of(workspace, run_of(workspace, "supervised")).content["seconds"]
    assert Estimate(workspace, [patient]).seconds() == pytest.approx(seconds)


def test_refuses_masks_that_do_not_match_before_any_training(study_folders: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    small = tiny_dataset.patient("diseased_0").lesion[:-1]
    tiny_dataset.write_image(small, truth / "diseased_0.nii.gz")
    name = write_study(tmp_path / "files", test=["diseased_0"], truth=str(truth))
    with pytest.raises(UserError, match=r"diseased_0\.nii\.gz does not lie on the grid of its scan: size"):
        command(name, out=tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out").rglob("*.pth"))
    tiny_dataset.write_image(tiny_dataset.patient("diseased_0").lesion * 7, truth / "diseased_0.nii.gz")
    with pytest.raises(UserError, match=r"holds \[7\]"):
        command(name, out=tmp_path / "out", device="cpu")


def test_predictions_become_masks_but_for_empty_ones(study_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arms = {"rounds": {**ARMS["supervised"], "settings": {"num_epochs": 5}, "pseudo_labels": {"rounds": 2}}}
    out.mkdir()
    workspace = open_workspace(load_study(write_study(tmp_path / "files", arms=arms)), out)
    (run,) = workspace.runs
    assert [(step.name, step.epochs) for step in steps_of(workspace, run, "cpu") if step.kind == "train"] == [
        ("train", 1),
        ("round1_train", 1),
        ("round2_train", 3),
    ]
    folder = out / "pseudo_labels" / "round1"
    empty, *others = run.deal.diseased
    for case in run.deal.diseased:
        tiny_dataset.write_image(
            tiny_dataset.patient(case).lesion * (case != empty), folder / "predicted" / f"{case}.nii.gz"
        )
    command_line = preprocess_command(workspace, "rounds-round1", 1)

    def preprocess(environment: Mapping[str, str]) -> None:
        program = [find_script(command_line[0]), *command_line[1:]]
        subprocess.run(program, env={**os.environ, **environment}, check=True, capture_output=True)

    label_dataset(workspace, run, folder, "rounds-round1", preprocess)
    made = folder / "nnUNet_preprocessed" / DATASET
    cohort = read_cohort(made / "gt_segmentations", json.loads((made / "dataset.json").read_text(encoding="utf-8")))
    fold = read_fold(made / "splits_final.json", run.number, cohort)
    assert set(fold.train) == {*run.deal.train, *others}
    assert fold.diseased == (empty,)
    assert set(fold.healthy) == set(run.deal.healthy)
    data = made / "nnUNetPlans_3d_fullres"
    assert {path.stem for path in data.glob("*.pkl")} == set(workspace.cohort.cases)
    assert [path.stem for path in sorted(data.glob("*.pkl")) if not path.is_symlink()] == sorted(others)


def test_an_epoch_that_was_run_again_counts_once(tmp_path: Path) -> None:
    lines = ["{t}: Epoch 0", "{t}: Epoch time: 10.0 s", "{t}: Epoch 1", "{t}: Epoch time: 99.0 s"]
    for name, part in (
        ("training_log_1.txt", lines),
        ("training_log_2.txt", ["{t}: Epoch 1", "{t}: Epoch time: 5.0 s"]),
    ):
        (tmp_path / name).write_text("\n".join(part).format(t="2026-01-01 10:00:00.1") + "\n")
        os.utime(tmp_path / name, (int(name[-5]), int(name[-5])))
    assert epoch_seconds(tmp_path) == {0: 10.0, 1: 5.0}


def test_nnunets_own_trainer_takes_its_length_from_the_plans(
    study_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gasnet_nnunet.trainers import VanillaTrainer

    plans = json.loads((study_folders / "preprocessed" / DATASET / "GASNetPlans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["gasnet"].update(num_epochs=7, iterations_per_epoch=3)
    plans["continue_training"] = False
    trainer = VanillaTrainer(plans, "3d_fullres", 0, tiny_dataset.DATASET_JSON, torch.device("cpu"))
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.save_every) == (7, 3, 1)
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()

    def cut_off(_: object, target: str) -> None:
        Path(target).write_bytes(before[:1000])
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(SystemExit, match="no space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before


@pytest.mark.slow
def test_pseudo_labels_equal_time_and_a_model_to_go_on_from(study_folders: Path) -> None:
    arms = {
        "rounds": {
            "trainer": "SupervisedBaselineTrainer",
            "settings": {"num_epochs": 3, "iterations_per_epoch": 3},
            "pseudo_labels": {"rounds": 1},
        },
        "vanilla": {"trainer": "VanillaTrainer"},
        "gasnet": {"masks": [1]},
        "finetuned": {"init_from": "gasnet", "volumes": ["healthy_*"]},
        "longer": {"like": "vanilla", "equal_time_with": "rounds"},
    }
    out = study_folders / "recipes"
    command(write_study(study_folders / "files2", arms=arms), out=out, device="cpu")
    workspace = opened(out)
    assert all(state_of(workspace, run) == "done" for run in workspace.runs)
    record = record_of(workspace, run_of(workspace, "rounds")).content
    assert list(record["steps"]) == ["train", "round1_predict", "round1_label", "round1_train", "predict"]
    assert record["epochs"] == 3
    longer = record_of(workspace, run_of(workspace, "longer")).content
    assert longer["epochs"] > 1
    # What the second training learnt from: the mask, and the volumes in which something was found.
    number = run_of(workspace, "rounds").number
    preprocessed = (
        out / "pseudo_labels" / "rounds" / "masks1_repeat0_fold0" / "round1" / "nnUNet_preprocessed" / DATASET
    )
    fold = json.loads((preprocessed / "splits_final.json").read_text(encoding="utf-8"))[number]
    labelled = set(fold["train"])
    assert labelled >= set(run_of(workspace, "rounds").deal.train)
    assert labelled | set(fold["diseased"]) == {*run_of(workspace, "rounds").deal.diseased, *fold["val"]}
    assert (out / "arms_masks1.png").is_file()
    assert (out / "overlays.png").is_file()
    # A study that goes on from that model, by one command, planning and all.
    (study_folders / "preprocessed" / DATASET / "dataset_fingerprint.json").unlink()
    (checkpoint,) = out.rglob("GASNetTrainer__gasnet__3d_fullres/fold_*/checkpoint_final.pth")
    onward = {"plans": "Second", "plan": {"init_from": str(checkpoint)}, "settings": SHORT}
    arms = {"finetuned": {}, "from-scratch": {"settings": {"init_from": None}}}
    command(write_study(study_folders / "files2", arms=arms, **onward), out=study_folders / "onward", device="cpu")
    workspace = opened(study_folders / "onward")
    assert all(state_of(workspace, run) == "done" for run in workspace.runs)
    for arm, goes_on in (("finetuned", True), ("from-scratch", False)):
        (log,) = (study_folders / "onward").rglob(f"GASNetTrainer__{arm}__3d_fullres/fold_*/training_log_*.txt")
        assert (str(checkpoint) in log.read_text(encoding="utf-8")) == goes_on


def test_a_checkpoint_that_was_cut_off_does_not_end_a_run(study_folders: Path) -> None:
    arms = {"plain": {"trainer": "nnUNetTrainer_1epoch"}}
    out = study_folders / "cut_off"
    workspace = open_workspace(load_study(write_study(study_folders / "files5", arms=arms)), out)
    (run,) = workspace.runs
    train = steps_of(workspace, run, "cpu")[0]
    assert train.model is not None
    train.model.mkdir(parents=True)
    (train.model / "checkpoint_latest.pth").write_bytes(b"PK half of it")
    asked: list[Sequence[str]] = []
    train.work(lambda command, _: asked.append(command))
    assert "--c" not in asked[0]
    assert [path.name.split("_", 1)[1] for path in (out / "superseded").iterdir()] == [
        "plain_masks1_repeat0_fold0_train_checkpoint_latest.pth"
    ]


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_a_forked_process_dies_of_sigterm_however_young() -> None:
    with ended_by_signals():
        for _ in range(50):
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            process.start()
            process.terminate()
            process.join(30)
            assert process.exitcode == -signal.SIGTERM
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


OUTLIVED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from gasnet_nnunet.study.runner import Runner, ended_by_signals

class Sleeper(Runner):
    def _run(self, run, record):
        self.watcher = lambda line: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        sleep = "import time; print(1, flush=True); time.sleep(120)"
        self.call([sys.executable, "-c", sleep, f"{out}/sleeps"], {}, out / "log", "train")

out = Path(sys.argv[1])
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
with ended_by_signals():
    Sleeper(SimpleNamespace(out=out), "cpu", started=0.0).run(
        SimpleNamespace(arm="a", deal=SimpleNamespace(name="b"), name="a/b")
    )
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_no_command_of_a_study_that_was_ended_meets_its_successor(tmp_path: Path, name: str) -> None:
    status = subprocess.run([sys.executable, "-c", OUTLIVED, str(tmp_path), name], check=False).returncode
    number = getattr(signal, name)
    lock = FileLock(tmp_path / "runs" / "a" / "b.lock", timeout=0)
    alive = subprocess.run(["pgrep", "-f", f"{tmp_path}/sleeps"], capture_output=True, text=True, check=False).stdout
    if name != "SIGKILL":
        assert status == 128 + number
        assert not alive
        with lock:
            return
    # What was killed can end nothing: its command goes on, and the run stays locked until it ends.
    assert status == -number
    with pytest.raises(Timeout):
        lock.acquire()
    os.kill(int(alive), signal.SIGKILL)
    with FileLock(lock.lock_file, timeout=10):
        pass


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_an_interrupted_study_goes_on_from_its_checkpoint(study_folders: Path) -> None:
    out = study_folders / "interrupted"
    arms = {"gasnet": {"settings": {"num_epochs": 3, "save_every_minutes": 0.0001}}}
    name = write_study(study_folders / "files3", arms=arms)
    arguments = ["study", name, "--out", str(out), "--device", "cpu"]
    program = [sys.executable, "-c", "from gasnet_nnunet.cli import main; main()", *arguments]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while not list(out.rglob("checkpoint_latest.pth")) and time.monotonic() < end:
        time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    trainings = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert str(out) not in trainings
    assert subprocess.run(program, check=False, capture_output=True).returncode == 0
    workspace = opened(out)
    (run,) = workspace.runs
    content = record_of(workspace, run).content
    assert content["state"] == "done"
    assert content["steps"]["train"]["attempts"] == 2
    assert " --c" in (out / "logs" / "gasnet" / run.deal.name / "train.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_phantom_study_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study_folders: Path) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}")
    phantoms = {"labelled": 2, "diseased": 2, "healthy": 3, "test_diseased": 1, "test_healthy": 1}
    study = load_study("phantom", {"phantoms": {**phantoms, "size": [16, 48, 48], "spacing": [12.5, 7.0, 7.0]}})
    path = tmp_path / "phantom.yaml"
    path.write_text(study.dump())
    command(str(path), out=tmp_path / "out", device="cpu", set_=["num_epochs=1", "iterations_per_epoch=2"])
    runs = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert list(runs["state"]) == ["done"] * 3
