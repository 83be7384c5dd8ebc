"""A study on a SLURM cluster: jobs by submitit, each of which makes one run or all runs of an arm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.study import load_study
from gasnet_nnunet.study_prepare import prepare
from gasnet_nnunet.study_runner import Runner, state_of
from gasnet_nnunet.study_workspace import Run, Workspace

DEFAULTS: Mapping[str, Any] = {"timeout_min": 24 * 60, "cpus_per_task": 8}
"""submitit's own are five minutes and one core, with which nnU-Net cannot augment as fast as a GPU trains."""


def submit(workspace: Workspace, runs: Sequence[Run], *, cluster: str | None = None) -> list[str]:
    """Submit what is not done; a job of an arm that needs the time or the model of another one waits for its job.

    Args:
        workspace: The study, on a disk that the nodes share.
        runs: Runs to be made.
        cluster: submitit's name of another executor, such as `local`.

    Returns:
        A line a job.

    Raises:
        UserError: submitit is not installed, there is no SLURM here, or an option is not one of submitit's.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'gasnet-nnunet[slurm]'.") from None
    slurm = workspace.study.slurm
    if cluster is None and submitit.SlurmExecutor.affinity() < 0:
        raise UserError("--slurm needs SLURM's commands (sbatch), and they are not here. Run this on a login node.")
    todo = [run for run in runs if state_of(workspace, run) != "done"]
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in todo:
        groups.setdefault((run.arm, "" if slurm.job == "arm" else run.deal.name), []).append(run)
    lines: list[str] = []
    jobs: dict[tuple[str, str], str] = {}
    # The arms that others wait for come first, because a job can wait for a job that has a number only.
    order = workspace.study.ordered_arms()
    for (arm, part), group in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        needed = [jobs[other, part] for other in workspace.study.needs(arm) if (other, part) in jobs]
        executor = submitit.AutoExecutor(folder=workspace.out / "slurm", cluster=cluster or "slurm")
        options: dict[str, Any] = {"name": f"{arm}_{part}".strip("_"), **DEFAULTS}
        if workspace.study.device in (None, "cuda"):
            options["gpus_per_node"] = 1
        options |= slurm.options
        if needed and cluster is None:
            more = dict(options.get("slurm_additional_parameters", {}))
            options["slurm_additional_parameters"] = {**more, "dependency": f"afterany:{':'.join(needed)}"}
        try:
            executor.update_parameters(**options)
        except (NameError, TypeError) as error:
            raise UserError(f"slurm.options of the study cannot be used: {' '.join(str(error).split())}") from None
        names = [run.name for run in group]
        job = executor.submit(run_job, workspace.out, names, workspace.environment_of_user())
        jobs[arm, part] = str(job.job_id)
        lines.append(f"{job.job_id}: {', '.join(names)}")
    return lines or ["Everything is done already."]


def run_job(out: Path, names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Make some runs of a study; what a job does.

    It trains on the device of its node, which the login node may not have, unless the study names one.

    Args:
        out: Folder of the study.
        names: Of the runs.
        environment: nnU-Net's folders of whoever submitted the job.

    Returns:
        The states that the runs ended in.
    """
    # submitit ignores SIGTERM, and so would worker processes: a pool that ends them by it would wait for ever.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    started = time.monotonic()
    workspace, device = prepare(load_study(str(out / "study.yaml")), out, Console(quiet=True))
    runner = Runner(workspace, device, started=started)
    states = [runner.run(run) for run in workspace.runs if run.name in names]
    runner.note_time()
    return states
