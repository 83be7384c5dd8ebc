"""From a raw dataset to whole-lung plans, splits and preprocessed data: checks, files, and what is there already."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset
from nnunetv2.paths import nnUNet_results
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from gasnet_nnunet.cohort import COHORT_CACHE, Cohort, abbreviate, cohort_of_files
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, write_json
from gasnet_nnunet.fine_tuning import Origin, read_origin
from gasnet_nnunet.geometry import Geometry, covering_extent
from gasnet_nnunet.lungs import CaseGeometry
from gasnet_nnunet.organ_masks import ensure_organ_masks
from gasnet_nnunet.planner import CONFIGURATION, PlanningChoices, WholeLungPlanner, plans_path
from gasnet_nnunet.raw_dataset import Dataset, check_grids, check_measures, find_dataset, measure_dataset
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings
from gasnet_nnunet.splits import check_splits, make_splits, read_fold, write_splits

PREPROCESSING_RECORD = "gasnet_preprocessed.json"
"""What the preprocessed data of each plan were made with."""


def fingerprint_is_current(dataset: Dataset) -> bool:
    """Whether nnU-Net's fingerprint is there and no older than the raw data."""
    path = dataset.preprocessed / "dataset_fingerprint.json"
    if not path.is_file() or len(read_json(path)["spacings"]) != len(dataset.files):
        return False
    return path.stat().st_mtime >= dataset.last_change


def check_plans_name(dataset: Dataset, plans_name: str) -> None:
    """Refuse names that nnU-Net cannot use, and plans that are not ours.

    Raises:
        UserError: As said.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", plans_name) or "__" in plans_name:
        raise UserError(
            f"--name {plans_name!r} cannot be used: letters, digits, '-' and '_' only, and no '__', at which nnU-Net "
            "splits the names of its folders."
        )
    path = plans_path(dataset, plans_name)
    if path.is_file() and PLANS_KEY not in read_json(path).get("configurations", {}).get(CONFIGURATION, {}):
        raise UserError(
            f"{path} is there already and was not made by gasnet-nnunet plan. Choose another --name; it is left alone."
        )


@dataclasses.dataclass(frozen=True)
class Planned:
    """What planning came to.

    Args:
        dataset: The dataset.
        cohort: Its cases.
        measures: Organ box and intensities of each case.
        choices: What was fixed.
        settings: GASNet's settings.
        geometry: Spacing, patch and topology.
        plans: Content of the plans file.
        splits_file: `splits_final.json`.
        folds: Number of its folds.
        splits_are_ours: False where another split file was there and kept.
        origin: Trained model that the training goes on from.
    """

    dataset: Dataset
    cohort: Cohort
    measures: dict[str, CaseGeometry]
    choices: PlanningChoices
    settings: GASNetSettings
    geometry: Geometry
    plans: dict[str, Any]
    splits_file: Path
    folds: int
    splits_are_ours: bool
    origin: Origin | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """The planned configuration."""
        return self.plans["configurations"][CONFIGURATION]

    @property
    def plans_file(self) -> Path:
        """Where the plans stand."""
        return plans_path(self.dataset, self.plans["plans_name"])

    @property
    def data_folder(self) -> Path:
        """Where nnU-Net's preprocessing writes."""
        return self.dataset.preprocessed / str(self.configuration["data_identifier"])

    @property
    def covered_extent(self) -> np.ndarray:
        """Box size in mm that the patch was made for, (3,)."""
        return covering_extent(np.array([measure.box_mm for measure in self.measures.values()]))

    @property
    def decisive_cases(self) -> str:
        """Which cases' boxes set that size along which axes, e.g. `case_3 (Z, X), case_8 (Y)`."""
        axes: dict[str, list[str]] = {}
        for axis, (name, size) in enumerate(zip("ZYX", self.covered_extent, strict=True)):
            case = next(case for case, measure in self.measures.items() if measure.box_mm[axis] == size)
            axes.setdefault(case, []).append(name)
        return ", ".join(f"{case} ({', '.join(names)})" for case, names in axes.items())

    @property
    def patch_mm(self) -> np.ndarray:
        """Patch size in mm, (3,)."""
        return np.array(self.geometry.patch_size) * np.array(self.geometry.spacing)

    @property
    def median_spacing(self) -> np.ndarray:
        """Median of the data's spacings in mm, (3,)."""
        return np.median([measure.spacing for measure in self.measures.values()], axis=0)

    @property
    def window_reason(self) -> str:
        """Where the CT window comes from."""
        if self.origin is not None:
            return "that of the checkpoint."
        if self.choices.hu_window is not None:
            return "given."
        return "the paper's." if self.settings.organ == "lungs" else "0.5 and 99.5 percentile of the median scan."

    @property
    def unused(self) -> str:
        """Cases that fold 0 of a kept split leaves out, as a text; empty if there are none."""
        fold = read_fold(self.splits_file, 0, self.cohort)
        used = {case for cases in dataclasses.astuple(fold) for case in cases}
        return abbreviate([case for case in sorted(self.cohort.cases) if case not in used])

    @property
    def cut_off(self) -> list[str]:
        """Cases whose organ one patch does not hold."""
        held = self.geometry.holds(np.array([measure.box_mm for measure in self.measures.values()]))
        return [case for case, is_held in zip(self.measures, held, strict=True) if not is_held]

    @property
    def voxels(self) -> int:
        """Voxels of all cases at the target spacing."""
        return sum(
            int(np.prod(compute_new_shape(measure.shape, measure.spacing, self.geometry.spacing), dtype=np.int64))
            for measure in self.measures.values()
        )


