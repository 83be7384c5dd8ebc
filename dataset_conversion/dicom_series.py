"""DICOM series: found by their headers, checked to be one volume, and read in the order of their slices' positions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.volumes import DIRECTION_TOLERANCE, SPACING_TOLERANCE, Grid

BATCH = 200
"""Headers that a worker reads at a time."""
AXIAL_COSINE = 0.8
"""Least cosine between the slices' normal and the body's axis; gantries are tilted by up to 30 degrees, 0.87."""
UNEVEN = 0.25
"""Share of a slice distance by which a slice may lie off an even stack; positions are often rounded to 0.1 mm."""
TAGS = [
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "SeriesNumber",
    "Modality",
    "ImageType",
    "SeriesDescription",
    "ProtocolName",
    "BodyPartExamined",
    "ConvolutionKernel",
    "Manufacturer",
    "SliceThickness",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
]


@dataclass(frozen=True)
class Header:
    """What a slice's header says, but for its position: equal, as a rule, in all slices of a series.

    Args:
        patient: PatientID.
        study: StudyInstanceUID.
        series: SeriesInstanceUID.
        frame_of_reference: FrameOfReferenceUID.
        number: SeriesNumber.
        modality: Modality, CT for a CT.
        image_type: ImageType, in capitals.
        description: SeriesDescription, ProtocolName and BodyPartExamined, in capitals.
        kernel: ConvolutionKernel.
        manufacturer: Manufacturer.
        thickness: SliceThickness in mm, 0 where it is not told.
        frames: NumberOfFrames, 1 for a slice a file.
        size: Rows and columns.
        spacing: PixelSpacing in mm: between rows, between columns.
        orientation: ImageOrientationPatient: direction along a row, then down a column (LPS).
        rescaled: Whether there are RescaleSlope and RescaleIntercept.
        rescale_type: RescaleType, in capitals; HU or nothing for Hounsfield units.
        transfer_syntax: How the pixels are stored.
    """

    patient: str
    study: str
    series: str
    frame_of_reference: str
    number: str
    modality: str
    image_type: tuple[str, ...]
    description: str
    kernel: str
    manufacturer: str
    thickness: float
    frames: int
    size: tuple[int, int]
    spacing: tuple[float, ...]
    orientation: tuple[float, ...]
    rescaled: bool
    rescale_type: str
    transfer_syntax: str


@dataclass(frozen=True)
class Slice:
    """A DICOM file.

    Args:
        file: Its path, text because archives hold hundreds of thousands.
        position: ImagePositionPatient: centre of the first voxel in mm (LPS); empty where it is not told.
        header: The rest.
    """

    file: str
    position: tuple[float, ...]
    header: Header


@dataclass(frozen=True)
class Series:
    """A DICOM series, whatever it shows.

    Args:
        slices: Its files, in no order.
    """

    slices: tuple[Slice, ...]

    @property
    def header(self) -> Header:
        """The header of its first file."""
        return self.slices[0].header

    @property
    def named(self) -> str:
        """How messages name it."""
        number = f" (number {self.header.number})" if self.header.number else ""
        return f"study {self.header.study}, series {self.header.series}{number}"

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across its slices (LPS); zero where no orientation is told."""
        if len(self.header.orientation) != 6:
            return np.zeros(3)
        row, column = np.reshape(self.header.orientation, (2, 3))
        return np.cross(row, column)

    @cached_property
    def heights(self) -> NDArray[np.float64]:
        """Places of its slices along the normal in mm, rising; empty where a position is missing."""
        if not all(len(one.position) == 3 for one in self.slices):
            return np.zeros(0)
        return np.sort(np.array([one.position for one in self.slices]) @ self.normal)

    @property
    def step(self) -> float:
        """Usual distance of its slices in mm; 0 where it cannot be told."""
        return float(np.median(np.diff(self.heights))) if len(self.heights) > 1 else 0.0

    @property
    def extent(self) -> float:
        """From its first to its last slice in mm; 0 where it cannot be told."""
        return float(self.heights[-1] - self.heights[0]) if len(self.heights) else 0.0

    @property
    def thickness(self) -> float:
        """Thickness of its slices in mm, or their distance where it is not told."""
        return self.header.thickness or self.step

    def volume(self, case: str) -> DicomVolume:
        """The series as a volume.

        Args:
            case: The name by which the volume is known from here on.

        Raises:
            UserError: Its files do not make up one volume in Hounsfield units, or their pixels cannot be decoded.
        """
        if fault := self._mixture() or self._undecodable():
            raise UserError(f"{self.named}: {fault}")
        row, column = np.reshape(self.header.orientation, (2, 3))
        flipped = bool(self.normal[2] < 0)
        # The third axis points up. Where the slices are seen from above, rows are read backwards, to stay right-handed.
        if flipped:
            row = -row
        up = np.cross(row, column)
        positions = np.array([one.position for one in self.slices])
        order = np.argsort(positions @ up, kind="stable")
        positions = positions[order]
        slices = [self.slices[number] for number in order]
        if fault := _unevenness(slices, positions, up, min(self.header.spacing)):
            raise UserError(f"{self.named}: {fault}")
        (rows, columns), (between_rows, between_columns) = self.header.size, self.header.spacing
        origin = positions[0] - (columns - 1) * between_columns * row if flipped else positions[0]
        step = float((positions[-1] - positions[0]) @ up) / (len(slices) - 1)
        grid = Grid(
            (columns, rows, len(slices)),
            (between_columns, between_rows, step),
            tuple(origin.tolist()),
            tuple(np.stack([row, column, up], axis=1).ravel().tolist()),
        )
        return DicomVolume(case, tuple(Path(one.file) for one in slices), grid, flipped)

    def _mixture(self) -> str | None:
        """Why its headers do not describe one volume."""
        headers = {one.header for one in self.slices}
        first = self.header
        if len({header.patient for header in headers}) > 1:
            return "its files name several patients. Have it exported again."
        if first.modality != "CT":
            return f"it is no CT (Modality {first.modality or 'not told'}). Name another series."
        if any(header.frames > 1 for header in headers):
            return (
                "it is an enhanced (multi-frame) object, which is not read here. Convert it to NIfTI, e.g. with "
                "dcm2niix, and use `convert folders`."
            )
        if len(self.slices) < 2:
            return "it has one image only. Name another series."
        if not all(len(one.position) == 3 for one in self.slices) or any(
            len(header.orientation) != 6 or len(header.spacing) != 2 for header in headers
        ):
            return "ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing. Have it exported again."
        sizes = sorted({header.size for header in headers})
        if len(sizes) > 1:
            found = " and ".join(f"{columns} x {rows}" for rows, columns in sizes)
            return f"its slices are of several sizes ({found}). {SPLIT_UP}"
        for header in headers:
            turned = max(abs(a - b) for a, b in zip(header.orientation, first.orientation, strict=True))
            scaled = max(abs(a / b - 1) for a, b in zip(header.spacing, first.spacing, strict=True))
            if turned > DIRECTION_TOLERANCE or scaled > SPACING_TOLERANCE:
                return f"its slices differ in orientation or pixel spacing; is a localizer among them? {SPLIT_UP}"
        if abs(self.normal[2]) < AXIAL_COSINE:
            return "its slices are not axial. Name another series."
        if not all(header.rescaled for header in headers) or any(header.rescale_type not in HU for header in headers):
            return "its values are not in Hounsfield units (RescaleSlope, RescaleIntercept, RescaleType). Name another."
        return None

    def _undecodable(self) -> str | None:
        """Which package is missing that decodes its pixels."""
        from pydicom.pixels import get_decoder
        from pydicom.uid import UID

        for uid in {one.header.transfer_syntax for one in self.slices}:
            syntax = UID(uid)
            if not syntax.is_compressed:
                continue
            try:
                decoder = get_decoder(syntax)
            except NotImplementedError:
                return f"its pixels are stored as {syntax.name}, which pydicom cannot decode. Have it exported again."
            if not decoder.is_available:
                return (
                    f"its pixels are compressed ({syntax.name}), and what decodes them is not installed: "
                    f'{"; or ".join(decoder.missing_dependencies)}. Run `pip install "pylibjpeg[all]"`.'
                )
        return None


