"""A page per case for a radiologist (slices, contour, restored CT, difference, burden) and an index over all cases.

A page holds everything it shows. Slices are embedded at 256 grey levels that lie close where soft tissue is told apart,
so that every window can be set in the browser, and are averaged down where a CT is larger than `MOST_VOXELS`.
"""

from __future__ import annotations

import base64
import itertools
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

from gasnet_nnunet.pages import inline, slice_picture, write_page
from gasnet_nnunet.volumes import HIGHEST_AIR

MOST_VOXELS = 32_000_000
"""Voxels of a page's CT: 512 x 512 x 120, which keeps a page below 40 MB."""
THICKEST = 3.0
"""Slices are averaged up to this thickness in mm before the pixels are."""
WINDOWS = {"Lung": (-600, 1500), "Mediastinum": (40, 400), "Bone": (400, 1800)}
"""Level and width in HU of the presets."""
HU_LEVELS = np.interp(np.arange(256), [0, 84, 184, 244, 255], [-1024, -200, 250, 1500, 3071])
"""HU of each of the 256 grey levels: steps of 10 HU in lung, 4.5 in soft tissue, 21 in bone."""
DIFFERENCE_LEVELS = np.interp(np.arange(255), [0, 27, 127, 227, 254], [-2000, -1000, 0, 1000, 2000])
"""HU of each level of a difference: steps of 10 HU up to 1000; 0 is a level."""
CONTOUR = (255, 214, 0)

