"""`gasnet-nnunet doctor`: whether a training could start here, and what to do where it could not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gasnet_nnunet import __version__
from gasnet_nnunet.parallel import cores

TRAINER = "GASNetTrainer"
GIB = 2**30
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}

# Run as nnUNetv2_train is: by this interpreter, in a process of its own, without the working directory on the path. All
# that the look-up prints goes to stderr, so that each line of stdout is an answer.
PROBE = f"""
import contextlib, json, sys
sys.path[:] = [path for path in sys.path if path]
def answer(name, function):
    try:
        with contextlib.redirect_stdout(sys.stderr):
            value = function()
    except Exception as error:
        value = dict(error=f"{{type(error).__name__}}: {{error}}")
    print(json.dumps({{name: value}}), flush=True)
def device():
    import torch
    if torch.cuda.is_available():
        torch.ones(1, device="cuda").add(1).item()
        free, total = torch.cuda.mem_get_info()
        return dict(kind="cuda", name=torch.cuda.get_device_name(), free=free, total=total)
    if torch.backends.mps.is_available():
        return dict(kind="mps", name="Apple GPU")
    return dict(kind="cpu", built_for_cuda=torch.version.cuda)
def trainer():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    found = recursive_find_trainer_class_by_name("{TRAINER}")
    # nnU-Net forgets the modules of other people's folders after the look-up.
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    return dict(module=found.__module__, file=file or f"{{found.__module__}}.py, in a folder of nnUNet_extTrainer")
answer("device", device)
answer("trainer", trainer)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: What was looked at.
        state: "ok", "warning" (a training starts all the same) or "problem" (it could not start).
        found: What was found.
        advice: What to do about it; empty where there is nothing to do.
    """

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def probe() -> dict[str, dict[str, Any]]:
    """Look the trainer and the device up in a fresh process.

    Returns:
        What was found under `device` and `trainer`; either holds nothing but `error` where that failed.
    """
    command = [sys.executable, "-c", PROBE]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    died = {"error": f"the look-up ended with status {ended.returncode}: {ended.stderr.strip()[-500:]}"}
    answers: dict[str, dict[str, Any]] = {"device": died, "trainer": died}
    for line in ended.stdout.splitlines():
        answers.update(json.loads(line))
    return answers


def check_trainer(trainer: dict[str, Any]) -> Finding:
    """Whether nnU-Net's resolver finds our trainer, and where."""
    if "error" in trainer:
        error = trainer["error"]
        if "Could not find requested nnunet trainer" not in error:
            return Finding(TRAINER, "problem", error, "Mend the import named here; nnU-Net's own trainers still work.")
        return Finding(
            TRAINER,
            "problem",
            "nnU-Net does not find it",
            "pip install --force-reinstall --no-deps gasnet-nnunet, with the pip of the environment nnUNetv2_train "
            "runs in. Until then: export nnUNet_extTrainer=<the folder gasnet_nnunet_ext in its site-packages>.",
        )
    if trainer["module"] != "gasnet_nnunet.trainers":
        return Finding(
            TRAINER,
            "warning",
            f"another class of this name comes first: {trainer['file']}",
            "Remove or rename it, or take its folder out of nnUNet_extTrainer.",
        )
    return Finding(TRAINER, "ok", f"resolved to {trainer['file']}")


def check_search_path() -> Finding:
    """The folders in `nnUNet_extTrainer`, ours among them."""
    folders = [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        return Finding(
            "nnUNet_extTrainer",
            "warning",
            f"no such folder: {', '.join(missing)}",
            "Take it out of the variable where you set it.",
        )
    return Finding("nnUNet_extTrainer", "ok", "\n".join(folders) or "not set")


def check_device(device: dict[str, Any]) -> Finding:
    """What the training would run on."""
    if "error" in device:
        return Finding("device", "problem", device["error"], "Mend or reinstall torch: https://pytorch.org/get-started")
    if device["kind"] == "cuda":
        memory = f"{device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB free"
        found = f"cuda: {device['name']}, {memory}; {cores()} CPU cores"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            advice = "torch.compile needs a C compiler: install gcc, or export nnUNet_compile=false"
            return Finding("device", "warning", f"{found}; no C compiler", advice)
        return Finding("device", "ok", found)
    if device["kind"] == "mps":
        return Finding("device", "ok", f"mps; {cores()} CPU cores", "Add `-device mps` to nnUNetv2_train.")
    if shutil.which("nvidia-smi"):
        built = device["built_for_cuda"]
        why = f"it was built for CUDA {built}, newer than the driver" if built else "it was built without CUDA"
        return Finding(
            "device",
            "warning",
            f"cpu: {cores()} cores. There is a GPU, but torch cannot use it ({why})",
            "Install the torch that fits the driver: https://pytorch.org/get-started",
        )
    advice = "Add `-device cpu` to nnUNetv2_train, and plan with `--preset small`."
    return Finding("device", "ok", f"cpu: {cores()} cores", advice)


def check_requirement(requirement: Requirement, version: str | None) -> Finding:
    """Whether the installed version of a dependency lies within our bounds.

    Args:
        requirement: Name and bounds as our own metadata give them.
        version: What is installed; `None` for nothing.
    """
    name, install = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Finding(name, "problem", "not installed", install)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "ok", version)
    found = f"{version}, outside {requirement.specifier}"
    if name == "torch" and version.startswith("2.9."):
        return Finding(name, "warning", f"{found}: its 3D convolutions are four times slower under AMP", install)
    return Finding(name, "problem", found, install)