HU = ("", "HU", "US")
"""RescaleTypes of CT values; US is 'unspecified'."""
SPLIT_UP = "Name another series, or move the odd files out of the folder that is read."


def _unevenness(slices: Sequence[Slice], positions: NDArray[Any], up: NDArray[Any], pixel: float) -> str | None:
    """Why sorted slices are no even, upright stack."""
    heights = (positions - positions[0]) @ up
    steps = np.diff(heights)
    usual = float(np.median(steps))
    doubled = np.flatnonzero(steps < 0.01)
    if len(doubled):
        first = int(doubled[0])
        return (
            f"{len(doubled)} of its positions occur twice, e.g. in {slices[first].file} and {slices[first + 1].file}: "
            f"copies, or several reconstructions in one series. {SPLIT_UP}"
        )
    gaps = np.flatnonzero(steps > (1 + UNEVEN) * usual)
    if len(gaps):
        first = int(gaps[0])
        missing = sum(max(1, round(float(step) / usual) - 1) for step in steps[gaps])
        low, high = positions[first][2], positions[first + 1][2]
        more = f" (the first of {len(gaps)} gaps)" if len(gaps) > 1 else ""
        return (
            f"slices are missing (about {missing}): there is none between z = {low:.2f} and {high:.2f} mm{more}, "
            f"elsewhere they are {usual:.3g} mm apart. Have it exported again, or name another series."
        )
    even = np.linspace(0, heights[-1], len(heights))
    off = np.abs(heights - even)
    if off.max() > UNEVEN * usual or steps.min() < (1 - UNEVEN) * usual:
        return (
            f"its slices lie {steps.min():.3g} to {steps.max():.3g} mm apart; an even distance is expected. Resample "
            "it, e.g. with dcm2niix, and use `convert folders`, or name another series."
        )
    aside = np.linalg.norm(positions - positions[0] - heights[:, None] * up, axis=1)
    if aside.max() > pixel:
        angle = float(np.degrees(np.arctan2(aside[-1], heights[-1])))
        return (
            f"its gantry was tilted: its slices are shifted against each other by {aside.max():.3g} mm in all "
            f"({angle:.1f} degrees). Straighten it, e.g. with dcm2niix, and use `convert folders`, or name another "
            "series."
        )
    return None


