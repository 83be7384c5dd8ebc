"""A page per case for a radiologist (slices, contour, restored CT, difference, burden) and an index over all cases.

A page holds everything it shows. Slices are embedded at 256 grey levels that lie close where soft tissue is told apart,
so that every window can be set in the browser, and are averaged down where a CT is larger than `MOST_VOXELS`.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from gasnet_nnunet.pages import inline, write_page
from gasnet_nnunet.volumes import HIGHEST_AIR

MOST_VOXELS = 32_000_000
"""Voxels of a page's CT: 512 x 512 x 120, which keeps a page below 40 MB."""
THICKEST = 3.0
"""Slices are averaged up to this thickness in mm before the pixels are."""
WINDOWS = {"Lung": (-600, 1500), "Mediastinum": (40, 400), "Bone": (400, 1800)}
"""Level and width in HU of the presets."""
HU_LEVELS = np.interp(np.arange(256), [0, 84, 184, 244, 255], [-1024, -200, 250, 1500, 3071])
"""HU of each of the 256 grey levels: steps of 10 HU in lung, 4.5 in soft tissue, 21 in bone."""
DIFFERENCE_LEVELS = np.interp(np.arange(255), [0, 27, 127, 227, 254], [-2000, -500, 0, 500, 2000])
"""HU of each level of a difference: steps of 5 HU up to 500; 0 is a level."""
THUMBNAIL_WIDTH = 240
CONTOUR = (255, 214, 0)

