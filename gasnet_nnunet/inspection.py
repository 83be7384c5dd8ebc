"""A dataset looked over before a long run: its cohort, its scans, its split file."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from gasnet_nnunet.cohort import COHORT_CACHE, Cohort, Kind, abbreviate, cohort_of_files, read_cohort
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.raw_dataset import Dataset, find_dataset
from gasnet_nnunet.splits import check_splits
from gasnet_nnunet.volumes import Grid, grid_difference, read_grid, read_volume

UNLIKE_SPACINGS = 1.5
"""Ratio of median spacings from which on two groups of scans look different by resolution alone."""


@dataclass
class Inspection:
    """What was found in a dataset.

    Args:
        folder: The folder that was looked at.
        cohort: The kinds of its cases, unless the labels cannot be read.
        grids: Grid of each case's first image; empty where only preprocessed data are there.
        splits: State of the split file, one sentence.
        remarks: What is odd but can be trained on, one sentence each.
        problems: What has to be mended first, one sentence each.
    """

    folder: Path
    cohort: Cohort | None = None
    grids: dict[str, Grid] = field(default_factory=dict)
    splits: str = ""
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect_dataset(
    name_or_id: str, *, read_images: bool = True, num_processes: int = 2, progress: bool = False
) -> Inspection:
    """Look a dataset over, in nnUNet_raw or, where that is gone, in nnUNet_preprocessed.

    Args:
        name_or_id: `501` or `Dataset501_Covid`.
        read_images: Read every image to its end, which finds truncated files and NaN; else headers only.
        num_processes: Files read at a time.
        progress: Show progress bars.

    Raises:
        UserError: There is no such dataset, or it is so incomplete that its cases cannot be told.
    """
    preprocessed = only_preprocessed(name_or_id)
    if preprocessed:
        inspection = Inspection(preprocessed)
        inspection.remarks.append("nnUNet_raw does not have this dataset; only what was preprocessed is checked.")
        try:
            inspection.cohort = read_cohort(
                preprocessed / "gt_segmentations",
                read_json(preprocessed / "dataset.json"),
                num_processes=num_processes,
                progress=progress,
            )
        except UserError as error:
            inspection.problems.append(str(error))
    else:
        dataset = find_dataset(name_or_id)
        preprocessed = dataset.preprocessed
        inspection = _inspect_raw(dataset, read_images, num_processes, progress)
    _inspect_splits(inspection, preprocessed / "splits_final.json")
    return inspection


def only_preprocessed(name_or_id: str) -> Path | None:
    """The dataset's folder in nnUNet_preprocessed where nnUNet_raw does not have it, else `None`.

    Args:
        name_or_id: `501` or `Dataset501_Covid`.
    """
    if not nnUNet_preprocessed.is_set():
        return None
    names = [name_or_id]
    if name_or_id.isdecimal():
        names = [str(name) for name in find_candidate_datasets(int(name_or_id))]
    if len(names) != 1 or (nnUNet_raw.is_set() and (Path(nnUNet_raw) / names[0]).is_dir()):
        return None
    folder = Path(nnUNet_preprocessed) / names[0]
    return folder if (folder / "dataset.json").is_file() else None


def find_cohort(name_or_id: str, *, num_processes: int = 2, progress: bool = False) -> tuple[Path, Cohort, list[str]]:
    """The kinds of a dataset's cases, for a new split of them.

    Args:
        name_or_id: `501` or `Dataset501_Covid`.
        num_processes: Label files read at a time.
        progress: Show a progress bar.

    Returns:
        The dataset's folder in nnUNet_preprocessed, made if missing; the cohort; and what is odd, one sentence each.

    Raises:
        UserError: There is no such dataset, its labels cannot be used, or nnUNet_raw holds a split of its own.
    """
    folder = only_preprocessed(name_or_id)
    if folder:
        dataset_json = read_json(folder / "dataset.json")
        labels = folder / "gt_segmentations"
        return folder, read_cohort(labels, dataset_json, num_processes=num_processes, progress=progress), []
    dataset = find_dataset(name_or_id)
    given = dataset.raw / "splits_final.json"
    if given.is_file():
        raise UserError(
            f"{given} is a split already, which nnU-Net copies when it plans. Move it away to have another."
        )
    dataset.make_folder()
    cohort = cohort_of_files(
        {case: Path(entry["label"]) for case, entry in dataset.files.items()},
        dataset.dataset_json,
        cache=dataset.preprocessed / COHORT_CACHE,
        num_processes=num_processes,
        progress=progress,
    )
    ending = dataset.dataset_json["file_ending"]
    seen = {path.name.removesuffix(ending) for path in (dataset.preprocessed / "gt_segmentations").glob(f"*{ending}")}
    stale = bool(seen) and seen != set(cohort.cases)
    remark = (
        f"{dataset.preprocessed} has other cases than nnUNet_raw. Plan again: gasnet-nnunet plan -d {dataset.number}"
    )
    return dataset.preprocessed, cohort, [remark] if stale else []


def trained_folds(dataset: str) -> list[Path]:
    """Folders of the folds of a dataset that models were trained on, but for fold `all`, which needs no split.

    Args:
        dataset: Name of the dataset, e.g. `Dataset501_Covid`.
    """
    if not nnUNet_results.is_set():
        return []
    found = Path(nnUNet_results).glob(f"{dataset}/*/fold_[0-9]*/checkpoint_*.pth")
    return sorted({checkpoint.parent for checkpoint in found})


def _inspect_raw(dataset: Dataset, read_images: bool, num_processes: int, progress: bool) -> Inspection:
    inspection = Inspection(dataset.raw)
    labels = {case: Path(entry["label"]) for case, entry in dataset.files.items()}
    try:
        inspection.cohort = cohort_of_files(
            labels, dataset.dataset_json, num_processes=num_processes, progress=progress
        )
    except UserError as error:
        inspection.problems.append(str(error))
    results = run_jobs(
        _read_scan,
        [([*map(Path, entry["images"])], Path(entry["label"]), read_images) for entry in dataset.files.values()],
        num_processes=num_processes,
        description="Reading scans" if progress else None,
    )
    for case, result in zip(dataset.files, results, strict=True):
        if isinstance(result, str):
            inspection.problems.append(result)
        else:
            inspection.grids[case] = result
    ending = dataset.dataset_json["file_ending"]
    folder = dataset.raw / "labelsTr"
    strays = sorted(path.name for path in folder.glob(f"*{ending}") if path not in labels.values())
    if strays and "dataset" not in dataset.dataset_json:
        inspection.remarks.append(f"labels without an image in imagesTr, not used: {abbreviate(strays)}.")
    copy = dataset.preprocessed / "dataset.json"
    if copy.is_file() and read_json(copy) != read_json(dataset.raw / "dataset.json"):
        inspection.remarks.append(
            f"{copy} differs from the one in nnUNet_raw, and training reads the former. To take over the changes: "
            f"gasnet-nnunet plan -d {dataset.number}"
        )
    inspection.remarks += _unlike_groups(inspection)
    return inspection


def _read_scan(job: tuple[list[Path], Path, bool]) -> Grid | str:
    """Grid of a case's first image, or the sentence that says what is wrong with its files."""
    images, label, read_images = job
    try:
        grids = []
        for path in images:
            if read_images:
                values, grid = read_volume(path)
                if values.min() == values.max():
                    return f"{path} is {values.min():g} throughout; it shows nothing."
            else:
                grid = read_grid(path)
            grids.append(grid)
        # A missing label has been named by the cohort already.
        for path in [*images[1:], *([label] if label.is_file() else [])]:
            difference = grid_difference(read_grid(path), grids[0])
            if difference:
                return f"{path} does not lie on the grid of {images[0].name}: {difference}. Resample it onto that grid."
    except UserError as error:
        return str(error)
    return grids[0]


