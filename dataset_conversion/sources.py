"""The user's volumes before they become an nnU-Net dataset: found, paired and checked, none of them written.

Every fault is collected, so that the user sees all of them at once and before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.cohort import Kind, abbreviate
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, read_volume, volume_name

HEADERS = (".mhd", ".nhdr")
"""Endings of headers whose values lie in another file of the same name."""
COMPANIONS = (".csv", ".json", ".log", ".md", ".pdf", ".raw", ".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".yml", ".zraw")
"""Endings of files that lie beside images: notes, tables, and the data of `.mhd` headers."""


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
        mapped = values.astype(np.float32)
        mapped -= self.low
        mapped *= scale
        mapped += self.hu_low
        return mapped


class Volume(Protocol):
    """A volume that is more than one file, such as a DICOM series; its name is what `str` gives."""

    def read(self) -> tuple[NDArray[Any], Grid]:
        """Values (Z, Y, X) and grid, as `read_volume` gives them."""

    def files(self) -> Sequence[Path]:
        """All files it is read from."""


def read_image(file: Path | Volume) -> tuple[NDArray[Any], Grid]:
    """Values (Z, Y, X) and grid of a file or of a volume of several files.

    Raises:
        UserError: It cannot be read, see `read_volume`.
    """
    return read_volume(file) if isinstance(file, Path) else file.read()


@dataclass(frozen=True)
class Source:
    """One case as the user has it.

    Args:
        case: Its name in the dataset.
        kind: What it is to be; `None` for a test case.
        images: Each channel: an image file, a folder with a DICOM series, or a `Volume`.
        mask: Its lesion mask, if it has one. That of a diseased case is kept aside for scoring.
        lungs: Its lung mask, if the user has one.
        rescaling: Map of its values to HU, if they are none.
        classes: Label of each value of its mask but 0 (0 for background); `None` to keep the values.
        patient: Whom it shows, where that is known: nobody may be in training and test cases.
        details: What else is known about it; goes into `dataset.json` under `gasnet.cases`.
        named_by: The option or folder it comes from, for messages.
    """

    case: str
    kind: Kind | None
    images: tuple[Path | Volume, ...]
    mask: Path | Volume | None = None
    lungs: Path | Volume | None = None
    rescaling: Rescaling | None = None
    classes: Mapping[int, int] | None = None
    patient: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    named_by: str = ""

    @property
    def option(self) -> str:
        """The option of the command that named it."""
        return self.named_by or (f"--{self.kind.value}" if self.kind else "--test")

    def facts(self) -> dict[str, Any]:
        """Patient and details, as `dataset.json` has them."""
        return {**self.details, **({"patient": self.patient} if self.patient else {})}

    def files(self) -> Iterator[Path]:
        """All files that the case is read from."""
        for item in (*self.images, self.mask, self.lungs):
            if isinstance(item, Path):
                yield from sorted(item.iterdir()) if item.is_dir() else (item,)
                if item.suffix.lower() in HEADERS:
                    yield from sorted(path for path in item.parent.glob(f"{item.stem}.*") if path != item)
            elif item is not None:
                yield from item.files()


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


def same_patients(sources: Iterable[Source]) -> Iterator[str]:
    """One sentence for each patient who is both among the training and among the test cases."""
    cases: dict[str, dict[bool, list[str]]] = {}
    for source in sources:
        if source.patient:
            cases.setdefault(source.patient, {}).setdefault(source.kind is None, []).append(source.case)
    for patient, groups in cases.items():
        if len(groups) == 2:
            yield (
                f"The patient '{patient}' is both in training ({abbreviate(groups[False])}) and in the test set "
                f"({abbreviate(groups[True])}). Keep all scans of a patient on one side."
            )


def storable(values: NDArray[Any]) -> NDArray[Any]:
    """The values in the smallest type for images that loses nothing a CT has: int16, or float32."""
    limits = np.iinfo(np.int16)
    if values.min() >= limits.min and values.max() <= limits.max:
        whole = values.astype(np.int16)
        if np.array_equal(whole, values):
            return whole
    return values.astype(np.float32)
