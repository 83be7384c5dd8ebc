"""The one way into an nnU-Net dataset: every source lists its cases, and this checks, writes and reports them.

Each volume is read and written once. A case is checked while it is read, and its files go to a hidden folder beside
the dataset, which gets its name when all cases are there and sound. A conversion that stopped half-way goes on there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.cohort import Kind, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.volumes import Grid, read_volume, write_volume

from .examination import Record, duplicates, examine, not_hounsfield, thumbnail
from .report import REPORT_FILES, write_report
from .sources import Source, same_names, same_patients, storable

ENDING = ".nii.gz"
HIDDEN_MASKS = "hiddenTr"
"""Folder of masks that training must not see and scoring needs."""
VERSION = 1
"""Part of every stamp: raise it when a conversion writes other files than before."""


@dataclass(frozen=True)
class Converted:
    """A dataset that was made.

    Args:
        folder: Its folder in nnUNet_raw.
        counts: Cases of each kind, and of the test set.
        remarks: What the user should know about it, one sentence each.
        report: The HTML report.
    """

    folder: Path
    counts: dict[str, int]
    remarks: tuple[str, ...]
    report: Path


@dataclass(frozen=True)
class WriteJob:
    """A case to read, check and write.

    Args:
        source: The case.
        folder: Where its files go, in nnU-Net's folders.
        ending: `file_ending` of the dataset.
    """

    source: Source
    folder: Path
    ending: str = ENDING

    @property
    def split(self) -> str:
        """nnU-Net's ending of folders: "Tr" of training cases, "Ts" of test cases."""
        return "Tr" if self.source.kind else "Ts"

    @property
    def record(self) -> Path:
        """What is known about the case once its files are written."""
        return self.folder / "records" / self.split / f"{self.source.case}.json"

    @property
    def images(self) -> list[Path]:
        """Its channels."""
        names = (f"{self.source.case}_{channel:04d}" for channel in range(len(self.source.images)))
        return [self._path(f"images{self.split}", name) for name in names]

    @property
    def mask(self) -> Path:
        """Its mask, if it has one; that of a diseased case is kept aside."""
        hidden = self.source.kind is Kind.DISEASED
        return self._path(HIDDEN_MASKS if hidden else f"labels{self.split}", self.source.case)

    @property
    def label(self) -> Path:
        """Its label file, if it is a training case."""
        return self._path("labelsTr", self.source.case)

    @property
    def lungs(self) -> Path:
        """Its lung mask, if it has one."""
        return self._path(f"lungs{self.split}", self.source.case)

    @property
    def outputs(self) -> list[Path]:
        """All files that `convert_case` writes."""
        masks = [path for path, source in ((self.mask, self.source.mask), (self.lungs, self.source.lungs)) if source]
        return [*self.images, *masks]

    def _path(self, folder: str, name: str) -> Path:
        return self.folder / folder / f"{name}{self.ending}"


