"""`gasnet-nnunet demo`: the whole way from CTs to a comparison of two models, on phantom patients."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gasnet_nnunet.devices import choose_device
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.parallel import cores

DATASET = 901
DATASET_NAME = "GASNetDemo"
MODELS = {"Supervised baseline": "SupervisedBaselineTrainer", "GASNet": "GASNetTrainer"}
MARKER = "gasnet_demo.json"
"""Tells a folder that a demo made from one that holds anything else."""
MADE = ("phantoms", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "logs")
RESULTS = ("scores.csv", "comparison.md", "comparison.png", "overlays.png")
LAST_LINES = 8
SECONDS_BETWEEN_LOOKS = 0.2
COMMANDS = ("gasnet-nnunet", "nnUNetv2_train", "nnUNetv2_predict")
FORKS = sys.platform == "linux"
"""Elsewhere a process that has imported torch is no good parent: macOS's own libraries do not stand a fork."""
PRELOADED = ["gasnet_nnunet.trainers", "gasnet_nnunet.planning", "nnunetv2.inference.predict_from_raw_data"]


@dataclass(frozen=True)
class DemoSize:
    """How much the demo trains on what.

    Args:
        patients: Numbers of phantom patients, as `write_phantoms` takes them.
        size: Voxels of a CT (Z, Y, X).
        spacing: Its voxel size in mm (Z, Y, X).
        patch: Patch of the plans (Z, Y, X).
        features: Feature maps of S at full resolution.
        settings: Settings that differ from the preset `small`.
        seed: Seed of patients and training.
    """

    patients: Mapping[str, int]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    patch: tuple[int, int, int]
    features: int
    settings: Mapping[str, Any]
    seed: int = 0


SMALL_ADVERSARY = {
    "discriminator_steps": 1,
    "generator_features": 4,
    "generator_residual_blocks": 1,
    "discriminator_features": 4,
}
FULL = DemoSize(
    patients={"labelled": 1, "diseased": 12, "healthy": 12, "test_diseased": 8, "test_healthy": 3},
    size=(26, 68, 68),
    spacing=(7.7, 5.0, 5.0),
    patch=(16, 48, 48),
    features=8,
    settings={
        "num_epochs": 12,
        "iterations_per_epoch": 40,
        "pseudo_start": 0.4,
        "gallery_every_epochs": 4,
        **SMALL_ADVERSARY,
    },
    seed=1,
)
QUICK = DemoSize(
    patients={"labelled": 1, "diseased": 8, "healthy": 8, "test_diseased": 8, "test_healthy": 3},
    size=(26, 68, 68),
    spacing=(7.7, 5.0, 5.0),
    patch=(12, 32, 32),
    features=8,
    settings={
        "num_epochs": 8,
        "iterations_per_epoch": 36,
        "pseudo_start": 0.4,
        "gallery_every_epochs": 4,
        **SMALL_ADVERSARY,
    },
)


@dataclass(frozen=True)
class Step:
    """One command of the chain.

    Args:
        name: Name of its log file.
        command: Program and arguments.
        epochs: Epochs of a training, for its progress bar; 0 for other commands.
    """

    name: str
    command: tuple[str, ...]
    epochs: int = 0


def demo(
    out: Annotated[Path, typer.Option(help="Folder to make; everything is written there.")] = Path("gasnet_demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller one: 3 minutes on 2 cores instead of 10.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps; cuda where there is one if left out, else cpu.")
    ] = None,
) -> None:
    """See GASNet at work on phantom patients, without any data of your own.

    Draws healthy, diseased and voxel-labelled phantom patients, runs nnU-Net's own commands on them to train a
    supervised baseline and GASNet from one mask, and compares both on patients they have not seen. Nothing is
    downloaded.
    """
    if device not in (None, "cpu", "cuda", "mps"):
        raise UserError(f"--device is '{device}', but nnU-Net knows cpu, cuda and mps.")
    run_demo(out, QUICK if quick else FULL, device=device, overwrite=overwrite, console=Console(highlight=False))