Levels = NDArray[np.float64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class IndexRow:
    """What the index shows of a case, beside the picture in its report.

    Args:
        case: Name of the case.
        burden: Lesion burden as in its report; empty if there is none.
        warnings: Its warnings.
        problem: What went wrong with it, in a sentence; `None` if nothing did.
    """

    case: str
    burden: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    problem: str | None = None


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
        burden: Lesion burden by the names of `burden.burden_of`; others are shown under their own.
        model: What the mask was made with: names and values, in the order to show.
        warnings: What the reader has to know, one sentence each.

    Raises:
        ValueError: The images do not lie on one grid.
    """
    volume = _Volume.of(ct, mask, restored, difference)
    write_page(
        path,
        "case.html",
        title=case,
        model=model,
        warnings=list(warnings),
        tables=burden_tables(burden),
        volume=volume.content(),
        aspect=volume.aspect,
        notes=volume.notes(),
        panels=volume.panels(),
        windows=WINDOWS if volume.is_hu else {},
        picture=inline(volume.thumbnail()),
    )


def write_index(path: Path, rows: Sequence[IndexRow]) -> None:
    """Write the page over all cases, with pictures of the reports that lie beside it and links to them.

    Args:
        path: The page to write.
        rows: The cases, shown with the greatest burden first.
    """
    columns = index_columns([row.burden for row in rows])
    table = []
    for row in sorted(rows, key=lambda row: _rank(row, list(columns))):
        report = path.parent / report_name(row.case)
        values = {name: row.burden.get(name) for name in columns}
        table.append(
            {
                "case": row.case,
                "link": quote(report.name) if report.is_file() else None,
                "picture": _picture_of(report) if report.is_file() else None,
                "cells": [(_number(value), as_text(name, value)) for name, value in values.items()],
                "problem": row.problem,
                "warnings": [warning for warning in row.warnings if warning != row.problem],
            }
        )
    problems = sum(row.problem is not None for row in rows)
    write_page(path, "index.html", title="Cases", headings=list(columns.values()), rows=table, problems=problems)


def _picture_of(report: Path) -> str | None:
    """The address of the picture near the head of a report."""
    with report.open(encoding="utf-8") as file:
        found = (re.search(r'<img id="picture" src="([^"]+)"', line) for line in file)
        return next((match[1] for match in found if match), None)


def _rank(row: IndexRow, columns: Sequence[str]) -> float:
    """The greater the burden the lower; cases without a number come last."""
    number = _number(row.burden.get(columns[0])) if columns else None
    return math.inf if number is None else -number


# Burden ---------------------------------------------------------------------------------------------------------------

TABLES: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    (
        "Where",
        ("Lesion (ml)", "% of lung", "Lung (ml)"),
        (
            ("Both lungs", ("lesion_ml", "lesion_percent", "lung_ml")),
            ("Right", ("right_lesion_ml", "right_percent", "right_lung_ml")),
            ("Left", ("left_lesion_ml", "left_percent", "left_lung_ml")),
            ("Upper third", ("upper_lesion_ml", "upper_percent", "upper_lung_ml")),
            ("Middle third", ("middle_lesion_ml", "middle_percent", "middle_lung_ml")),
            ("Lower third", ("lower_lesion_ml", "lower_percent", "lower_lung_ml")),
        ),
    ),
    (
        "Kind",
        ("ml", "% of lesion"),
        (
            ("Ground glass", ("ground_glass_ml", "ground_glass_percent")),
            ("Consolidated", ("consolidated_ml", "consolidated_percent")),
        ),
    ),
    (
        "Mean HU",
        ("CT", "restored"),
        (
            ("In lesions", ("lesion_mean_hu", "lesion_mean_hu_restored")),
            ("In lungs", ("lung_mean_hu", "lung_mean_hu_restored")),
        ),
    ),
    (
        "Lesions",
        ("",),
        (
            ("Number", ("components",)),
            ("Sizes (ml)", ("component_ml",)),
            ("Outside the lung mask (ml)", ("lesion_outside_lung_ml",)),
        ),
    ),
)
"""Tables of the burden: caption, headings, and the names (see `burden.burden_of`) that stand in each row."""
INDEX_COLUMNS = {
    "lesion_ml": "Lesion (ml)",
    "lesion_percent": "% of lung",
    "right_percent": "% of right",
    "left_percent": "% of left",
    "consolidated_percent": "% consolidated",
    "components": "Lesions",
}
"""Names that have a column in the index, and their headings."""
DIGITS = {"_ml": 1, "_percent": 1, "_hu": 0, "_restored": 0}
"""Decimals by the end of a name."""
LISTED = 5


def burden_tables(burden: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything in a burden as tables: the known names where a reader looks for them, the others under their own.

    Examples:
        >>> where, other = burden_tables({"lesion_ml": 12.34, "new_thing": 7})
        >>> where["rows"], other["rows"]
        ([('Both lungs', ['12.3', '', ''])], [('new thing', ['7'])])
    """
    tables = []
    known = {"largest_component_ml"}  # the first of the sizes
    for caption, headings, lines in TABLES:
        rows = [
            (label, [as_text(name, burden[name]) if name in burden else "" for name in names])
            for label, names in lines
            if any(name in burden for name in names)
        ]
        known.update(name for _, names in lines for name in names)
        tables.append({"caption": caption, "headings": headings, "rows": rows})
    rest = [(_label(name), [as_text(name, value)]) for name, value in burden.items() if name not in known]
    tables.append({"caption": "Other", "headings": ("",), "rows": rest})
    return [table for table in tables if table["rows"]]


def index_columns(burdens: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names of the numbers that get a column in the index, and their headings; all numbers where none is known."""
    present = [name for burden in burdens for name, value in burden.items() if _number(value) is not None]
    columns = {name: heading for name, heading in INDEX_COLUMNS.items() if name in present}
    return columns or {name: _label(name) for name in present}


def as_text(name: str, value: Any) -> str:
    """A value of the burden as it is shown, with the decimals of its kind.

    Examples:
        >>> as_text("lesion_ml", 0.04), as_text("lung_mean_hu", -812.6), as_text("components", 3)
        ('<0.1', '-813', '3')
        >>> as_text("component_ml", [8.0, 2.5, 1, 1, 1, 1, 1]), as_text("lesion_percent", None)
        ('8.0, 2.5, 1.0, 1.0, 1.0 and 2 more', '-')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{_label(key)} {as_text(key, item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(as_text(name, item) for item in value[:LISTED]) or "-"
        return shown + (f" and {len(value) - LISTED} more" if len(value) > LISTED else "")
    number = _number(value)
    if number is None:
        return str(value) if isinstance(value, str) else "-"
    digits = next((digits for end, digits in DIGITS.items() if name.endswith(end)), None)
    if digits is None:
        return f"{number:.6g}"
    return f"<{10**-digits:.{digits}f}" if 0 < number < 0.5 * 10**-digits else f"{number:.{digits}f}"


def _label(name: str) -> str:
    """A name as words, with its unit.

    Examples:
        >>> _label("largest_hole_ml")
        'largest hole (ml)'
    """
    for end, unit in (("_ml", "ml"), ("_percent", "%"), ("_hu", "HU")):
        if name.endswith(end):
            return f"{name.removesuffix(end).replace('_', ' ')} ({unit})"
    return name.replace("_", " ")


def _number(value: Any) -> float | None:
    """A value as a finite number."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


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
        shown = axial(ct)
        spacing = shown.GetSpacing()[::-1]
        values = sitk.GetArrayViewFromImage(shown)
        size = values.shape
        factors = reduction(size, spacing)
        lowest, highest = float(values.min()), float(values.max())
        is_hu = lowest <= HIGHEST_AIR
        levels = HU_LEVELS if is_hu else np.linspace(lowest, max(highest, lowest + 1), 256)
        labels = axial(mask)  # held, because a view of its voxels does not
        return cls(
            size=size,
            spacing=spacing,
            factors=factors,
            top=shown.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in size[:0:-1]] + [size[0] - 1.0])[2],
            tilt=math.degrees(math.acos(min(1.0, abs(shown.GetDirection()[8])))),
            is_hu=is_hu,
            levels=levels,
            ct=[_code(plane, levels) for plane in _averaged(values, factors)],
            mask=[_labels(block, factors) for block in _blocks(sitk.GetArrayViewFromImage(labels), factors[0])],
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
            notes.append("Grey values are rounded to 10 HU in lung, 4.5 HU in soft tissue and 21 HU in bone.")
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
        outline = (self.mask[self.key_slice] > 0, CONTOUR)
        return slice_picture(values, (level - width / 2, level + width / 2), [outline], aspect)


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


def axial(image: sitk.Image) -> sitk.Image:
    """The image whose slices are shown: X to the patient's left, Y to the back and Z to the head, up to a tilt."""
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
    shown = axial(image)
    return [_code(plane, levels) for plane in _averaged(sitk.GetArrayViewFromImage(shown), factors)]


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
