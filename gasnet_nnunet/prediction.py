"""Prediction by nnU-Net's own predictor, case by case, so that an interrupted one goes on."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json
from gasnet_nnunet.raw_dataset import read_json

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
    source = {"model": str(model), "checkpoints": {str(path): _stamp(path) for path in checkpoints}}
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    known = record["cases"] if record.get("source") == source else {}
    stamps = {case: [_stamp(path) for path in paths] for case, paths in images.items()}
    left = [case for case in images if known.get(case) != stamps[case] or not targets[case].is_file()]
    if not left:
        return targets, 0
    said = io.StringIO()  # nnU-Net tells of every case
    with contextlib.redirect_stdout(said):
        predictor = _predictor(model, checkpoints, device)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    done = {case: stamp for case, stamp in known.items() if case not in left}
    for case in _track(left, description):
        with contextlib.redirect_stdout(said):
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
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor = nnUNetPredictor(
        device=torch.device(name), perform_everything_on_device=name == "cuda", allow_tqdm=False
    )
    folds = [checkpoint.parent.name.removeprefix("fold_") for checkpoint in checkpoints]
    try:
        predictor.initialize_from_trained_model_folder(str(model), folds, checkpoints[0].name)
    # Damaged bytes and missing classes may raise anything at all; the message is what helps.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"nnU-Net cannot predict with {model} ({type(error).__name__}: {reason}). Does nnUNetv2_predict work "
            "with it?"
        ) from None
    return predictor


def _track(cases: Sequence[str], description: str | None) -> Iterator[str]:
    if description is None:
        yield from cases
        return
    from rich.progress import track

    yield from track(cases, description)


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]