def make_plans(
    name_or_id: str,
    choices: PlanningChoices,
    settings: GASNetSettings,
    *,
    plans_name: str = "GASNetPlans",
    gpu_memory_gb: float = 8.0,
    num_processes: int = 1,
    progress: bool = False,
) -> Planned:
    """Check the dataset, measure it, choose, and write plans, splits and `dataset.json` for nnU-Net's preprocessing.

    Nothing but caches and nnU-Net's fingerprint is written before everything is decided. An existing
    `splits_final.json` is never overwritten.

    Args:
        name_or_id: The dataset.
        choices: What is fixed.
        settings: GASNet's settings.
        plans_name: Name of the plans.
        gpu_memory_gb: Memory target of nnU-Net's VRAM rule in GB.
        num_processes: Processes that read cases.
        progress: Show progress bars.

    Raises:
        UserError: Anything that the user has to mend first.
    """
    dataset = find_dataset(name_or_id)
    check_plans_name(dataset, plans_name)
    origin = read_origin(settings.init_from) if settings.init_from is not None else None
    if origin is not None:
        origin.check_dataset(dataset.dataset_json)
        origin.check_adversary(settings)
    if settings.organ != "volume" and 0 not in dataset.ct_channels:
        names = ", ".join(map(str, dataset.dataset_json["channel_names"].values()))
        raise UserError(
            f"The {settings.organ} are found by HU, but channel 0 of {dataset.name} is not named 'CT' (channels: "
            f"{names}). Plan with --set organ=volume, or correct channel_names in dataset.json."
        )
    dataset.make_folder()
    check_grids(dataset, num_processes=num_processes, progress=progress)
    cohort = cohort_of_files(
        {case: Path(entry["label"]) for case, entry in dataset.files.items()},
        dataset.dataset_json,
        cache=dataset.preprocessed / COHORT_CACHE,
        num_processes=num_processes,
        progress=progress,
    )
    splits_file = dataset.preprocessed / "splits_final.json"
    _check_existing_splits(dataset, splits_file, cohort)
    measures = measure_dataset(dataset, settings.organ, num_processes=num_processes, progress=progress)
    check_measures(dataset, measures, settings.organ)
    # nnU-Net prints on the way what the table says better.
    with contextlib.redirect_stdout(io.StringIO()):
        if not fingerprint_is_current(dataset):
            extract_fingerprint_dataset(
                dataset.number, num_processes=num_processes, verbose=False, show_progress_bar=progress
            )
        planner = WholeLungPlanner(
            dataset, measures, choices, settings, plans_name=plans_name, gpu_memory_gb=gpu_memory_gb, origin=origin
        )
        plans = planner.plan_experiment()
    check_trained_models(dataset, plans)
    # Read again, because nnU-Net's listing of the files resolves the paths of a 'dataset' entry in place.
    write_json(dataset.preprocessed / "dataset.json", read_json(dataset.raw / "dataset.json"))
    ours = write_splits(splits_file, make_splits(cohort))
    planner.save_plans(plans)
    return Planned(
        dataset=dataset,
        cohort=cohort,
        measures=measures,
        choices=choices,
        settings=settings,
        geometry=planner.geometry,
        plans=plans,
        splits_file=splits_file,
        folds=check_splits(splits_file, cohort),
        splits_are_ours=ours,
        origin=origin,
    )