@dataclass(frozen=True)
class DicomVolume:
    """The slices of a series that make up one volume, known by a pseudonym.

    Args:
        case: The name of its case.
        slices: Its files, from the lowest to the highest slice.
        grid: Where it lies: X along a row, Z up (LPS).
        flipped: Whether X runs against the stored rows.
    """

    case: str
    slices: tuple[Path, ...]
    grid: Grid
    flipped: bool

    def __str__(self) -> str:
        return f"{self.case} (DICOM series)"

    def files(self) -> Sequence[Path]:
        """Its files, from the lowest to the highest slice."""
        return self.slices

    def read(self) -> tuple[NDArray[Any], Grid]:
        """Values (Z, Y, X) in HU, int16 where that holds them and else float32, and the grid.

        Raises:
            UserError: A file cannot be read or decoded.
        """
        columns, rows, count = self.grid.size
        values: NDArray[Any] = np.empty((count, rows, columns), np.int16)
        limits = np.iinfo(np.int16)
        for number, file in enumerate(self.slices):
            pixels, slope, intercept = _read_slice(file)
            if pixels.shape != (rows, columns):
                raise UserError(f"{file} holds {pixels.shape} pixels; {rows} rows and {columns} columns are expected.")
            plane = pixels * slope + intercept
            whole = slope.is_integer() and intercept.is_integer()
            if values.dtype == np.int16 and not (whole and plane.min() >= limits.min and plane.max() <= limits.max):
                values = values.astype(np.float32)
            values[number] = plane[:, ::-1] if self.flipped else plane
        return values, self.grid


def _read_slice(file: Path) -> tuple[NDArray[Any], float, float]:
    """Stored values (Y, X), slope and intercept of a file."""
    from pydicom import dcmread

    try:
        dataset = dcmread(file)
        return dataset.pixel_array, float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    # What pydicom raises for files that are cut off, lack elements, or hold streams that their decoder refuses.
    except (OSError, EOFError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}. Have it exported again.") from None