def check_versions() -> Iterator[Finding]:
    """Python, ourselves and every dependency that our own metadata name."""
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    try:
        lines = importlib.metadata.requires("gasnet-nnunet") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("gasnet-nnunet", "problem", f"{__version__}, not installed", "pip install . in its folder")
        return
    yield Finding("gasnet-nnunet", "ok", f"{__version__}, {Path(__file__).parents[1]}")
    within = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        finding = check_requirement(requirement, installed_version(requirement.name))
        if finding.state == "ok" and requirement.name not in ("nnunetv2", "torch"):
            within.append(f"{finding.name} {finding.found}")
        else:
            yield finding
    yield Finding("other packages", "ok", ", ".join(within))


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; `None` if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_folder(variable: str, *, written: bool, needed: int = 10 * GIB) -> Finding:
    """One of nnU-Net's three folders.

    Args:
        variable: Its environment variable.
        written: Whether a training writes there.
        needed: Bytes below which free space is worth a warning.
    """
    value = os.environ.get(variable)
    state: Literal["warning", "problem"] = "problem" if written else "warning"
    purpose = "" if written else "Converting and planning need it: "
    if not value:
        return Finding(variable, state, "not set", f"{purpose}export {variable}=/a/folder, in ~/.bashrc to keep it")
    folder = Path(value)
    if not folder.is_dir():
        advice = f"{purpose}mkdir -p '{folder}', or correct {variable}"
        return Finding(variable, state, f"no such folder: {folder}", advice)
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / GIB:.0f} GiB free"
    try:
        # os.access() knows neither quotas nor full disks.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"gasnet-nnunet doctor")
    except OSError as error:
        advice = f"{purpose}make room there, or get the right to write"
        return Finding(variable, state, f"{folder} cannot be written: {error.strerror}", advice)
    if written and free < needed:
        return Finding(variable, "warning", found, "Little for preprocessed data and checkpoints: make room")
    return Finding(variable, "ok", found)


def check_command(name: str = "nnUNetv2_train") -> Finding:
    """Whether the `nnUNetv2_train` that the shell would run belongs to this environment."""
    found = shutil.which(name)
    scripts = sysconfig.get_path("scripts")
    if found is None:
        return Finding(name, "problem", "not on PATH", f"Activate this environment, or add {scripts} to PATH")
    try:
        files = importlib.metadata.files("nnunetv2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    if Path(found).resolve() in (Path(os.fspath(file.locate())).resolve() for file in files if file.stem == name):
        return Finding(name, "ok", found)
    advice = f"Activate the environment of {sys.executable}, or install gasnet-nnunet into that other one"
    return Finding(name, "problem", f"{found} belongs to another environment", advice)


def check_shared_memory(folder: Path = Path("/dev/shm"), needed: int = GIB) -> Iterable[Finding]:
    """Whether data-loading processes can hand batches over; containers are often started with 64 MiB.

    Args:
        folder: Where the system keeps shared memory; without it (macOS, Windows) there is nothing to check.
        needed: Bytes below which it is worth a warning.
    """
    if not folder.is_dir():
        return []
    total = shutil.disk_usage(folder).total
    found = f"{total / 2**20:.0f} MiB in {folder}"
    if total >= needed:
        return [Finding("shared memory", "ok", found)]
    advice = "Loading processes may die with a bus error: start the container with --ipc=host or --shm-size=8g"
    return [Finding("shared memory", "warning", found, advice)]


def examine() -> list[Finding]:
    """Everything the report says, in its order."""
    answers = probe()
    return [
        check_trainer(answers["trainer"]),
        check_search_path(),
        check_command(),
        *check_versions(),
        check_device(answers["device"]),
        *check_shared_memory(),
        check_folder("nnUNet_raw", written=False),
        check_folder("nnUNet_preprocessed", written=True),
        check_folder("nnUNet_results", written=True),
    ]


def doctor() -> None:
    """Say whether a training could start here, and what to do about each problem.

    Asks nnU-Net's own look-up for GASNetTrainer, then checks versions, device, shared memory and nnU-Net's folders. The
    exit status is 0 only if a training could start.
    """
    console = Console(highlight=False)
    with console.status("Asking nnU-Net for GASNetTrainer ..."):
        findings = examine()
    table = Table(show_header=False, show_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = STYLES[finding.state]
        advice = f"\n[{style}]-> {escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(f"[{style}]{finding.state}[/]", escape(finding.name), escape(finding.found) + advice)
    console.print(table)
    problems = [finding for finding in findings if finding.state == "problem"]
    if problems:
        console.print(f"\n[bold red]A training could not start: see {', '.join(item.name for item in problems)}.[/]")
        raise typer.Exit(1)
    console.print("\n[green]A training can start.[/]")
