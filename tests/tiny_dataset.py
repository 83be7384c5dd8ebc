"""A dataset of a few phantom patients, small enough that training on it takes seconds."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from gasnet_nnunet.phantom import Phantom, make_phantom

SIZE, SPACING = (16, 48, 48), (12.5, 7.0, 7.0)
PATCH = (12, 32, 32)
CONFIGURATION = "3d_fullres"
DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "lesion": 1, "ignore": 2},
    "file_ending": ".nii.gz",
}
SETTINGS: dict[str, Any] = {
    "num_epochs": 3,
    "iterations_per_epoch": 2,
    "validation_iterations_per_epoch": 1,
    "seed": 1,
    "gallery_every_epochs": 0,
    "generator_features": 4,
    "generator_residual_blocks": 1,
    "discriminator_features": 4,
    "discriminator_layers": 2,
    "discriminator_steps": 1,
    "pseudo_start": 0.3,
    "volumes_per_step": 1,
    "watch_volumes": 1,
}
"""Of a training that goes through everything in a few iterations."""

ARCHITECTURE: dict[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}

Mask = Callable[[str, Phantom], np.ndarray]
"""What a case's label file holds."""


@functools.cache
def patient(name: str) -> Phantom:
    """The patient of a name like `diseased_2`; labelled ones have a lesion large enough to be met in a patch."""
    kind, number = name.split("_")
    seed = {"labelled": 0, "diseased": 100, "healthy": 200}[kind] + int(number)
    return make_phantom(np.random.default_rng(seed), kind, size=SIZE, spacing=SPACING)  # type: ignore[arg-type]


def names(labelled: int = 2, diseased: int = 3, healthy: int = 4) -> list[str]:
    """Names of the patients of a dataset."""
    counts = {"labelled": labelled, "diseased": diseased, "healthy": healthy}
    return [f"{kind}_{number}" for kind, count in counts.items() for number in range(count)]


def mask_by_kind(name: str, phantom: Phantom) -> np.ndarray:
    """The lesions, or the ignore label all over a diseased patient."""
    return np.full_like(phantom.lesion, 2) if name.startswith("diseased") else phantom.lesion


def write_image(array: np.ndarray, path: Path) -> None:
    """Write an array (Z, Y, X) on the patients' grid."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, path)


def write_raw(
    folder: Path,
    cases: list[str],
    *,
    mask: Mask = mask_by_kind,
    dataset_json: Mapping[str, Any] = DATASET_JSON,
) -> None:
    """Write a dataset of nnUNet_raw; further channels repeat the first one, louder."""
    for name in cases:
        phantom = patient(name)
        for channel in range(len(dataset_json["channel_names"])):
            write_image(phantom.ct * (channel + 1), folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        write_image(mask(name, phantom).astype(np.uint8), folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": len(cases)}))


def plans(
    dataset: str, *, settings: Mapping[str, Any] = SETTINGS, channels: int = 1, ct: bool = True
) -> dict[str, Any]:
    """Plans such as nnU-Net makes, with a network of a few thousand weights."""
    resampling = "resample_data_or_seg_to_shape"
    image_kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(PATCH),
        "median_image_size_in_voxels": list(SIZE),
        "spacing": list(SPACING),
        "normalization_schemes": ["CTNormalization" if ct else "ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": resampling,
        "resampling_fn_seg": resampling,
        "resampling_fn_probabilities": resampling,
        "resampling_fn_data_kwargs": image_kwargs,
        "resampling_fn_seg_kwargs": {**image_kwargs, "is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": {**image_kwargs, "order": 1},
        "architecture": ARCHITECTURE,
        "batch_dice": False,
        "gasnet": dict(settings),
    }
    intensities = {"mean": -450.0, "std": 480.0, "percentile_00_5": -1000.0, "percentile_99_5": 200.0}
    intensities |= {"min": -1024.0, "max": 1500.0, "median": -600.0}
    return {
        "dataset_name": dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(SPACING),
        "original_median_shape_after_transp": list(SIZE),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): intensities for channel in range(channels)},
    }


def preprocess(raw: Path, preprocessed: Path, plans: dict[str, Any]) -> None:
    """Do in this process what `nnUNetv2_preprocess` does in others."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    data = preprocessed / configuration.data_identifier
    data.mkdir(parents=True)
    for label in sorted((raw / "labelsTr").iterdir()):
        name = label.name.removesuffix(".nii.gz")
        images = [str(path) for path in sorted((raw / "imagesTr").glob(f"{name}_*"))]
        DefaultPreprocessor(verbose=False).run_case_save(
            str(data / name), images, str(label), manager, configuration, dataset_json
        )
    shutil.copytree(raw / "labelsTr", preprocessed / "gt_segmentations")
    shutil.copy(raw / "dataset.json", preprocessed)
    (preprocessed / "dataset_fingerprint.json").write_text("{}")
    (preprocessed / f"{plans['plans_name']}.json").write_text(json.dumps(plans))


