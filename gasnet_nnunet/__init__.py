"""GASNet for nnU-Net: lesion segmentation from one voxel-labelled CT and many that are only diagnosed."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gasnet_nnunet.inference import LoadedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def load_model(
    folder: str | PathLike[str],
    *,
    folds: Sequence[str | int] | None = None,
    checkpoint: str = "final",
    device: str | None = None,
    step_size: float = 0.5,
    mirroring: bool = True,
) -> LoadedModel:
    """Load a trained model, for `model.segment(ct)` and `model.restore(ct)`.

    torch, nnU-Net and SimpleITK are imported by this call, not by `import gasnet_nnunet`.

    Args:
        folder: The model's folder, `nnUNet_results/<dataset>/<trainer>__<plans>__<configuration>`.
        folds: Folds to average; `None` for all that have the checkpoint.
        checkpoint: "final", "best", or the checkpoint's file name in each fold.
        device: "cuda", "cpu" or "mps"; `None` for cuda where there is one, else cpu.
        step_size: Step of the sliding window, in shares of the patch.
        mirroring: Mirror S's input along the axes that were trained with, as nnU-Net does.

    Raises:
        UserError: There is no such model, a file of it is damaged, or it is one that cannot be used here.
    """
    from gasnet_nnunet.inference import LoadedModel

    return LoadedModel(
        Path(folder), folds=folds, checkpoint=checkpoint, device=device, step_size=step_size, mirroring=mirroring
    )