def convert(
    sources: Sequence[Source],
    *,
    dataset_id: int,
    name: str,
    class_names: Sequence[str] = (),
    remarks: Sequence[str] = (),
    overwrite: bool = False,
    num_processes: int = 2,
    progress: bool = False,
) -> Converted:
    """Make `nnUNet_raw/DatasetNNN_NAME` out of cases.

    Args:
        sources: The cases, in any order.
        dataset_id: nnU-Net's dataset id, 1 to 999.
        name: Name behind the id: letters, digits, `_` and `-`.
        class_names: Names of the labels 1, 2, ...; "lesion" or "lesion_1", "lesion_2", ... if left out.
        remarks: What the source has to tell the user, one sentence each.
        overwrite: Replace a dataset of the same id and name.
        num_processes: Cases read and written at a time.
        progress: Show progress bars.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or files cannot be used; all of them are named.
    """
    target = check_target(dataset_id, name, overwrite)
    problems = [*same_names(source for source in sources if source.kind)]
    problems += same_names(source for source in sources if not source.kind)
    # What is known of a case is filed under its name alone.
    problems += same_names(source for source in sources if source.facts())
    problems += [*same_patients(sources), *_inside(sources, target)]
    raise_problems(list(dict.fromkeys(problems)), "the cases")
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        jobs = [WriteJob(source, unfinished) for source in sources]
        records = convert_cases(jobs, num_processes, progress=progress)
        problems = [problem for record in records for problem in record.problems] + list(duplicates(sources, records))
        raise_problems(problems, f"the files. {target.name} was not made; sound cases are kept for the next try")
        # Who names the classes knows them all, even if the masks that are kept do not show each.
        classes, notes = (list(range(1, len(class_names) + 1)), []) if class_names else _classes(jobs, records)
        ignore = len(classes) + 1
        write_constant_labels(jobs, records, ignore, num_processes)
        names = list(class_names) or ["lesion" if len(classes) == 1 else f"lesion_{number}" for number in classes]
        dataset_json: dict[str, Any] = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, **dict(zip(names, classes, strict=True)), "ignore": ignore},
            "numTraining": sum(source.kind is not None for source in sources),
            "file_ending": ENDING,
        }
        if cases := {source.case: source.facts() for source in sources if source.facts()}:
            dataset_json["gasnet"] = {"cases": cases}
        write_json(unfinished / "dataset.json", dataset_json)
        if remark := not_hounsfield(sources, records):
            notes.append(remark)
        everything = [*remarks, *notes]
        write_report(unfinished, target.name, sources, records, everything)
        _clear(unfinished, jobs)
        _put_in_place(unfinished, target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error}. Repeat the command to go on.") from None
    if remark := _stale(target):
        everything.append(remark)
    return Converted(target, count(sources), tuple(everything), target / REPORT_FILES[0])


def count(sources: Sequence[Source]) -> dict[str, int]:
    """Cases of each kind, and of the test set."""
    counts = {kind.value: sum(source.kind is kind for source in sources) for kind in Kind}
    return {**counts, "test": len(sources) - sum(counts.values())}


def convert_cases(jobs: Sequence[WriteJob], num_processes: int, *, progress: bool) -> list[Record]:
    """Read, check and write cases, those that an earlier try has written not again."""
    known = [_known(job) for job in jobs]
    left = [job for job, record in zip(jobs, known, strict=True) if record is None]
    made = iter(
        run_jobs(convert_case, left, num_processes=num_processes, description="Converting" if progress else None)
    )
    return [next(made) if record is None else record for record in known]


def convert_case(job: WriteJob) -> Record:
    """Read a case once, check it, and write image, mask and lung mask if it is sound.

    The labels take over the image's grid, of which they may differ by rounding. What a case without a mask is labelled
    with follows when all classes are known.

    Raises:
        UserError: A file could not be written.
    """
    record, arrays = examine(job.source)
    if not record.problems:
        grid = record.grid
        for path, image in zip(job.images, arrays.images, strict=True):
            _write(path, storable(image), grid)
        if arrays.mask is not None:
            _write(job.mask, arrays.mask, grid)
        if arrays.lungs is not None:
            _write(job.lungs, arrays.lungs, grid)
        thumbnail(job.record.with_suffix(".png"), arrays, grid.spacing)
        # Of sound cases only: the others are read again anyway, and a problem may name a file that names a patient.
        write_json(job.record, {"stamp": _stamp(job.source), **record.to_json()})
    return record


def _known(job: WriteJob) -> Record | None:
    """What an earlier try found out about a case whose files have not changed since."""
    files = [job.record, job.record.with_suffix(".png"), *job.outputs]
    if not all(path.is_file() and path.stat().st_size for path in files):
        return None
    content = json.loads(job.record.read_text(encoding="utf-8"))
    if content.pop("stamp") != _stamp(job.source):
        return None
    return Record.from_json(content)


def _stamp(source: Source) -> str:
    """Changes with everything that a case's files are made from."""
    description = dataclasses.asdict(source)
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files() if path.exists()]
    text = json.dumps([VERSION, description, files], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, array, grid)


