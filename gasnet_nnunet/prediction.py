"""Prediction by nnU-Net's own predictor, case by case, so that an interrupted one goes on."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gasnet_nnunet.devices import choose_device
from gasnet_nnunet.files import file_stamp, read_json, write_json

RECORD = "predicted.json"
"""In a folder of predictions: the checkpoints and the CTs that they were made from."""
DESCRIPTIONS = ("dataset.json", "plans.json")
"""What nnU-Net puts beside its predictions, for its own evaluation and post-processing."""


def predict_cases(
    model: Path,
    checkpoints: Sequence[Path],
    images: Mapping[str, Sequence[Path]],
    folder: Path,
    *,
    device: str | None = None,
    description: str | None = None,
) -> tuple[dict[str, Path], int]:
    """Predict cases that have not been predicted yet by these checkpoints from these images.

    Args:
        model: nnU-Net's model folder.
        checkpoints: `fold_X/checkpoint_*.pth` in it, all of one name; their mean predicts.
        images: Files of the channels of each case.
        folder: Where `<case><file_ending>` goes; each file appears when it is whole.
        device: "cpu", "cuda" or "mps"; cuda where there is one if `None`, else cpu.
        description: Title of the progress bar; none is shown if `None`.

    Returns:
        The prediction of each case, and how many of them were made now.

    Raises:
        UserError: nnU-Net cannot make a predictor of the model.
    """
    ending = str(read_json(model / "dataset.json")["file_ending"])
    targets = {case: folder / f"{case}{ending}" for case in images}
    source = {"model": str(model), "checkpoints": {str(path): file_stamp(path) for path in checkpoints}}
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    known = record["cases"] if record.get("source") == source else {}
    stamps = {case: [file_stamp(path) for path in paths] for case, paths in images.items()}
    left = [case for case in images if known.get(case) != stamps[case] or not targets[case].is_file()]
    if not left:
        return targets, 0
    predictor = _predictor(model, checkpoints, device)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    done = {case: stamp for case, stamp in known.items() if case not in left}
    for case in _track(left, description):
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net tells of every case
            predictor.predict_from_files_sequential([[str(path) for path in images[case]]], [str(unfinished / case)])
        os.replace(unfinished / targets[case].name, targets[case])
        done[case] = stamps[case]
        write_json(folder / RECORD, {"source": source, "cases": done})
    for name in DESCRIPTIONS:
        os.replace(unfinished / name, folder / name)
    shutil.rmtree(unfinished)
    return targets, len(left)


def _predictor(model: Path, checkpoints: Sequence[Path], device: str | None) -> Any:
    import torch

    from gasnet_nnunet.trained_model import load_predictor

    where = torch.device(choose_device(device))
    folds = [checkpoint.parent.name.removeprefix("fold_") for checkpoint in checkpoints]
    return load_predictor(model, folds, checkpoints[0].name, where)


def _track(cases: Sequence[str], description: str | None) -> Iterator[str]:
    if description is None:
        yield from cases
        return
    from rich.progress import track

    yield from track(cases, description)
