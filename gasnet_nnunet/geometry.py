"""Target spacing and patch size such that one patch holds the lungs of nearly every case.

The paper resizes every lung box to 40 x 160 x 160. nnU-Net has one target spacing for a whole dataset, so here the
spacing is chosen instead: as coarse as the largest lungs (but for a few outliers) ask for, and no coarser.
All triples are (Z, Y, X), the order in which nnU-Net's readers return the axes of a CT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

SHARE_HELD = 0.95
"""Share of the cases whose lungs one patch must hold."""
MIN_FEATURE_MAP_EDGE = 4
"""nnU-Net's smallest edge of a feature map."""
SIMILAR_SPACINGS = 1.5
"""In-plane axes whose data spacings are within this factor get the same target spacing."""
COARSENING = 1.03
"""Step of the search, that of nnU-Net's own search for its 3d_lowres configuration."""

Spacing = tuple[float, float, float]
Patch = tuple[int, int, int]
Fits = Callable[[Spacing, Patch], bool]


@dataclass(frozen=True)
class Topology:
    """nnU-Net's network topology for a spacing and a patch.

    Args:
        strides: Down-sampling factors (Z, Y, X) of each stage.
        kernel_sizes: Convolution kernels (Z, Y, X) of each stage.
        patch_size: The patch, enlarged so that every stage divides it evenly.
    """

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: Patch


@dataclass(frozen=True)
class Geometry:
    """The chosen spacing and patch.

    Args:
        spacing: Target spacing in mm.
        topology: Strides, kernels and patch size.
        remarks: Why they are not what was asked for, one sentence each.
    """

    spacing: Spacing
    topology: Topology
    remarks: tuple[str, ...] = field(default=())

    @property
    def patch_size(self) -> Patch:
        """Patch size in voxels."""
        return self.topology.patch_size

    def holds(self, extents: np.ndarray) -> np.ndarray:
        """Which boxes of `extents` (N, 3) in mm fit into one patch wherever the voxel grid lies, (N,) bool.

        A box of e mm meets up to e / spacing + 1 voxels along an axis.

        Examples:
            >>> geometry = choose_geometry(np.array([[300.0, 200.0, 300.0]]), np.array([[5.0, 1.0, 1.0]]), (40, 80, 80))
            >>> geometry.holds(np.array([[300.0, 200.0, 300.0], [320.0, 200.0, 300.0]])).tolist()
            [True, False]
        """
        room = (np.array(self.patch_size) - 1) * np.array(self.spacing)
        return np.all(np.asarray(extents) <= room * (1 + 1e-9), axis=1)


def nnunet_topology(spacing: Spacing, patch_size: Patch) -> Topology:
    """Strides, kernels and the divisible patch by nnU-Net's own rules (`get_pool_and_conv_props`)."""
    _, strides, kernels, divisible, _ = get_pool_and_conv_props(spacing, patch_size, MIN_FEATURE_MAP_EDGE, 999999)
    z, y, x = (int(size) for size in divisible)
    return Topology(strides, kernels, (z, y, x))


def covering_extent(extents: np.ndarray, share: float = SHARE_HELD) -> np.ndarray:
    """The smallest equal quantiles of the axes that hold at least `share` of the boxes along all axes at once.

    The 95th percentile of each axis alone would hold as few as 85 % of the cases.

    Args:
        extents: Box sizes in mm, (N, 3).
        share: Share of the boxes to hold.

    Returns:
        Extent in mm, (3,).

    Examples:
        >>> covering_extent(np.array([[300.0, 200.0, 310.0], [280.0, 210.0, 330.0]])).tolist()
        [300.0, 210.0, 330.0]
    """
    ranked = np.sort(extents, axis=0)
    for count in range(math.ceil(share * len(extents) - 1e-9), len(extents)):
        if np.mean(np.all(extents <= ranked[count - 1], axis=1)) >= share:
            return ranked[count - 1]
    return ranked[-1]


