"""Checkpoints: which of a model predict, and files that survive a kill, a full disk and a truncated copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gasnet_nnunet.errors import UserError

CHECKPOINT_KEY = "gasnet"
"""Where our state stands in nnU-Net's checkpoint; nnU-Net's predictor ignores it."""
CHECKPOINTS = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth"}
"""nnU-Net's file for each choice of a checkpoint."""
TEMPORARY = ".{}.tmp"
"""Name of a checkpoint that is being written."""


def checkpoint_file(checkpoint: str) -> str:
    """File of a checkpoint, which may be called `final`, `best`, or by its file's name as nnU-Net's `-chk` has it."""
    return CHECKPOINTS.get(checkpoint, checkpoint)


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that nnU-Net trained no model in.

    Raises:
        UserError: It lacks plans.json or dataset.json.
    """
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}. A model's folder is <trainer>__<plans>__<configuration> in nnUNet_results."
            )


def named_folds(folder: Path, wanted: Sequence[str | int] | None = None) -> list[str]:
    """The folds of a model's folder, whether their training has ended or not.

    Args:
        folder: `<trainer>__<plans>__<configuration>`.
        wanted: Numbers of folds, or `all`; every one there, if there is any, if none is named.

    Raises:
        UserError: There is no such fold.
    """
    names = [path.name.removeprefix("fold_") for path in folder.glob("fold_*") if path.is_dir()]
    # Somebody's fold_0_old is no fold to nnU-Net.
    there = sorted((name for name in names if name == "all" or name.isdecimal()), key=lambda name: (len(name), name))
    chosen = list(dict.fromkeys(str(fold) for fold in wanted or ()))
    if missing := [f"fold_{fold}" for fold in chosen if fold not in there]:
        has = ", ".join(f"fold_{fold}" for fold in there) or "no fold at all"
        raise UserError(f"{folder} has no {', '.join(missing)}; it has {has}. Name folds with -f.")
    return chosen or there


def predicting_folds(
    folder: Path, wanted: Sequence[str | int] | None, checkpoint: str, *, unfinished: bool = False
) -> list[str]:
    """The folds of a model that predict together.

    Args:
        folder: `<trainer>__<plans>__<configuration>`.
        wanted: Numbers of folds, or `all`. If none is named, as nnU-Net takes them: every numbered one that has the
            checkpoint, else `all`.
        checkpoint: File of each fold.
        unfinished: If none is named, numbered folds without the checkpoint count, and are refused, too.

    Raises:
        UserError: There is no such fold, or it lacks the checkpoint.
    """
    check_model_folder(folder)
    there = named_folds(folder, wanted)
    if not there:
        raise UserError(f"{folder} has no folder fold_0, fold_1, ... or fold_all, so nothing was trained there yet.")
    ready = [fold for fold in there if (folder / f"fold_{fold}" / checkpoint).is_file()]
    chosen = there
    if not wanted:
        among = there if unfinished else ready or there
        chosen = [fold for fold in among if fold != "all"] or among
    if missing := [fold for fold in chosen if fold not in ready]:
        place = folder / f"fold_{missing[0]}"
        has = ", ".join(sorted(path.name for path in place.glob("checkpoint_*.pth"))) or "no checkpoint at all"
        raise UserError(
            f"{place} has no {checkpoint}; it has {has}. Let its training end (nnUNetv2_train ... --c goes on with "
            "it), name the folds that are ready with -f, or another checkpoint with -chk."
        )
    return chosen


def remove_leftovers(folder: Path) -> None:
    """Remove the checkpoints that a killed training left half written."""
    for leftover in folder.glob(TEMPORARY.format("checkpoint_*.pth")):
        leftover.unlink()


def write_checkpoint(path: Path, save: Callable[[str], None], extra: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all, with keys of ours added, if there are any.

    `torch.save` writes in place: a kill during it would lose the old checkpoint.

    Args:
        path: The checkpoint.
        save: nnU-Net's own `save_checkpoint`, which takes a file name.
        extra: Keys to add.

    Raises:
        UserError: It could not be written, e.g. because the disk is full; the old file is untouched.
    """
    temporary = path.with_name(TEMPORARY.format(path.name))
    try:
        save(str(temporary))
        if extra:
            checkpoint = torch.load(temporary, map_location="cpu", weights_only=False)
            with temporary.open("wb") as file:
                torch.save({**checkpoint, **extra}, file)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # A full disk is an OSError or, from torch's own writer, a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # torch's own writer puts it over two lines
        kept = "The one from before is untouched; go on with --c" if path.exists() else "Start again"
        raise UserError(
            f"The checkpoint {path} could not be written: {reason}. {kept} once that disk has room and takes files."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into main memory.

    Raises:
        UserError: The file is missing, truncated or no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    # Unpickling damaged bytes may raise anything at all, as the documentation of pickle says.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {reason}). It may be truncated: copy it "
            "again, or move it away to continue from another one."
        ) from None
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise UserError(f"{path} is no nnU-Net checkpoint.")
    return checkpoint