def _classes(jobs: Sequence[WriteJob], records: Sequence[Record]) -> tuple[list[int], list[str]]:
    """Lesion labels 1, 2, ..., and what to tell the user about them."""
    lesions = sorted({value for record in records for value in record.values} - {0})
    if len(lesions) == 1 and lesions != [1]:
        for job in jobs:
            if job.source.mask:
                # What is written from here on no longer is what the record says.
                job.record.unlink()
                mask, grid = read_volume(job.mask)
                write_volume(job.mask, (mask > 0).astype(np.uint8), grid)
        return [1], [f"the masks' value {lesions[0]} was stored as label 1."]
    if lesions != list(range(1, len(lesions) + 1)):
        example = {value: job.source for job, record in zip(jobs, records, strict=True) for value in record.values}
        listed = ", ".join(f"{value} (e.g. in {example[value].mask})" for value in lesions[:8])
        raise UserError(
            f"The masks hold the lesion values {listed}. nnU-Net wants consecutive ones: 1, or 1, 2, ... for several "
            "classes."
        )
    return lesions, []


@dataclass(frozen=True)
class _LabelJob:
    path: Path
    value: int
    grid: Grid


def write_constant_labels(jobs: Sequence[WriteJob], records: Sequence[Record], ignore: int, num_processes: int) -> None:
    """Write the label files of diseased cases (all `ignore`) and of healthy ones without a mask (all zero)."""
    labels = []
    for job, record in zip(jobs, records, strict=True):
        kind = job.source.kind
        if kind is Kind.DISEASED or (kind is Kind.HEALTHY and not job.source.mask):
            job.label.parent.mkdir(exist_ok=True)
            labels.append(_LabelJob(job.label, ignore if kind is Kind.DISEASED else 0, record.grid))
    run_jobs(_write_constant, labels, num_processes=num_processes)


def _write_constant(job: _LabelJob) -> None:
    write_volume(job.path, np.full(job.grid.size[::-1], job.value, np.uint8), job.grid)


def _clear(folder: Path, jobs: Sequence[WriteJob]) -> None:
    """Take away the records and what earlier tries with other cases or options left."""
    shutil.rmtree(folder / "records")
    kept = {path for job in jobs for path in job.outputs} | {job.label for job in jobs if job.source.kind}
    for path in folder.glob("*T[rs]/*"):
        if path not in kept:
            path.unlink()
    for path in folder.glob("*T[rs]"):
        if not any(path.iterdir()):
            path.rmdir()


def _inside(sources: Sequence[Source], target: Path) -> Iterator[str]:
    """A sentence if the dataset to be replaced holds what it is to be made from."""
    if target.exists():
        inside = [path for source in sources for path in source.files() if target.resolve() in path.resolve().parents]
        if inside:
            yield f"{inside[0]} lies in {target}, which would be replaced. Copy them elsewhere, or choose another --id."


def check_target(dataset_id: int, name: str, overwrite: bool) -> Path:
    """The folder of a dataset to be made.

    Raises:
        UserError: nnUNet_raw is not set, or the id or name cannot be used.
    """
    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    if not nnUNet_raw.is_set():
        raise UserError("nnUNet_raw is not set, so there is no place for the dataset: export nnUNet_raw=/a/folder")
    if not 1 <= dataset_id <= 999:
        raise UserError(f"--id is {dataset_id}; nnU-Net's dataset ids run from 1 to 999.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--name is '{name}'; expected letters, digits, '_' and '-' only.")
    folder = f"Dataset{dataset_id:03d}_{name}"
    taken = [str(other) for other in find_candidate_datasets(dataset_id)]
    others = [other for other in taken if other != folder]
    if others:
        raise UserError(f"The id {dataset_id} belongs to {', '.join(others)} already. Choose another --id.")
    target = Path(nnUNet_raw) / folder
    if taken and not overwrite:
        where = "in nnUNet_raw" if target.exists() else "in nnUNet_preprocessed or nnUNet_results"
        raise UserError(f"{folder} exists already ({where}). Choose another --id, or add --overwrite to replace it.")
    return target


def _stale(target: Path) -> str | None:
    from nnunetv2.paths import nnUNet_preprocessed

    if not nnUNet_preprocessed.is_set() or not (Path(nnUNet_preprocessed) / target.name).exists():
        return None
    return (
        f"{Path(nnUNet_preprocessed) / target.name} was made from the old data. Delete it before planning: its "
        "splits_final.json would be kept."
    )


def _put_in_place(unfinished: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    unfinished.rename(target)
    shutil.rmtree(old, ignore_errors=True)
