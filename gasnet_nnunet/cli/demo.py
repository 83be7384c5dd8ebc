"""`gasnet-nnunet demo`: the whole way from CTs to a comparison of two models, on phantom patients."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gasnet_nnunet.errors import UserError

DATASET = 901
DATASET_NAME = "GASNetDemo"
MODELS = {"Supervised baseline": "SupervisedBaselineTrainer", "GASNet": "GASNetTrainer"}
MARKER = "gasnet_demo.json"
"""Tells a folder that a demo made from one that holds anything else."""
MADE = ("phantoms", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "logs")
RESULTS = ("scores.csv", "comparison.md", "comparison.png", "overlays.png")
LAST_LINES = 8


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


FULL = DemoSize(
    patients={"labelled": 1, "diseased": 12, "healthy": 12, "test_diseased": 6, "test_healthy": 3},
    size=(32, 84, 84),
    spacing=(6.25, 4.0, 4.0),
    patch=(24, 64, 64),
    features=8,
    settings={"num_epochs": 20, "iterations_per_epoch": 15, "discriminator_steps": 1, "gallery_every_epochs": 10},
)
QUICK = DemoSize(
    patients={"labelled": 1, "diseased": 8, "healthy": 8, "test_diseased": 4, "test_healthy": 2},
    size=(26, 68, 68),
    spacing=(7.7, 5.0, 5.0),
    patch=(16, 40, 40),
    features=8,
    settings={"num_epochs": 6, "iterations_per_epoch": 20, "discriminator_steps": 1, "gallery_every_epochs": 3},
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
    programs = find_programs()
    make_folder(out, overwrite=overwrite)
    with console.status("Loading"):
        import torch

        from gasnet_nnunet.phantom import write_phantoms

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    counts = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in size.patients.items())
    console.print(f"[bold]Phantom patients[/]: {counts}, in {escape(str(out / 'phantoms'))}", soft_wrap=True)
    write_phantoms(
        out / "phantoms", seed=size.seed, size=size.size, spacing=size.spacing, progress=True, **size.patients
    )

    folders = {name: str(out / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    console.print("\nThe commands below are yours to repeat, once these are set:", style="dim")
    for name, folder in folders.items():
        console.print(f"  export {name}={shlex.quote(folder)}", style="dim", soft_wrap=True)
    environment = {**os.environ, **folders, **environment_of_children()}
    for number, step in enumerate(chain(out, size, device), start=1):
        run_step(step, out / "logs" / f"{number}_{step.name}.txt", programs, environment, console)
    compare(out, console)
    console.print(f"It took {(time.monotonic() - start) / 60:.1f} minutes.")


def find_programs() -> dict[str, str]:
    """Paths of the commands to run: of this environment, whether or not it is activated.

    Raises:
        UserError: One of them is not installed.
    """
    names = ("gasnet-nnunet", "nnUNetv2_train", "nnUNetv2_predict")
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=places) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UserError(f"{', '.join(missing)} cannot be found; install the package first: pip install .")
    return {name: path for name, path in found.items() if path is not None}


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        # Patches this small are augmented faster than worker processes could hand them over.
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": str(min(cores, 2)),
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
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


def run_step(
    step: Step, log_file: Path, programs: Mapping[str, str], environment: Mapping[str, str], console: Console
) -> None:
    """Run a command, with its output in a log file and its last line beside a progress bar.

    Raises:
        UserError: It ended with a status other than 0.
    """
    console.print(f"\n[bold]$ {escape(shlex.join(step.command))}[/]", soft_wrap=True)
    start = time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)
    columns = (SpinnerColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("[dim]{task.description}"))
    with (
        log_file.open("w", encoding="utf-8") as log,
        Progress(*columns, console=console, transient=True) as progress,
        subprocess.Popen(
            [programs[step.command[0]], *step.command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        task = progress.add_task("", total=step.epochs or None)
        for line in child.stdout:
            log.write(line)
            log.flush()
            if text := line.strip():
                last.append(text)
                shown = escape(text[: max(20, console.width - 40)])
                progress.update(task, description=shown, advance="Epoch time" in text)
    if child.returncode != 0:
        lines = "\n".join(f"  {line}" for line in last)
        raise UserError(
            f"{shlex.join(step.command)} ended with status {child.returncode}. All it said is in {log_file}; "
            f"its last lines:\n{lines}"
        )
    console.print(f"[dim]done in {time.monotonic() - start:.0f} s, log in {escape(str(log_file))}[/]", soft_wrap=True)


def compare(out: Path, console: Console) -> None:
    """Score both models on the unseen patients, print the table and draw the figures."""
    import pandas as pd

    from gasnet_nnunet.evaluation import evaluate_folder, markdown_table, plot_comparison, plot_overlays, rich_table

    test = out / "phantoms" / "test"
    predictions = {model: out / "predictions" / trainer for model, trainer in MODELS.items()}
    frames = {
        model: evaluate_folder(folder, test / "mask", lungs=test / "lung") for model, folder in predictions.items()
    }
    pd.concat(frames, names=["model"]).to_csv(out / "scores.csv")
    (out / "comparison.md").write_text(markdown_table(frames), encoding="utf-8")
    plot_comparison(frames, out / "comparison.png")
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
    console.print(rich_table(frames, title=f"{len(cases)} unseen phantom patients, one mask to learn from"))
    console.print("\nSee:")
    results = out / "nnUNet_results" / f"Dataset{DATASET}_{DATASET_NAME}" / "GASNetTrainer__GASNetPlans__3d_fullres"
    for path, what in (
        (out / "overlays.png", "what each model found"),
        (out / "comparison.png", "every patient's scores"),
        (results / "fold_0" / "gasnet_progress.png", "GASNet's training"),
        (results / "fold_0" / "gasnet_gallery", "what S and G make of a patient"),
    ):
        console.print(f"  {escape(str(path))}  [dim]{what}[/]", soft_wrap=True)
