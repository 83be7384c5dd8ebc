"""Studies on a cluster, whose commands are played by scripts that note what they were asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission
from tiny_study import ARMS, DATASET, write_study

from gasnet_nnunet.cli.study import study as command
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.study.file import load_study
from gasnet_nnunet.study.runner import Runner
from gasnet_nnunet.study.slurm import Cluster, RunsJob
from gasnet_nnunet.study.steps import record_of, state_of, steps_of
from gasnet_nnunet.study.workspace import Run, Workspace, open_workspace


class Slurm:
    """SLURM's commands, which the machines of the tests do not have: jobs are noted, and run when a test says so.

    Args:
        folder: For the commands and the jobs.
    """

    def __init__(self, folder: Path) -> None:
        self.jobs, self.commands, self.queue = folder / "jobs", folder / "bin", folder / "queue"
        self.requeued, self.pid = folder / "requeued", folder / "pid"
        for made in (self.jobs, self.commands):
            made.mkdir(parents=True)
        self.queue.touch()
        for name, text in {
            "sbatch": f"""
                number=$((101 + $(ls {self.jobs} | wc -l)))
                cp "$1" {self.jobs}/$number
                echo $number >> {self.queue}
                echo "Submitted batch job $number"
            """,
            # Without --unbuffered --output FILE --error FILE.
            "srun": f"echo $$ > {self.pid}; exec ${{@:6}}",
            "squeue": f"cat {self.queue}",
            "scontrol": f"echo $@ >> {self.requeued}",
        }.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> Path:
        """Write a command of a few lines."""
        path = self.commands / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    def script(self, job: str) -> str:
        """What sbatch was given."""
        return (self.jobs / job).read_text()

    def end(self, job: str) -> None:
        """Take a job out of the queue."""
        self.queue.write_text("".join(f"{other}\n" for other in self.queue.read_text().split() if other != job))

    def start(self, job: str) -> subprocess.Popen[bytes]:
        """Run a job as a node would."""
        return subprocess.Popen(["bash", self.jobs / job], env={**os.environ, "SLURM_JOB_ID": job})


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    if os.name == "nt":
        pytest.skip("SLURM is POSIX")
    made = Slurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(made.commands), prepend=os.pathsep)
    return made


def one_run(out: Path, **changes: Any) -> tuple[Workspace, Run]:
    """A study of one run, on the CPU wherever it is made."""
    changes = {"arms": {"supervised": ARMS["supervised"]}, "device": "cpu", **changes}
    workspace = open_workspace(load_study(write_study(out, **changes)), out)
    return workspace, workspace.runs[0]


def test_what_is_queued_is_not_submitted_again(study_folders: Path, tmp_path: Path, slurm: Slurm) -> None:
    out = tmp_path / "out"
    arms = {"finetuned": {"init_from": "gasnet"}, "gasnet": {}, "supervised": ARMS["supervised"]}
    options = {"options": {"slurm_additional_parameters": {"account": "ward"}}}
    workspace = open_workspace(load_study(write_study(out, arms=arms, slurm=options)), out)
    cluster = Cluster(workspace.study, out)
    job_of = {}
    for line in cluster.submit(workspace, workspace.runs):
        job, name = line.split(": ")
        job_of[name.split("/")[0]] = job
    assert set(job_of) == set(arms)
    for arm, job in job_of.items():
        words = slurm.script(job).split()
        assert {"--account=ward", "--gpus-per-node=1", "--requeue"} <= set(words)
        assert (f"--dependency=afterany:{job_of['gasnet']}" in words) == (arm == "finetuned")
    again = cluster.submit(workspace, workspace.runs)
    assert len(again) == 3
    assert all("still queued or running, so left out: " in line for line in again)
    slurm.end(job_of["finetuned"])
    only = [run for run in workspace.runs if run.arm != "supervised"]
    left, submitted = cluster.submit(workspace, only)
    assert left == f"{job_of['gasnet']}: still queued or running, so left out: gasnet/masks1_repeat0_fold0"
    assert submitted == "104: finetuned/masks1_repeat0_fold0"
    assert f"--dependency=afterany:{job_of['gasnet']}" in slurm.script("104")
    slurm.write("squeue", "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(UserError, match=r"squeue ended with status 1.*Unable to contact"):
        cluster.submit(workspace, only)


def test_slurm_that_is_not_there_or_refuses_is_told(study_folders: Path, tmp_path: Path, slurm: Slurm) -> None:
    workspace, run = one_run(tmp_path / "out")
    slurm.write("sbatch", "echo Invalid partition >&2; exit 1")
    with pytest.raises(UserError, match=r"does not take the job 'supervised': .*Invalid partition"):
        Cluster(workspace.study, workspace.out).submit(workspace, [run])
    workspace, run = one_run(tmp_path / "out", slurm={"options": {"timeout_min": "a day"}})
    with pytest.raises(UserError, match=r"slurm\.options of the study cannot be used: .*timeout_min"):
        Cluster(workspace.study, workspace.out).submit(workspace, [run])
    (slurm.commands / "sbatch").unlink()
    with pytest.raises(UserError, match=r"sbatch cannot be found here\. Run this on a login node"):
        Cluster(workspace.study, workspace.out)


def test_a_login_node_neither_plans_nor_finds_lungs(
    study_folders: Path,
    tmp_path: Path,
    slurm: Slurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned: list[str] = []
    plans = study_folders / "preprocessed" / DATASET / "Mine.json"

    def plan(words: Sequence[str], *_: Any) -> None:
        planned.append(words[1])
        plans.write_text((plans.parent / "GASNetPlans.json").read_text(encoding="utf-8"))

    def submit() -> str:
        command(name, out=out, slurm=True)
        return capsys.readouterr().out

    monkeypatch.setattr("gasnet_nnunet.study.prepare._run", plan)
    out = tmp_path / "out"
    entries = {"arms": {"supervised": ARMS["supervised"]}, "plans": "Mine", "plan": {"preset": "small"}}
    options = {"options": {"cpus_per_task": 4, "mem_gb": 20}, "prepare": {"cpus_per_task": 2}}
    name = write_study(tmp_path / "files", slurm=options, **entries)
    try:
        assert "101: prepares the study.\nOnce it has ended, the same command again" in submit()
        assert {"--cpus-per-task=2", "--mem=20GB"} <= set(slurm.script("101").split())
        assert "gpus" not in slurm.script("101")
        assert "101: prepares the study, and is still queued or running." in submit()
        slurm.end("101")
        said = submit()
        assert f"101: has ended, and something is still missing; see {out / 'slurm' / '101_0_log.err'}" in said
        assert "102: prepares the study." in said
        assert not planned
        # In this process, where no plans are really made.
        DelayedSubmission.load(out / "slurm" / "102_submitted.pkl").result()
        slurm.end("102")
        assert planned == ["plan"]
        assert list(out.glob("test/*/lungs/*"))
        assert "103: supervised/masks1_repeat0_fold0\n" in submit()
        shutil.rmtree(out / "test")
        assert "104: prepares the study." in submit()
        assert not list(out.glob("test/*/lungs/*"))
    finally:
        plans.unlink(missing_ok=True)


def test_a_command_that_is_ended_from_outside_leaves_its_run_unfinished(
    study_folders: Path, tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, run = one_run(tmp_path / "out")
    program = slurm.write("train", "kill -USR2 $$")
    monkeypatch.setattr("gasnet_nnunet.study.runner.find_script", lambda _: str(program))
    assert Runner(workspace, "cpu", started=time.monotonic()).run(run) == "unfinished"
    assert state_of(workspace, run) == "unfinished"
    assert "nnUNetv2_train was ended by signal" in record_of(workspace, run).content["reason"]
    slurm.write("train", "exit 3")
    assert Runner(workspace, "cpu", started=time.monotonic()).run(run) == "failed"


def test_a_job_makes_nothing_again_that_was_made_for_something_else(
    study_folders: Path, tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, run = one_run(tmp_path / "out")
    record = record_of(workspace, run)
    for step in steps_of(workspace, run, "cpu"):
        for path in step.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        record.note(step.name, fingerprint=step.fingerprint, done=True, kind=step.kind)
    record.note(state="done")
    one_run(workspace.out, settings={"num_epochs": 2})  # the file is edited while the job is queued
    program = slurm.write("train", f"touch {tmp_path}/called; exit 3")
    monkeypatch.setattr("gasnet_nnunet.study.runner.find_script", lambda _: str(program))
    assert RunsJob(workspace.out, (run.name,), {})() == ["changed"]
    assert not (tmp_path / "called").exists()
    assert not (workspace.out / "superseded").exists()
    assert RunsJob(workspace.out, (run.name,), {}, redo=True)() == ["failed"]
    assert (tmp_path / "called").exists()
    assert list((workspace.out / "superseded").iterdir())


@pytest.mark.parametrize(("sent", "status"), [("USR2", "timed-out too many times"), ("TERM", "143")])
def test_a_job_that_is_cut_off_for_good_leaves_its_run_unfinished(
    study_folders: Path, tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, sent: str, status: str
) -> None:
    def give_up(*_: Any) -> None:
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    workspace, run = one_run(tmp_path / "out")
    program = slurm.write("train", f"kill -{sent} $PPID; sleep 60")
    monkeypatch.setattr("gasnet_nnunet.study.runner.find_script", lambda _: str(program))
    before = signal.signal(signal.SIGUSR2, give_up)
    try:
        with pytest.raises(SystemExit, match=status):
            RunsJob(workspace.out, (run.name,), {})()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert state_of(workspace, run) == "unfinished"
    (session,) = json.loads((workspace.out / "time.json").read_text(encoding="utf-8"))["sessions"]
    assert session["training"] > 0
    assert all(seconds >= 0 for seconds in session.values())


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(study_folders: Path, tmp_path: Path, slurm: Slurm) -> None:
    arms = {"gasnet": {"settings": {"num_epochs": 3, "save_every_minutes": 0.0001}}}
    workspace, run = one_run(tmp_path / "out", arms=arms)
    cluster = Cluster(workspace.study, workspace.out)
    assert cluster.submit(workspace, workspace.runs) == [f"101: {run.name}"]
    job = slurm.start("101")
    end = time.monotonic() + 600
    while not list(workspace.out.rglob("checkpoint_latest.pth")) and time.monotonic() < end:
        time.sleep(0.3)
    os.kill(int(slurm.pid.read_text()), signal.SIGUSR2)
    job.wait(60)
    assert slurm.requeued.read_text().split() == ["requeue", "101"]
    assert state_of(workspace, run) == "unfinished"
    assert slurm.start("101").wait(600) == 0
    slurm.end("101")
    assert cluster.submit(workspace, workspace.runs) == ["Everything is done already."]
    assert record_of(workspace, run).content["steps"]["train"]["attempts"] == 2
