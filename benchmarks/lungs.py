"""How well `gasnet_nnunet.lungs` finds lungs, against masks that are there, case by case.

    python benchmarks/lungs.py DATA_FOLDER... [--rescale LO HI HU_LO HU_HI] [--csv FILE]

A data folder holds, at any depth, folders `ct` and `lung` side by side with the same file names (and, where there are
lesion masks, `lesion`), or files `<case>.nii.gz` beside `<case>_lung.nii.gz`.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.lungs import segment_lungs
from gasnet_nnunet.volumes import read_volume, volume_name

Rescale = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Score:
    """One case.

    Args:
        case: Its name.
        dice: Dice of the found lungs and the mask.
        volume_ratio: Volume found / volume of the mask.
        lesion_share: Share of the lesion voxels inside the mask that was found; NaN without lesions.
        seconds: Wall time of the segmentation.
        cpu_seconds: Processor time of it, which other work on the machine does not distort.
    """

    case: str
    dice: float
    volume_ratio: float
    lesion_share: float
    seconds: float
    cpu_seconds: float


def main(
    folders: Annotated[list[Path], typer.Argument(help="Data folders", exists=True, file_okay=False)],
    rescale: Annotated[
        Rescale | None, typer.Option(help="Values LO to HI stand for HU_LO to HU_HI: 0 255 -1250 250 for 8-bit slices")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table here")] = None,
) -> None:
    """Measure, print a table and the means."""
    # One thread, so that processor and wall time mean the same.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    cases = [case for folder in folders for case in find_cases(folder)]
    if not cases:
        raise UserError(f"No CT with a lung mask in {', '.join(map(str, folders))}. Expected ct/X and lung/X.")
    scores = [score(*case, rescale) for case in track(cases, "Finding lungs", console=Console(stderr=True))]
    names = [field.name for field in dataclasses.fields(Score)]
    table = Table(*(name.replace("_", " ") for name in names))
    for row in scores:
        table.add_row(row.case, *(_number(value) for value in dataclasses.astuple(row)[1:]))
    table.add_section()
    columns = list(zip(*(dataclasses.astuple(row)[1:] for row in scores), strict=True))
    table.add_row(f"mean of {len(scores)}", *(_number(_mean(column)) for column in columns))
    table.add_row("lowest", *(_number(min(column, key=lambda x: (np.isnan(x), x))) for column in columns))
    Console().print(table)
    if csv_file is not None:
        with csv_file.open("w", newline="") as stream:
            csv.writer(stream).writerows([names, *map(dataclasses.astuple, scores)])


def find_cases(folder: Path) -> list[tuple[str, Path, Path, Path | None]]:
    """Name, CT, lung mask and lesion mask (if there is one) of each case below a folder."""
    cases: list[tuple[str, Path, Path, Path | None]] = []
    for ct in sorted(path for path in folder.rglob("*") if path.is_file()):
        lung, lesion = ct.parent.with_name("lung") / ct.name, ct.parent.with_name("lesion") / ct.name
        beside = ct.with_name(f"{volume_name(ct)}_lung{ct.name[len(volume_name(ct)) :]}")
        if ct.parent.name == "ct" and lung.is_file():
            cases.append((volume_name(ct), ct, lung, lesion if lesion.is_file() else None))
        elif beside.is_file():
            cases.append((volume_name(ct), ct, beside, None))
    return cases


def score(case: str, ct: Path, lung: Path, lesion: Path | None, rescale: Rescale | None) -> Score:
    """Segment one CT and compare."""
    values, grid = read_volume(ct)
    if rescale is not None:
        low, high, hu_low, hu_high = rescale
        values = (values - low) / (high - low) * (hu_high - hu_low) + hu_low
    truth = read_volume(lung)[0] > 0
    wall, cpu = time.perf_counter(), time.process_time()
    found = segment_lungs(values, grid.spacing[::-1])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    inside = truth & (read_volume(lesion)[0] > 0) if lesion is not None else np.zeros_like(truth)
    return Score(
        case=case,
        dice=2 * float((found & truth).sum()) / float(found.sum() + truth.sum()),
        volume_ratio=float(found.sum() / truth.sum()),
        lesion_share=float(found[inside].mean()) if inside.any() else float("nan"),
        seconds=wall,
        cpu_seconds=cpu,
    )


def _mean(values: tuple[float, ...]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return statistics.fmean(known) if known else float("nan")


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(str(error))