def _unlike_groups(inspection: Inspection) -> list[str]:
    """The discriminator would learn a difference in resolution instead of the lesions."""
    if inspection.cohort is None:
        return []
    ill = [case for case in (*inspection.cohort.labelled, *inspection.cohort.diseased) if case in inspection.grids]
    well = [case for case in inspection.cohort.healthy if case in inspection.grids]
    if not ill or not well:
        return []
    remarks = []
    for axis, what in ((2, "slice distance"), (0, "pixel size")):
        medians = [statistics.median(inspection.grids[case].spacing[axis] for case in cases) for cases in (ill, well)]
        if max(medians) > UNLIKE_SPACINGS * min(medians):
            remarks.append(
                f"the {what} differs between diseased ({medians[0]:.3g} mm) and healthy scans ({medians[1]:.3g} mm, "
                "medians). The discriminator may learn that instead of the lesions."
            )
    return remarks


def _inspect_splits(inspection: Inspection, path: Path) -> None:
    if not path.is_file():
        inspection.splits = "no splits_final.json yet: planning or training makes one by the masks."
        return
    if inspection.cohort is None:
        inspection.splits = f"{path} was not checked, because the labels have problems."
        return
    try:
        folds = check_splits(path, inspection.cohort)
    except UserError as error:
        inspection.splits = f"{path} cannot be used, see below."
        inspection.problems.append(str(error))
    else:
        inspection.splits = f"{path}: {folds} fold{'s' if folds > 1 else ''}, all fit to train."


def group_sizes(inspection: Inspection) -> list[tuple[str, str, str, str]]:
    """Kind, number, matrix and spacing (mm) of the scans of each kind, as ranges over (X, Y, Z)."""
    rows = []
    cases = inspection.cohort.cases if inspection.cohort else {}
    for kind in Kind:
        grids = [grid for name, grid in inspection.grids.items() if name in cases and cases[name].kind is kind]
        if grids:
            size = " x ".join(_range([grid.size[axis] for grid in grids]) for axis in range(3))
            spacing = " x ".join(_range([grid.spacing[axis] for grid in grids]) for axis in range(3))
            rows.append((kind.value, str(len(grids)), size, spacing))
    return rows


def _range(numbers: list[float]) -> str:
    low, high = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return low if low == high else f"{low}-{high}"
