"""How much of the lungs is diseased: volumes, shares, places and densities of the lesions of one CT.

Left, right, upper and lower are those of the patient, told by the image's direction and never by the order of the
voxels. Definitions and their sources: docs/restore.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gasnet_nnunet.lungs import GRID_MM, MIN_SHARE, Mask, bounding_box, segment_lungs
from gasnet_nnunet.volumes import Grid

CONSOLIDATED_HU = -200.0
"""A lesion's voxel is consolidated from here on and ground glass below ("high opacity" of Chaganti et al. 2020)."""
SIDES = ("left", "right")
THIRDS = ("upper", "middle", "lower")
PART_RADII_MM = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Erosions that part the left from the right lung, the mildest first."""
APART = 0.25
"""The centres of the two lungs lie at least this share of the mask's width apart; pieces of one lung lie closer."""
SINGLE_LUNG = 0.5
"""A mask narrower than this share of the body is one lung."""
BODY_HU = -300.0
"""Between air or lung and fat."""
LEFT_AXIS, UP_AXIS = 0, 2
"""ITK's world runs to the patient's left, back and head (LPS)."""

Burden = Mapping[str, Any]


def find_lungs(ct: NDArray[Any], grid: Grid) -> Mask:
    """Both lungs of a CT of any orientation (`segment_lungs` wants axial slices along the first axis).

    Args:
        ct: CT (Z, Y, X) in HU.
        grid: Where it lies.

    Returns:
        Mask (Z, Y, X), empty where there are no lungs.
    """
    upright = 2 - int(np.argmax(np.abs(_world_axis(grid, UP_AXIS))))
    spacing = list(grid.spacing[::-1])
    spacing.insert(0, spacing.pop(upright))
    return np.moveaxis(segment_lungs(np.moveaxis(ct, upright, 0), spacing), 0, upright)


