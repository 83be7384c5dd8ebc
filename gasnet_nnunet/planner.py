"""Whole-lung plans: an nnU-Net planner that lets one patch hold the lungs, and what a user chooses of them.

As in the paper, a diseased patch is then a whole diseased patient, so that "this input shows disease" is always true.
nnU-Net keeps everything else: its fingerprint, topology rules, batch size rule and resampling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from pydantic import Field, TypeAdapter, ValidationError

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, write_json
from gasnet_nnunet.fine_tuning import Origin, read_origin
from gasnet_nnunet.geometry import Geometry, Patch, Topology, choose_geometry, nnunet_topology
from gasnet_nnunet.lungs import CaseGeometry
from gasnet_nnunet.raw_dataset import Dataset
from gasnet_nnunet.segmenters import SEGMENTERS, apply_segmenter, segmenter_of
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings, load_preset, parse_assignments

CONFIGURATION = "3d_fullres"
"""The configuration of nnU-Net's that the plans describe."""
LUNG_WINDOW = (-1250.0, 250.0)
"""The paper's window in HU (its section IV.A)."""

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
