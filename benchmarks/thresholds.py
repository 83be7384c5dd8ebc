"""What a trained model would have at other thresholds than the one it was trained to decide at.

    nnUNetv2_predict ... --save_probabilities -o PREDICTIONS
    python benchmarks/thresholds.py PREDICTIONS MASKS LUNGS [--carried 0.8] [--ending .nii.gz]

takes nnU-Net's probabilities of one lesion class, and masks and lungs as a study has them in `test/<set>/masks` and
`test/<set>/lungs`. A model of ours carries its `lesion_threshold` in its heads, so that nnU-Net's 0.5 is what training
called `--carried`. A case without lesions counts as healthy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import SimpleITK as sitk
import typer
from rich.progress import track
from scipy.special import expit, logit

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.metrics import overlap_scores

THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def main(
    predictions: Annotated[Path, typer.Argument(help="Folder of nnU-Net's *.npz", exists=True, file_okay=False)],
    masks: Annotated[Path, typer.Argument(help="Folder of true masks", exists=True, file_okay=False)],
    lungs: Annotated[Path, typer.Argument(help="Folder of lung masks", exists=True, file_okay=False)],
    carried: Annotated[float, typer.Option(help="The model's lesion_threshold", min=0.01, max=0.99)] = 0.8,
    ending: Annotated[str, typer.Option(help="How the names of the masks end")] = ".nii.gz",
) -> None:
    """Measure, and print a table."""
    rows = []
    for path in track(sorted(predictions.glob("*.npz")), description="Cases"):
        files = [folder / f"{path.stem}{ending}" for folder in (masks, lungs)]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is not there; every case of {predictions} needs a mask and lungs.")
        true, lung = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) > 0 for file in files)
        lesion = np.load(path)["probabilities"][1].astype(np.float32)
        for threshold in THRESHOLDS:
            # In the odds of training, which the heads have divided by those of the threshold that they carry.
            found = lesion > expit(logit(threshold) - logit(carried))
            score = 100 * overlap_scores(found, true)["dice"] if true.any() else np.nan
            called = np.nan if true.any() else 100 * (found & lung).sum() / lung.sum()
            rows.append({"threshold": threshold, "Dice %": score, "healthy lung called lesion %": called})
    if not rows:
        raise UserError(f"{predictions} holds no *.npz; nnUNetv2_predict writes them with --save_probabilities.")
    print(pd.DataFrame(rows).groupby("threshold").mean().round(2).to_string())


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(str(error))
