"""Lungs of a CT: mask and bounding box by thresholding and morphology, and a cache of them beside nnU-Net's data.

Nothing here is learnt. The mask tells G, D and the pseudo-labels where lungs are; it is not a result of its own. A mask
of the user's in `nnUNet_raw/<dataset>/lungsTr` always wins over a computed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from gasnet_nnunet.errors import UserError

Mask = NDArray[np.bool_]
Spacing = Sequence[float]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open voxel ranges (start, stop) along Z, Y and X."""

ORGANS = ("lungs", "body", "volume")

GRID_MM = 2.5
"""Grid of the morphology: fine enough for a fissure's width, coarse enough for seconds per scan."""
HU_RANGE = (-1250.0, 250.0)
"""Values are clipped to this first: padding (-2048, -3024), bone and metal would only distort the thresholds."""
MIN_CONTRAST = 300.0
"""Least difference in HU between tissue and lung; less is fat against muscle in a scan without lungs."""
IN_PLANE = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))


def bounding_box(mask: NDArray[np.generic]) -> Box | None:
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


def segment_lungs(ct: NDArray[np.generic], spacing: Spacing) -> Mask:
    """Both lungs, with the lesions in them as far as morphology can follow.

    Args:
        ct: CT (Z, Y, X) in HU, also clipped or padded; axial slices along the first axis, either way up.
        spacing: Voxel size (Z, Y, X) in mm.

    Returns:
        Mask (Z, Y, X), empty where there are no lungs.
    """
    coarse, image = _coarse_grid(ct, spacing)
    size = image.GetSpacing()[::-1]
    smooth = ndimage.gaussian_filter(coarse, [1.0 / s for s in size])
    low = smooth < threshold_otsu(smooth)
    body = _body(low, size)
    lungs = _select(low & body, size)
    if not lungs.any():
        return np.zeros(ct.shape, bool)
    lung_level, tissue_level = np.median(smooth[lungs]), np.median(smooth[body & ~low])
    if tissue_level - lung_level < MIN_CONTRAST:
        return np.zeros(ct.shape, bool)
    low = smooth < lung_level + 0.6 * (tissue_level - lung_level)
    body = _body(low, size)
    lungs = _select(low & body, size)
    lungs = _close(lungs, 8.0, size) & body
    lungs = _fill_slices(lungs)
    return _fine_grid(lungs, image, ct.shape, spacing)


def segment_body(ct: NDArray[np.generic], spacing: Spacing) -> Mask:
    """The largest body in the scan, filled, without the table as far as it is thin.

    Args:
        ct: CT (Z, Y, X) in HU, also clipped or padded.
        spacing: Voxel size (Z, Y, X) in mm.

    Returns:
        Mask (Z, Y, X), empty where nothing is denser than air.
    """
    coarse, image = _coarse_grid(ct, spacing)
    if coarse.min() == coarse.max():
        return np.zeros(ct.shape, bool)
    size = image.GetSpacing()[::-1]
    smooth = ndimage.gaussian_filter(coarse, [1.0 / s for s in size])
    return _fine_grid(_body(smooth < threshold_otsu(smooth), size), image, ct.shape, spacing)


def _coarse_grid(ct: NDArray[np.generic], spacing: Spacing) -> tuple[NDArray[np.float32], sitk.Image]:
    """Average the CT down to about `GRID_MM`; the image carries the geometry of the coarse grid."""
    image = sitk.GetImageFromArray(np.clip(ct, *HU_RANGE).astype(np.float32))
    image.SetSpacing([float(s) for s in reversed(spacing)])
    factors = [max(1, min(round(GRID_MM / s), n)) for s, n in zip(reversed(spacing), reversed(ct.shape), strict=True)]
    image = sitk.BinShrink(image, factors)
    return sitk.GetArrayFromImage(image), image


def _fine_grid(mask: Mask, coarse: sitk.Image, shape: Sequence[int], spacing: Spacing) -> Mask:
    """Put a mask of the coarse grid back onto the CT's grid."""
    if mask.shape == tuple(shape):
        return mask
    image = sitk.GetImageFromArray(mask.astype(np.uint8) * 254)
    image.CopyInformation(coarse)
    fine = sitk.Resample(
        image,
        [int(n) for n in reversed(shape)],
        sitk.Transform(),
        sitk.sitkLinear,
        (0.0, 0.0, 0.0),
        [float(s) for s in reversed(spacing)],
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        0.0,
        sitk.sitkUInt8,
        True,
    )
    return sitk.GetArrayFromImage(fine) >= 127


def _erode(mask: Mask, radius: float, size: Spacing) -> Mask:
    """Erosion by a ball of `radius` mm; the edge of the volume does not erode, because organs go on beyond it."""
    return (ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"), sampling=size) > radius)[1:-1, 1:-1, 1:-1]


def _dilate(mask: Mask, radius: float, size: Spacing) -> Mask:
    """Dilation by a ball of `radius` mm."""
    return ndimage.distance_transform_edt(~mask, sampling=size) <= radius if mask.any() else mask


def _close(mask: Mask, radius: float, size: Spacing) -> Mask:
    """Closing by a ball of `radius` mm."""
    return mask | _erode(_dilate(mask, radius, size), radius, size)


def _largest(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _fill_slices(mask: Mask) -> Mask:
    """Fill what each slice encloses."""
    labels, count = ndimage.label(~mask, IN_PLANE)
    open_ = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        open_[edge] = True
    open_[0] = False
    return ~open_[labels]


def _body(low: Mask, size: Spacing) -> Mask:
    """Largest thing that is not `low`, filled slice by slice: the 4 mm opening parts it from table and blankets."""
    tissue = ~low
    return _fill_slices(_dilate(_largest(_erode(tissue, 4.0, size)), 5.0, size) & tissue)


def _select(air: Mask, size: Spacing) -> Mask:
    """Of the air inside the body, what is large enough to be lung."""
    labels, count = ndimage.label(_erode(air, 2.0, size))
    if count == 0:
        return np.zeros_like(air)
    volumes = np.bincount(labels.ravel())[1:] * np.prod(size)
    keep = 1 + np.flatnonzero((volumes > 0.1 * volumes.max()) & (volumes > 30e3))
    return _dilate(np.isin(labels, keep), 3.0, size) & air


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


def segment_organ(ct: NDArray[np.generic], spacing: Spacing, organ: str) -> Mask:
    """Mask (Z, Y, X) of the organ that the setting `organ` names."""
    if organ == "volume":
        return np.ones(ct.shape, bool)
    return segment_lungs(ct, spacing) if organ == "lungs" else segment_body(ct, spacing)


def _read(path: Path) -> tuple[NDArray[np.generic], tuple[float, float, float]]:
    """Values (Z, Y, X) and spacing (Z, Y, X) in mm of an image file."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as an image: {str(error).strip().splitlines()[-1]}") from None
    if image.GetDimension() != 3:
        raise UserError(f"{path} has {image.GetDimension()} dimensions; a volume of 3 is expected.")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
