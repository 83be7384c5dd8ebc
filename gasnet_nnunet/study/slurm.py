"""A study on a SLURM cluster: jobs by submitit, one that prepares it and others that make its runs.

A login node only reads and submits. What it has submitted is noted in OUT/slurm/jobs.json.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from rich.console import Console

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json
from gasnet_nnunet.raw_dataset import NNUNET_FOLDERS, read_json
from gasnet_nnunet.study.definition import Study
from gasnet_nnunet.study.file import load_study
from gasnet_nnunet.study.prepare import prepare
from gasnet_nnunet.study.runner import Runner, ended_by_signals
from gasnet_nnunet.study.steps import state_of
from gasnet_nnunet.study.workspace import STUDY, Run, Workspace

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

JOBS = "jobs.json"
COMMANDS = ("sbatch", "srun", "squeue")
DEFAULTS: Mapping[str, Any] = {"timeout_min": 24 * 60, "cpus_per_task": 8}
"""submitit's own are five minutes and one core, with which nnU-Net cannot augment as fast as a GPU trains."""
MOST_TIMEOUTS = 10
"""How often a job whose time is up is queued again, so that one that never gets anywhere ends some day."""


class Cluster:
    """Submits the jobs of a study, and knows those that it has submitted.

    Args:
        study: The study.
        out: Its folder, on a disk that the nodes share.

    Raises:
        UserError: submitit is not installed, or there is no SLURM here.
    """

    def __init__(self, study: Study, out: Path) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UserError("--slurm needs submitit: pip install 'gasnet-nnunet[slurm]'.") from None
        missing = [name for name in COMMANDS if shutil.which(name) is None]
        if missing:
            raise UserError(
                f"--slurm needs SLURM's commands, and {', '.join(missing)} cannot be found here. Run this on a login "
                "node."
            )
        self.study, self.out = study, out
        self.folder = out / "slurm"

    def submit_preparation(self) -> list[str]:
        """Submit the job that plans, preprocesses and finds lungs, unless it is queued or running.

        Returns:
            What to tell the user, line by line.
        """
        with self._lock():
            noted, lines = self._noted(), []
            job = noted.get("preparation")
            if job is not None and job in _queued():
                return [f"{job}: prepares the study, and is still queued or running."]
            if job is not None:
                lines.append(
                    f"{job}: has ended, and something is still missing; see {self.folder / f'{job}_0_log.err'}"
                )
            options = {**DEFAULTS, **self.study.slurm.options, **self.study.slurm.prepare}
            job = self._submit("prepare", options, prepare_job, self.study, self.out, _environment())
            write_json(self.folder / JOBS, {**noted, "preparation": job})
            return [*lines, f"{job}: prepares the study."]

    def submit(self, workspace: Workspace, runs: Sequence[Run], *, redo: bool = False) -> list[str]:
        """Submit what is not done; a job of an arm that needs the time or the model of another one waits for its job.

        Args:
            workspace: The study.
            runs: Runs to be made; those whose jobs are queued or running are left out.
            redo: Make runs again that were made for something else.

        Returns:
            A line a job.

        Raises:
            UserError: SLURM does not take a job, or an option is not one of submitit's.
        """
        study = self.study
        with self._lock():
            noted = self._noted()["runs"]
            queued = _queued() if noted else set()
            jobs: dict[str, list[str]] = {job: names for job, names in noted.items() if job in queued}
            job_of = {name: job for job, names in jobs.items() for name in names}
            wanted = {run.name for run in runs}
            lines = [
                f"{job}: still queued or running, so left out: {', '.join(name for name in names if name in wanted)}"
                for job, names in jobs.items()
                if wanted & set(names)
            ]
            groups: dict[tuple[str, str], list[Run]] = {}
            for run in runs:
                if run.name not in job_of and state_of(workspace, run) != "done":
                    groups.setdefault((run.arm, "" if study.slurm.job == "arm" else run.deal.name), []).append(run)
            options: dict[str, Any] = {**DEFAULTS}
            if study.device in (None, "cuda"):
                options["gpus_per_node"] = 1
            options |= study.slurm.options
            # The arms that others wait for come first, because a job can wait for a job that has a number only.
            order = study.ordered_arms()
            for (arm, part), group in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
                names = [run.name for run in group]
                others = [f"{other}/{run.deal.name}" for run in group for other in study.needs(arm)]
                needed = sorted({job_of[other] for other in others if other in job_of})
                work = RunsJob(self.out, tuple(names), _environment(), redo)
                job = self._submit(f"{arm}_{part}".strip("_"), options, work, needed=needed)
                job_of |= dict.fromkeys(names, job)
                jobs[job] = names
                # At once: what is submitted is known even if SLURM does not take the next one.
                write_json(self.folder / JOBS, {"runs": jobs})
                lines.append(f"{job}: {', '.join(names)}")
            return lines or ["Everything is done already."]

    def _submit(
        self,
        name: str,
        options: Mapping[str, Any],
        function: Callable[..., Any],
        *arguments: Any,
        needed: Sequence[str] = (),
    ) -> str:
        """Submit a job that starts after those that are needed, however they end; its number."""
        import submitit

        # Some clusters queue no job again that has not asked for it.
        more = {"requeue": True, **options.get("slurm_additional_parameters", {})}
        if needed:
            more["dependency"] = f"afterany:{':'.join(needed)}"
        try:
            executor = submitit.AutoExecutor(folder=self.folder, cluster="slurm", slurm_max_num_timeout=MOST_TIMEOUTS)
            executor.update_parameters(**{"name": name, **options, "slurm_additional_parameters": more})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"slurm.options of the study cannot be used: {' '.join(str(error).split())}") from None
        try:
            return str(executor.submit(function, *arguments).job_id)
        except RuntimeError as error:  # submitit's, of which some are not its own class
            raise UserError(f"SLURM does not take the job '{name}': {' '.join(str(error).split())}") from None

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{JOBS}.lock")

    def _noted(self) -> dict[str, Any]:
        """The jobs with the names of their runs, and the one that prepares the study."""
        path = self.folder / JOBS
        return {"runs": {}, **(read_json(path) if path.is_file() else {})}