def run_preprocessing(planned: Planned, *, num_processes: int = 1) -> bool:
    """nnU-Net's preprocessing of the planned configuration, unless its result is there already.

    Returns:
        Whether it ran.
    """
    if preprocessing_is_current(planned):
        return False
    # Silences a print of the whole configuration, which the plans file holds.
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess_dataset(
            planned.dataset.number, planned.plans["plans_name"], (CONFIGURATION,), num_processes=(num_processes,)
        )
    basis = _preprocessing_basis(planned.plans, planned.dataset.dataset_json)
    write_json(_record(planned), {**_read_record(planned), planned.data_folder.name: basis})
    return True


def prepare_organ_masks(planned: Planned, *, num_processes: int = 1, progress: bool = False) -> None:
    """Make the masks of the lungs (or of what takes their place) beside the preprocessed cases.

    A training would make them as well, but it may run where nnUNet_raw is not at hand, and thin walls of the chest are
    lost in the coarse grid of whole-lung patches.
    """
    ensure_organ_masks(
        planned.dataset.preprocessed,
        planned.plans,
        CONFIGURATION,
        sorted(planned.measures),
        organ=planned.settings.organ,
        raw_folder=planned.dataset.raw,
        num_processes=num_processes,
        progress=progress,
    )


def preprocessing_is_current(planned: Planned) -> bool:
    """Whether the data of exactly these cases are there, made with this spacing, window and labels from these files.

    Settings, batch size and features do not change the data.
    """
    basis = _preprocessing_basis(planned.plans, planned.dataset.dataset_json)
    # nnU-Net writes the .pkl of a case last.
    written = {path.stem: path.stat().st_mtime for path in planned.data_folder.glob("*.pkl")}
    if set(written) != set(planned.measures) or _read_record(planned).get(planned.data_folder.name) != basis:
        return False
    return _record(planned).stat().st_mtime >= max(planned.dataset.last_change, *written.values())


def _record(planned: Planned) -> Path:
    return planned.dataset.preprocessed / PREPROCESSING_RECORD


def _read_record(planned: Planned) -> dict[str, Any]:
    return read_json(_record(planned)) if _record(planned).is_file() else {}


def _preprocessing_basis(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """All that nnU-Net's preprocessed data depend on."""
    configuration = plans["configurations"][CONFIGURATION]
    keys = [key for key in configuration if key.startswith(("resampling_fn_data", "resampling_fn_seg"))]
    keys += ["spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name"]
    return {
        **{key: configuration[key] for key in keys},
        "transpose_forward": plans["transpose_forward"],
        "intensities": plans["foreground_intensity_properties_per_channel"],
        "labels": dataset_json["labels"],
    }


def check_trained_models(dataset: Dataset, plans: Mapping[str, Any]) -> None:
    """Refuse to replan under models that could then not be continued.

    Settings and batch size may change.

    Args:
        dataset: The dataset.
        plans: The new plans.

    Raises:
        UserError: Models were trained with plans of this name that describe another network or other data.
    """
    name = plans["plans_name"]
    path = plans_path(dataset, name)
    trained = sorted(Path(nnUNet_results).glob(f"{dataset.name}/*__{name}__{CONFIGURATION}/fold_*/checkpoint_*.pth"))
    if not trained or not path.is_file():
        return

    def fixed(content: Mapping[str, Any]) -> dict[str, Any]:
        configuration = content["configurations"][CONFIGURATION]
        network = {key: configuration[key] for key in ("patch_size", "architecture")}
        return {**_preprocessing_basis(content, dataset.dataset_json), **network}

    old, new = fixed(read_json(path)), fixed(plans)
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(
            f"{trained[0].parent} holds a model trained with {name}, and the new plans differ from those in "
            f"{', '.join(changed)}, so that its training could not be continued. Choose another --name."
        )


def _check_existing_splits(dataset: Dataset, splits_file: Path, cohort: Cohort) -> None:
    """nnU-Net copies a split file out of nnUNet_raw, and asserts that it is the one in nnUNet_preprocessed."""
    given = dataset.raw / "splits_final.json"
    if (
        given.is_file()
        and splits_file.is_file()
        and given.read_text(encoding="utf-8") != splits_file.read_text(encoding="utf-8")
    ):
        raise UserError(f"{given} and {splits_file} are two different splits. Keep the one you want.")
    for path in (splits_file, given):
        if path.is_file():
            check_splits(path, cohort)