def train(root: Path, trainer: type, *, dataset: str = "Dataset501_Tiny", **settings: Any) -> Path:
    """Train and validate fold 0 in this process; the folder of the fold.

    Args:
        root: Folder of `raw`, `preprocessed` and `results`; data are written there unless they are there already.
        trainer: GASNetTrainer or one like it.
        dataset: Name of the dataset.
        settings: What differs from `SETTINGS`.
    """
    import matplotlib
    import torch
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.json_export import recursive_fix_for_json_export

    raw, preprocessed = root / "raw" / dataset, root / "preprocessed" / dataset
    if not raw.exists():
        write_raw(raw, names(2, 2, 3))
        preprocess(raw, preprocessed, plans(dataset))
    made = plans(dataset, settings={**SETTINGS, **settings}) | {"continue_training": False}
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{folder}", str(root / folder))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setitem(matplotlib.rcParams, "savefig.dpi", 20)  # nnU-Net draws 16 million pixels an epoch
        dataset_json = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
        done = trainer(made, CONFIGURATION, 0, dataset_json, torch.device("cpu"))
        done.run_training()
    fold = Path(done.output_folder)
    # What nnU-Net's validation writes, without the processes that it starts, for masks a little off the truth.
    (fold / "validation").mkdir()
    found = []
    for case in done.do_split()[1]:
        prediction = fold / "validation" / f"{case}.nii.gz"
        write_image(np.roll(patient(case).lesion, 2, axis=2), prediction)
        reference = preprocessed / "gt_segmentations" / prediction.name
        found.append(compute_metrics(str(reference), str(prediction), SimpleITKIO(), [1]))
    mean = found[0]["metrics"]
    summary = {"metric_per_case": found, "mean": mean, "foreground_mean": mean[1]}
    recursive_fix_for_json_export(summary)
    save_summary_json(summary, str(fold / "validation" / "summary.json"))
    return fold


def write_model(
    root: Path,
    trainer: str = "GASNetTrainer",
    *,
    folds: tuple[int, ...] = (0,),
    dataset_json: Mapping[str, Any] = DATASET_JSON,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A model's folder as after a training that learnt nothing, whose S therefore finds something everywhere.

    Args:
        root: Parent of nnU-Net's folders raw, preprocessed and results, which its variables have to name.
        trainer: Name of its trainer.
        folds: Its folds, each with weights of its own.
        dataset_json: Its dataset.
        change: Changes the plans.

    Returns:
        The model's folder.
    """
    import torch

    from gasnet_nnunet import trainers

    made = plans("Dataset501_Tiny", channels=len(dataset_json["channel_names"]))
    if change:
        change(made)
    # Untrained weights are sure of nothing, and are to find something.
    made["configurations"][CONFIGURATION]["gasnet"].setdefault("lesion_threshold", 0.6)
    # nnU-Net tells by the preprocessed cases how they are stored.
    stored = root / "preprocessed" / made["dataset_name"] / made["configurations"][CONFIGURATION]["data_identifier"]
    stored.mkdir(parents=True, exist_ok=True)
    (stored / "case.b2nd").touch()
    for fold in folds:
        made["configurations"][CONFIGURATION]["gasnet"]["seed"] = fold
        trained = getattr(trainers, trainer)(
            {**json.loads(json.dumps(made)), "continue_training": False},
            CONFIGURATION,
            fold,
            dict(dataset_json),
            torch.device("cpu"),
        )
        trained.initialize()
        trained.inference_allowed_mirroring_axes = (2,)
        trained.save_checkpoint(str(Path(trained.output_folder) / "checkpoint_final.pth"))
    folder = Path(trained.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(made))
    (folder / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": 1}))
    (folder / "dataset_fingerprint.json").write_text(json.dumps({"spacings": [SPACING]}))
    assert folder.is_relative_to(root)
    return folder
