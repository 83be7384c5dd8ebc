"""A raw nnU-Net dataset as planning meets it: its files, checked, and what is measured of every scan."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from pydantic import TypeAdapter

from gasnet_nnunet.cohort import abbreviate, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, write_json
from gasnet_nnunet.lungs import CaseGeometry, measure_case
from gasnet_nnunet.organ_masks import VERSION
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.volumes import HIGHEST_AIR, grid_difference, read_grid, read_volume

GEOMETRY_CACHE = "gasnet_geometry.json"
NNUNET_FOLDERS = {
    "nnUNet_raw": nnUNet_raw,
    "nnUNet_preprocessed": nnUNet_preprocessed,
    "nnUNet_results": nnUNet_results,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A raw nnU-Net dataset.

    Args:
        name: Name of its folder, e.g. `Dataset501_Covid`.
        raw: Its folder in nnUNet_raw.
        preprocessed: Its folder in nnUNet_preprocessed, which may not exist yet.
        dataset_json: Content of `dataset.json`.
        files: Images (one a channel) and label file of each case.
    """

    name: str
    raw: Path
    preprocessed: Path
    dataset_json: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def number(self) -> int:
        """nnU-Net's dataset id."""
        return int(self.name[len("Dataset") :].split("_")[0])

    def make_folder(self) -> None:
        """Make the dataset's folder in nnUNet_preprocessed.

        Raises:
            UserError: It cannot be made or written to.
        """
        try:
            self.preprocessed.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.preprocessed} cannot be made ({error.strerror}). Correct nnUNet_preprocessed."
            ) from None
        if not os.access(self.preprocessed, os.W_OK):
            raise UserError(f"{self.preprocessed} cannot be written to. Correct its rights or nnUNet_preprocessed.")

    @property
    def last_change(self) -> float:
        """When dataset.json, an image or a label file was last written, in seconds since the epoch."""
        files = [self.raw / "dataset.json"]
        for entry in self.files.values():
            files += [Path(entry["label"]), *map(Path, entry["images"])]
        return max(file.stat().st_mtime for file in files)

    @property
    def ct_channels(self) -> list[int]:
        """Channels that nnU-Net normalises as CT, by their names."""
        names = list(self.dataset_json["channel_names"].values())
        return [channel for channel, name in enumerate(names) if str(name).casefold() == "ct"]


@dataclasses.dataclass(frozen=True)
class DatasetFolders:
    """Where nnU-Net keeps a dataset, whether or not the folders are there.

    Args:
        raw: Its folder in nnUNet_raw.
        preprocessed: Its folder in nnUNet_preprocessed.
        results: Its folder in nnUNet_results.
    """

    raw: Path
    preprocessed: Path
    results: Path

    def of_cases(self, training: bool) -> tuple[Path, Path, Path]:
        """Folders of images, masks and lung masks of the training or else of the test cases."""
        if not training:
            return self.raw / "imagesTs", self.raw / "labelsTs", self.raw / "lungsTs"
        # Those that nnU-Net validates on; the raw dataset may have been deleted since.
        return self.raw / "imagesTr", self.preprocessed / "gt_segmentations", self.raw / "lungsTr"


def dataset_folders(name_or_id: str) -> DatasetFolders:
    """Where nnU-Net keeps a dataset.

    Args:
        name_or_id: `501`, `Dataset501_Covid`.

    Raises:
        UserError: nnU-Net's folders are not set; no or several datasets of that id.
    """
    _check_folders_set()
    name = _dataset_name(name_or_id)
    return DatasetFolders(Path(nnUNet_raw) / name, Path(nnUNet_preprocessed) / name, Path(nnUNet_results) / name)


def find_dataset(name_or_id: str) -> Dataset:
    """Find a raw dataset and check that it is whole, before any long work.

    Args:
        name_or_id: `501`, `Dataset501_Covid`.

    Raises:
        UserError: nnU-Net's folders are not set; no or several datasets of that id; `dataset.json` missing, broken or
            incomplete; no cases, or a case whose number of channels is wrong.
    """
    _check_folders_set()
    name = _dataset_name(name_or_id)
    raw = Path(nnUNet_raw) / name
    path = raw / "dataset.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Make a dataset with: gasnet-nnunet convert folders --id N --name NAME ..."
        )
    dataset_json = read_json(path)
    for key in ("channel_names", "labels", "numTraining", "file_ending"):
        if key not in dataset_json:
            raise UserError(f"{path} has no '{key}', which nnU-Net needs.")
    if "dataset" not in dataset_json and not (raw / "imagesTr").is_dir():
        raise UserError(f"{raw} has no folder imagesTr with the CTs <case>_0000{dataset_json['file_ending']}.")
    files = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    if not files:
        raise UserError(f"{raw / 'imagesTr'} holds no file named <case>_0000{dataset_json['file_ending']}.")
    channels = len(dataset_json["channel_names"])
    for case, entry in files.items():
        if len(entry["images"]) != channels:
            raise UserError(
                f"{case} has {len(entry['images'])} image files in {raw / 'imagesTr'}, but dataset.json names "
                f"{channels} channels ({', '.join(map(str, dataset_json['channel_names'].values()))})."
            )
    if dataset_json["numTraining"] != len(files):
        raise UserError(f"{path} says numTraining {dataset_json['numTraining']}, but there are {len(files)} cases.")
    return Dataset(name, raw, Path(nnUNet_preprocessed) / name, dataset_json, files)


def _check_folders_set() -> None:
    for variable, folder in NNUNET_FOLDERS.items():
        if not folder.is_set():
            raise UserError(f"{variable} is not set. nnU-Net needs it: export {variable}=/a/folder")


