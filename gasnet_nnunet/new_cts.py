"""The CTs that a trained model is to work on: a file, a folder of files, or DICOM series at any depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gasnet_nnunet.dataset_conversion.dicom_series import DicomVolume, Series, scan
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import volume_name

ENDING = ".nii.gz"
"""Of everything that is written."""
CT_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".hdr")
"""Of what is read."""


@dataclass(frozen=True)
class Case:
    """A CT to work on.

    Args:
        name: Name of its outputs.
        files: A file a channel; none for a DICOM series.
        series: The DICOM series.
    """

    name: str
    files: tuple[Path, ...] = ()
    series: DicomVolume | None = None


def find_cases(source: Path, channels: int, *, progress: bool = False) -> tuple[list[Case], list[str]]:
    """The CTs of a file, of a folder of files, or of a folder of DICOM series at any depth.

    Files are named as nnU-Net wants (`<case>_0000.nii.gz`, a number for each channel) or in any other way, and are of
    any format that SimpleITK reads.

    Args:
        source: File or folder.
        channels: Channels of the model.
        progress: Show a progress bar while DICOM headers are read.

    Returns:
        The cases, and why others cannot be used, one sentence each.

    Raises:
        UserError: There is nothing to work on.
    """
    if not source.exists():
        raise UserError(f"There is no {source}. Name a CT, a folder of CTs or a folder of DICOM series with -i.")
    if source.is_file():
        numbered = re.fullmatch(r"(.*)_0000", volume_name(source))
        if not numbered:
            return _group([source], channels)
        siblings = [path for path in sorted(source.parent.iterdir()) if _channel_of(path, numbered[1]) is not None]
        return _group(siblings, channels)
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if path.name.lower().endswith(CT_ENDINGS)]
    if images:
        return _group(images, channels)
    return _find_series(source, progress)


def _channel_of(path: Path, case: str) -> int | None:
    found = re.fullmatch(re.escape(case) + r"_(\d{4})", volume_name(path))
    return int(found[1]) if found and path.name.lower().endswith(CT_ENDINGS) else None


def _group(files: Sequence[Path], channels: int) -> tuple[list[Case], list[str]]:
    """Cases by nnU-Net's names where there is a channel 0000, else a file a case."""
    names = {volume_name(path) for path in files}
    grouped: dict[str, list[Path]] = {}
    for path in files:
        name = volume_name(path)
        stem = name[:-5] if re.search(r"_\d{4}$", name) else name
        grouped.setdefault(stem if f"{stem}_0000" in names else name, []).append(path)
    cases, problems = [], []
    for name, paths in grouped.items():
        if len(paths) == channels:
            cases.append(Case(name, tuple(paths)))
        else:
            problems.append(
                f"{name}: the model takes {channels} channel{'s' * (channels != 1)}, found {len(paths)}: "
                f"{', '.join(path.name for path in paths)}. Expected {name}_0000{ENDING}"
                + (f" to {name}_{channels - 1:04d}{ENDING}." if channels > 1 else " alone.")
            )
    return cases, problems


def _find_series(source: Path, progress: bool) -> tuple[list[Case], list[str]]:
    try:
        found, _ = scan(source, progress=progress)
    except UserError:
        raise UserError(
            f"{source} holds no CTs: no files of {', '.join(CT_ENDINGS[:4])} ..., and no DICOM files at any depth."
        ) from None
    series = [one for one in found if one.header.modality == "CT"]
    if not series:
        kinds = sorted({one.header.modality or "not told" for one in found})
        raise UserError(f"{source} holds no CT: the modality of its DICOM series is {', '.join(kinds)}.")
    cases: list[Case] = []
    faults: dict[str, list[str]] = {}
    usable: set[str] = set()
    for one, name in zip(series, _series_names(source, series), strict=True):
        try:
            cases.append(Case(name, series=one.volume(name)))
            usable.add(one.header.study)
        except UserError as error:
            faults.setdefault(one.header.study, []).append(f"{name}: {error}")
    # A study's localizer is no fault where another series of it can be used.
    return cases, [fault for study, texts in faults.items() if study not in usable for fault in texts]


def _series_names(source: Path, series: Sequence[Series]) -> list[str]:
    """The folder of each series, with its number where several lie in one; never anything of the patient's header."""
    folders = [Path(one.slices[0].file).parent.relative_to(source).parts for one in series]
    names = ["_".join(parts) or source.resolve().name for parts in folders]
    numbered = [
        name if names.count(name) == 1 else f"{name}_series{one.header.number or position}"
        for position, (name, one) in enumerate(zip(names, series, strict=True))
    ]
    return [
        name if numbered.count(name) == 1 else f"{name}_{position}" for position, name in enumerate(numbered, start=1)
    ]


def find_lung_masks(folder: Path | None, cases: Sequence[Case]) -> dict[str, Path]:
    """The user's lung masks of some cases: files of a folder named like them, with or without `_0000`.

    Raises:
        UserError: There is no such folder, or none of its files is named like a case.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise UserError(f"--lungs: {folder} is no folder. Name one that holds a lung mask <case>{ENDING} for each CT.")
    files = {
        volume_name(path).removesuffix("_0000"): path
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(CT_ENDINGS) and not path.name.startswith(".")
    }
    masks = {case.name: files[case.name] for case in cases if case.name in files}
    if cases and not masks:
        raise UserError(f"--lungs: {folder} holds no mask named like a case, e.g. {cases[0].name}{ENDING}.")
    return masks
