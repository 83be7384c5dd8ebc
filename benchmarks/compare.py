"""How long comparing takes beside predicting, case by case.

    python benchmarks/compare.py MODEL_FOLDER... --images FOLDER --masks FOLDER [--lungs FOLDER] [--device cpu]

predicts the CTs with the final checkpoints of every model into a temporary folder, compares the models there as
`gasnet-nnunet compare` does, figures included, and prints both times. Processor time is what to look at on a machine
that has other work.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gasnet_nnunet.comparison import compare_models
from gasnet_nnunet.comparison_inputs import find_cases, find_model
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.prediction import predict_cases


def main(
    folders: Annotated[list[Path], typer.Argument(help="nnU-Net model folders")],
    images: Annotated[Path, typer.Option(help="Folder of CTs")],
    masks: Annotated[Path, typer.Option(help="Folder of their true masks")],
    lungs: Annotated[Path | None, typer.Option(help="Folder of their lung masks")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
) -> None:
    """Measure, and print a table."""
    models = [find_model(None, folder) for folder in folders]
    cases = find_cases(models, masks, images=images, lungs=lungs)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        start = time.monotonic(), time.process_time()
        predicted = []
        for model in models:
            target = root / "predictions" / model.name
            files, _ = predict_cases(model.folder, model.checkpoints(), cases.images, target, device=device)
            predicted.append(replace(model, folds=(), predictions=files))
        between = time.monotonic(), time.process_time()
        compare_models(predicted, cases, root / "comparison", num_processes=1)
        end = time.monotonic(), time.process_time()
    number = len(cases.references)
    print(f"{len(models)} models on {number} cases, seconds a case and model")
    print(f"{'':12}{'wall':>10}{'processor':>12}")
    for what, (first, last) in {"predicting": (start, between), "comparing": (between, end)}.items():
        wall, processor = ((later - earlier) / number / len(models) for earlier, later in zip(first, last, strict=True))
        print(f"{what:12}{wall:10.2f}{processor:12.2f}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(str(error))
