"""Time of `gasnet-nnunet restore` beside `nnUNetv2_predict`, and its memory with a large CT.

    python benchmarks/restore.py time MODEL_FOLDER CTS [-device cpu]
    python benchmarks/restore.py memory [--size 600 512 512] [--spacing 0.6 0.7 0.7] [--report]

Times are wall and processor seconds of whole commands, their start included; the latter are not distorted by other work
on the machine. Memory is the greatest resident set of the command's process. Its model is one of random weights, with a
plan of few windows, because memory follows the CT's own grid.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import typer
from rich.console import Console
from rich.table import Table

from gasnet_nnunet.phantom import make_phantom

app = typer.Typer(add_completion=False)
console = Console(highlight=False)
SCRIPTS = Path(sysconfig.get_path("scripts"))
OURS = [sys.executable, "-c", "from gasnet_nnunet.cli import main; main()", "restore"]
COARSE = (10.0, 3.0, 3.0)
"""Voxel size in mm of the phantom that is enlarged."""


def run(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and MiB of a command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    ended = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        console.print(ended.stdout[-2000:], ended.stderr[-4000:], markup=False)
        raise SystemExit(f"{command[0]} ended with {ended.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


@app.command("time")
def measure_time(
    model: Annotated[Path, typer.Argument(help="The model's folder", exists=True)],
    cts: Annotated[Path, typer.Argument(help="Folder of <case>_0000.nii.gz", exists=True)],
    device: Annotated[str, typer.Option("-device")] = "cpu",
    fold: Annotated[str, typer.Option("-f")] = "0",
) -> None:
    """Masks by both commands, which have to be equal, and everything by ours."""
    table = Table("command", "wall s", "CPU s", "of nnU-Net's CPU s")
    with tempfile.TemporaryDirectory() as folder:
        out = {name: Path(folder) / name for name in ("nnU-Net", "mask", "restored")}
        common = ["-i", str(cts), "-m", str(model), "-f", fold, "-device", device]
        predict = [str(SCRIPTS / "nnUNetv2_predict_from_modelfolder"), *common, "-o", str(out["nnU-Net"])]
        commands = {
            "nnUNetv2_predict": [*predict, "--disable_progress_bar"],
            "restore --mask-only": [*OURS, *common, "-o", str(out["mask"]), "--mask-only"],
            "restore --no-report": [*OURS, *common, "-o", str(out["restored"]), "--no-report"],
        }
        reference = 0.0
        for name, command in commands.items():
            wall, cpu, _ = run(command)
            reference = reference or cpu
            table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / reference:.2f}")
        masks = sorted(out["nnU-Net"].glob("*.nii.gz"))
        for mask in masks:
            expected = sitk.GetArrayFromImage(sitk.ReadImage(mask))
            for name in ("mask", "restored"):
                if not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(out[name] / mask.name)), expected):
                    raise SystemExit(f"{mask.name} differs")
    console.print(table, f"{len(masks)} masks, equal in every voxel")


@app.command()
def memory(
    size: Annotated[tuple[int, int, int], typer.Option(help="Voxels (Z, Y, X)")] = (600, 512, 512),
    spacing: Annotated[tuple[float, float, float], typer.Option(help="Voxel size (Z, Y, X) in mm")] = (0.6, 0.7, 0.7),
    report: Annotated[bool, typer.Option("--report", help="Write the HTML page too")] = False,
) -> None:
    """The greatest resident set of `restore` with a large CT, everything written but (as a rule) the page."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {
            **os.environ,
            **{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")},
        }
        (root / "in").mkdir()
        _write_ct(root / "in" / "large_0000.nii.gz", size, spacing)
        model = subprocess.run(
            [sys.executable, __file__, "write-model", folder],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        command = [*OURS, "-i", str(root / "in"), "-o", str(root / "out"), "-m", model, "-device", "cpu"]
        wall, cpu, mib = run(command if report else [*command, "--no-report"], environment)
        made = json.loads((root / "out" / "burden.json").read_text(encoding="utf-8"))["cases"]["large"]
    shape = " x ".join(map(str, size))
    console.print(f"{shape} voxels (Z x Y x X): {mib / 1024:.2f} GiB, {wall:.0f} s, {cpu:.0f} s of processors")
    console.print(f"lungs {made['lung_ml'] or 0:.0f} ml")


def _write_ct(path: Path, size: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    """A phantom, enlarged to the size, with noise that does not compress."""
    coarse = tuple(max(8, round(n * edge / step)) for n, edge, step in zip(size, spacing, COARSE, strict=True))
    phantom = sitk.GetImageFromArray(make_phantom(np.random.default_rng(0), "diseased", coarse, COARSE).ct)
    phantom.SetSpacing(COARSE[::-1])
    reference = sitk.Image(size[::-1], sitk.sitkInt16)
    reference.SetSpacing(spacing[::-1])
    ct = sitk.Resample(phantom, reference, sitk.Transform(), sitk.sitkLinear, -1000.0)
    values = sitk.GetArrayViewFromImage(ct)
    rng = np.random.default_rng(0)
    noisy = np.stack([plane + rng.integers(-20, 20, plane.shape, np.int16) for plane in values])
    image = sitk.GetImageFromArray(noisy)
    image.CopyInformation(ct)
    sitk.WriteImage(image, path, True)


@app.command(hidden=True)
def write_model(root: Path) -> None:
    """A model that learnt nothing; in a process of its own, because nnU-Net's folders are set for it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny_dataset

    def few_windows(plans: dict[str, object]) -> None:
        # Thick slices and probabilities interpolated along Z, as in plans by gasnet-nnunet plan.
        configuration = plans["configurations"][tiny_dataset.CONFIGURATION]  # type: ignore[index]
        configuration["spacing"] = [14.0, 4.2, 4.2]
        configuration["patch_size"] = [16, 64, 64]
        configuration["resampling_fn_probabilities_kwargs"]["force_separate_z"] = False

    print(tiny_dataset.write_model(root, change=few_windows))


if __name__ == "__main__":
    app()
