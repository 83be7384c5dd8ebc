"""Lungs of a CT: mask and bounding box by thresholding and morphology.

Nothing here is learnt. The mask tells G, D and the pseudo-labels where lungs are; it is not a result of its own. A mask
of the user's in `nnUNet_raw/<dataset>/lungsTr` always wins over a computed one.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed

from gasnet_nnunet.errors import UserError

Mask = NDArray[np.bool_]
Values = NDArray[np.float32]
Spacing = Sequence[float]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open voxel ranges (start, stop) along Z, Y and X."""

GRID_MM = 3.0
"""Grid of the morphology: finer axes are averaged down to it, and the surface found is interpolated back."""
SMOOTH_MM = 1.0
"""Standard deviation of the smoothing on that grid."""
HU_RANGE = (-1250.0, 250.0)
"""Values are clipped to this first: padding (-2048, -3024), bone and metal would only distort the thresholds."""
TABLE_MM = 4.0
"""Erosion that parts the body from table and blankets."""
EROSIONS_MM = (4.0, 6.0, 8.0, 12.0)
"""Erosions that part the lungs from other air, the mildest first."""
SPECKLE_MM = 2.5
"""Standard deviation of the smoothing of a mask that bridges noise."""
MIN_LUNG_ML = 20.0
MIN_SHARE = 0.1
"""A piece of lung has at least this share of the largest piece's volume; smaller ones are bowel gas or the trachea."""
MIN_CONTRAST = 300.0
"""Least difference in HU between tissue and lung; less is fat against muscle in a scan without lungs."""
AIR_HU = (-1060.0, -980.0)
TISSUE_HU = (-150.0, 150.0)
"""Medians of the air outside and of the body where values are plain HU, neither clipped nor equalised."""
GAS_HU = -970.0
"""In plain HU, gas in airways, bowel and stomach lies below this, and the mean of a lung, with emphysema too, above."""
CORE_LEVEL = 0.35
"""Where lung is 0 and tissue 1, what lies below this is lung, and fat after contrast equalisation lies above."""
SURFACE_LEVEL = 0.55
"""Where lung is 0 and tissue 1, the lung's surface."""
LESION_LEVEL = 0.7
"""Where lung is 0 and tissue 1, in plain HU, fat lies above this, and most of a consolidation below."""
BLUR_MM = 4.0
"""Half the thickness up to which what lies between lung and tissue may be a blurred border of the two."""
DENSE_LEVEL = 0.75
"""Where lung is 0 and tissue 1, what lies above this is lung only where lung encloses it."""
NEAR_MM = 12.0
"""Tissue up to this distance gives the level of tissue nearby; the lung's surface is not looked for beyond."""
LOCAL_MM = (6.0, 15.0, 15.0)
"""Standard deviation (Z, Y, X) of the means that give the levels nearby; contrast equalisation works slice by slice."""
VESSEL_MM = 8.0
"""Closing that takes in vessels and nodules."""
LESION_MM = 30.0
"""Closing that takes in consolidations at the pleura."""
HOLE_CM2 = 6.0
"""Holes in a slice up to this area are vessels, nodules or lesions; larger ones are the heart or the liver's dome."""
DIRECTIONS = 180
IN_PLANE = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))


def bounding_box(mask: NDArray[Any]) -> Box | None:
    """Smallest box around the non-zero voxels.

    Args:
        mask: Array (Z, Y, X).

    Returns:
        The half-open box, or `None` for an empty mask.

    Examples:
        >>> bounding_box(np.pad(np.ones((1, 2, 3), bool), 1))
        ((1, 2), (1, 3), (1, 4))
    """
    found = ndimage.find_objects((np.asarray(mask) != 0).astype(np.uint8))
    return tuple((axis.start, axis.stop) for axis in found[0]) if found else None  # type: ignore[return-value]


