"""`gasnet-nnunet study`: arms x numbers of masks x choices of the masks x folds, run and compared."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet.errors import UserError, hint

if TYPE_CHECKING:
    from gasnet_nnunet.study.runner import Runner
    from gasnet_nnunet.study.workspace import Run, Workspace

LISTED = 5


def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="A YAML file, or a study of the package, see below.")],
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Dataset id or name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; named after it if left out.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting for all arms, or an entry of the study such as folds=5; may be repeated.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; wins over the file.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Arm (gasnet) or run (gasnet/masks1_repeat0_fold0); may be repeated.")
    ] = None,
    commands: Annotated[bool, typer.Option("--commands", help="Print what would be run, and run nothing.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs to SLURM (needs submitit).")] = False,
    report: Annotated[bool, typer.Option("--report", help="Collect what there is, and run nothing.")] = False,
    redo: Annotated[
        bool, typer.Option("--redo", help="Make runs again that were made with other settings, plans or cases.")
    ] = False,
) -> None:
    """Train and compare several methods on one dataset, with a table and figures at the end.

    STUDY is a YAML file (docs/study.md) or one of the studies of the package: phantom (needs no data), one-mask and
    ablation (any dataset), paper-table-3, paper-table-4, paper-table-5, paper-fig-11. The same command again goes on
    where it stopped: what is done is skipped, what was interrupted is resumed, what failed is tried again.
    """
    from gasnet_nnunet.settings import parse_assignments
    from gasnet_nnunet.study.file import assignable, load_study

    console = Console(highlight=False, soft_wrap=True)
    settings = parse_assignments(set_ or [])
    changes: dict[str, Any] = {key: settings.pop(key) for key in assignable() if key in settings}
    changes["settings"] = settings
    if dataset is not None:
        changes["dataset"] = int(dataset) if dataset.isdecimal() else dataset
    if device is not None:
        changes["device"] = device
    loaded = load_study(name, changes)
    folder = (out or Path(f"{Path(name).stem}_study")).absolute()
    if report and not (folder / "study.yaml").is_file():
        raise UserError(f"{folder} holds no study that could be reported on. Name its folder with --out.")
    with console.status("Loading nnU-Net"):
        from gasnet_nnunet.study.prepare import prepare
        from gasnet_nnunet.study.slurm import Cluster
        from gasnet_nnunet.study.workspace import STUDY, UnpreparedError, keep_study

    started = time.monotonic()
    cluster = Cluster(loaded, folder) if slurm else None
    try:
        make = not (commands or report or slurm)
        workspace, chosen_device = prepare(loaded, folder, console, make=make, find_lungs=not slurm)
        runs = _chosen(workspace, only or [])
        plan = _plan(workspace, runs, "SLURM" if slurm else chosen_device)
    except UnpreparedError:
        if cluster is None:
            raise
        for line in cluster.submit_preparation():
            console.print(escape(line))
        console.print("Once it has ended, the same command again submits the runs.")
        return
    from gasnet_nnunet.cohort import abbreviate
    from gasnet_nnunet.study.runner import Runner, ended_by_signals
    from gasnet_nnunet.study.steps import needs_redo, state_of

    changed = [run.name for run in runs if needs_redo(workspace, run, chosen_device)]
    if changed and not (redo or commands):
        again = (
            "To leave them out of the tables, add --redo."
            if report
            else f"To make them again, add --redo; what they have left is moved to {folder / 'superseded'}."
        )
        raise UserError(
            f"{len(changed)} of {len(runs)} runs were made with other settings, plans or cases than the study asks for "
            f"now, or wait for such a run: {abbreviate(changed, LISTED)}. To keep them, ask for what was asked for "
            f"before (--set, the file; {folder / STUDY} holds all of it). {again}"
        )
    if report:
        _end(workspace, console)
        return
    # What is printed with --commands is a script.
    comment = "# " if commands else ""
    console.print(comment + plan.replace("\n", f"\n{comment}"))
    earlier = keep_study(folder, loaded)
    if earlier is not None:
        console.print(
            f"{comment}[yellow]Note:[/] {escape(str(folder))} held another study file; it is kept as "
            f"{escape(str(earlier))}."
        )
    if commands:
        _print_commands(workspace, runs, chosen_device, console)
        return
    if cluster is not None:
        for line in cluster.submit(workspace, runs, redo=redo):
            console.print(escape(line))
        console.print(f"Once they have ended: [bold]{escape(_again(workspace))} --report[/]")
        return
    runner = Runner(workspace, chosen_device, started=started)
    with ended_by_signals():
        try:
            _run(runner, runs, console)
        finally:
            runner.note_time()
        unscored = _end(workspace, console)
        # What the tables took is told by the next ones.
        runner.note_time()
    left = [run.name for run in runs if run.name in unscored or state_of(workspace, run, chosen_device) != "done"]
    if left:
        raise UserError(
            f"{len(left)} of {len(runs)} runs are not done, see above: {abbreviate(left, LISTED)}. The same command "
            "again tries them anew and leaves the others as they are."
        )


def _chosen(workspace: Workspace, only: list[str]) -> list[Run]:
    """The runs that are asked for."""
    chosen = []
    for wanted in only:
        found = [run for run in workspace.runs if wanted in (run.arm, run.name)]
        if not found:
            valid = [*workspace.study.arms, *(run.name for run in workspace.runs)]
            raise UserError(
                f"--only {wanted} is no arm or run of the study.{hint(wanted, valid)} Arms: "
                f"{', '.join(workspace.study.arms)}; runs are called e.g. {workspace.runs[0].name}."
            )
        chosen += found
    return [run for run in workspace.runs if run in chosen] if only else workspace.runs


def _plan(workspace: Workspace, runs: list[Run], device: str) -> str:
    """What the study is, in two or three lines."""
    from gasnet_nnunet.cohort import abbreviate

    study, deals, cases = workspace.study, workspace.deals, workspace.cohort.cases
    tested = {case for deal in deals for case in workspace.test_set(deal).cases}
    lines = [
        f"[bold]{escape(study.title)}[/]: {len(runs)} runs on {workspace.dataset.name} ({device}), {len(study.arms)} "
        f"arms x {len(deals)} choices of cases, {len(tested)} test cases ({abbreviate(sorted(tested), LISTED)}).",
        f"Folder: {escape(str(workspace.out))}",
    ]
    alone = [case for case in sorted(cases) if case not in workspace.groups]
    if alone:
        lines.append(
            f"[yellow]Note:[/] neither dataset.json nor 'groups' says whom {len(alone)} of {len(cases)} cases show "
            f"({abbreviate(alone, LISTED)}), so each of them was taken for a patient of its own."
        )
    return "\n".join(lines)


def _print_commands(workspace: Workspace, runs: list[Run], device: str, console: Console) -> None:
    """A line a run that can be run anywhere, in this order, and nnU-Net's commands that it stands for."""
    from gasnet_nnunet.raw_dataset import NNUNET_FOLDERS
    from gasnet_nnunet.study.steps import WaitingError, needs_redo, steps_of

    again = _again(workspace)
    for variable in NNUNET_FOLDERS:
        value = os.environ.get(variable)
        if value:
            console.print(f"export {variable}={shlex.quote(value)}", markup=False)
    console.print("# What the runs call, with these set:", markup=False)
    for variable, value in workspace.environment.items():
        console.print(f"#   {variable}={shlex.quote(value)}", markup=False)
    for run in runs:
        try:
            steps = steps_of(workspace, run, device)
        except WaitingError as reason:
            console.print(f"# {run.name}: {reason}", markup=False)
            steps = []
        for step in steps:
            for command in step.commands:
                console.print(f"# {shlex.join(command)}", markup=False)
        redo = " --redo" if needs_redo(workspace, run, device) else ""
        console.print(f"{again} --only {run.name}{redo}", markup=False)
    console.print(f"{again} --report", markup=False)


