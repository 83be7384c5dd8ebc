"""Plain folders of CTs made into an nnU-Net dataset that holds the three kinds of case."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.cohort import Kind, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.volumes import Grid, read_volume, write_volume

from .sources import (
    Examined,
    Rescaling,
    Source,
    duplicates,
    examine,
    find_volumes,
    not_hounsfield,
    pair,
    same_names,
    storable,
)

ENDING = ".nii.gz"


@dataclass(frozen=True)
class Converted:
    """A dataset that was made.

    Args:
        folder: Its folder in nnUNet_raw.
        counts: Cases of each kind, and of the test set.
        remarks: What the user should know about it, one sentence each.
    """

    folder: Path
    counts: dict[str, int]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class WriteJob:
    """A case to write.

    Args:
        source: The case.
        folder: The dataset's folder.
        values: Label of each value of its mask.
        ignore: Value of the `ignore` label.
        ending: `file_ending` of the dataset.
    """

    source: Source
    folder: Path
    values: Mapping[int, int]
    ignore: int
    ending: str = ENDING


def convert_folders(
    *,
    dataset_id: int,
    name: str,
    labelled: tuple[Path, Path],
    healthy: Path,
    diseased: Path | None = None,
    test: Path | None = None,
    test_masks: Path | None = None,
    lungs: Path | None = None,
    rescaling: Rescaling | None = None,
    overwrite: bool = False,
    num_processes: int = 2,
    progress: bool = False,
) -> Converted:
    """Make `nnUNet_raw/DatasetNNN_NAME` out of folders of CTs.

    All files are checked before the first is written, and the dataset gets its name when it is complete.

    Args:
        dataset_id: nnU-Net's dataset id, 1 to 999.
        name: Name behind the id: letters, digits, `_` and `-`.
        labelled: Folder of images, folder of their lesion masks (same names).
        healthy: Folder of CTs without lesions.
        diseased: Folder of CTs with lesions but without masks.
        test: Folder of CTs to test on.
        test_masks: Folder of their lesion masks.
        lungs: Folder of lung masks for some or all training cases, to be used instead of computed ones.
        rescaling: Map of the images' values to HU.
        overwrite: Replace a dataset of the same id and name.
        num_processes: Cases read and written at a time.
        progress: Show progress bars.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or files cannot be used; all of them are named.
    """
    target = _target(dataset_id, name, overwrite)
    if test_masks and not test:
        raise UserError(f"{test_masks} holds test masks, but there is no --test IMAGES.")
    sources, problems = _collect(labelled, diseased, healthy, test, test_masks, lungs)
    raise_problems(problems, "the folders")
    sources = [replace(source, rescaling=rescaling) for source in sources]
    examined = run_jobs(examine, sources, num_processes=num_processes, description="Checking" if progress else None)
    problems = [problem for result in examined for problem in result.problems]
    problems += duplicates(sources, examined)
    raise_problems(problems, "the files; nothing was written")
    values, remarks = _label_values(sources, examined)
    ignore = max(values.values()) + 1
    if remark := not_hounsfield(sources, examined):
        remarks.append(remark)

    # Under another name until it is complete, so that nobody ever meets half a dataset.
    unfinished = target.with_name(f".{target.name}.unfinished")
    training = [source for source in sources if source.kind]
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        run_jobs(
            write_case,
            [WriteJob(source, unfinished, values, ignore) for source in sources],
            num_processes=num_processes,
            description="Writing" if progress else None,
        )
        classes = sorted(set(values.values()) - {0})
        names = ["lesion"] if len(classes) == 1 else [f"lesion_{number}" for number in classes]
        write_json(
            unfinished / "dataset.json",
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, **dict(zip(names, classes, strict=True)), "ignore": ignore},
                "numTraining": len(training),
                "file_ending": ENDING,
            },
        )
        _put_in_place(unfinished, target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if remark := _stale(target):
        remarks.append(remark)
    counts = {kind.value: sum(source.kind is kind for source in sources) for kind in Kind}
    return Converted(target, {**counts, "test": len(sources) - len(training)}, tuple(remarks))


def write_case(job: WriteJob) -> None:
    """Write image, labels and lung mask of a case.

    A diseased case without a mask gets a label file filled with `ignore`, a healthy one zeros. The labels take over
    the image's grid, of which they may differ by rounding.

    Raises:
        UserError: A file cannot be read any more, or not be written.
    """
    source, split = job.source, "Tr" if job.source.kind else "Ts"
    for channel, path in enumerate(source.images):
        image, grid = read_volume(path)
        values = source.rescaling.apply(image) if source.rescaling else image
        _write(job, f"images{split}", f"{source.case}_{channel:04d}", storable(values), grid)
    if source.mask:
        mask, _ = read_volume(source.mask)
        labels = np.zeros(mask.shape, np.uint8)
        for value, label in job.values.items():
            labels[mask == value] = label
    else:
        labels = np.full(image.shape, job.ignore if source.kind is Kind.DISEASED else 0, np.uint8)
    if source.kind or source.mask:
        _write(job, f"labels{split}", source.case, labels, grid)
    if source.lungs:
        _write(job, "lungsTr", source.case, (read_volume(source.lungs)[0] > 0).astype(np.uint8), grid)


def _write(job: WriteJob, folder: str, name: str, array: NDArray[Any], grid: Grid) -> None:
    path = job.folder / folder / f"{name}{job.ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, array, grid)


def _collect(
    labelled: tuple[Path, Path],
    diseased: Path | None,
    healthy: Path,
    test: Path | None,
    test_masks: Path | None,
    lungs: Path | None,
) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    problems: list[str] = []
    lung_masks = find_volumes(lungs, "--lungs") if lungs else {}
    groups: list[tuple[Kind | None, Path | None, Path | None]] = [
        (Kind.LABELLED, labelled[0], labelled[1]),
        (Kind.DISEASED, diseased, None),
        (Kind.HEALTHY, healthy, None),
        (None, test, test_masks),
    ]
    for kind, image_folder, mask_folder in groups:
        if image_folder is None:
            continue
        option = f"--{kind.value}" if kind else "--test"
        try:
            images = find_volumes(image_folder, option)
            masks = find_volumes(mask_folder, option) if mask_folder else {}
        except UserError as error:
            problems.append(str(error))
            continue
        if mask_folder:
            problems += pair(images, masks, option)
        for case, path in images.items():
            lung_mask = lung_masks.get(case) if kind else None
            sources.append(Source(case, kind, (path,), masks.get(case), lung_mask))
    strangers = sorted(set(lung_masks) - {source.case for source in sources})
    if strangers:
        problems.append(f"--lungs: no image is named like {', '.join(strangers[:8])} in {lungs}.")
    problems += same_names(source for source in sources if source.kind)
    return sources, problems


def _label_values(sources: list[Source], examined: list[Examined]) -> tuple[dict[int, int], list[str]]:
    """Label of each value in the masks, and what to tell the user about them."""
    lesions = sorted({value for result in examined for value in result.values} - {0})
    if len(lesions) == 1 and lesions != [1]:
        return {0: 0, lesions[0]: 1}, [f"the masks' value {lesions[0]} was stored as label 1."]
    if lesions != list(range(1, len(lesions) + 1)):
        example = {value: source for source, result in zip(sources, examined, strict=True) for value in result.values}
        listed = ", ".join(f"{value} (e.g. in {example[value].mask})" for value in lesions[:8])
        raise UserError(
            f"The masks hold the lesion values {listed}. nnU-Net wants consecutive ones: 1, or 1, 2, ... for several "
            "classes."
        )
    return {value: value for value in [0, *lesions]}, []


def _target(dataset_id: int, name: str, overwrite: bool) -> Path:
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
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    unfinished.rename(target)
    shutil.rmtree(old, ignore_errors=True)
