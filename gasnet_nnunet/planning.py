"""Whole-lung plans: an nnU-Net planner that lets one patch hold the lungs, and the checks and files around it.

As in the paper, a diseased patch is then a whole diseased patient, so that "this input shows disease" is always true.
nnU-Net keeps everything else: its fingerprint, topology rules, batch size rule, resampling and preprocessing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset
from nnunetv2.paths import nnUNet_results
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from pydantic import Field, TypeAdapter, ValidationError

from gasnet_nnunet.cohort import COHORT_CACHE, Cohort, abbreviate, cohort_of_files
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, write_json
from gasnet_nnunet.fine_tuning import Origin, read_origin
from gasnet_nnunet.geometry import Geometry, Patch, Topology, choose_geometry, covering_extent, nnunet_topology
from gasnet_nnunet.lungs import CaseGeometry
from gasnet_nnunet.organ_masks import ensure_organ_masks
from gasnet_nnunet.raw_dataset import Dataset, check_grids, check_measures, find_dataset, measure_dataset
from gasnet_nnunet.segmenters import SEGMENTERS, apply_segmenter, segmenter_of
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings, load_preset, parse_assignments
from gasnet_nnunet.splits import check_splits, make_splits, read_fold, write_splits

CONFIGURATION = "3d_fullres"
"""The configuration of nnU-Net's that the plans describe."""
LUNG_WINDOW = (-1250.0, 250.0)
"""The paper's window in HU (its section IV.A)."""
PREPROCESSING_RECORD = "gasnet_preprocessed.json"
"""What the preprocessed data of each plan were made with."""

