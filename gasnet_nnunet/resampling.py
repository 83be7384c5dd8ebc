"""From the plan's grid back to the CT's own, some slices at a time.

nnU-Net resamples a whole CT at once: 512 x 512 x 600 voxels of a plan with thick slices would take more than 10 GB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.nn import functional

SLAB_VOXELS = 8_000_000
"""Voxels of the CT that are worked on at a time."""


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Runs of slices along the first axis of a volume (Z, Y, X), of about `SLAB_VOXELS` each.

    Examples:
        >>> list(slabs((5, 2000, 2000)))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, SLAB_VOXELS // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def resample_logits(
    logits: Tensor, shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float], configuration: Any
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Resample logits as nnU-Net does for its masks, to the last bit, a slab at a time.

    Where the plan's function resamples slices in plane and then takes the nearest one along Z, it is called for the
    slices that a slab needs. Otherwise it is called channel by channel, as it works by itself.

    Args:
        logits: (K, z, y, x) on the plan's grid, in main memory.
        shape: Voxels (Z, Y, X) to resample to.
        spacing: Voxel size (z, y, x) in mm of the logits.
        new_spacing: Voxel size (Z, Y, X) in mm to resample to.
        configuration: nnU-Net's `ConfigurationManager`.

    Yields:
        A slab and its logits (K, n, Y, X).
    """
    resample = configuration.resampling_fn_probabilities
    if _slice_by_slice(spacing, new_spacing, configuration):
        count = logits.shape[1]
        # nnU-Net's own formula and rounding, for one axis.
        places = (count / shape[0]) * (np.arange(shape[0]) + 0.5) - 0.5
        nearest = map_coordinates(np.arange(count, dtype=float), [places], order=0, mode="nearest").astype(int)
        for rows in slabs(shape):
            first, last = nearest[rows][0], nearest[rows][-1] + 1
            planes = np.asarray(resample(logits[:, first:last], (last - first, *shape[1:]), spacing, new_spacing))
            yield rows, planes[:, nearest[rows] - first]
        return
    resampled: NDArray[Any] | None = None
    for channel in range(len(logits)):
        one = np.asarray(resample(logits[channel : channel + 1], tuple(shape), spacing, new_spacing))
        if resampled is None:
            resampled = np.empty((len(logits), *shape), one.dtype)
        resampled[channel] = one[0]
    assert resampled is not None
    for rows in slabs(shape):
        yield rows, resampled[:, rows]


def _slice_by_slice(spacing: Sequence[float], new_spacing: Sequence[float], configuration: Any) -> bool:
    plan = configuration.configuration
    if plan["resampling_fn_probabilities"] != resample_data_or_seg_to_shape.__name__:
        return False
    options = plan["resampling_fn_probabilities_kwargs"]
    known = {"force_separate_z", "separate_z_anisotropy_threshold"}
    separate, axis = determine_do_sep_z_and_axis(
        options.get("force_separate_z", False),
        spacing,
        new_spacing,
        **{name: options[name] for name in known - {"force_separate_z"} if name in options},
    )
    return bool(separate) and axis == 0 and options.get("order_z", 0) == 0


def interpolate_slab(volume: Tensor, shape: Sequence[int], rows: slice) -> NDArray[np.float32]:
    """A slab of a volume, resampled trilinearly; both grids cover the same box.

    Args:
        volume: (z, y, x)
        shape: Voxels (Z, Y, X) to resample to.
        rows: Slices of the slab.

    Returns:
        (n, Y, X) in single precision.
    """
    count = volume.shape[0]
    places = (np.arange(rows.start, rows.stop) + 0.5) * (count / shape[0]) - 0.5
    places = places.clip(0, count - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, count - 1)
    weight = torch.from_numpy((places - below).astype(np.float32))[:, None, None]
    planes = volume[below].float() * (1 - weight) + volume[above].float() * weight
    size = (int(shape[1]), int(shape[2]))
    return functional.interpolate(planes[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
