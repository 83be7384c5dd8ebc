"""Volume-level cases added to an nnU-Net dataset that exists already."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gasnet_nnunet.cohort import Kind, abbreviate, declared_labels, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, write_json
from gasnet_nnunet.raw_dataset import Dataset

from .conversion import WriteJob, convert_cases, write_constant_labels
from .examination import Record, duplicates, not_hounsfield
from .sources import Rescaling, Source, find_volumes, same_names

WRITABLE = (".nii.gz", ".nrrd", ".mha", ".gipl")
"""File endings of nnU-Net datasets whose grid SimpleITK keeps."""


@dataclass(frozen=True)
class Extended:
    """What was added to a dataset.

    Args:
        folder: The dataset's folder in nnUNet_raw.
        counts: Added cases of each kind.
        remarks: What the user should know about it, one sentence each.
    """

    folder: Path
    counts: dict[str, int]
    remarks: tuple[str, ...]


def extend_dataset(
    dataset: Dataset,
    *,
    diseased: Path | None = None,
    healthy: Path | None = None,
    rescaling: Rescaling | None = None,
    num_processes: int = 2,
    progress: bool = False,
) -> Extended:
    """Add diseased and healthy cases to a dataset in nnUNet_raw.

    Diseased cases get label files filled with the `ignore` label, which is added to `dataset.json` above the highest
    label if there is none. All files are checked while they are read and written under a folder of their own, and
    moved in place when all are there and sound; `dataset.json` comes last.

    Args:
        dataset: The dataset.
        diseased: Folder of images of diseased patients; with several channels named `<case>_0000`, `<case>_0001`, ...
        healthy: Folder of images without lesions, named in the same way.
        rescaling: Map of the images' values to HU, for datasets of one channel.
        num_processes: Cases read and written at a time.
        progress: Show progress bars.

    Raises:
        UserError: There is nothing to add, the dataset's file format cannot be written, or files cannot be used; all
            of them are named.
    """
    if diseased is None and healthy is None:
        raise UserError("Nothing to add: name a folder with --diseased IMAGES or --healthy IMAGES.")
    # Not dataset.dataset_json, in which nnU-Net has turned relative paths into absolute ones.
    dataset_json = read_json(dataset.raw / "dataset.json")
    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    if ending not in WRITABLE:
        raise UserError(
            f"{dataset.name} consists of {ending} files; cases can be added to datasets of {', '.join(WRITABLE)}."
        )
    if rescaling and channels > 1:
        raise UserError(f"--rescale is for datasets of one channel; {dataset.name} has {channels}.")
    sources: list[Source] = []
    for kind, images in ((Kind.DISEASED, diseased), (Kind.HEALTHY, healthy)):
        if images is not None:
            for case, files in _find_cases(images, f"--{kind.value}", channels).items():
                sources.append(Source(case, kind, files, rescaling=rescaling))
    # A label file without an image would be overwritten.
    existing = set(dataset.files) | {path.name.removesuffix(ending) for path in (dataset.raw / "labelsTr").glob("*")}
    problems = list(same_names(sources))
    taken = sorted(source.case for source in sources if source.case in existing)
    if taken:
        problems.append(f"{dataset.name} has cases of these names already: {abbreviate(taken)}. Rename the files.")
    raise_problems(problems, "the folders")
    labels, remarks = declared_labels(dataset_json), []
    ignore = max(labels.values) + 1 if labels.ignore is None else labels.ignore
    if diseased is not None and labels.ignore is None:
        dataset_json["labels"]["ignore"] = ignore
        remarks.append(f"the label 'ignore' ({ignore}) was added to dataset.json.")
    dataset_json["numTraining"] = len(dataset.files) + len(sources)
    if "dataset" in dataset_json:
        dataset_json["dataset"] |= {source.case: _entry(source, ending) for source in sources}
    records = _add(dataset.raw, dataset_json, sources, ignore, num_processes, progress)
    if dataset.ct_channels == [0] and (remark := not_hounsfield(sources, records)):
        remarks.append(remark)
    if dataset.preprocessed.exists():
        remarks.append(
            f"{dataset.preprocessed} does not have the new cases yet, and its splits_final.json is never overwritten: "
            "delete that file, unless it is your own, and plan again."
        )
    counts = {kind.value: sum(source.kind is kind for source in sources) for kind in (Kind.DISEASED, Kind.HEALTHY)}
    return Extended(dataset.raw, counts, tuple(remarks))


def _find_cases(folder: Path, option: str, channels: int) -> dict[str, tuple[Path, ...]]:
    if channels == 1:
        return {case: (path,) for case, path in find_volumes(folder, option).items()}
    cases: defaultdict[str, dict[int, Path]] = defaultdict(dict)
    for name, path in find_volumes(folder, option, keep_channel=True).items():
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        if not match:
            raise UserError(
                f"{option}: {path} should be named <case>_0000, <case>_0001, ...: the dataset has {channels} channels."
            )
        cases[match[1]][int(match[2])] = path
    for case, files in cases.items():
        if sorted(files) != list(range(channels)):
            found = ", ".join(f"_{number:04d}" for number in sorted(files))
            raise UserError(f"{option}: {case} in {folder} has the channels {found}; the dataset has {channels}.")
    return {case: tuple(files[number] for number in range(channels)) for case, files in cases.items()}


def _add(
    folder: Path,
    dataset_json: dict[str, Any],
    sources: list[Source],
    ignore: int,
    num_processes: int,
    progress: bool,
) -> list[Record]:
    unfinished = folder / ".extension.unfinished"
    moved: list[Path] = []
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        ending = dataset_json["file_ending"]
        jobs = [WriteJob(source, unfinished, ending) for source in sources]
        records = convert_cases(jobs, num_processes, progress=progress)
        problems = [problem for record in records for problem in record.problems]
        raise_problems([*problems, *duplicates(sources, records)], "the files; nothing was added")
        write_constant_labels(jobs, records, ignore, num_processes)
        # Labels first: nnU-Net takes the names of the cases from the images.
        for path in [*sorted(unfinished.glob("labelsTr/*")), *sorted(unfinished.glob("imagesTr/*"))]:
            target = folder / path.parent.name / path.name
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            moved.append(target)
        write_json(folder / "dataset.json", dataset_json)
        return records
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{folder} could not be extended, nothing was added: {error}") from None
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _entry(source: Source, ending: str) -> dict[str, Any]:
    images = [f"imagesTr/{source.case}_{channel:04d}{ending}" for channel in range(len(source.images))]
    return {"images": images, "label": f"labelsTr/{source.case}{ending}"}