def scan(root: Path, *, num_processes: int = 1, progress: bool = False) -> tuple[list[Series], int]:
    """Find all DICOM series under a folder; of each file only the header is read.

    Args:
        root: The folder, searched to its depths.
        num_processes: Processes that read headers.
        progress: Show a progress bar.

    Returns:
        The series, sorted by their UIDs, and how many files were no DICOM files or could not be read.

    Raises:
        UserError: There is no such folder, or no DICOM file under it.
    """
    if not root.is_dir():
        raise UserError(f"--in: {root} is no folder." if root.exists() else f"--in: there is no {root}.")
    files = sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if not name.startswith(".")
    )
    batches = [tuple(files[start : start + BATCH]) for start in range(0, len(files), BATCH)]
    title = "Reading headers" if progress else None
    found: dict[tuple[str, str], list[Slice]] = {}
    headers: dict[Header, Header] = {}
    count = 0
    for batch in run_jobs(read_headers, batches, num_processes=num_processes, description=title):
        for one in batch:
            # Processes send copies; one a series is enough.
            header = headers.setdefault(one.header, one.header)
            found.setdefault((header.study, header.series), []).append(Slice(one.file, one.position, header))
            count += 1
    if not found:
        raise UserError(f"--in: {root} holds no DICOM files ({len(files)} others). Name the folder of the studies.")
    return [Series(tuple(found[key])) for key in sorted(found)], len(files) - count


def read_headers(files: Sequence[str]) -> list[Slice]:
    """Read headers, those of files that are no DICOM images or objects of a series excepted.

    Args:
        files: Paths.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    slices = []
    shared: dict[Header, Header] = {}
    for file in files:
        try:
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
        # Also broken links and what is cut off; if it belonged to a series that is taken, its gap is noticed there.
        except (InvalidDicomError, EOFError, OSError, ValueError):
            continue
        if not dataset.get("SeriesInstanceUID"):  # a DICOMDIR
            continue
        header = _header(dataset)
        slices.append(Slice(file, _numbers(dataset, "ImagePositionPatient"), shared.setdefault(header, header)))
    return slices


def _header(dataset: Any) -> Header:
    texts = ("SeriesDescription", "ProtocolName", "BodyPartExamined")
    return Header(
        patient=_text(dataset, "PatientID"),
        study=_text(dataset, "StudyInstanceUID"),
        series=_text(dataset, "SeriesInstanceUID"),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        number=_text(dataset, "SeriesNumber"),
        modality=_text(dataset, "Modality").upper(),
        image_type=tuple(_words(dataset, "ImageType")),
        description=" ".join(_text(dataset, text) for text in texts).upper(),
        kernel=" ".join(_words(dataset, "ConvolutionKernel")),
        manufacturer=_text(dataset, "Manufacturer"),
        thickness=sum(_numbers(dataset, "SliceThickness")[:1], 0.0),
        frames=int(sum(_numbers(dataset, "NumberOfFrames")[:1])) or 1,
        size=(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
        spacing=_numbers(dataset, "PixelSpacing"),
        orientation=_numbers(dataset, "ImageOrientationPatient"),
        rescaled=all(_numbers(dataset, name) for name in ("RescaleSlope", "RescaleIntercept")),
        rescale_type=_text(dataset, "RescaleType").upper(),
        transfer_syntax=str(dataset.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")),
    )


def _text(dataset: Any, name: str) -> str:
    value = dataset.get(name)
    return "" if value is None else str(value).strip()


def _words(dataset: Any, name: str) -> list[str]:
    value = dataset.get(name)
    return [str(word).strip().upper() for word in _several(value)]


def _numbers(dataset: Any, name: str) -> tuple[float, ...]:
    """The numbers of an element; none where it is missing, empty or no number."""
    try:
        return tuple(float(number) for number in _several(dataset.get(name)))
    except (TypeError, ValueError):
        return ()


def _several(value: Any) -> Iterable[Any]:
    from pydicom.multival import MultiValue

    if value is None or value == "":
        return ()
    return value if isinstance(value, MultiValue) else (value,)
