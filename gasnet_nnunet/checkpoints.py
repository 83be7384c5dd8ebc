"""Checkpoints that survive a kill, a full disk and a truncated copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gasnet_nnunet.errors import UserError

CHECKPOINT_KEY = "gasnet"
"""Where our state stands in nnU-Net's checkpoint; nnU-Net's predictor ignores it."""
TEMPORARY = ".{}.tmp"
"""Name of a checkpoint that is being written."""


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