Levels = NDArray[np.float64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class IndexRow:
    """What the index shows of a case.

    Args:
        case: Name of the case.
        burden: Lesion burden as in its report; empty if there is none.
        warnings: Its warnings.
        thumbnail: A picture as PNG, if there is one.
        failed: Why there is no report of the case, in a sentence; `None` if there is one.
    """

    case: str
    burden: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    thumbnail: bytes | None = None
    failed: str | None = None


def report_name(case: str) -> str:
    """File name of a case's report, which the index links to.

    Examples:
        >>> report_name("case_7")
        'case_7_report.html'
    """
    return f"{case}_report.html"


def write_case_report(
    path: Path,
    *,
    case: str,
    ct: sitk.Image,
    mask: sitk.Image,
    restored: sitk.Image | None,
    difference: sitk.Image | None,
    burden: Mapping[str, Any],
    model: Mapping[str, str],
    warnings: Sequence[str],
) -> None:
    """Write the page of a case: one HTML file that needs no network.

    Args:
        path: The page to write.
        case: Name of the case.
        ct: The CT in HU, of any direction. Values without any air are taken for not being HU, and get no presets.
        mask: Labels on the CT's grid, 0 background.
        restored: The restored CT in HU on the same grid, if there is one.
        difference: CT minus restored in HU on the same grid, if it is to be shown.
        burden: Lesion burden by the names of `BURDEN`; others are shown under their own name.
        model: What the mask was made with: names and values, in the order to show.
        warnings: What the reader has to know, one sentence each.

    Raises:
        ValueError: The images do not lie on one grid.
    """
    volume = _Volume.of(ct, mask, restored, difference)
    thumbnail = volume.thumbnail()
    summary = {
        "case": case,
        "burden": burden,
        "warnings": list(warnings),
        "thumbnail": base64.b64encode(thumbnail).decode(),
    }
    write_page(
        path,
        "case.html",
        title=case,
        # JSON has no NaN, and browsers are strict.
        summary=json.loads(json.dumps(summary, default=_plain), parse_constant=lambda name: None),
        model=model,
        warnings=list(warnings),
        burden=burden_rows(burden),
        volume=volume.content(),
        aspect=volume.aspect,
        notes=volume.notes(),
        panels=volume.panels(),
        windows=WINDOWS if volume.is_hu else {},
        picture=inline(thumbnail),
    )


def read_row(report: Path) -> IndexRow:
    """The index's row of a case whose report was written before.

    Raises:
        ValueError: The file is no report of a case.
    """
    with report.open(encoding="utf-8") as file:
        found = next((re.search(r'id="summary">(.*)</script>', line) for line in file if 'id="summary"' in line), None)
    if found is None:
        raise ValueError(f"{report} is no report of a case")
    summary = json.loads(found[1])
    return IndexRow(
        summary["case"], summary["burden"], summary["warnings"], base64.b64decode(summary["thumbnail"]), None
    )


def write_index(path: Path, rows: Sequence[IndexRow]) -> None:
    """Write the page over all cases, which lies beside their reports and links to them.

    Args:
        path: The page to write.
        rows: The cases, shown with the greatest burden first.
    """
    columns = index_columns([row.burden for row in rows])
    quantities = [quantity(name) for name in columns]
    table = []
    for row in sorted(rows, key=lambda row: _rank(row, columns)):
        flat = flatten(row.burden)
        values = [_number(flat.get(name)) for name in columns]
        table.append(
            {
                "case": row.case,
                "link": None if row.failed else quote(report_name(row.case)),
                "picture": None if row.thumbnail is None else inline(row.thumbnail),
                "cells": [
                    {"value": value, "text": shown.text(value)} for value, shown in zip(values, quantities, strict=True)
                ],
                "warnings": [row.failed] if row.failed else list(row.warnings),
                "failed": row.failed is not None,
            }
        )
    failed = sum(row.failed is not None for row in rows)
    write_page(path, "index.html", title="Cases", quantities=quantities, rows=table, failed=failed)


def _rank(row: IndexRow, columns: Sequence[str]) -> float:
    """The greater the burden the lower; cases without a number come last."""
    number = _number(flatten(row.burden).get(columns[0])) if columns else None
    return math.inf if number is None else -number


# Burden ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """How a number of the burden is shown.

    Args:
        label: Its name.
        unit: Its unit.
        digits: Decimals.
        factor: What the value is multiplied by, e.g. 100 for a share that is shown in percent.
        index: Whether it has a column in the index.
    """

    label: str
    unit: str = ""
    digits: int = 1
    factor: float = 1.0
    index: bool = False

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: Any) -> str:
        """A value as it is shown."""
        number = _number(value)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if number is None:
            return str(value)
        return f"{number * self.factor:.{self.digits}f}"


BURDEN: dict[str, Quantity] = {
    "lesion_ml": Quantity("Lesion", "ml", 1, index=True),
    "lesion_percent": Quantity("Lesion of lung", "%", 1, index=True),
    "lung_ml": Quantity("Lungs", "ml", 0),
    "lesion_outside_lung_ml": Quantity("Lesion outside the lung mask", "ml", 1),
    **{
        f"{place}_{name}": Quantity(f"{place.capitalize()} {part}: {what}", unit, digits, index=index)
        for place, part, index in (
            ("left", "lung", True),
            ("right", "lung", True),
            ("upper", "third", False),
            ("middle", "third", False),
            ("lower", "third", False),
        )
        for name, what, unit, digits, index in (
            ("lesion_ml", "lesion", "ml", 1, False),
            ("percent", "lesion", "%", 1, index),
            ("lung_ml", "volume", "ml", 0, False),
        )
    },
    "ground_glass_ml": Quantity("Ground glass", "ml", 1),
    "ground_glass_percent": Quantity("Ground glass of lesion", "%", 0),
    "consolidated_ml": Quantity("Consolidated", "ml", 1),
    "consolidated_percent": Quantity("Consolidated of lesion", "%", 0, index=True),
    "components": Quantity("Separate lesions", "", 0),
    "largest_component_ml": Quantity("Largest lesion", "ml", 1),
    "lesion_mean_hu": Quantity("Mean of the lesions", "HU", 0),
    "lesion_mean_hu_restored": Quantity("Mean of the lesions, restored", "HU", 0),
    "lung_mean_hu": Quantity("Mean of the lungs", "HU", 0),
    "lung_mean_hu_restored": Quantity("Mean of the lungs, restored", "HU", 0),
}
"""Known names of the burden, in the order they are shown."""


def quantity(name: str) -> Quantity:
    """How a number of the burden is shown; an unknown one by its own name.

    Examples:
        >>> quantity("new_thing").label
        'new thing'
    """
    return BURDEN.get(name) or Quantity(name.replace("_", " "), digits=2)


def flatten(burden: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by a blank.

    Examples:
        >>> flatten({"left": {"lesion_ml": 1.0}, "sizes": [2, 1]})
        {'left lesion_ml': 1.0, 'sizes': '2, 1'}
    """
    flat: dict[str, Any] = {}
    for name, value in burden.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name} ")
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{name}"] = ", ".join(map(str, value))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def burden_rows(burden: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and unit of everything in a burden, the known names first."""
    flat = flatten(burden)
    names = [*(name for name in BURDEN if name in flat), *(name for name in flat if name not in BURDEN)]
    return [(quantity(name).label, quantity(name).text(flat[name]), quantity(name).unit) for name in names]