def choose_geometry(
    extents: np.ndarray,
    spacings: np.ndarray,
    patch_size: Patch | None = None,
    *,
    preferred_spacing: Sequence[float] | None = None,
    fits_memory: Fits = lambda spacing, patch_size: True,
) -> Geometry:
    """Choose target spacing and patch so that one patch holds nearly every box.

    With a given patch the spacing follows: box extent / patch, Y and X alike where the data are, never finer than the
    finest data. Without one, the spacing starts at `preferred_spacing` and is coarsened, the finer axes first, until
    the patch that holds the boxes fits the memory.

    Args:
        extents: Box sizes of the lungs in mm, (N, 3).
        spacings: Spacings of the cases in mm, (N, 3).
        patch_size: The patch in voxels, or `None` to derive it.
        preferred_spacing: Spacing in mm to start from without a given patch; the median of the data if `None`.
        fits_memory: Tells whether a network of this spacing and patch fits the memory.

    Examples:
        >>> boxes, spacings = np.array([[300.0, 210.0, 310.0]]), np.array([[5.0, 0.8, 0.8]])
        >>> geometry = choose_geometry(boxes, spacings, (40, 160, 160))
        >>> [round(size, 2) for size in geometry.spacing]
        [7.69, 1.95, 1.95]
        >>> choose_geometry(boxes, spacings, preferred_spacing=(5.0, 2.0, 2.0)).patch_size
        (64, 112, 160)
    """
    extent = covering_extent(np.asarray(extents, dtype=float))
    data = np.asarray(spacings, dtype=float)
    tied = max(np.median(data, axis=0)[1:]) <= SIMILAR_SPACINGS * min(np.median(data, axis=0)[1:])
    if patch_size is not None:
        return _spacing_for_patch(extent, patch_size, finest=data.min(axis=0), tied=tied)
    start = np.median(data, axis=0) if preferred_spacing is None else np.array(preferred_spacing, dtype=float)
    return _patch_for_memory(extent, start, tied=tied, fits_memory=fits_memory)


def _triple(values: np.ndarray) -> Spacing:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _tie(spacing: np.ndarray, tied: bool) -> np.ndarray:
    """The coarser of the in-plane spacings for both, where they are tied."""
    return np.array([spacing[0], max(spacing[1:]), max(spacing[1:])]) if tied else spacing


def _spacing_for_patch(extent: np.ndarray, wanted: Patch, *, finest: np.ndarray, tied: bool) -> Geometry:
    # A larger patch asks for a finer spacing, which may in turn pool an axis once more: both grow until they agree.
    patch = wanted
    while True:
        needed = _tie(extent / (np.array(patch) - 1), tied)
        spacing = np.maximum(needed, _tie(finest, tied))
        topology = nnunet_topology(_triple(spacing), patch)
        if topology.patch_size == patch:
            break
        patch = topology.patch_size
    remarks = []
    if patch != wanted:
        remarks.append(
            f"The patch {_times(wanted)} became {_times(patch)}, which every stage of the network divides evenly."
        )
    axes = [name for name, floor, need in zip("ZYX", spacing, needed, strict=True) if floor > need * (1 + 1e-9)]
    if axes:
        remarks.append(
            f"Along {', '.join(axes)} the patch is larger than the lungs need: the spacing stays at that of the finest "
            "scan, because a finer one would only invent voxels."
        )
    return Geometry(_triple(spacing), topology, tuple(remarks))


def _patch_for_memory(extent: np.ndarray, start: np.ndarray, *, tied: bool, fits_memory: Fits) -> Geometry:
    preferred = _tie(start, tied)
    coarse = preferred
    while True:
        patch = np.maximum(np.ceil(extent / coarse).astype(int) + 1, 2 * MIN_FEATURE_MAP_EDGE)
        spacing, topology = coarse, nnunet_topology(_triple(coarse), (int(patch[0]), int(patch[1]), int(patch[2])))
        # The patch was rounded up to what divides evenly: use that room for a finer spacing.
        finer = np.maximum(_tie(extent / (np.array(topology.patch_size) - 1), tied), preferred)
        refined = nnunet_topology(_triple(finer), topology.patch_size)
        if refined.patch_size == topology.patch_size:
            spacing, topology = finer, refined
        if fits_memory(_triple(spacing), topology.patch_size):
            break
        finest = coarse.max() / coarse > 2
        coarse = np.where(finest if finest.any() else True, coarse * COARSENING, coarse)
    remarks = []
    if np.any(spacing > preferred * (1 + 1e-9)):
        remarks.append(
            f"The data's own spacing ({_times(preferred, '.3g')} mm) was coarsened until a patch that holds the lungs "
            "fits the memory target."
        )
    return Geometry(_triple(spacing), topology, tuple(remarks))


def _times(values: Sequence[float] | np.ndarray, form: str = "") -> str:
    return " x ".join(format(value, form) for value in values)