def _dataset_name(name_or_id: str) -> str:
    if re.fullmatch(r"Dataset\d{3,}_.+", name_or_id):
        return name_or_id
    if not name_or_id.isdecimal():
        raise UserError(f"'{name_or_id}' is no dataset; expected its id, e.g. 501, or its name, e.g. Dataset501_Covid.")
    found = [str(name) for name in find_candidate_datasets(int(name_or_id))]
    if len(found) != 1:
        which = f"several ({', '.join(found)})" if found else "none"
        folders = ", ".join(f"{variable}={folder}" for variable, folder in NNUNET_FOLDERS.items())
        raise UserError(f"Expected one dataset of id {name_or_id}, found {which} in {folders}.")
    return found[0]


def measure_dataset(
    dataset: Dataset, organ: str, *, num_processes: int = 1, progress: bool = False
) -> dict[str, CaseGeometry]:
    """Measure organ box and intensities of channel 0 of every case, only those that changed since the last time.

    Masks in `lungsTr` of the raw dataset win over computed ones.

    Args:
        dataset: The dataset.
        organ: "lungs", "body" or "volume".
        num_processes: Cases measured at a time.
        progress: Show a progress bar.

    Raises:
        UserError: An image is damaged or holds NaN, or a mask does not match it.
    """
    cache = dataset.preprocessed / GEOMETRY_CACHE
    known = read_json(cache) if cache.is_file() else {}
    jobs: dict[str, tuple[list[Path], Path | None, str]] = {}
    stamps: dict[str, list[Any]] = {}
    for case, entry in dataset.files.items():
        mask = dataset.raw / "lungsTr" / f"{case}{dataset.dataset_json['file_ending']}"
        images = [Path(image) for image in entry["images"]]
        jobs[case] = (images, mask if mask.is_file() and organ != "volume" else None, organ)
        stamps[case] = [VERSION, organ]
        for path in (*images, jobs[case][1]):
            stamps[case] += [str(path), path.stat().st_size, path.stat().st_mtime_ns] if path else [None]
    entries = {case: known[case] for case, stamp in stamps.items() if known.get(case, {}).get("stamp") == stamp}
    pending = [case for case in jobs if case not in entries]
    results = run_jobs(
        _measure,
        [jobs[case] for case in pending],
        num_processes=num_processes,
        description=f"Measuring {organ}" if progress else None,
    )
    measured = dict(zip(pending, results, strict=True))
    entries |= {
        case: {"stamp": stamps[case], "geometry": dataclasses.asdict(result)}
        for case, result in measured.items()
        if not isinstance(result, str)
    }
    if pending:
        dataset.make_folder()
        write_json(cache, entries)
    raise_problems([result for result in measured.values() if isinstance(result, str)], "the scans")
    return {case: TypeAdapter(CaseGeometry).validate_python(entries[case]["geometry"]) for case in jobs}


def _measure(job: tuple[list[Path], Path | None, str]) -> CaseGeometry | str:
    """The measures of a case, or the sentence that says why there are none: one broken file of many is no traceback."""
    images, mask, organ = job
    try:
        # Read by a reader that notices truncated files and NaN, which ITK's hides.
        for image in images:
            read_volume(image)
        return measure_case(images[0], mask, organ)
    except UserError as error:
        return str(error)


def check_grids(dataset: Dataset, *, num_processes: int = 1, progress: bool = False) -> None:
    """Check by their headers that a case's images and its label file lie on one grid.

    Raises:
        UserError: Some do not, or are no images.
    """
    results = run_jobs(
        _grid_problem,
        [[*map(Path, entry["images"]), Path(entry["label"])] for entry in dataset.files.values()],
        num_processes=num_processes,
        description="Comparing scans and labels" if progress else None,
    )
    raise_problems([result for result in results if result], "the dataset")


def _grid_problem(paths: list[Path]) -> str:
    try:
        expected = read_grid(paths[0])
        for path in paths[1:]:
            difference = grid_difference(read_grid(path), expected)
            if difference:
                return f"{path} does not lie on the grid of {paths[0]}: {difference}. Resample it onto that grid."
    except UserError as error:
        return str(error)
    return ""


def check_measures(dataset: Dataset, measures: Mapping[str, CaseGeometry], organ: str) -> None:
    """Refuse data that no lung window fits, and cases without the organ.

    Raises:
        UserError: A CT is not in Hounsfield units; a case has no organ.
    """
    if 0 in dataset.ct_channels:
        # Fat and water-filled organs are near 0 HU: a crop of them shows no air, but values below 0.
        limit = HIGHEST_AIR if organ == "lungs" else 0.0
        wrong = [case for case, measure in measures.items() if not measure.intensity[1] < limit]
        if wrong:
            low, _, _, _, high = measures[wrong[0]].intensity
            raise UserError(
                f"{len(wrong)} of {len(measures)} CTs are not in Hounsfield units: {abbreviate(wrong)}. {wrong[0]} "
                f"runs from {low:g} to {high:g}; expected air near -1000. Convert them with: gasnet-nnunet convert "
                "folders ... --rescale LO HI HU_LO HU_HI (e.g. --rescale 0 255 -1250 250). If they are no CT, give the "
                "channel another name than 'CT' in dataset.json and plan with --set organ=volume."
            )
    missing = [case for case, measure in measures.items() if measure.box is None]
    if missing:
        raise UserError(
            f"No {organ} found in {abbreviate(missing)}. Look at the scan; if it does show {organ}, put a mask of them "
            f"at {dataset.raw / 'lungsTr' / missing[0]}{dataset.dataset_json['file_ending']}, else take the case out, "
            "or plan with --set organ=body or --set organ=volume."
        )
