"""The user's volumes before they become an nnU-Net dataset: found, paired and checked, none of them written.

Every fault is collected, so that the user sees all of them at once and before anything is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.cohort import Kind, abbreviate
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, grid_difference, read_volume, volume_name

COMPANIONS = (".csv", ".json", ".log", ".md", ".pdf", ".raw", ".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".yml", ".zraw")
"""Endings of files that lie beside images: notes, tables, and the data of `.mhd` headers."""
HIGHEST_AIR = -500.0
"""A chest CT in HU has air, near -1000, in and around the patient."""


@dataclass(frozen=True)
class Rescaling:
    """A linear map of stored values to Hounsfield units.

    Args:
        low: Stored value that becomes `hu_low`, and the lowest one that may occur.
        high: Stored value that becomes `hu_high`, and the highest one that may occur.
        hu_low: HU of `low`.
        hu_high: HU of `high`.

    Raises:
        UserError: Either range does not rise.
    """

    low: float
    high: float
    hu_low: float
    hu_high: float

    def __post_init__(self) -> None:
        for low, high in ((self.low, self.high), (self.hu_low, self.hu_high)):
            if not low < high:
                raise UserError(
                    "--rescale takes LO HI HU_LO HU_HI, both ranges rising, e.g. 0 255 -1250 250; found "
                    f"{low:g} to {high:g}."
                )

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values in HU, same shape."""
        scale = (self.hu_high - self.hu_low) / (self.high - self.low)
        return ((values.astype(np.float64) - self.low) * scale + self.hu_low).astype(np.float32)


@dataclass(frozen=True)
class Source:
    """One case as the user has it.

    Args:
        case: Its name in the dataset.
        kind: What it is to be; `None` for a test case.
        images: Image file, or DICOM folder, of each channel.
        mask: Its lesion mask, if it has one.
        lungs: Its lung mask, if the user has one.
        rescaling: Map of its values to HU, if they are none.
    """

    case: str
    kind: Kind | None
    images: tuple[Path, ...]
    mask: Path | None = None
    lungs: Path | None = None
    rescaling: Rescaling | None = None

    @property
    def option(self) -> str:
        """The option of the command that named it."""
        return f"--{self.kind.value}" if self.kind else "--test"


@dataclass(frozen=True)
class Examined:
    """What was found in the files of a case.

    Args:
        problems: Why it cannot be used, one sentence each.
        digest: Fingerprint of its values, equal for copies of a scan.
        values: Values in its mask.
        lowest: Lowest value of its first channel.
    """

    problems: tuple[str, ...] = ()
    digest: str = ""
    values: frozenset[int] = field(default=frozenset())
    lowest: float = 0.0


def find_volumes(folder: Path, option: str, *, keep_channel: bool = False) -> dict[str, Path]:
    """Volumes of a folder by the names of their cases.

    An image file is a case, a folder with a DICOM series as well. Where all files end in `_0000`, nnU-Net's mark of
    the first channel, that is left out of the names. Characters that are a nuisance in file names become `_`.

    Args:
        folder: Where they lie.
        option: The option of the command that named it.
        keep_channel: Leave `_0000` in the names, for images of several channels.

    Raises:
        UserError: There is no such folder, nothing in it, or two files of it would have one name.
    """
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is no folder." if folder.exists() else f"{option}: there is no {folder}.")
    if any(folder.glob("*.dcm")):
        raise UserError(
            f"{option}: {folder} holds DICOM slices. Put the series of each case into a folder of its own, named like "
            "the case, and name the folder that holds these."
        )
    paths = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path.is_dir() or not path.name.lower().endswith(COMPANIONS))
    ]
    if not paths:
        raise UserError(f"{option}: {folder} holds no images.")
    names = [volume_name(path) for path in paths]
    if not keep_channel and all(name.endswith("_0000") for name in names):
        names = [name.removesuffix("_0000") for name in names]
    volumes: dict[str, Path] = {}
    for path, name in zip(paths, names, strict=True):
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        if safe in volumes:
            raise UserError(f"{option}: {volumes[safe].name} and {path.name} in {folder} are both the case '{safe}'.")
        volumes[safe] = path
    return volumes


def pair(images: Mapping[str, Path], masks: Mapping[str, Path], option: str) -> Iterator[str]:
    """One sentence each for images without a mask and masks without an image."""
    for those, others, what in ((images, masks, "image without a mask"), (masks, images, "mask without an image")):
        alone = sorted(set(those) - set(others))
        if alone:
            yield (
                f"{option}: {what}: {abbreviate(alone)}. An image and its mask must have the same name "
                f"(expected e.g. {alone[0]} in both folders)."
            )


