"""`gasnet-nnunet report`: a training on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def report(
    result_folder: Annotated[
        Path, typer.Argument(metavar="RESULT_FOLDER", help="A model's folder in nnUNet_results, or that of a fold.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write; RESULT_FOLDER/report.html if left out.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Preset to hold the settings against; the most similar one if left out.")
    ] = None,
) -> None:
    """Show a training on one HTML page: state, signs of trouble, curves, galleries, settings and validation cases.

    Of a training by GASNetTrainer or SupervisedBaselineTrainer, finished or not. The page needs no network. Pictures of
    the validation cases need nnUNet_raw.

    Raises:
        UserError: The folder holds no such training.
    """
    from gasnet_nnunet.training_report import write_training_report

    path = write_training_report(result_folder, out, preset=preset)
    Console(highlight=False, soft_wrap=True).print(f"Report: {escape(str(path))}")
