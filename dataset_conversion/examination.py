"""One case read, checked and measured: what is wrong with it, what is odd about it, and what the report shows of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.cohort import Kind, abbreviate
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import HIGHEST_AIR, Grid, grid_difference

from .sources import Source, read_image

LOWEST_AIR = -1100.0
"""Below is no tissue and no gas: scanners fill what lies outside their circle of view with -2000, -2048 or -3024."""
FEW_SLICES, THICK_MM = 15, 10.0
LUNG_HU = (-950.0, -500.0)
THUMBNAIL = 160
"""Longest edge of a thumbnail in pixels."""
WINDOW = (-1250.0, 250.0)
"""HU that a thumbnail shows, the paper's lung window."""


@dataclass(frozen=True)
class Record:
    """What was found in the files of a case.

    Args:
        problems: Why it cannot be used, one sentence each.
        oddities: What is unusual about it, a few words each.
        digest: Fingerprint of its values, equal for copies of a scan.
        values: Values in its mask, as labels of the dataset.
        grid: Where it lies.
        lowest: Lowest value of its first channel, in HU where it was mapped to them.
        percentiles: 0.5, 50 and 99.5 % of the values of its first channel.
        lesion_ml: Volume of each label of its mask in ml.
        lungs_ml: Volume of its lung mask in ml, if it has one.
    """

    problems: tuple[str, ...] = ()
    oddities: tuple[str, ...] = ()
    digest: str = ""
    values: frozenset[int] = frozenset()
    grid: Grid = field(default=Grid((), (), (), ()))
    lowest: float = 0.0
    percentiles: tuple[float, ...] = ()
    lesion_ml: Mapping[int, float] = field(default_factory=dict)
    lungs_ml: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values of all fields."""
        return {**dataclasses.asdict(self), "values": sorted(self.values)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """Restore what `to_json` gave."""
        return cls(
            **{
                **content,
                "problems": tuple(content["problems"]),
                "oddities": tuple(content["oddities"]),
                "values": frozenset(content["values"]),
                "grid": Grid(**{name: tuple(values) for name, values in content["grid"].items()}),
                "percentiles": tuple(content["percentiles"]),
                "lesion_ml": {int(label): volume for label, volume in content["lesion_ml"].items()},
            }
        )


@dataclass(frozen=True)
class Arrays:
    """The values of a case.

    Args:
        images: Each channel (Z, Y, X), in HU where a rescaling says how.
        mask: Labels of the dataset (Z, Y, X), uint8, if there is a mask.
        lungs: 1 in the lungs (Z, Y, X), uint8, if there is a lung mask.
    """

    images: tuple[NDArray[Any], ...] = ()
    mask: NDArray[np.uint8] | None = None
    lungs: NDArray[np.uint8] | None = None


def examine(source: Source) -> tuple[Record, Arrays]:
    """Read all files of a case, check them against each other and measure them.

    Returns:
        What was found, and the values; without these where there are problems.
    """
    problems: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    grid: Grid | None = None
    images: list[NDArray[Any]] = []
    for file in source.images:
        try:
            image, found = read_image(file)
        except UserError as error:
            problems.append(f"{source.option}: {error}")
            continue
        digest.update(str(image.shape).encode())
        for plane in image:
            digest.update(np.ascontiguousarray(plane, dtype=np.float32).data)
        low, high = float(image.min()), float(image.max())
        if grid is None:
            grid = found
        elif difference := grid_difference(found, grid):
            problems.append(f"{source.option}: {file} does not lie on {source.images[0]}: {difference}.")
        if low == high:
            problems.append(f"{source.option}: {file} is {low:g} throughout; it shows nothing.")
        scale = source.rescaling
        if scale and (low < scale.low or high > scale.high):
            problems.append(
                f"{source.option}: {file} holds values from {low:g} to {high:g}, outside the {scale.low:g} to "
                f"{scale.high:g} that are to be mapped to HU."
            )
        images.append(scale.apply(image) if scale else image)
    mask = lungs = None
    if source.mask is not None:
        mask, found_problems = _mask(source, source.mask, grid, "mask")
        problems += found_problems
    if source.lungs is not None:
        lungs, found_problems = _mask(source, source.lungs, grid, "lung mask")
        problems += found_problems
    if problems or grid is None or not images:
        return Record(tuple(problems)), Arrays()
    voxel = float(np.prod(grid.spacing)) / 1000
    counts: dict[int, int] = {}
    if mask is not None:
        labels, numbers = np.unique(mask, return_counts=True)
        counts = dict(zip(labels.tolist(), numbers.tolist(), strict=True))
    record = Record(
        oddities=tuple(_oddities(source, images[0], grid)),
        digest=digest.hexdigest(),
        values=frozenset(counts),
        grid=grid,
        lowest=float(images[0].min()),
        percentiles=tuple(float(value) for value in np.percentile(images[0][::2, ::2, ::2], (0.5, 50, 99.5))),
        lesion_ml={label: number * voxel for label, number in counts.items() if label},
        lungs_ml=None if lungs is None else float(np.count_nonzero(lungs)) * voxel,
    )
    return record, Arrays(tuple(images), mask, lungs)


def _mask(source: Source, file: Any, grid: Grid | None, what: str) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """A mask as labels of the dataset, or what is wrong with it."""
    try:
        values, found = read_image(file)
        if grid is not None and (difference := grid_difference(found, grid)):
            raise UserError(
                f"the {what} {file} does not lie on its image: {difference}. Resample it to the image's grid, with "
                "nearest-neighbour interpolation."
            )
        numbers = np.unique(values)
        if numbers.min() < 0 or not np.array_equal(numbers, numbers.astype(np.int64)):
            wrong = next(number for number in numbers.tolist() if number < 0 or number != int(number))
            raise UserError(f"the {what} {file} holds the value {wrong:g}; expected 0 for background and 1, 2, ... .")
        if len(numbers) > 250 or numbers.max() > 255:
            raise UserError(f"the {what} {file} holds {len(numbers)} values up to {numbers.max():g}. Is it an image?")
        if what == "lung mask":
            if not numbers.any():
                raise UserError(f"the lung mask {file} is empty. Leave it out to have one computed.")
            labels = (values > 0).astype(np.uint8)
        else:
            labels = _labels(source, file, values, {int(number) for number in numbers})
    except UserError as error:
        return None, [f"{source.option}: {error}"]
    if labels.all():
        return None, [f"{source.option}: the {what} {file} covers every voxel. Is it the right file?"]
    if what == "mask" and source.kind is Kind.HEALTHY and labels.any():
        return None, [f"{source.option}: the mask {file} of the healthy case {source.case} holds lesion."]
    if what == "mask" and source.kind is Kind.LABELLED and not labels.any():
        return None, [f"{source.option}: the mask {file} is empty. Does the case belong under --healthy?"]
    return labels, []


def _labels(source: Source, file: Any, values: NDArray[Any], numbers: set[int]) -> NDArray[np.uint8]:
    if source.classes is None:
        return values.astype(np.uint8)
    unknown = sorted(numbers - {0} - set(source.classes))
    if unknown:
        known = ", ".join(map(str, sorted(source.classes)))
        raise UserError(f"the mask {file} holds the value {unknown[0]}; its source has 0, {known}.")
    table = np.zeros(256, np.uint8)
    for value, label in source.classes.items():
        table[value] = label
    return table[values.astype(np.uint8)]


def _oddities(source: Source, image: NDArray[Any], grid: Grid) -> list[str]:
    """What is unusual about a sound scan; `image` is in HU where it was mapped to them."""
    import SimpleITK as sitk

    found = []
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid.direction)
    if code[2] not in "SI":
        found.append(f"slices are not axial (orientation {code})")
    elif code[2] == "I":
        found.append(f"z runs downwards (orientation {code})")
    elif code != "LPS":
        found.append(f"orientation {code}, not LPS")
    if not np.allclose(np.abs(np.array(grid.direction)).reshape(3, 3).max(axis=0), 1, atol=1e-3):
        found.append("oblique axes")
    low, high = float(image.min()), float(image.max())
    if source.rescaling is None:
        if low >= 0 and high <= 255:
            found.append(f"8-bit intensities ({low:g} to {high:g})")
        elif low >= 0:
            found.append(f"no value below 0 (up to {high:g}): not HU, perhaps 1024 too high")
        elif low > HIGHEST_AIR:
            found.append(f"no air: nothing below {low:g}")
        if low < LOWEST_AIR:
            share = float(np.count_nonzero(image < LOWEST_AIR)) / image.size
            found.append(f"padding of {low:g} ({share:.0%} of the voxels)")
    if len(image) < FEW_SLICES:
        found.append(f"{len(image)} slices only")
    if grid.spacing[2] > THICK_MM:
        found.append(f"slices {grid.spacing[2]:g} mm apart")
    return found


def duplicates(sources: Sequence[Source], records: Sequence[Record]) -> Iterator[str]:
    """One sentence for each scan that occurs twice, be it under another name or in another group."""
    seen: dict[str, Source] = {}
    for source, record in zip(sources, records, strict=True):
        if record.problems:
            continue
        first = seen.setdefault(record.digest, source)
        if first is not source:
            yield (
                f"{first.images[0]} ({first.option}) and {source.images[0]} ({source.option}) are the same scan. Keep "
                "one of them."
            )


def not_hounsfield(sources: Sequence[Source], records: Sequence[Record]) -> str | None:
    """A remark on images that are hardly in Hounsfield units, if there are any."""
    wrong = [
        source.case
        for source, record in zip(sources, records, strict=True)
        if source.rescaling is None and record.lowest > HIGHEST_AIR
    ]
    if not wrong:
        return None
    return (
        f"{len(wrong)} of {len(sources)} images are hardly in Hounsfield units, nothing in them is below "
        f"{HIGHEST_AIR:g}: {abbreviate(wrong)}. If they are chest CTs, map their values with "
        "--rescale LO HI HU_LO HU_HI (e.g. --rescale 0 255 -1250 250)."
    )


def thumbnail(path: Path, arrays: Arrays, spacing: tuple[float, ...]) -> None:
    """Write the slice with most lesion, or else with most lung, as a PNG with the mask's outline.

    Args:
        path: The PNG.
        arrays: The case.
        spacing: Its voxel size in mm (X, Y, Z).
    """
    from PIL import Image
    from skimage.segmentation import find_boundaries

    image, mask = arrays.images[0], arrays.mask
    if mask is not None and mask.any():
        sums = np.count_nonzero(mask, axis=(1, 2))
    elif arrays.lungs is not None:
        sums = np.count_nonzero(arrays.lungs, axis=(1, 2))
    else:
        coarse = image[:, ::4, ::4]
        sums = np.count_nonzero((coarse > LUNG_HU[0]) & (coarse < LUNG_HU[1]), axis=(1, 2))
    best = int(np.argmax(sums)) if sums.any() else len(image) // 2
    size_mm = image.shape[2] * spacing[0], image.shape[1] * spacing[1]
    scale = THUMBNAIL / max(size_mm)
    size = max(1, round(size_mm[0] * scale)), max(1, round(size_mm[1] * scale))
    plane = image[best].astype(np.float32)
    # What is not in HU is shown from its darkest to its brightest value.
    low, high = WINDOW if image.min() < HIGHEST_AIR else (float(plane.min()), max(float(plane.max()), plane.min() + 1))
    grey = (np.clip((plane - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    shown = np.stack([np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))] * 3, axis=-1)
    if mask is not None and mask[best].any():
        small = np.asarray(Image.fromarray(mask[best]).resize(size, Image.Resampling.NEAREST))
        shown[find_boundaries(small, mode="inner")] = (230, 60, 40)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shown).save(path)