def _again(workspace: Workspace) -> str:
    """The command that goes on with a study, from anywhere."""
    out = workspace.out
    return f"gasnet-nnunet study {shlex.quote(str(out / 'study.yaml'))} --out {shlex.quote(str(out))}"


def _run(runner: Runner, runs: list[Run], console: Console) -> None:
    """Run what is not done, with a line for each run and one for what goes on."""
    from gasnet_nnunet.study.progress import Estimate, duration
    from gasnet_nnunet.study.steps import record_of, state_of

    workspace = runner.workspace
    todo = [run for run in runs if state_of(workspace, run, runner.device) != "done"]
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} runs are done already.")
    estimate = Estimate(workspace, todo)
    with console.status("") as status:

        def hear(line: str) -> None:
            estimate.hear(line)
            shown = escape(re.sub(r"^\S+ \S+: ", "", line)[: max(20, console.width - 90)])
            status.update(f"{escape(estimate.doing)} [dim]{estimate.text()} | {shown}[/]")

        runner.watcher = hear
        for number, run in enumerate(todo, start=1):
            estimate.start(run)
            status.update(escape(run.name))
            start = time.monotonic()
            state = runner.run(run)
            record = record_of(workspace, run).content
            colour = "green" if state == "done" else "red"
            left = Estimate(workspace, todo[number:]).text() if number < len(todo) else "that was the last"
            taken = duration(time.monotonic() - start)
            console.print(f"{number}/{len(todo)} {run.name}: [{colour}]{state}[/] in {taken}, {left}")
            if state == "running elsewhere":
                console.print(
                    "  Another process is at it, or a command that has outlived its study (see ps). Wait for it or "
                    "end it."
                )
            elif state != "done" and record.get("reason"):
                console.print(f"  [red]{escape(str(record['reason']))}[/]")


def _end(workspace: Workspace, console: Console) -> list[str]:
    """Collect, print the table and where the rest is.

    Returns:
        Runs that could not be scored.
    """
    from gasnet_nnunet.study.report import write_report

    result = write_report(workspace)
    console.print(result.table)
    for line in result.remarks:
        console.print(escape(line))
    console.print("See:")
    for path in result.files:
        console.print(f"  {escape(str(path))}")
    return result.failed