def examine(source: Source) -> Examined:
    """Read all files of a case and check them against each other."""
    problems: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    grid, lowest = None, 0.0
    for path in source.images:
        try:
            image, found = read_volume(path)
        except UserError as error:
            problems.append(f"{source.option}: {error}")
            continue
        digest.update(str(image.shape).encode() + image.astype(np.float32).tobytes())
        low, high = float(image.min()), float(image.max())
        if grid is None:
            grid, lowest = found, low
        elif difference := grid_difference(found, grid):
            problems.append(f"{source.option}: {path} does not lie on {source.images[0].name}: {difference}.")
        if low == high:
            problems.append(f"{source.option}: {path} is {low:g} throughout; it shows nothing.")
        scale = source.rescaling
        if scale and (low < scale.low or high > scale.high):
            problems.append(
                f"{source.option}: {path} holds values from {low:g} to {high:g}, outside the {scale.low:g} to "
                f"{scale.high:g} that --rescale names."
            )
    values: set[int] = set()
    for mask, what in ((source.mask, "mask"), (source.lungs, "lung mask")):
        if mask is None:
            continue
        try:
            found_values = _examine_mask(mask, grid, what)
        except UserError as error:
            problems.append(f"{source.option}: {error}")
            continue
        if what == "mask":
            values = found_values
        if not any(found_values) and what == "lung mask":
            problems.append(f"{source.option}: the lung mask {mask} is empty. Leave it out to have one computed.")
        if not any(found_values) and what == "mask" and source.kind is Kind.LABELLED:
            problems.append(f"{source.option}: the mask {mask} is empty. Does the case belong under --healthy?")
        if 0 not in found_values:
            problems.append(f"{source.option}: the {what} {mask} covers every voxel. Is it the right file?")
    return Examined(tuple(problems), digest.hexdigest(), frozenset(values), lowest)


def duplicates(sources: Sequence[Source], examined: Sequence[Examined]) -> Iterator[str]:
    """One sentence for each scan that occurs twice, be it under another name or in another group."""
    seen: dict[str, Source] = {}
    for source, result in zip(sources, examined, strict=True):
        if result.problems:
            continue
        first = seen.setdefault(result.digest, source)
        if first is not source:
            yield (
                f"{first.images[0]} ({first.option}) and {source.images[0]} ({source.option}) are the same scan. Keep "
                "one of them."
            )


def same_names(sources: Iterable[Source]) -> Iterator[str]:
    """One sentence for each name that two training cases share."""
    seen: dict[str, Source] = {}
    for source in sources:
        first = seen.setdefault(source.case, source)
        if first is not source:
            yield (
                f"The case '{source.case}' is both under {first.option} ({first.images[0]}) and under {source.option} "
                f"({source.images[0]}). Rename one of them."
            )


def not_hounsfield(sources: Sequence[Source], examined: Sequence[Examined]) -> str | None:
    """A remark on images that are hardly in Hounsfield units, if there are any."""
    wrong = [
        source.case
        for source, result in zip(sources, examined, strict=True)
        if source.rescaling is None and result.lowest > HIGHEST_AIR
    ]
    if not wrong:
        return None
    return (
        f"{len(wrong)} of {len(sources)} images are hardly in Hounsfield units, nothing in them is below "
        f"{HIGHEST_AIR:g}: {abbreviate(wrong)}. If they are chest CTs, map their values with "
        "--rescale LO HI HU_LO HU_HI (e.g. --rescale 0 255 -1250 250)."
    )


def storable(values: NDArray[Any]) -> NDArray[Any]:
    """The values in the smallest type for images that loses nothing a CT has: int16, or float32."""
    limits = np.iinfo(np.int16)
    if values.min() >= limits.min and values.max() <= limits.max:
        whole = values.astype(np.int16)
        if np.array_equal(whole, values):
            return whole
    return values.astype(np.float32)


def _examine_mask(path: Path, grid: Grid | None, what: str) -> set[int]:
    mask, found = read_volume(path)
    if grid is not None and (difference := grid_difference(found, grid)):
        raise UserError(
            f"the {what} {path} does not lie on its image: {difference}. Resample it to the image's grid, with "
            "nearest-neighbour interpolation."
        )
    numbers = np.unique(mask)
    if numbers.min() < 0 or not np.array_equal(numbers, numbers.astype(np.int64)):
        wrong = next(number for number in numbers.tolist() if number < 0 or number != int(number))
        raise UserError(f"the {what} {path} holds the value {wrong:g}; expected 0 for background and 1, 2, ... .")
    if len(numbers) > 250 or numbers.max() > 65535:
        raise UserError(f"the {what} {path} holds {len(numbers)} values up to {numbers.max():g}. Is it an image?")
    return {int(number) for number in numbers}