def run_demo(out: Path, size: DemoSize, *, device: str | None, overwrite: bool, console: Console) -> None:
    """Make patients, run the chain, compare.

    Args:
        out: Folder of everything.
        size: How much.
        device: nnU-Net's `-device`; `None` for cuda where there is one, else cpu.
        overwrite: Whether an earlier demo may be replaced.
        console: Where to print.

    Raises:
        UserError: The folder holds something else, a command is not installed, or a command failed.
    """
    start = time.monotonic()
    out = out.absolute()
    for name in COMMANDS:
        find_command(name)
    make_folder(out, overwrite=overwrite)
    folders = {name: str(out / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = {**folders, **environment_of_children()}
    # nnU-Net reads some of them when it is imported, which happens once for all commands.
    os.environ.update(environment)
    _start_loading()
    with console.status("Loading"):
        from gasnet_nnunet.phantom import write_phantoms

    device = choose_device(device)
    counts = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in size.patients.items())
    console.print(f"[bold]Phantom patients[/]: {counts}, in {escape(str(out / 'phantoms'))}", soft_wrap=True)
    write_phantoms(
        out / "phantoms", seed=size.seed, size=size.size, spacing=size.spacing, progress=True, **size.patients
    )

    console.print("\nThe commands below are yours to repeat, once these are set:", style="dim")
    for name, value in environment.items():
        console.print(f"  export {name}={shlex.quote(value)}", style="dim", soft_wrap=True)
    for number, step in enumerate(chain(out, size, device), start=1):
        run_step(step, out / "logs" / f"{number}_{step.name}.txt", environment, console)
    compare(out, console)
    console.print(f"It took {(time.monotonic() - start) / 60:.1f} minutes.")


def find_command(name: str) -> EntryPoint:
    """What a command of this Python environment calls.

    Raises:
        UserError: The command is not installed.
    """
    found = list(entry_points(group="console_scripts", name=name))
    if not found:
        raise UserError(f"The command {name} is not installed; install the package first: pip install .")
    return found[0]


def make_folder(out: Path, *, overwrite: bool) -> None:
    """Make the demo's folder, or clear one that an earlier demo made.

    Raises:
        UserError: It holds something, and that is not an earlier demo that may be replaced.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Name a new folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(f"{out} is not empty and holds no earlier demo. Name a new folder with --out.")
        if not overwrite:
            raise UserError(
                f"{out} holds an earlier demo. Replace it with --overwrite, or name a new folder with --out."
            )
        for name in MADE:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
    for name in MADE:
        (out / name).mkdir(parents=True)
    (out / MARKER).write_text(json.dumps({"made_by": "gasnet-nnunet demo"}) + "\n")


def environment_of_children() -> dict[str, str]:
    """Variables that make nnU-Net quick on such small data."""
    return {
        # Patches this small are augmented faster than worker processes could hand them over.
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": str(min(cores(), 2)),
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores())),
        "COLUMNS": "120",
    }


def chain(out: Path, size: DemoSize, device: str) -> list[Step]:
    """The commands that a user would run, in order."""
    phantoms, raw = out / "phantoms", out / "nnUNet_raw" / f"Dataset{DATASET}_{DATASET_NAME}"
    number = str(DATASET)
    folders = {
        kind: [str(phantoms / kind / name) for name in names]
        for kind, names in {
            "labelled": ("ct", "mask"),
            "diseased": ("ct",),
            "healthy": ("ct",),
            "test": ("ct", "mask"),
        }.items()
    }
    convert = ["gasnet-nnunet", "convert", "folders", "--id", number, "--name", DATASET_NAME]
    for kind, paths in folders.items():
        convert += [f"--{kind}", *paths]
    assignments = [f"{key}={json.dumps(value)}" for key, value in {**size.settings, "seed": size.seed}.items()]
    plan = ["gasnet-nnunet", "plan", "-d", number, "--preset", "small", "--patch", *map(str, size.patch)]
    plan += ["--features", str(size.features), "--set", *assignments]
    steps = [Step("convert", tuple(convert)), Step("plan", tuple(plan))]
    model = ["-p", "GASNetPlans", "-device", device]
    for trainer in MODELS.values():
        train = ["nnUNetv2_train", number, "3d_fullres", "0", "-tr", trainer, *model]
        steps.append(Step(f"train_{trainer}", tuple(train), epochs=int(size.settings["num_epochs"])))
    for trainer in MODELS.values():
        predict = ["nnUNetv2_predict", "-d", number, "-c", "3d_fullres", "-f", "0", "-tr", trainer, *model]
        predict += ["-i", str(raw / "imagesTs"), "-o", str(out / "predictions" / trainer), "-npp", "0", "-nps", "0"]
        steps.append(Step(f"predict_{trainer}", tuple(predict)))
    return steps


def run_step(step: Step, log_file: Path, environment: Mapping[str, str], console: Console) -> None:
    """Run a command, with its output in a log file and its last line beside a progress bar.

    Raises:
        UserError: It ended with a status other than 0.
    """
    console.print(f"\n[bold]$ {escape(shlex.join(step.command))}[/]", soft_wrap=True)
    start = time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)
    columns = (SpinnerColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("[dim]{task.description}"))
    log_file.touch()
    process = _processes().Process(target=_run_command, args=(step.command, log_file, dict(environment)))
    process.start()
    try:
        with (
            log_file.open(encoding="utf-8", errors="replace") as log,
            Progress(*columns, console=console, transient=True) as progress,
        ):
            task = progress.add_task("", total=step.epochs or None)
            unfinished = ""
            running = True
            while running:
                # Asked before reading, so that nothing said last is missed.
                process.join(SECONDS_BETWEEN_LOOKS)
                running = process.exitcode is None
                *lines, unfinished = (unfinished + log.read() + ("" if running else "\n")).split("\n")
                for text in filter(None, map(str.strip, lines)):
                    last.append(text)
                    shown = escape(text[: max(20, console.width - 40)])
                    progress.update(task, description=shown, advance="Epoch time" in text)
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    if process.exitcode != 0:
        lines_shown = "\n".join(f"  {line}" for line in last)
        raise UserError(
            f"{shlex.join(step.command)} ended with status {process.exitcode}. All it said is in {log_file}; "
            f"its last lines:\n{lines_shown}"
        )
    console.print(f"[dim]done in {time.monotonic() - start:.0f} s, log in {escape(str(log_file))}[/]", soft_wrap=True)


def _processes() -> Any:
    """Makes processes that have torch and nnU-Net imported already, which takes longer than some of the commands."""
    return multiprocessing.get_context("forkserver" if FORKS else "spawn")


def _start_loading() -> None:
    """Start the process that imports them, while the patients are drawn."""
    if FORKS:
        from multiprocessing import forkserver

        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def _run_command(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> None:
    """In a process of its own: what the script of that name in the environment's `bin` does, said into a log file."""
    with log_file.open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(encoding="utf-8", line_buffering=True)
    os.environ.update(environment)
    sys.argv = list(command)
    sys.exit(find_command(command[0]).load()())


def compare(out: Path, console: Console) -> None:
    """Score both models on the unseen patients, print the table and draw the figures."""
    import pandas as pd

    from gasnet_nnunet.comparison_figures import plot_comparison, plot_overlays
    from gasnet_nnunet.evaluation import (
        PAPER_METRICS,
        evaluate_folder,
        markdown_table,
        rich_table,
    )

    test = out / "phantoms" / "test"
    predictions = {model: out / "predictions" / trainer for model, trainer in MODELS.items()}
    frames = {
        model: evaluate_folder(folder, test / "mask", lungs=test / "lung") for model, folder in predictions.items()
    }
    pd.concat(frames, names=["model"]).to_csv(out / "scores.csv")
    (out / "comparison.md").write_text(markdown_table(frames, metrics=PAPER_METRICS), encoding="utf-8")
    plot_comparison(frames, out / "comparison.png", metrics=PAPER_METRICS)
    cases = next(iter(frames.values())).index
    diseased = [case for case in cases if "diseased" in case][:3]
    healthy = [case for case in cases if "healthy" in case][:1]
    plot_overlays(
        out / "overlays.png",
        images=test / "ct",
        references=test / "mask",
        predictions=predictions,
        cases=[*diseased, *healthy],
    )
    console.print()
    title = f"{len(cases)} unseen phantom patients, one mask to learn from"
    console.print(rich_table(frames, title=title, metrics=PAPER_METRICS))
    console.print("\nSee:")
    results = out / "nnUNet_results" / f"Dataset{DATASET}_{DATASET_NAME}" / "GASNetTrainer__GASNetPlans__3d_fullres"
    for path, what in (
        (out / "overlays.png", "what each model found"),
        (out / "comparison.png", "every patient's scores"),
        (results / "fold_0" / "gasnet_progress.png", "GASNet's training"),
        (results / "fold_0" / "gasnet_gallery", "what S and G make of a patient"),
    ):
        console.print(f"  {escape(str(path))}  [dim]{what}[/]", soft_wrap=True)