def index_columns(burdens: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the numbers that get a column in the index."""
    present = dict.fromkeys(itertools.chain.from_iterable(flatten(burden) for burden in burdens))
    known = [name for name, shown in BURDEN.items() if shown.index and name in present]
    return known or list(present)


def _number(value: Any) -> float | None:
    """A value as a finite number."""
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as JSON takes them."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


# Volumes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Volume:
    """The images of a case as the page shows them: (Z, Y, X) with the highest slice first, the patient's right at the
    left edge and the front at the top (radiological convention)."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    factors: tuple[int, int, int]
    top: float
    tilt: float
    is_hu: bool
    levels: Levels
    ct: list[Codes]
    mask: list[Codes]
    restored: list[Codes] | None
    difference: list[Codes] | None

    @classmethod
    def of(
        cls, ct: sitk.Image, mask: sitk.Image, restored: sitk.Image | None, difference: sitk.Image | None
    ) -> _Volume:
        images = {"mask": mask, "restored": restored, "difference": difference}
        for name, image in images.items():
            if image is not None and image.GetSize() != ct.GetSize():
                raise ValueError(f"The {name} has {image.GetSize()} voxels, the CT {ct.GetSize()}")
        axial = _axial(ct)
        x, y, z = axial.GetSpacing()
        size = axial.GetSize()
        size, spacing = (size[2], size[1], size[0]), (z, y, x)
        factors = reduction(size, spacing)
        values = sitk.GetArrayViewFromImage(axial)
        lowest, highest = float(values.min()), float(values.max())
        is_hu = lowest <= HIGHEST_AIR
        levels = HU_LEVELS if is_hu else np.linspace(lowest, max(highest, lowest + 1), 256)
        codes = [_code(plane, levels) for plane in _averaged(values, factors)]
        shown = [_labels(block, factors) for block in _blocks(sitk.GetArrayViewFromImage(_axial(mask)), factors[0])]
        return cls(
            size=size,
            spacing=spacing,
            factors=factors,
            top=axial.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in size[:0:-1]] + [size[0] - 1.0])[2],
            tilt=math.degrees(math.acos(min(1.0, abs(axial.GetDirection()[8])))),
            is_hu=is_hu,
            levels=levels,
            ct=codes,
            mask=shown,
            restored=None if restored is None else _planes(restored, factors, levels),
            difference=None if difference is None else _planes(difference, factors, DIFFERENCE_LEVELS),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (Z, Y, X) as shown."""
        height, width = self.ct[0].shape
        return len(self.ct), height, width

    @property
    def aspect(self) -> float:
        """Width of a slice over its height, in mm."""
        _, height, width = self.shape
        return width * self.spacing[2] / (height * self.spacing[1])

    @property
    def key_slice(self) -> int:
        """The slice with most lesion, or the middle one."""
        areas = [int(np.count_nonzero(plane)) for plane in self.mask]
        return int(np.argmax(areas)) if any(areas) else len(areas) // 2

    def panels(self) -> list[tuple[str, str]]:
        """Name and caption of each picture."""
        panels = [("ct", "CT"), ("contour", "CT with lesions outlined")]
        if self.restored is not None:
            panels.append(("restored", "Restored CT"))
        if self.difference is not None:
            panels.append(("difference", "CT - restored"))
        return panels

    def content(self) -> dict[str, Any]:
        """What the viewer's script reads."""
        planes: dict[str, Any] = {"ct": _packed(self.ct), "mask": _packed(self.mask)}
        if self.restored is not None:
            # Where the restored CT is the CT there is nothing to store.
            planes["restored"] = _packed(new - old for new, old in zip(self.restored, self.ct, strict=True))
        if self.difference is not None:
            planes["difference"] = _packed(self.difference)
        (dz, dy, dx), (fz, fy, fx) = self.spacing, self.factors
        return {
            "shape": self.shape,
            "spacing": [dz * fz, dy * fy, dx * fx],
            "top": self.top - dz * (fz - 1) / 2,
            "start": self.key_slice,
            "areas": [int(np.count_nonzero(plane)) for plane in self.mask],
            "unit": "HU" if self.is_hu else "",
            "levels": [round(level, 2) for level in self.levels.tolist()],
            "differenceLevels": DIFFERENCE_LEVELS.tolist(),
            "windows": WINDOWS if self.is_hu else {},
            "planes": planes,
        }

    def notes(self) -> list[str]:
        """What the reader should know about the pictures."""
        (z, y, x), (dz, dy, dx), (fz, _, fx) = self.size, self.spacing, self.factors
        notes = [f"CT: {x} x {y} x {z} voxels of {dx:.3g} x {dy:.3g} x {dz:.3g} mm."]
        if fz * fx > 1:
            parts = [f"{fz} slices"] * (fz > 1) + [f"{fx} x {fx} pixels"] * (fx > 1)
            notes.append(
                f"To keep this page small, {' and '.join(parts)} are averaged into one here, and the outline holds "
                "whatever is lesion in any of them; the numbers are measured on the whole CT."
            )
        if self.is_hu:
            notes.append("Grey values are rounded to 10 HU in lung, 5 HU in soft tissue and 21 HU in bone.")
        else:
            notes.append("The values of this CT are not HU, so the usual windows mean nothing here.")
        if self.tilt > 5:
            notes.append(f"The slices are the scanner's, tilted by {self.tilt:.0f} degrees from axial.")
        return notes

    def thumbnail(self) -> bytes:
        """The key slice in the lung window with the lesions outlined, as PNG."""
        level, width = WINDOWS["Lung"] if self.is_hu else (self.levels.mean(), np.ptp(self.levels))
        values = self.levels[self.ct[self.key_slice]]
        aspect = self.spacing[1] / self.spacing[2]
        return picture(values, self.mask[self.key_slice], (level - width / 2, level + width / 2), aspect)