def segment_lungs(ct: NDArray[Any], spacing: Spacing) -> Mask:
    """Both lungs, with the lesions in them as far as morphology can follow.

    Air inside the body that is large enough and not as dark as gas makes the core. From there the surface is looked for
    between the levels of lung and tissue nearby, not at a fixed HU, because contrast equalisation shifts them. Closings
    then take in vessels and consolidations. See docs/lungs.md.

    Args:
        ct: CT (Z, Y, X) in HU, also clipped or padded; axial slices along the first axis, either way up.
        spacing: Voxel size (Z, Y, X) in mm.

    Returns:
        Mask (Z, Y, X), empty where there are no lungs.
    """
    grid = _Grid(ct, spacing)
    hull = _hull(grid)
    box = bounding_box(hull)
    if box is None:
        return np.zeros(ct.shape, bool)
    gas = _gas_level(grid, hull)
    plain = gas > -math.inf
    window = tuple(slice(*axis) for axis in box)
    values, hull = grid.values[window], hull[window]
    low = values < grid.threshold
    lungs = _pieces(low, values, hull, gas, grid.spacing)
    if not lungs.any():
        return np.zeros(ct.shape, bool)
    lung_level, tissue_level = float(np.median(values[lungs])), float(np.median(values[hull & ~low]))
    if tissue_level - lung_level < MIN_CONTRAST:
        return np.zeros(ct.shape, bool)
    level = _level(values, lung_level, tissue_level)
    core = _pieces(level < CORE_LEVEL, values, hull, gas, grid.spacing)
    near = _close_vessels(core, grid.spacing)
    distance = _distance_to(near, grid.spacing)
    # Between the two lie consolidations, in plain HU; contrast equalisation puts fat there too.
    lesion_level = LESION_LEVEL if plain else -math.inf
    tissue = hull & (distance > 2.5) & (distance <= NEAR_MM) & (level > lesion_level)
    level = _level(
        values,
        _local_mean(values, core, lung_level, grid.spacing),
        _local_mean(values, tissue, tissue_level, grid.spacing),
    )
    core = _pieces(level < CORE_LEVEL, values, hull, gas, grid.spacing)
    core |= _consolidations(level, lesion_level, hull, core, grid.spacing)
    outside = ~hull | ((distance > NEAR_MM) & ~core) | ((level > DENSE_LEVEL) & ~near)
    field = np.full(grid.values.shape, -1.0, np.float32)
    field[window] = _close_lesions(_surface(values, level, core, outside), hull, grid.spacing)
    return grid.to_ct(field)


def segment_body(ct: NDArray[Any], spacing: Spacing) -> Mask:
    """The largest body in the scan, filled, without the table as far as it is thin.

    Args:
        ct: CT (Z, Y, X) in HU, also clipped or padded.
        spacing: Voxel size (Z, Y, X) in mm.

    Returns:
        Mask (Z, Y, X), empty where nothing is denser than air.
    """
    grid = _Grid(ct, spacing)
    body = _dilate(_body_core(grid), TABLE_MM + 1.0, grid.spacing) & grid.tissue
    return grid.to_ct(np.where(_fill_slices(body, math.inf, grid.spacing), np.float32(1), np.float32(-1)))


class _Grid:
    """A CT averaged down to about `GRID_MM`, and the way back.

    Args:
        ct: CT (Z, Y, X) in HU.
        spacing: Voxel size (Z, Y, X) in mm.
    """

    def __init__(self, ct: NDArray[Any], spacing: Spacing) -> None:
        image = sitk.GetImageFromArray(np.clip(ct, *HU_RANGE, dtype=np.float32))
        image.SetSpacing([float(edge) for edge in reversed(spacing)])
        self._ct = (image.GetSize(), image.GetSpacing())
        bins = [max(1, min(int(GRID_MM / s), n)) for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)]
        image = sitk.BinShrink(image, bins)
        finer = zip(image.GetSize(), image.GetSpacing(), strict=True)
        size = [max(1, math.ceil(n * s / GRID_MM)) if s < GRID_MM else n for n, s in finer]
        self._image = _resample(image, size, [max(s, GRID_MM) for s in image.GetSpacing()], image.GetOrigin())
        self.spacing = self._image.GetSpacing()[::-1]
        self.values = ndimage.gaussian_filter(
            sitk.GetArrayViewFromImage(self._image), [SMOOTH_MM / edge for edge in self.spacing]
        )
        self.threshold = float(threshold_otsu(self.values))
        """Between air and tissue, by Otsu."""
        self.tissue = self.values > self.threshold

    def to_ct(self, field: Values) -> Mask:
        """Where a field on this grid, interpolated to that of the CT, is above 0."""
        image = sitk.GetImageFromArray(field)
        image.CopyInformation(self._image)
        size, spacing = self._ct
        return sitk.GetArrayFromImage(_resample(image, size, spacing, (0.0, 0.0, 0.0))) > 0