@dataclass(frozen=True)
class RunsJob:
    """What a job does: make some runs of a study, on the device of its node unless the study names one.

    Args:
        out: Folder of the study.
        names: Of the runs.
        environment: nnU-Net's folders of whoever submitted the job.
        redo: Make runs again that were made for something else than `study.yaml` asks for when the job begins.
    """

    out: Path
    names: tuple[str, ...]
    environment: Mapping[str, str]
    redo: bool = False

    def __call__(self) -> list[str]:
        """Make them.

        Returns:
            The states that they ended in.
        """
        os.environ.update(self.environment)
        started = time.monotonic()
        _exit_when_cut_off()
        # submitit ignores SIGTERM, and so would worker processes: a pool that ends them by it would wait for ever.
        with ended_by_signals():
            workspace, device = prepare(load_study(str(self.out / STUDY)), self.out, Console(quiet=True), make=False)
            runner = Runner(workspace, device, started=started, redo=self.redo)
            try:
                return [runner.run(run) for run in workspace.runs if run.name in self.names]
            finally:
                runner.note_time()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again when the time is up: the same, which goes on from nnU-Net's checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def prepare_job(study: Study, out: Path, environment: Mapping[str, str]) -> None:
    """Do what a login node should not: draw phantom patients, plan, preprocess, find the lungs of the test cases.

    Args:
        study: The study, which need not be that in the folder yet.
        out: Its folder.
        environment: nnU-Net's folders of whoever submitted the job.
    """
    os.environ.update(environment)
    started = time.monotonic()
    with ended_by_signals():
        workspace, device = prepare(study, out, Console())
        for deal in workspace.deals:
            workspace.test_set(deal)
        Runner(workspace, device, started=started).note_time()


def _exit_when_cut_off() -> None:
    """Let submitit's last word end the job where it cannot queue it again: an exception would fail the run it is in."""
    import submitit

    number = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
    handle, job = signal.getsignal(number), os.getpid()

    def cut_off(*arguments: Any) -> None:
        # SLURM may send the signal to all processes of a job, and a forked one would queue the job a second time.
        if os.getpid() == job and callable(handle):
            try:
                handle(*arguments)
            except Exception as problem:
                sys.exit(f"{type(problem).__name__}: {problem} The runs of this job are unfinished.")

    signal.signal(number, cut_off)


def _environment() -> dict[str, str]:
    """nnU-Net's folders, which a job does not know where a cluster starts it with an environment of its own."""
    return {name: str(Path(os.environ[name]).absolute()) for name in NNUNET_FOLDERS if os.environ.get(name)}


def _queued() -> set[str]:
    """Numbers of all jobs that are queued or running.

    Raises:
        UserError: SLURM does not answer.
    """
    said = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True, check=False)
    if said.returncode:
        raise UserError(
            f"squeue ended with status {said.returncode}, so which jobs of this study are still running is not known: "
            f"{' '.join(said.stderr.split())} Try again later."
        )
    return set(said.stdout.split())