PatchEdge = Annotated[int, Field(ge=8, le=1024)]
Count = Annotated[int, Field(ge=1)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class PlanningChoices:
    """What a preset or the user fixes; the rest follows from the data.

    Args:
        patch_size: Patch (Z, Y, X) in voxels; derived from the data and the memory target if `None`.
        base_features: Feature maps of S at full resolution, doubled with each stage, or those of every stage.
        max_features: Most feature maps of a stage.
        batch_size: Patches of a batch; by nnU-Net's rule if `None`.
        hu_window: CT window in HU that the preprocessing clips to; if `None`, the paper's
            [-1250, 250] for lungs and the data's 0.5 and 99.5 percentiles for other organs.
        segmenter: Which network S is, a name of `segmenters.SEGMENTERS`.
    """

    patch_size: tuple[PatchEdge, PatchEdge, PatchEdge] | None = None
    base_features: Count | tuple[Count, ...] = 32
    max_features: Count = 320
    batch_size: Count | None = None
    hu_window: tuple[float, float] | None = None
    segmenter: str = "plain"

    def __post_init__(self) -> None:
        if self.segmenter not in SEGMENTERS:
            raise ValueError(f"there is no segmenter '{self.segmenter}'; segmenters are {', '.join(SEGMENTERS)}")
        if self.hu_window is not None and not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window must rise, not run from {self.hu_window[0]} to {self.hu_window[1]}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all choices."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanningChoices:
        """Validate choices of a preset and of the command line.

        Raises:
            UserError: An impossible value.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0]) if problem["loc"] else ""
            found = f" (found {values[name]!r})" if name in values else ""
            raise UserError(
                f"Impossible plan: {name + ': ' if name else ''}{problem['msg'].removeprefix('Value error, ')}{found}."
            ) from None


def resolve_choices(
    preset: str | None,
    patch_size: Patch | None,
    features: Sequence[int],
    assignments: Sequence[str],
    *,
    segmenter: str | None = None,
    init_from: str | Path | None = None,
) -> tuple[PlanningChoices, GASNetSettings]:
    """Preset, then `--patch`, `--features`, `--segmenter` and `--set`: the later wins.

    `--set` takes GASNet's settings and, because presets hold them too, the planner's `batch_size`, `max_features` and
    `hu_window`. With `init_from`, from either place, the plans in that checkpoint take the place of a preset.

    Raises:
        UserError: An unknown preset or setting, an impossible value, or one that the checkpoint has settled.
    """
    assigned = parse_assignments(list(assignments))
    planning = {name: assigned.pop(name) for name in PlanningChoices.names() if name in assigned}
    if patch_size is not None:
        planning["patch_size"] = patch_size
    if features:
        planning["base_features"] = features[0] if len(features) == 1 else tuple(features)
    if segmenter is not None:
        planning["segmenter"] = segmenter
    checkpoint = init_from if init_from is not None else assigned.get("init_from")
    if checkpoint is not None:
        settled = [*(["--preset"] if preset is not None else []), *(name for name in planning if name != "batch_size")]
        if settled:
            raise UserError(
                f"With --init-from the network, spacing, patch and HU window are those in {checkpoint}, because its "
                f"weights fit no others. Leave out {', '.join(settled)}."
            )
        origin = read_origin(checkpoint)
        base, settings = _choices_of(origin), origin.settings
        assigned["init_from"] = str(origin.path)
    else:
        chosen = load_preset(preset or "default")
        base, settings = chosen.planning, chosen.settings
    changes = GASNetSettings.from_dict(assigned, source="--set").to_dict()
    settings = settings.replace(**{name: changes[name] for name in assigned})
    if settings.patches == "auto":
        settings = settings.replace(patches="volume")
    return PlanningChoices.from_dict({**base, **planning}), settings


def _choices_of(origin: Origin) -> dict[str, Any]:
    """What the plans of a trained model leave to choose and what the command says of them."""
    return {
        "patch_size": tuple(origin.configuration["patch_size"]),
        "batch_size": origin.configuration["batch_size"],
        "segmenter": segmenter_of(origin.configuration) or "plain",
    }


def fingerprint_is_current(dataset: Dataset) -> bool:
    """Whether nnU-Net's fingerprint is there and no older than the raw data."""
    path = dataset.preprocessed / "dataset_fingerprint.json"
    if not path.is_file() or len(read_json(path)["spacings"]) != len(dataset.files):
        return False
    return path.stat().st_mtime >= dataset.last_change


class WholeLungPlanner(ExperimentPlanner):
    """nnU-Net's planner with spacing and patch chosen so that one patch holds the organ of nearly every case.

    Axes are never transposed (nnU-Net puts the axis of largest spacing first): for axial CTs read as (Z, Y, X) that
    changes nothing, and a patch given as (Z, Y, X), the mirror axes and the box of the lungs keep their meaning.

    Args:
        dataset: The dataset, whose fingerprint exists.
        measures: Organ box, spacing and intensities of each case.
        choices: What is fixed.
        settings: GASNet's settings, to be written into the plans.
        plans_name: Name of the plans.
        gpu_memory_gb: Memory target of nnU-Net's VRAM rule in GB.
        origin: Trained model that the training goes on from, whose network, geometry and intensities are taken over.
    """

    def __init__(
        self,
        dataset: Dataset,
        measures: Mapping[str, CaseGeometry],
        choices: PlanningChoices,
        settings: GASNetSettings,
        *,
        plans_name: str,
        gpu_memory_gb: float = 8.0,
        origin: Origin | None = None,
    ) -> None:
        super().__init__(
            dataset.name, gpu_memory_target_in_gb=gpu_memory_gb, plans_name=plans_name, suppress_transpose=True
        )
        self.source = dataset
        self.measures = measures
        self.choices = choices
        self.settings = settings
        self.origin = origin
        self.UNet_reference_val_3d = SEGMENTERS[choices.segmenter].feature_maps_in_8_gb
        self.UNet_max_features_3d = choices.max_features
        self._feature_maps: dict[tuple[Any, ...], int] = {}

    @property
    def extents(self) -> np.ndarray:
        """Organ box sizes in mm, (N, 3)."""
        return np.array([measure.box_mm for measure in self.measures.values()])

    @cached_property
    def geometry(self) -> Geometry:
        """Spacing, patch and topology."""
        if self.origin is not None:
            return _geometry_of(self.origin)
        return choose_geometry(
            self.extents,
            np.array([measure.spacing for measure in self.measures.values()]),
            self.choices.patch_size,
            preferred_spacing=self.determine_fullres_target_spacing(),
            fits_memory=lambda spacing, patch: self.feature_maps(nnunet_topology(spacing, patch)) <= self.reference,
        )

    @property
    def reference(self) -> float:
        """Feature map voxels that nnU-Net's memory target allows at its smallest batch of 2."""
        return self.UNet_reference_val_3d * self.UNet_vram_target_GB / self.UNet_reference_val_corresp_GB

    def features_per_stage(self, stages: int) -> tuple[int, ...]:
        """Feature maps of each stage of S.

        Raises:
            UserError: One number a stage was given, but the number of stages is another.
        """
        base, most = self.choices.base_features, self.choices.max_features
        if isinstance(base, int):
            return tuple(min(base * 2**stage, most) for stage in range(stages))
        if len(base) != stages:
            raise UserError(
                f"--features names {len(base)} stages, but the planned network has {stages}. Give {stages} numbers, or "
                "one that is doubled with each stage."
            )
        return tuple(min(features, most) for features in base)

    def architecture(self, topology: Topology) -> dict[str, Any]:
        """S for a topology, as it stands in the plans."""
        if self.origin is not None:
            return dict(self.origin.configuration["architecture"])
        stages = len(topology.strides)
        shared = {
            "n_stages": stages,
            "features_per_stage": self.features_per_stage(stages),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": topology.kernel_sizes,
            "strides": topology.strides,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        configuration = apply_segmenter({"architecture": {"arch_kwargs": shared}}, self.choices.segmenter)
        return dict(configuration["architecture"])

    def feature_maps(self, topology: Topology) -> int:
        """Feature map voxels of S for one patch: nnU-Net's measure of memory."""
        key = (topology.patch_size, topology.strides)
        if key not in self._feature_maps:
            architecture = self.architecture(topology)
            # On the meta device the network has shapes but no weights: a search over hundreds of them takes seconds.
            # nnU-Net's static_estimate_VRAM_usage does the same with weights, and fails where nnUNet_n_proc_DA is 0.
            with torch.device("meta"):
                network = get_network_from_plans(
                    architecture["network_class_name"],
                    architecture["arch_kwargs"],
                    architecture["_kw_requires_import"],
                    len(self.dataset_json["channel_names"]),
                    len(self.dataset_json["labels"]),
                    allow_init=False,
                )
            self._feature_maps[key] = int(network.compute_conv_feature_map_size(topology.patch_size))
        return self._feature_maps[key]

    def batch_size(self, topology: Topology, voxels: float) -> int:
        """The given batch size, or nnU-Net's rule: fill the memory target, at most 5 % of the data, at least 2."""
        if self.choices.batch_size is not None:
            return self.choices.batch_size
        filling = round(self.reference / self.feature_maps(topology) * self.UNet_reference_val_corresp_bs_3d)
        most = round(voxels * self.max_dataset_covered / np.prod(topology.patch_size, dtype=np.float64))
        return max(min(filling, most), self.UNet_min_batch_size)

    def hu_window(self) -> tuple[float, float]:
        """CT window in HU."""
        if self.choices.hu_window is not None:
            return self.choices.hu_window
        if self.settings.organ == "lungs":
            return LUNG_WINDOW
        low, high = np.median([[m.intensity[1], m.intensity[3]] for m in self.measures.values()], axis=0)
        return float(np.floor(low)), float(np.ceil(high))

    def intensity_properties(self) -> dict[str, dict[str, float]]:
        """nnU-Net's intensity properties, in CT channels with the window in place of the foreground's percentiles.

        nnU-Net's own foreground counts voxels labelled `ignore`, so that its percentiles would be those of whole scans.
        With these four numbers CTNormalization clips to the window and maps it to [0, 2]. The lower bound becomes 0,
        because nnU-Net pads with 0, in training and in prediction: a patch that holds the lungs is larger than many a
        scan, and a slab of mean HU beside the lungs is nothing that S could know.
        """
        if self.origin is not None:
            return dict(self.origin.plans["foreground_intensity_properties_per_channel"])
        low, high = self.hu_window()
        window = {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": (high - low) / 2}
        found = self.dataset_fingerprint["foreground_intensity_properties_per_channel"]
        return {
            channel: {**values, **(window if int(channel) in self.source.ct_channels else {})}
            for channel, values in found.items()
        }

    def determine_segmentation_softmax_export_fn(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """nnU-Net's, but interpolating along Z too.

        nnU-Net repeats slices that are over three times as thick as their voxels are wide: it expects such CTs to have
        been taken so. Ours are only planned so, and a mistake in one slice would be as thick as the slice.
        """
        function, options = super().determine_segmentation_softmax_export_fn(*args, **kwargs)
        return function, {**options, "force_separate_z": False}

    def plan_experiment(self) -> dict[str, Any]:
        """Make the plans, without writing them.

        Raises:
            UserError: As `features_per_stage`.
        """
        geometry = self.geometry
        shapes, spacings = self.dataset_fingerprint["shapes_after_crop"], self.dataset_fingerprint["spacings"]
        resampled = [compute_new_shape(*case, geometry.spacing) for case in zip(shapes, spacings, strict=True)]
        median_shape = np.median(resampled, axis=0)
        voxels = float(np.prod(median_shape)) * len(resampled)
        resampling, resampling_kwargs, resampling_seg, resampling_seg_kwargs = self.determine_resampling()
        export, export_kwargs = self.determine_segmentation_softmax_export_fn()
        schemes, use_mask = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        transpose_forward, transpose_backward = self.determine_transpose()
        configuration = {
            "data_identifier": self.generate_data_identifier(CONFIGURATION),
            "preprocessor_name": self.preprocessor_name,
            "batch_size": self.batch_size(geometry.topology, voxels),
            "patch_size": geometry.patch_size,
            "median_image_size_in_voxels": median_shape,
            "spacing": geometry.spacing,
            "normalization_schemes": schemes,
            "use_mask_for_norm": use_mask,
            "resampling_fn_data": resampling.__name__,
            "resampling_fn_seg": resampling_seg.__name__,
            "resampling_fn_data_kwargs": resampling_kwargs,
            "resampling_fn_seg_kwargs": resampling_seg_kwargs,
            "resampling_fn_probabilities": export.__name__,
            "resampling_fn_probabilities_kwargs": export_kwargs,
            "architecture": self.architecture(geometry.topology),
            "batch_dice": False,
            PLANS_KEY: self.settings.to_dict(),
        }
        if self.origin is not None:
            # All else, such as spacing, normalisation and resampling, is what its weights are used to.
            ours = ("data_identifier", "batch_size", "median_image_size_in_voxels", PLANS_KEY)
            configuration = {**self.origin.configuration, **{name: configuration[name] for name in ours}}
        plans = {
            "dataset_name": self.dataset_name,
            "plans_name": self.plans_identifier,
            "original_median_spacing_after_transp": [float(i) for i in np.median(spacings, axis=0)],
            "original_median_shape_after_transp": [round(i) for i in np.median(shapes, axis=0)],
            "image_reader_writer": self.determine_reader_writer().__name__,
            "transpose_forward": transpose_forward,
            "transpose_backward": transpose_backward,
            "configurations": {CONFIGURATION: configuration},
            # nnU-Net looks planners up in its own tree, where ours is not.
            "experiment_planner_used": ExperimentPlanner.__name__,
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": self.intensity_properties(),
        }
        recursive_fix_for_json_export(plans)
        # As it will be read: comparable with plans on disk.
        self.plans = json.loads(json.dumps(plans))
        return self.plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans whole or not at all, keeping the user's further configurations as nnU-Net does."""
        path = plans_path(self.source, self.plans_identifier)
        if path.is_file():
            plans["configurations"] = {**read_json(path)["configurations"], **plans["configurations"]}
        write_json(path, plans)


def _geometry_of(origin: Origin) -> Geometry:
    """Spacing, patch and topology of a trained model.

    Raises:
        UserError: It is not three-dimensional, or its axes are transposed.
    """
    if len(origin.configuration["patch_size"]) != 3 or list(origin.plans["transpose_forward"]) != [0, 1, 2]:
        raise UserError(
            f"The model in {origin.path} is 2D or was planned with other axes than (Z, Y, X), which these plans cannot "
            "take over. Start from one that gasnet-nnunet plan has planned."
        )
    kwargs = origin.configuration["architecture"]["arch_kwargs"]
    z, y, x = origin.configuration["patch_size"]
    spacing_z, spacing_y, spacing_x = origin.configuration["spacing"]
    strides, kernel_sizes = (tuple(map(tuple, kwargs[name])) for name in ("strides", "kernel_sizes"))
    return Geometry((spacing_z, spacing_y, spacing_x), Topology(strides, kernel_sizes, (z, y, x)))


def plans_path(dataset: Dataset, plans_name: str) -> Path:
    """Plans file of a name."""
    return dataset.preprocessed / f"{plans_name}.json"


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