def _resample(image: sitk.Image, size: Sequence[int], spacing: Spacing, origin: Spacing) -> sitk.Image:
    """Linear interpolation to another grid; the outermost values go on beyond their centres."""
    same, outside = sitk.Transform(), 0.0
    return sitk.Resample(
        image, size, same, sitk.sitkLinear, origin, spacing, image.GetDirection(), outside, sitk.sitkFloat32, True
    )


def _distance_to(mask: Mask, spacing: Spacing) -> Values:
    """Distance of each voxel to the mask in mm, 0 inside."""
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    distance = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    return np.maximum(sitk.GetArrayViewFromImage(distance), 0)


def _erode(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    """Erosion by a ball of `radius` mm; the edge of the volume does not erode, because organs go on beyond it."""
    return _depth(mask, spacing) > radius


def _depth(mask: Mask, spacing: Spacing) -> Values:
    """Distance of each voxel to the outside of the mask in mm; the mask goes on beyond the edge of the volume."""
    return _distance_to(~mask, spacing)


def _dilate(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    return _distance_to(mask, spacing) <= radius


def _close(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    """Closing by a ball of `radius` mm. In plane there is nothing beyond the volume, along Z the lungs may go on."""
    margin = [0, *(math.ceil(radius / edge) + 1 for edge in spacing[1:])]
    closed = _erode(_dilate(np.pad(mask, [(m, m) for m in margin]), radius, spacing), radius, spacing)
    return mask | closed[:, margin[1] : -margin[1], margin[2] : -margin[2]]


def _fill_slices(mask: Mask, cm2: float, spacing: Spacing) -> Mask:
    """Fill the holes of each slice up to an area; what reaches the slice's edge is no hole."""
    labels, count = ndimage.label(~mask, IN_PLANE)
    hole = np.bincount(labels.ravel(), minlength=count + 1) * spacing[1] * spacing[2] / 100 <= cm2
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        hole[edge] = False
    return mask | hole[labels]


def _body_core(grid: _Grid) -> Mask:
    """Largest piece of tissue after an erosion that parts it from table and blankets."""
    labels, count = ndimage.label(_erode(grid.tissue, TABLE_MM, grid.spacing))
    if count == 0:
        return labels > 0
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _hull(grid: _Grid) -> Mask:
    """Convex hull of the body in each slice: where lungs can be, however thin the chest wall."""
    with warnings.catch_warnings():
        # Of a slice that holds a mere line of voxels it says that there is no hull, and gives none.
        warnings.simplefilter("ignore", UserWarning)
        return np.stack([convex_hull_image(s, offset_coordinates=False) if s.any() else s for s in _body_core(grid)])


def _gas_level(grid: _Grid, hull: Mask) -> float:
    """Value below which air is gas and not lung; below everything where the values are no plain HU."""
    outside = grid.values[~hull & ~grid.tissue & (grid.values > HU_RANGE[0] + 1)]
    air = np.median(outside) if outside.size else -1000.0
    tissue = np.median(grid.values[hull & grid.tissue])
    plain = AIR_HU[0] < air < AIR_HU[1] and TISSUE_HU[0] < tissue < TISSUE_HU[1]
    return GAS_HU if plain else -math.inf


def _pieces(low: Mask, values: Values, hull: Mask, gas: float, spacing: Spacing) -> Mask:
    """The pieces of `low` that are lung: inside the body, large, and not as dark as gas.

    Where lungs hang together with air outside or in the bowel, through the trachea or a wall thinner than a voxel, an
    erosion parts them: the mildest that does, after which each voxel falls to the nearest piece.
    """
    solid = ndimage.gaussian_filter(low.astype(np.float32), [SPECKLE_MM / edge for edge in spacing]) > 0.5
    depth = _depth(solid, spacing)
    best, radius, lungs, others = 0.0, 0.0, np.zeros_like(low), np.zeros_like(low)
    for erosion in EROSIONS_MM:
        labels, count = ndimage.label(depth > erosion)
        voxels = np.bincount(labels.ravel(), minlength=count + 1)
        keep = voxels * math.prod(spacing) > 1000 * MIN_LUNG_ML
        keep &= np.bincount(labels[hull], minlength=count + 1) > 0.9 * voxels
        keep &= np.asarray(ndimage.mean(values, labels, np.arange(count + 1))) > gas
        keep[0] = False
        keep &= voxels >= MIN_SHARE * (voxels * keep).max()
        volume = float(voxels[keep].sum())
        if volume > 2 * best:
            best, radius, lungs = volume, erosion, keep[labels]
            others = (labels > 0) & ~lungs
    distance = _distance_to(lungs, spacing)
    return low & hull & (distance <= radius + GRID_MM) & (distance <= _distance_to(others, spacing))


def _consolidations(level: Values, highest: float, hull: Mask, core: Mask, spacing: Spacing) -> Mask:
    """What is between lung and tissue, thicker than a blurred border of the two, and next to the core of the lungs."""
    smooth = ndimage.gaussian_filter(level, [SPECKLE_MM / edge for edge in spacing])
    between = (smooth >= CORE_LEVEL) & (smooth < highest) & hull & ~core
    radius = max(BLUR_MM, *spacing)
    thick = _dilate(_erode(between, radius, spacing), radius, spacing) & between
    labels, count = ndimage.label(thick)
    next_to = np.bincount(labels[ndimage.binary_dilation(core)], minlength=count + 1) > 0
    next_to[0] = False
    return next_to[labels]


def _level(values: Values, lung: Values | float, tissue: Values | float) -> Values:
    """Values on the scale where lung is 0 and tissue 1."""
    return ((values - lung) / np.maximum(tissue - lung, 1.0)).astype(np.float32)


def _local_mean(values: Values, mask: Mask, default: float, spacing: Spacing) -> Values:
    """Mean of the values under the mask around each voxel, the default far away from the mask."""
    sigma = [mm / edge for mm, edge in zip(LOCAL_MM, spacing, strict=True)]
    weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma, truncate=3)
    total = ndimage.gaussian_filter(np.where(mask, values, np.float32(0)), sigma, truncate=3)
    few = np.float32(0.02)
    return ((total + few * np.float32(default)) / (weight + few)).astype(np.float32)


def _close_vessels(lungs: Mask, spacing: Spacing) -> Mask:
    return _fill_slices(_close(lungs, VESSEL_MM, spacing), HOLE_CM2, spacing)


def _surface(values: Values, level: Values, core: Mask, outside: Mask) -> Values:
    """A field that is above 0 in the lungs: a watershed finds the surface, the level its place between two voxels."""
    markers = np.where(core, 1, np.where(outside, 2, 0))
    steepness = np.sqrt(np.sum(np.square(np.gradient(values)), axis=0))
    region = watershed(steepness, markers) == 1
    band = ndimage.binary_dilation(region) & ~ndimage.binary_erosion(region, border_value=1)
    return np.where(band, SURFACE_LEVEL - level, np.where(region, np.float32(0.3), np.float32(-0.3)))


def _close_lesions(field: Values, hull: Mask, spacing: Spacing) -> Values:
    """Take vessels, and consolidations between lung and chest wall, into the lungs of a field."""
    lungs = (field > 0) & hull
    closed = _close_vessels(lungs, spacing) & hull
    behind, left = _behind(_erode(lungs, VESSEL_MM, spacing), hull)
    for side in (left, ~left):
        # Each lung for itself: spine and aorta lie between the two.
        closed |= _close(lungs & side, LESION_MM, spacing) & hull & behind & side
    closed = _fill_slices(closed, HOLE_CM2, spacing)
    inside = np.where(lungs, np.maximum(field, np.float32(0.05)), np.float32(0.3))
    return np.where(closed, inside, np.minimum(field, np.float32(-0.05))).clip(-0.5, 0.5)


def _behind(lungs: Mask, body: Mask) -> tuple[Mask, Mask]:
    """Voxels with lung between them and the body's axis, and those on the left of the axis."""
    behind, left = np.zeros_like(lungs), np.zeros_like(lungs)
    indices = np.indices(lungs.shape[1:])
    y, x = indices[0], indices[1]
    for z in np.flatnonzero(lungs.any(axis=(1, 2))):
        dy, dx = y - y[body[z]].mean(), x - x[body[z]].mean()
        radius = np.hypot(dy, dx)
        direction = ((np.arctan2(dy, dx) / (2 * np.pi) + 0.5) * DIRECTIONS).astype(int) % DIRECTIONS
        first = np.full(DIRECTIONS, np.inf)
        np.minimum.at(first, direction[lungs[z]], radius[lungs[z]])
        behind[z], left[z] = radius > first[direction], dx < 0
    return behind, left


@dataclasses.dataclass(frozen=True)
class CaseGeometry:
    """What planning needs to know of a raw CT.

    Args:
        shape: Voxels (Z, Y, X).
        spacing: Voxel size (Z, Y, X) in mm.
        box: Bounding box of the organ in voxels, `None` where none was found.
        box_mm: Its size (Z, Y, X) in mm, zeros where none was found.
        organ_fraction: Organ voxels as a fraction of the volume.
        intensity: Minimum, 0.5, 50 and 99.5 percentile and maximum of the values.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    box: Box | None
    box_mm: tuple[float, float, float]
    organ_fraction: float
    intensity: tuple[float, float, float, float, float]


def measure_case(image: Path, mask: Path | None, organ: str) -> CaseGeometry:
    """Measure the organ's bounding box and the values of a raw CT.

    Args:
        image: CT file that SimpleITK reads.
        mask: The user's organ mask, which wins over a computed one; any value above 0 is organ.
        organ: "lungs", "body" or "volume".

    Raises:
        UserError: A file that cannot be read, or a mask whose shape is not the CT's.
    """
    ct, spacing = _read(image)
    if mask is not None:
        found = _read(mask)[0] > 0
        if found.shape != ct.shape:
            raise UserError(
                f"{mask} has shape {found.shape}, but its CT {image} has {ct.shape} (Z, Y, X). Make the mask on the "
                "CT's own grid."
            )
    else:
        found = segment_organ(ct, spacing, organ)
    box = bounding_box(found)
    box_mm = tuple((stop - start) * s for (start, stop), s in zip(box, spacing, strict=True)) if box else (0.0,) * 3
    intensity = (ct.min(), *np.percentile(ct.ravel()[:: max(1, ct.size // 1_000_000)], [0.5, 50, 99.5]), ct.max())
    return CaseGeometry(
        shape=ct.shape,
        spacing=spacing,
        box=box,
        box_mm=box_mm,  # type: ignore[arg-type]
        organ_fraction=float(found.mean()),
        intensity=tuple(float(value) for value in intensity),  # type: ignore[arg-type]
    )


def segment_organ(ct: NDArray[Any], spacing: Spacing, organ: str) -> Mask:
    """Mask (Z, Y, X) of the organ that the setting `organ` names."""
    if organ == "volume":
        return np.ones(ct.shape, bool)
    return segment_lungs(ct, spacing) if organ == "lungs" else segment_body(ct, spacing)


def _read(path: Path) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """Values (Z, Y, X) and spacing (Z, Y, X) in mm of an image file."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as an image: {str(error).strip().splitlines()[-1]}") from None
    if image.GetDimension() != 3:
        raise UserError(f"{path} has {image.GetDimension()} dimensions; a volume of 3 is expected.")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
