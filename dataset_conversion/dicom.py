"""A hospital's archive, DICOM studies and a table of diagnoses, made into an nnU-Net dataset without patient data.

Studies are found by their headers; one series of each study of the table is taken, by the rule of `unsuitable` and
`preference`. From there on cases and patients are known by pseudonyms.
"""

from __future__ import annotations

import csv
import io
import os
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gasnet_nnunet.cohort import Kind, abbreviate, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import read_grid

from .conversion import Converted, check_target, convert
from .dicom_masks import DicomMask, MaskHeader, VolumeMask, read_mask_header
from .dicom_series import AXIAL_COSINE, HU, DicomVolume, Series, scan
from .manifest import KINDS, Row, locate, missing_kinds, read_manifest
from .sources import Source

COLUMNS = (
    "path",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "diagnosis",
    "series",
    "mask",
    "structures",
)
IDENTIFYING = COLUMNS[:4]
MIN_SLICES = 20
MIN_EXTENT_MM = 150.0
"""Height of most of the lungs of an adult."""
MAX_THICKNESS_MM = 5.0
IDEAL_THICKNESS_MM, THICKNESS_STEP_MM = 1.0, 0.5
NO_VOLUME = {"LOCALIZER", "SCOUT", "MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "SCREEN SAVE"}
"""Values of ImageType."""
NO_VOLUME_WORDS = re.compile(r"\b(SCOUT|LOCALI[ZS]ER|TOPOGRAM|SURVIEW|MIP|MINIP|DOSE REPORT|SCREEN ?SAVE)\b")
CHEST_WORDS = re.compile(r"CHEST|THORAX|THORAC|LUNG|PULMO")
RULE = (
    "of each study the series was taken that is a CT in HU, axial, no localizer and no projection (MIP), of at least "
    f"{MIN_SLICES} slices over at least {MIN_EXTENT_MM:g} mm, each at most {MAX_THICKNESS_MM:g} mm thick and apart; "
    "among several of these, in this order: one that says it shows the chest, an original image before a derived one, "
    f"thickness nearest to {IDEAL_THICKNESS_MM:g} mm (in steps of {THICKNESS_STEP_MM:g} mm), a {{kernel}} kernel, most "
    "slices. The column 'series' of the manifest overrules it."
)
"""The rule as the user is told; `unsuitable` and `preference` carry it out."""


def unsuitable(series: Series) -> str | None:
    """Why the rule does not take a series as a chest CT; `None` if it may."""
    header = series.header
    if header.modality != "CT":
        return f"no CT (Modality {header.modality or 'not told'})"
    if header.rescale_type not in HU:
        return f"not in HU (RescaleType {header.rescale_type})"
    if NO_VOLUME & set(header.image_type) or NO_VOLUME_WORDS.search(header.description):
        return "a localizer or a projection"
    if abs(series.normal[2]) < AXIAL_COSINE:
        return "not axial"
    if len(series.slices) < MIN_SLICES:
        return f"{len(series.slices)} slices only"
    if max(series.thickness, series.step) > MAX_THICKNESS_MM:
        return f"slices {series.thickness:g} mm thick and {series.step:g} mm apart"
    if series.extent < MIN_EXTENT_MM:
        return f"{series.extent:.0f} mm high only"
    return None


def preference(series: Series, *, kernel: str = "soft") -> tuple[Any, ...]:
    """Sorts the series that the rule may take, the best one first.

    Args:
        series: The series.
        kernel: "soft" or "lung", the kind of kernel wanted.
    """
    header = series.header
    return (
        not CHEST_WORDS.search(header.description),
        "DERIVED" in header.image_type,
        round(abs(series.thickness - IDEAL_THICKNESS_MM) / THICKNESS_STEP_MM),
        {kernel: 0, None: 1}.get(kernel_kind(header.kernel), 2),
        -len(series.slices),
        header.series,
    )


def kernel_kind(kernel: str) -> str | None:
    """Whether a reconstruction kernel is meant for soft tissue or for the lungs, as the makers name them.

    Args:
        kernel: ConvolutionKernel in capitals.

    Returns:
        "soft", "lung" (any sharp kernel), or `None` for one that is not known.

    Examples:
        >>> [kernel_kind(name) for name in ("B31F", "BL57D 3", "LUNG", "STANDARD", "FC51", "YA", "X")]
        ['soft', 'lung', 'lung', 'soft', 'lung', 'lung', None]
    """
    if re.search(r"LUNG|BONE|EDGE|SHARP", kernel):
        return "lung"
    if re.search(r"STANDARD|STND|SOFT|DETAIL|CHEST|SMOOTH", kernel):
        return "soft"
    if match := re.match(r"(?:[BDHIJQTU][A-Z]?)(\d\d)", kernel):  # Siemens: the higher the sharper
        return "lung" if int(match[1]) >= 50 else "soft"
    if match := re.match(r"FC(\d\d)", kernel):  # Canon, Toshiba: 1 to 29 are for the body
        return "lung" if int(match[1]) >= 30 else "soft"
    if re.match(r"(?:D|E|L|Y[A-D])\b", kernel):  # Philips
        return "lung"
    return "soft" if re.match(r"[ABC]\b", kernel) else None


def convert_dicom(
    *,
    dataset_id: int,
    name: str,
    root: Path,
    manifest: Path,
    kernel: str = "soft",
    seed: int | None = None,
    link_table: Path | None = None,
    overwrite: bool = False,
    num_processes: int = 2,
    progress: bool = False,
) -> Converted:
    """Make `nnUNet_raw/DatasetNNN_NAME` out of DICOM studies and a table of diagnoses.

    Args:
        dataset_id: nnU-Net's dataset id, 1 to 999.
        name: Name behind the id: letters, digits, `_` and `-`.
        root: Folder of the studies, searched to its depths.
        manifest: CSV or XLSX file. `diagnosis` is labelled, diseased, healthy or test; a diseased case with a mask is
            labelled. A row is found by `path` (file or folder), `PatientID`, `StudyInstanceUID` or `SeriesInstanceUID`,
            or several of them. `series` (number or SeriesInstanceUID) overrules the choice of the series, `mask` is a
            NIfTI file, a DICOM segmentation or structure set, `structures` names (with `;` between) what in it is
            lesion. Relative paths start at `root`, or else at the manifest's folder.
        kernel: "soft" or "lung": kernel to be preferred where a study has series of both.
        seed: Number the cases in an order drawn with this seed; `None` for the order of the rows.
        link_table: CSV file to be made that tells which pseudonym is whom.
        overwrite: Replace a dataset of the same id and name, and an old `link_table`.
        num_processes: Files or cases read at a time.
        progress: Show progress bars.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or the manifest or a series cannot be used; all mistakes are
            named.
    """
    check_target(dataset_id, name, overwrite)
    if kernel not in ("soft", "lung"):
        raise UserError(f"--kernel is '{kernel}'; expected soft or lung.")
    if link_table:
        _check_link_table(link_table, overwrite)
    rows = read_manifest(manifest, COLUMNS, ("diagnosis",))
    if not any(column in row.cells for row in rows for column in IDENTIFYING):
        raise UserError(f"{manifest} tells no scan: it needs a column {' or '.join(IDENTIFYING)}.")
    found, others = scan(root, num_processes=num_processes, progress=progress)
    picked, problems = pick(rows, Archive(found, root), (root, manifest.parent), kernel)
    raise_problems([*problems, *_clashes(picked)], str(manifest))
    cases = _name(picked, seed)
    sources, problems = _sources(cases)
    raise_problems(problems, "the series")
    converted = convert(
        sources,
        dataset_id=dataset_id,
        name=name,
        remarks=[*_remarks(picked, kernel, others), *missing_kinds(sources)],
        overwrite=overwrite,
        num_processes=num_processes,
        progress=progress,
    )
    if link_table:
        _write_link_table(link_table, cases)
    return converted


@dataclass(frozen=True)
class Archive:
    """All series of an archive, and ways to find them.

    Args:
        series: The series.
        root: The folder they lie in.
    """

    series: Sequence[Series]
    root: Path

    @cached_property
    def _by_path(self) -> Mapping[str, set[int]]:
        found: dict[str, set[int]] = {}
        root = os.path.abspath(self.root)
        for number, series in enumerate(self.series):
            folders = {os.path.dirname(os.path.abspath(one.file)) for one in series.slices}
            places = {os.path.abspath(one.file) for one in series.slices} | folders
            for folder in folders:
                while len(folder) > len(root):
                    folder = os.path.dirname(folder)
                    places.add(folder)
            for place in places:
                found.setdefault(place, set()).add(number)
        return found

    def find(self, row: Row, folders: Iterable[Path]) -> list[Series]:
        """The series that all identifying cells of a row fit.

        Raises:
            UserError: There are none.
        """
        left = set(range(len(self.series)))
        for column in IDENTIFYING:
            if column not in row.cells:
                continue
            cell = row.cells[column]
            if column == "path":
                place = locate(cell, folders)
                left &= self._by_path.get(os.path.abspath(place), set()) if place else set()
            else:
                left = {number for number in left if _identity(self.series[number], column) == cell}
            if not left:
                hint = " Spreadsheets drop leading zeros: is it stored as text?" if column == "PatientID" else ""
                raise UserError(f"{row.named}: no DICOM series under {self.root} has the {column} {cell}.{hint}")
        return [self.series[number] for number in sorted(left)]


def _identity(series: Series, column: str) -> str:
    header = series.header
    values = {"PatientID": header.patient, "StudyInstanceUID": header.study, "SeriesInstanceUID": header.series}
    return values[column]


@dataclass(frozen=True)
class Picked:
    """A row of the manifest with the series that was taken for it.

    Args:
        row: The row.
        kind: What the case is to be; `None` for a test case.
        series: The series.
        others: Further series of the study that the rule may take.
        by: What chose it: "rule", "manifest" or "mask".
        mask: Its mask, if it has one.
        header: What a DICOM mask says about itself.
        structures: Numbers of a DICOM mask's lesion structures.
    """

    row: Row
    kind: Kind | None
    series: Series
    others: tuple[Series, ...]
    by: str
    mask: Path | None = None
    header: MaskHeader | None = None
    structures: tuple[int, ...] = ()


def pick(rows: Sequence[Row], archive: Archive, folders: Sequence[Path], kernel: str) -> tuple[list[Picked], list[str]]:
    """Take a series for each row.

    Args:
        rows: The manifest.
        archive: All series.
        folders: Where relative paths start; the first one in which they exist.
        kernel: "soft" or "lung".

    Returns:
        Those that were taken, and what is wrong with the other rows, one sentence each.
    """
    picked, problems = [], []
    for row in rows:
        try:
            picked.append(_pick(row, archive, folders, kernel))
        except UserError as error:
            problems.append(str(error))
    return picked, problems


def _pick(row: Row, archive: Archive, folders: Sequence[Path], kernel: str) -> Picked:
    kind = _kind(row)
    if not any(column in row.cells for column in IDENTIFYING):
        raise UserError(f"{row.named} tells no scan: fill in {' or '.join(IDENTIFYING)}.")
    found = archive.find(row, folders)
    mask, header, structures = _mask(row, folders)
    series, by, others = _choose(row, found, header, kernel)
    if header:
        _check_reference(row, series, header, mask)
    return Picked(row, kind, series, others, by, mask, header, structures)


def _kind(row: Row) -> Kind | None:
    word = row.cells.get("diagnosis", "").lower()
    if word not in KINDS:
        raise UserError(f"{row.named}: diagnosis is '{row.cells.get('diagnosis', '')}'; expected {', '.join(KINDS)}.")
    kind = KINDS[word]
    if kind is Kind.LABELLED and "mask" not in row.cells:
        raise UserError(f"{row.named}: a labelled case needs a mask. Is it diseased?")
    return Kind.LABELLED if kind is Kind.DISEASED and "mask" in row.cells else kind


def _mask(row: Row, folders: Sequence[Path]) -> tuple[Path | None, MaskHeader | None, tuple[int, ...]]:
    """The mask of a row, what it says about itself and which of its structures are lesion."""
    if "mask" not in row.cells:
        return None, None, ()
    path = locate(row.cells["mask"], folders)
    if path is None or not path.is_file():
        raise UserError(
            f"{row.named}: there is no mask file {row.cells['mask']} (relative paths start at "
            f"{' or '.join(str(folder) for folder in folders)})."
        )
    try:
        header = read_mask_header(path)
        if header is None:
            read_grid(path)
            if "structures" in row.cells:
                raise UserError(f"{path} is no DICOM file, so it has no structures. Empty that cell.")
            return path, None, ()
    except UserError as error:
        raise UserError(f"{row.named}: {error}") from None
    known = ", ".join(header.structures.values())
    if "structures" not in row.cells:
        if len(header.structures) != 1:
            raise UserError(
                f"{row.named}: {path} holds {len(header.structures)} structures ({known}). Name those that are "
                "lesion in a column 'structures', with ';' between."
            )
        return path, header, tuple(header.structures)
    numbers: list[int] = []
    for wanted in (name.strip() for name in row.cells["structures"].split(";")):
        same = [number for number, name in header.structures.items() if name.lower() == wanted.lower()]
        if not same:
            raise UserError(f"{row.named}: {path} has no structure '{wanted}'; it has {known}.")
        numbers += same
    return path, header, tuple(numbers)


def _choose(
    row: Row, found: Sequence[Series], mask: MaskHeader | None, kernel: str
) -> tuple[Series, str, tuple[Series, ...]]:
    """The series to take, what chose it, and which others the rule may take."""
    suitable = sorted((one for one in found if not unsuitable(one)), key=partial(preference, kernel=kernel))
    told: Collection[Series] = ()
    by = "manifest"
    if "series" in row.cells:
        cell = row.cells["series"]
        told = [one for one in found if cell in (one.header.series, one.header.number)]
        if len(told) != 1:
            raise UserError(
                f"{row.named}: {len(told)} series of the scan have the number or UID {cell} in the column 'series'; "
                f"there are {_listed(found)}."
            )
    elif "SeriesInstanceUID" in row.cells:
        told = found
    elif mask and mask.series:
        told = [one for one in found if one.header.series in mask.series]
        by = "mask"
    if len(told) == 1:
        chosen = next(iter(told))
        return chosen, by, tuple(one for one in suitable if one is not chosen)
    if len({one.header.patient for one in found}) > 1:
        raise UserError(f"{row.named} fits scans of several patients. Tell more, e.g. the StudyInstanceUID.")
    if not suitable:
        raise UserError(
            f"{row.named}: no series is a chest CT by the rule: {_listed(found)}. If one of them is to be taken, "
            "put its number or UID into a column 'series'."
        )
    studies = sorted({one.header.study for one in suitable})
    if len(studies) > 1:
        raise UserError(
            f"{row.named} fits {len(studies)} studies with a chest CT: {abbreviate(studies)}. Tell which one in a "
            "column StudyInstanceUID, or in a row for each."
        )
    return suitable[0], "rule", tuple(suitable[1:])


def _listed(found: Iterable[Series]) -> str:
    """Series by their numbers, and why the rule passes over them."""
    return abbreviate(
        [f"{one.header.number or one.header.series} ({unsuitable(one) or 'a chest CT'})" for one in found], limit=12
    )


def _check_reference(row: Row, series: Series, mask: MaskHeader, path: Path | None) -> None:
    if mask.series and series.header.series not in mask.series:
        raise UserError(
            f"{row.named}: {path} was drawn on the series {abbreviate(mask.series)}; taken is {series.named}. Take "
            "that series (column 'series'), or another mask."
        )
    frame = series.header.frame_of_reference
    if mask.frame_of_reference and frame and frame not in mask.frame_of_reference:
        raise UserError(
            f"{row.named}: {path} lies in another frame of reference than {series.named}, so its place is not known."
        )


def _clashes(picked: Iterable[Picked]) -> Iterator[str]:
    """One sentence for each series taken twice and each patient in training and test."""
    first: dict[str, Row] = {}
    sides: dict[str, dict[bool, str]] = {}
    for one in picked:
        row = first.setdefault(one.series.header.series, one.row)
        if row is not one.row:
            yield f"{row.named} and {one.row.named} take the same scan, {one.series.named}. Delete one of them."
        patient, test = sides.setdefault(_patient(one.series), {}), one.kind is None
        if test not in patient and (not test) in patient:
            yield (
                f"{patient[not test]} and {one.row.named} are scans of one patient, one for training and one for the "
                "test. Keep all scans of a patient on one side."
            )
        patient.setdefault(test, one.row.named)


def _patient(series: Series) -> str:
    """What tells patients apart."""
    return series.header.patient or series.header.study


@dataclass(frozen=True)
class Pseudonyms:
    """A scan under its new names.

    Args:
        case: Name of the case.
        patient: Name of the patient.
        picked: The scan.
    """

    case: str
    patient: str
    picked: Picked


def _name(picked: Sequence[Picked], seed: int | None) -> list[Pseudonyms]:
    order = list(picked)
    if seed is not None:
        random.Random(seed).shuffle(order)
    patients: dict[str, str] = {}
    return [
        Pseudonyms(
            f"case_{number:04d}", patients.setdefault(_patient(one.series), f"patient_{len(patients) + 1:04d}"), one
        )
        for number, one in enumerate(order, start=1)
    ]


def _sources(cases: Iterable[Pseudonyms]) -> tuple[list[Source], list[str]]:
    """The cases, and which series are no volume, one sentence each."""
    sources, problems = [], []
    for one in cases:
        picked, header = one.picked, one.picked.series.header
        try:
            volume = picked.series.volume(one.case)
        except UserError as error:
            hint = f" The rule may also take {_listed(picked.others)}." if picked.others else ""
            problems.append(f"{picked.row.named}: {error}{hint}")
            continue
        # Nothing else of the headers and of the manifest, which may tell who the patient is.
        details = {"patient": one.patient, "slice_thickness": picked.series.thickness}
        details |= {"kernel": header.kernel, "manufacturer": header.manufacturer}
        sources.append(
            Source(
                one.case,
                picked.kind,
                (volume,),
                _mask_volume(picked, volume),
                patient=one.patient,
                details={key: value for key, value in details.items() if value},
                named_by=picked.row.named,
            )
        )
    return sources, problems


def _mask_volume(picked: Picked, volume: DicomVolume) -> VolumeMask | DicomMask | None:
    if picked.mask is None:
        return None
    if picked.header is None:
        return VolumeMask(volume.case, picked.mask, volume.grid)
    return DicomMask(volume.case, picked.mask, volume.grid, picked.structures)


def _remarks(picked: Sequence[Picked], kernel: str, others: int) -> list[str]:
    """What the user should know; goes into the report, so no identifiers."""
    by = Counter(one.by for one in picked)
    remarks = [RULE.format(kernel=kernel)]
    if by["manifest"] or by["mask"]:
        remarks.append(
            f"the rule chose {by['rule']} series, the manifest {by['manifest']}, and {by['mask']} are those that a "
            "mask was drawn on."
        )
    promoted = sum(one.row.cells["diagnosis"].lower() != "labelled" and one.kind is Kind.LABELLED for one in picked)
    if promoted:
        remarks.append(f"{promoted} cases with the diagnosis diseased have a mask and are labelled.")
    if others:
        remarks.append(f"{others} files are no DICOM files, or damaged in their headers; they were passed over.")
    return remarks


def _check_link_table(path: Path, overwrite: bool) -> None:
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

    for folder in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):
        if folder.is_set() and path.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"--link-table: {path} would lie in {folder} and be passed on with the data. Keep it somewhere else."
            )
    if not path.parent.is_dir():
        raise UserError(f"--link-table: there is no folder {path.parent}.")
    if path.exists() and not overwrite:
        raise UserError(f"--link-table: {path} exists already. Choose another name, or add --overwrite to replace it.")


def _write_link_table(path: Path, cases: Iterable[Pseudonyms]) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["case", "patient", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "manifest"])
    for one in cases:
        header = one.picked.series.header
        writer.writerow([one.case, one.patient, header.patient, header.study, header.series, one.picked.row.named])
    path.unlink(missing_ok=True)
    # For its owner alone: it tells who the patients are.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8", newline="") as file:
        file.write(table.getvalue())