def burden_of(
    mask: NDArray[Any],
    ct: NDArray[Any],
    grid: Grid,
    *,
    lungs: NDArray[Any] | None = None,
    restored: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """The lesion burden of one CT.

    Args:
        mask: Lesions (Z, Y, X); every label above 0 counts.
        ct: CT (Z, Y, X) in HU.
        grid: Where both lie.
        lungs: Lung mask (Z, Y, X), every value above 0. Lesions that touch it are counted as lung, too: a mask by
            thresholds may miss what is consolidated. What lies apart from it is no lung.
        restored: The restored CT (Z, Y, X) in HU.

    Returns:
        Volumes in ml, percentages, mean HU, and `component_ml`, the volumes of the single lesions (26-connected), the
        largest first. `None` where something is not defined: shares without lungs, densities without a lesion.

    Examples:
        >>> grid = Grid((2, 2, 2), (10.0, 10.0, 10.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        >>> lesion = np.zeros((2, 2, 2), np.uint8)
        >>> lesion[1, 0, 0] = 1
        >>> burden = burden_of(lesion, np.full((2, 2, 2), -600), grid, lungs=np.ones((2, 2, 2)))
        >>> burden["lesion_ml"], burden["lesion_percent"], burden["ground_glass_percent"]
        (1.0, 12.5, 100.0)
    """
    voxel_ml = float(np.prod(grid.spacing)) / 1000
    lesion = np.asarray(mask) > 0
    inside = None if lungs is None or not np.any(lungs) else np.asarray(lungs) > 0
    volumes, apart = _components(lesion, inside, voxel_ml)
    hu = np.asarray(ct)[lesion].astype(np.float64)
    dense = int((hu >= CONSOLIDATED_HU).sum())
    burden: dict[str, Any] = {
        "lesion_ml": len(hu) * voxel_ml,
        **_by_place(lesion & ~apart, inside, np.asarray(ct), grid, voxel_ml),
        "lesion_outside_lung_ml": None if inside is None else float((lesion & ~inside).sum()) * voxel_ml,
        "ground_glass_ml": (len(hu) - dense) * voxel_ml,
        "ground_glass_percent": _percent(len(hu) - dense, len(hu)),
        "consolidated_ml": dense * voxel_ml,
        "consolidated_percent": _percent(dense, len(hu)),
        "components": len(volumes),
        "largest_component_ml": volumes[0] if volumes else 0.0,
        "lesion_mean_hu": float(hu.mean()) if len(hu) else None,
        "lesion_mean_hu_restored": None,
        "lung_mean_hu": None,
        "lung_mean_hu_restored": None,
        "component_ml": volumes,
    }
    for name, values in (("", ct), ("_restored", restored)):
        if values is not None and inside is not None:
            burden[f"lung_mean_hu{name}"] = float(np.asarray(values).mean(where=inside, dtype=np.float64))
    if restored is not None and len(hu):
        burden["lesion_mean_hu_restored"] = float(np.asarray(restored)[lesion].mean(dtype=np.float64))
    return burden


def _components(lesion: Mask, lungs: Mask | None, voxel_ml: float) -> tuple[list[float], Mask]:
    """Volumes of the single lesions, the largest first, and the voxels of those that do not touch the lungs."""
    apart = np.zeros_like(lesion)
    box = bounding_box(lesion)
    if box is None:
        return [], apart
    window = tuple(slice(*edge) for edge in box)
    neighbours = np.ones((3, 3, 3), bool)
    labels, count = ndimage.label(lesion[window], neighbours)
    voxels = np.bincount(labels.ravel(), minlength=count + 1)
    if lungs is not None:
        wider = tuple(slice(max(0, low - 1), high + 1) for low, high in box)
        inner = tuple(slice(w.start - v.start, w.stop - v.start) for w, v in zip(window, wider, strict=True))
        touching = np.zeros(count + 1, bool)
        touching[labels[ndimage.binary_dilation(lungs[wider], neighbours)[inner]]] = True
        apart[window] = (labels > 0) & ~touching[labels]
    return [float(one) * voxel_ml for one in sorted(voxels[1:], reverse=True)], apart


def _by_place(lesion: Mask, lungs: Mask | None, ct: NDArray[Any], grid: Grid, voxel_ml: float) -> dict[str, Any]:
    """Volumes and shares in the lungs, in each of them, and in their thirds."""
    counts = np.zeros((2, len(SIDES), len(THIRDS)))
    known = lungs is not None
    if lungs is not None:
        sides = _Sides(lungs, ct, grid)
        heights = _Heights(grid)
        low, high = heights.range_of(lungs)
        for z in np.flatnonzero((lungs | lesion).any(axis=(1, 2))).tolist():
            place = lungs[z] | lesion[z]
            # From above: 0 for the upper third.
            third = ((high - heights.of_slice(z)[place]) / max(high - low, 1e-6) * 3).astype(int).clip(0, 2)
            region = sides.of_slice(z)[place] * 3 + third
            for row, voxels in enumerate((np.ones(region.shape, bool), lesion[z][place])):
                counts[row] += np.bincount(region[voxels], minlength=6).reshape(counts[row].shape)
    lung, diseased = counts
    places: dict[str, Any] = {
        "lung_ml": lung.sum() * voxel_ml if known else None,
        "lesion_percent": _percent(diseased.sum(), lung.sum()),
    }
    for axis, names in ((1, SIDES), (0, THIRDS)):
        for name, of_lung, of_lesion in zip(names, lung.sum(axis), diseased.sum(axis), strict=True):
            places[f"{name}_lung_ml"] = of_lung * voxel_ml if known else None
            places[f"{name}_lesion_ml"] = of_lesion * voxel_ml if known else None
            places[f"{name}_percent"] = _percent(of_lesion, of_lung)
    return {name: None if value is None else float(value) for name, value in places.items()}


def _percent(part: float, whole: float) -> float | None:
    return 100.0 * float(part) / float(whole) if whole else None


def _world_axis(grid: Grid, axis: int) -> NDArray[np.float64]:
    """Step along a world axis, in mm, for each step along the image's axes X, Y and Z."""
    return np.reshape(grid.direction, (3, 3))[axis] * np.asarray(grid.spacing)


class _Heights:
    """How far up the patient a voxel lies, in mm."""

    def __init__(self, grid: Grid) -> None:
        x, y, z = (step * np.arange(count) for step, count in zip(_world_axis(grid, UP_AXIS), grid.size, strict=True))
        self._z, self._plane = z, y[:, None] + x

    def of_slice(self, z: int) -> NDArray[np.float64]:
        return self._z[z] + self._plane

    def range_of(self, mask: Mask) -> tuple[float, float]:
        heights = [self.of_slice(z)[mask[z]] for z in np.flatnonzero(mask.any(axis=(1, 2))).tolist()]
        return min(float(one.min()) for one in heights), max(float(one.max()) for one in heights)


class _Sides:
    """Which lung a voxel belongs to: 0 for the left one, 1 for the right one; found on a grid of about 3 mm."""

    def __init__(self, lungs: Mask, ct: NDArray[Any], grid: Grid) -> None:
        self._steps = [max(1, round(GRID_MM / edge)) for edge in grid.spacing[::-1]]
        coarse = tuple(slice(None, None, step) for step in self._steps)
        self._shape = lungs.shape
        spacing = [edge * step for edge, step in zip(grid.spacing[::-1], self._steps, strict=True)]
        mask = lungs[coarse]
        # Towards the patient's left, in mm.
        z, y, x = (
            along * step * np.arange(count)
            for along, step, count in zip(_world_axis(grid, LEFT_AXIS)[::-1], self._steps, mask.shape, strict=True)
        )
        left = z[:, None, None] + y[:, None] + x
        self._coarse = _part(mask, left, ct[coarse] > BODY_HU, spacing)

    def of_slice(self, z: int) -> NDArray[np.int64]:
        rows, columns = (np.arange(count) // step for count, step in zip(self._shape[1:], self._steps[1:], strict=True))
        return self._coarse[z // self._steps[0]][np.ix_(rows, columns)]


def _part(lungs: Mask, left: NDArray[np.float64], body: Mask, spacing: list[float]) -> NDArray[np.int64]:
    """0 where the left lung is nearer, 1 where the right one is."""
    inside = left[lungs]
    if not len(inside):
        return np.zeros(lungs.shape, np.int64)
    width = float(np.ptp(inside))
    depth = ndimage.distance_transform_edt(np.pad(lungs, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    for radius in PART_RADII_MM:
        labels, count = ndimage.label(depth > radius)
        if count < 2:
            continue
        voxels = np.bincount(labels.ravel())[1:]
        second, first = (np.argsort(voxels)[-2:] + 1).tolist()
        centres = [float(left[labels == one].mean()) for one in (first, second)]
        if voxels[second - 1] >= MIN_SHARE * voxels[first - 1] and abs(centres[0] - centres[1]) > APART * width:
            seeds = np.where(labels == (first if centres[0] > centres[1] else second), 1, 0)
            seeds[labels == (second if centres[0] > centres[1] else first)] = 2
            nearest = ndimage.distance_transform_edt(
                seeds == 0, sampling=spacing, return_distances=False, return_indices=True
            )
            return seeds[tuple(nearest)].astype(np.int64) - 1
    across = left[body] if body.any() else inside
    if width < SINGLE_LUNG * np.ptp(across):
        return np.full(lungs.shape, int(inside.mean() < (across.min() + across.max()) / 2), np.int64)
    # Grown together: cut where the lungs are thinnest around the middle.
    edges = np.linspace(inside.min(), inside.max(), max(8, int(width / (2 * max(spacing)))) + 1)
    profile = np.histogram(inside, edges)[0].astype(float)
    third = len(profile) // 3
    middle = slice(third, len(profile) - third)
    cut = edges[middle][int(np.argmin(ndimage.uniform_filter1d(profile, 3)[middle]))] + np.diff(edges)[0] / 2
    return (left < cut).astype(np.int64)
