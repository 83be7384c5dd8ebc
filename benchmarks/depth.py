"""Where in the lungs lesions are found and healthy tissue is called lesion, by the distance from the lungs' surface.

    python benchmarks/depth.py PREDICTIONS MASKS LUNGS [--ending .nii.gz]

takes three folders of masks of the same names, as a study has them in `predictions/<arm>/<run>`, `test/<set>/masks` and
`test/<set>/lungs`. A case without lesions counts as healthy.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import SimpleITK as sitk
import typer
from rich.progress import track
from scipy import ndimage

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.evaluation import files_of_cases

EDGES_MM = (0.0, 5.0, 10.0, 20.0, np.inf)


def main(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted masks", exists=True, file_okay=False)],
    masks: Annotated[Path, typer.Argument(help="Folder of true masks", exists=True, file_okay=False)],
    lungs: Annotated[Path, typer.Argument(help="Folder of lung masks", exists=True, file_okay=False)],
    ending: Annotated[str, typer.Option(help="How the names of the files end")] = ".nii.gz",
) -> None:
    """Measure, and print a table."""
    rows = []
    for case, path in track(files_of_cases(predictions, ending).items(), description="Cases"):
        files = [folder / f"{case}{ending}" for folder in (masks, lungs)]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is not there; every case of {predictions} needs a mask and lungs.")
        image = sitk.ReadImage(str(path))
        predicted, true, lung = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) > 0 for file in (path, *files))
        depth = ndimage.distance_transform_edt(lung, sampling=image.GetSpacing()[::-1])
        millilitres = float(np.prod(image.GetSpacing())) / 1000
        for low, high in itertools.pairwise(EDGES_MM):
            there = (depth > low) & (depth <= high)
            counts = {"lung": there, "lesion": there & true, "found": there & true & predicted}
            row = {name: float(voxels.sum()) * millilitres for name, voxels in counts.items()}
            row["false"] = float((there & ~true & predicted).sum()) * millilitres
            rows.append({"mm": f"{low:g} to {high:g}", "healthy": not true.any(), **row})
    if not rows:
        raise UserError(f"{predictions} holds no mask *{ending}.")
    table = pd.DataFrame(rows)
    sums = {kind: part.groupby("mm", sort=False).sum() for kind, part in table.groupby("healthy")}
    shown = pd.DataFrame(index=table["mm"].unique())
    if False in sums:
        shown["lesion ml"] = sums[False]["lesion"].round()
        shown["found %"] = (100 * sums[False]["found"] / sums[False]["lesion"]).round(1)
    if True in sums:
        shown["healthy lung ml"] = sums[True]["lung"].round()
        shown["called lesion %"] = (100 * sums[True]["false"] / sums[True]["lung"]).round(2)
    print(shown.rename_axis("mm from the surface").to_string())


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(str(error))
