"""What a study needs before its first run: phantom patients where it draws its own, and plans."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet.devices import check_device, choose_device
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json, write_text
from gasnet_nnunet.parallel import cores
from gasnet_nnunet.raw_dataset import NNUNET_FOLDERS, find_dataset, read_json
from gasnet_nnunet.study.definition import Phantoms, Plan, Study
from gasnet_nnunet.study.runner import find_script
from gasnet_nnunet.study.workspace import STUDY, UnpreparedError, Workspace, check_folder, open_workspace

PHANTOM_DATASET = 902
PHANTOM_NAME = "GASNetStudy"
PHANTOM_RECORD = "phantoms.json"
UNFINISHED_PLAN = ".unfinished_plan"
LOCK = "preparation.lock"
SECONDS_UNTIL_TOLD = 1.0
MOST_PROCESSES = 8
LAST_LINES = 12


def prepare(
    study: Study, out: Path, console: Console, *, make: bool = True, find_lungs: bool = True
) -> tuple[Workspace, str]:
    """Make what is missing, check the study against its dataset and write its folder.

    Args:
        study: The study.
        out: Its folder.
        console: Where to tell what is made.
        make: Whether to draw phantom patients and plan, if that has not been done.
        find_lungs: As of `Workspace`.

    Returns:
        The study's workspace, and nnU-Net's `-device`.

    Raises:
        UserError: What the user has to mend first.
        UnpreparedError: What is missing if nothing may be made.
    """
    if study.phantoms is None:
        find_dataset(str(study.dataset))
    check_folder(out)
    for name in ("nnUNetv2_train", "nnUNetv2_predict"):
        find_script(name)
    if make:  # the node that submits or prints may have another device than those that run
        check_device(study.device)
    start = time.monotonic()
    if not (out / STUDY).is_file():
        # Whatever an interruption leaves belongs to a study then.
        write_text(out / STUDY, study.dump())
    with _alone(out, console):
        study = _make(study, out, console, make=make)
    made = time.monotonic() - start
    workspace = open_workspace(study, out, find_lungs=find_lungs)
    workspace.preparation_seconds = made
    return workspace, study.device or choose_device(mps=True)


@contextmanager
def _alone(out: Path, console: Console) -> Iterator[None]:
    """Of two commands that are started together, one makes what both need."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=SECONDS_UNTIL_TOLD)
    except Timeout:
        console.print("Another command is preparing this study. Waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(study: Study, out: Path, console: Console, *, make: bool) -> Study:
    """Draw phantom patients and plan, where that is missing; the study with the dataset that there is then."""
    if study.phantoms is not None:
        _make_phantoms(study.phantoms, out, console, make=make)
        # From here on it is a dataset like any other.
        study = study.model_copy(update={"dataset": PHANTOM_DATASET, "phantoms": None})
        study = study.model_copy(update={"lungs": out / "phantoms" / "test" / "lung"})
    dataset = find_dataset(str(study.dataset))
    plan, unfinished = study.plan, out / UNFINISHED_PLAN
    if plan is not None and (unfinished.is_file() or not (dataset.preprocessed / f"{study.plans}.json").is_file()):
        command = _plan_command(study, plan, dataset.number)
        if not make:
            raise UnpreparedError(
                f"{dataset.name} has no finished plans {study.plans}, which the arms start from. Make them first:\n"
                f"  {shlex.join(command)}"
            )
        # The plans are there before all cases are preprocessed by them.
        unfinished.touch()
        _run(command, out, "plan", console)
        unfinished.unlink()
    return study


def _make_phantoms(phantoms: Phantoms, out: Path, console: Console, *, make: bool) -> None:
    """Draw the patients and convert them, in folders of nnU-Net's that are the study's own."""
    for variable in NNUNET_FOLDERS:
        folder = out / "base" / variable
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder)
    # Patches this small are augmented faster than worker processes could hand them over.
    for variable, value in (("nnUNet_n_proc_DA", "0"), ("nnUNet_def_n_proc", "2"), ("nnUNet_compile", "f")):
        os.environ.setdefault(variable, value)
    wanted = phantoms.model_dump(mode="json")
    record = out / PHANTOM_RECORD
    if record.is_file():
        if read_json(record) != wanted:
            raise UserError(f"{out} holds a study of other phantom patients. Name a new folder with --out.")
        return
    if not make:
        raise UnpreparedError(
            f"The phantom patients of this study have not been drawn into {out} yet, and its runs depend on them. "
            "The study without --commands or --report draws them first."
        )
    from gasnet_nnunet.phantom import write_phantoms

    place = out / "phantoms"
    shutil.rmtree(place, ignore_errors=True)
    write_phantoms(place, progress=True, **phantoms.model_dump())
    groups: dict[str, Sequence[str]] = {
        "labelled": ("ct", "mask"),
        "diseased": ("ct",),
        "healthy": ("ct",),
        "test": ("ct", "mask"),
    }
    command = ["gasnet-nnunet", "convert", "folders", "--id", str(PHANTOM_DATASET), "--name", PHANTOM_NAME]
    for kind, parts in groups.items():
        command += [f"--{kind}", *(str(place / kind / part) for part in parts)]
    _run([*command, "--overwrite"], out, "convert", console)
    write_json(record, wanted)


def _plan_command(study: Study, plan: Plan, number: int) -> list[str]:
    command = ["gasnet-nnunet", "plan", "-d", str(number), "--name", study.plans]
    command += ["--preset", plan.preset] if plan.init_from is None else ["--init-from", str(plan.init_from)]
    if plan.patch is not None:
        command += ["--patch", *map(str, plan.patch)]
    if plan.features is not None:
        command += ["--features", *map(str, plan.features)]
    if plan.settings:
        command += ["--set", *(f"{key}={json.dumps(value)}" for key, value in plan.settings.items())]
    return [*command, "--num-processes", str(min(MOST_PROCESSES, cores()))]


def _run(command: Sequence[str], out: Path, name: str, console: Console) -> None:
    """Run one of our own commands, with its output in a log file.

    Raises:
        UserError: It ended with a status other than 0.
    """
    log = out / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"[dim]$ {escape(' '.join(command))}[/]")
    with log.open("w", encoding="utf-8") as said, console.status(f"gasnet-nnunet {name}"):
        ended = subprocess.run(
            [find_script(command[0]), *command[1:]],
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "COLUMNS": "160"},
            check=False,
        )
    if ended.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        listed = "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
        raise UserError(f"{' '.join(command)} ended with status {ended.returncode}. Its last lines ({log}):\n{listed}")