def picture(values: NDArray[Any], mask: NDArray[Any], window: tuple[float, float], aspect: float = 1.0) -> bytes:
    """A small PNG of a slice with the outline of a mask.

    Args:
        values: Intensities (Y, X).
        mask: Labels (Y, X), 0 background.
        window: Intensities shown as black and as white.
        aspect: Height of a pixel over its width.
    """
    height, width = values.shape
    size = (THUMBNAIL_WIDTH, max(1, round(THUMBNAIL_WIDTH * aspect * height / width)))
    grey = np.clip((values - window[0]) / (window[1] - window[0]), 0, 1) * 255
    shown = np.array(Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.BOX).convert("RGB"))
    inside = np.array(Image.fromarray((mask > 0).astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shown[inside & ~core] = CONTOUR
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def reduction(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[int, int, int]:
    """How many voxels (Z, Y, X) are averaged into one, so that a page stays small.

    Slices come first, up to a thickness of `THICKEST`, because it is the pixels that a reader needs; then the pixels,
    and then no more slices than it takes.

    Args:
        size: Voxels of the CT (Z, Y, X).
        spacing: Their size in mm (Z, Y, X).

    Examples:
        >>> reduction((600, 512, 512), (0.6, 0.7, 0.7))
        (5, 1, 1)
        >>> reduction((80, 512, 512), (5.0, 0.7, 0.7))
        (1, 1, 1)
        >>> reduction((600, 512, 512), (1.0, 0.7, 0.7))
        (2, 2, 2)
    """
    most = max(1, int(THICKEST / spacing[0]))
    for pixels in itertools.count(1):
        for slices in range(1, most + 1):
            shown = math.ceil(size[0] / slices) * math.ceil(size[1] / pixels) * math.ceil(size[2] / pixels)
            if shown <= MOST_VOXELS:
                return slices, pixels, pixels
    raise AssertionError("the loop does not end")


def _axial(image: sitk.Image) -> sitk.Image:
    """The image with X to the patient's left, Y to the back and Z to the head, up to a tilt."""
    axes = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    return image if axes == "LPS" else sitk.DICOMOrient(image, "LPS")


def _blocks(values: NDArray[Any], thickness: int) -> Iterator[NDArray[Any]]:
    """Groups of slices from the top down."""
    for end in range(len(values), 0, -thickness):
        yield values[max(0, end - thickness) : end]


def _averaged(values: NDArray[Any], factors: tuple[int, int, int]) -> Iterator[NDArray[np.float32]]:
    for block in _blocks(values, factors[0]):
        plane = block[0].astype(np.float32) if len(block) == 1 else block.mean(axis=0, dtype=np.float32)
        yield _tiles(plane, factors).mean(axis=(1, 3))


def _labels(block: NDArray[Any], factors: tuple[int, int, int]) -> Codes:
    """The highest label in each shown voxel: no finding gets lost."""
    return _tiles(block.max(axis=0).astype(np.uint8), factors).max(axis=(1, 3))


def _tiles(plane: NDArray[Any], factors: tuple[int, int, int]) -> NDArray[Any]:
    """A plane (Y, X) as (rows, Y of a tile, columns, X of a tile), its edge repeated where the tiles do not fit."""
    _, fy, fx = factors
    height, width = plane.shape
    plane = np.pad(plane, ((0, -height % fy), (0, -width % fx)), mode="edge")
    return plane.reshape(plane.shape[0] // fy, fy, plane.shape[1] // fx, fx)


def _planes(image: sitk.Image, factors: tuple[int, int, int], levels: Levels) -> list[Codes]:
    return [_code(plane, levels) for plane in _averaged(sitk.GetArrayViewFromImage(_axial(image)), factors)]


def _code(plane: NDArray[np.float32], levels: Levels) -> Codes:
    """The nearest level of each value."""
    return np.rint(np.interp(plane, levels, np.arange(len(levels)))).astype(np.uint8)


def _packed(planes: Iterator[Codes] | Sequence[Codes]) -> list[str]:
    """Each plane compressed as PNG does it; viewer.js undoes it.

    Not as PNG files, because browsers that protect against fingerprinting falsify what is read back from a picture.
    """
    packed = []
    for plane in planes:
        shifted = np.pad(plane, ((1, 0), (1, 0))).astype(np.int16)
        left, up, corner = shifted[1:, :-1], shifted[:-1, 1:], shifted[:-1, :-1]
        expected = np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
        residual = (plane - expected).astype(np.uint8)
        packed.append(base64.b64encode(zlib.compress(residual.tobytes())).decode())
    return packed
