from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from gasnet_nnunet.cohort import Kind
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.organ_masks import OrganMasks, ensure_organ_masks
from gasnet_nnunet.phantom import make_phantom

SPACING = (10.0, 6.0, 6.0)
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}


def plans_of(transpose: list[int], scheme: str = "CTNormalization") -> dict[str, Any]:
    spacing = [SPACING[axis] * 1.2 for axis in transpose]
    resampling = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset007_Test",
        "plans_name": "TestPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": -500.0, "std": 750.0, "percentile_00_5": -1250.0, "percentile_99_5": 250.0}
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "TestPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [8, 24, 24],
                "spacing": spacing,
                "normalization_schemes": [scheme],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {**resampling, "is_seg": False, "order": 3},
                "resampling_fn_seg_kwargs": resampling,
                "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
            }
        },
    }


@pytest.fixture(params=[[0, 1, 2], [2, 0, 1]], ids=["axes as they are", "axes turned"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, dict[str, Any], np.ndarray]:
    """A phantom that nnU-Net itself has preprocessed: raw folder, preprocessed folder, plans and true lungs."""
    plans = plans_of(request.param)
    phantom = make_phantom(np.random.default_rng(3), Kind.HEALTHY, size=(20, 52, 52), spacing=SPACING)
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed / "TestPlans_3d_fullres"):
        folder.mkdir(parents=True)
    write(raw / "imagesTr" / "a_0000.nii.gz", phantom.ct)
    write(raw / "labelsTr" / "a.nii.gz", phantom.lesion)
    preprocess(raw, preprocessed, plans)
    return raw, preprocessed, plans, phantom.lung


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


def preprocess(raw: Path, preprocessed: Path, plans: dict[str, Any]) -> None:
    manager = PlansManager(plans)
    # As nnU-Net does before it preprocesses again: blosc2 overwrites nothing.
    for path in (preprocessed / "TestPlans_3d_fullres").iterdir():
        path.unlink()
    DefaultPreprocessor(verbose=False).run_case_save(
        str(preprocessed / "TestPlans_3d_fullres" / "a"),
        [str(raw / "imagesTr" / "a_0000.nii.gz")],
        str(raw / "labelsTr" / "a.nii.gz"),
        manager,
        manager.get_configuration("3d_fullres"),
        DATASET,
    )


def ensure(raw: Path | None, preprocessed: Path, plans: dict[str, Any], organ: str = "lungs") -> OrganMasks:
    return ensure_organ_masks(
        preprocessed, plans, "3d_fullres", ["a"], organ=organ, raw_folder=raw, num_processes=1, progress=False
    )


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def in_grid_of(mask: np.ndarray, true: np.ndarray, transpose: list[int]) -> np.ndarray:
    """The true lungs in the grid of the preprocessed case, by nearest neighbours."""
    turned = true.transpose(transpose) > 0
    index = [
        np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
        for n, m in zip(mask.shape, turned.shape, strict=True)
    ]
    return turned[np.ix_(*index)]


def test_lungs_are_found_in_the_preprocessed_grid(dataset: Any) -> None:
    raw, preprocessed, plans, true = dataset
    masks = ensure(raw, preprocessed, plans)
    found = masks.load("a")
    assert dice(found, in_grid_of(found, true, plans["transpose_forward"])) > 0.85
    (z0, z1), (y0, y1), (x0, x1) = masks.box("a")
    assert found[z0:z1, y0:y1, x0:x1].sum() == found.sum()
    np.testing.assert_array_equal(masks.open("a")[z0 : z0 + 2, y0:y1, x0:x1], found[z0 : z0 + 2, y0:y1, x0:x1])


def test_nothing_of_ours_lies_in_nnunets_folder(dataset: Any) -> None:
    raw, preprocessed, plans, _ = dataset
    before = sorted(os.listdir(preprocessed / "TestPlans_3d_fullres"))
    ensure(raw, preprocessed, plans)
    assert sorted(os.listdir(preprocessed / "TestPlans_3d_fullres")) == before
    made = preprocessed / "gasnet_organ_masks" / "TestPlans_3d_fullres" / "lungs"
    assert os.listdir(made) == ["a.b2nd"]


def test_masks_are_made_once_and_again_when_the_case_changes(dataset: Any) -> None:
    raw, preprocessed, plans, _ = dataset
    masks = ensure(raw, preprocessed, plans)
    assert masks.folder is not None
    stored = masks.folder / "a.b2nd"
    first = stored.stat().st_mtime_ns
    ensure(raw, preprocessed, plans)
    assert stored.stat().st_mtime_ns == first
    image = sitk.ReadImage(str(raw / "imagesTr" / "a_0000.nii.gz"))
    sitk.WriteImage(sitk.DiscreteGaussian(image, 4.0), str(raw / "imagesTr" / "a_0000.nii.gz"))
    preprocess(raw, preprocessed, plans)
    ensure(raw, preprocessed, plans)
    assert stored.stat().st_mtime_ns > first


def test_the_users_mask_wins_and_its_loss_is_noticed(dataset: Any) -> None:
    raw, preprocessed, plans, true = dataset
    half = true.copy()
    half[:, :, : half.shape[2] // 2] = 0
    write(raw / "lungsTr" / "a.nii.gz", half * 3)
    found = ensure(raw, preprocessed, plans).load("a")
    assert dice(found, in_grid_of(found, half, plans["transpose_forward"])) > 0.9
    (raw / "lungsTr" / "a.nii.gz").unlink()
    assert ensure(raw, preprocessed, plans).load("a").sum() > 1.5 * found.sum()


@pytest.mark.parametrize("fault", ["shape", "spacing"])
def test_a_users_mask_on_another_grid_is_refused(dataset: Any, fault: str) -> None:
    raw, preprocessed, plans, true = dataset
    spacing = (10.0, 6.0, 6.5) if fault == "spacing" else SPACING
    write(raw / "lungsTr" / "a.nii.gz", true[:-1] if fault == "shape" else true, spacing)
    with pytest.raises(UserError, match=r"lungsTr/a\.nii\.gz has shape .* its CT has"):
        ensure(raw, preprocessed, plans)


def test_a_ct_without_lungs_is_named(dataset: Any) -> None:
    raw, preprocessed, plans, true = dataset
    write(raw / "imagesTr" / "a_0000.nii.gz", np.full(true.shape, 40, np.int16))
    preprocess(raw, preprocessed, plans)
    with pytest.raises(UserError, match=r"No lungs were found in a\. .*lungsTr/a\.nii\.gz"):
        ensure(raw, preprocessed, plans)


def test_the_whole_volume_needs_no_files(dataset: Any) -> None:
    raw, preprocessed, plans, _ = dataset
    masks = ensure(raw, preprocessed, plans, organ="volume")
    assert masks.load("a").all()
    assert masks.box("a") == tuple((0, n) for n in masks.load("a").shape)
    assert not (preprocessed / "gasnet_organ_masks").exists()


def test_lungs_in_images_that_are_no_ct_are_refused(dataset: Any) -> None:
    raw, preprocessed, _, _ = dataset
    with pytest.raises(UserError, match="organ=volume"):
        ensure(raw, preprocessed, plans_of([0, 1, 2], "ZScoreNormalization"))


def test_lungs_are_found_in_the_preprocessed_data_where_the_raw_ones_are_not_at_hand(dataset: Any) -> None:
    _, preprocessed, plans, true = dataset
    found = ensure(None, preprocessed, plans).load("a")
    assert dice(found, in_grid_of(found, true, plans["transpose_forward"])) > 0.85


def test_masks_of_the_users_stay_where_the_raw_ones_are_not_at_hand(dataset: Any) -> None:
    raw, preprocessed, plans, true = dataset
    half = true.copy()
    half[:, :, : half.shape[2] // 2] = 0
    write(raw / "lungsTr" / "a.nii.gz", half)
    with_raw = ensure(raw, preprocessed, plans).load("a")
    # What a copy to another machine does.
    for path in (preprocessed / "TestPlans_3d_fullres").glob("a*"):
        os.utime(path)
    without = ensure(None, preprocessed, plans).load("a")
    assert np.array_equal(with_raw, without)
    (raw / "lungsTr" / "a.nii.gz").unlink()
    assert ensure(raw, preprocessed, plans).load("a").sum() > 1.5 * with_raw.sum()


def test_the_body_takes_the_place_of_the_lungs(dataset: Any) -> None:
    raw, preprocessed, plans, true = dataset
    found = ensure(raw, preprocessed, plans, organ="body").load("a")
    lungs = in_grid_of(found, true, plans["transpose_forward"])
    assert found[lungs].mean() > 0.99
    assert 2 * lungs.sum() < found.sum() < 0.8 * found.size


def test_cases_in_nnunets_older_format_with_dots_in_their_names(dataset: Any) -> None:
    raw, preprocessed, plans, true = dataset
    folder = preprocessed / "TestPlans_3d_fullres"
    data, seg, _, properties = infer_dataset_class(str(folder))(str(folder)).load_case("a")
    for case in ("p.1", "p.2"):
        nnUNetDatasetNumpy.save_case(data[:], seg[:], properties, str(folder / case))
    for path in folder.glob("a*"):
        path.unlink()
    half = true.copy()
    half[:, :, : half.shape[2] // 2] = 0
    write(raw / "lungsTr" / "p.2.nii.gz", half)
    masks = ensure_organ_masks(
        preprocessed,
        plans,
        "3d_fullres",
        ["p.1", "p.2"],
        organ="lungs",
        raw_folder=raw,
        num_processes=1,
        progress=False,
    )
    for case, expected in (("p.1", true), ("p.2", half)):
        found = masks.load(case)
        assert dice(found, in_grid_of(found, expected, plans["transpose_forward"])) > 0.85


@pytest.mark.parametrize(("fault", "message"), [("empty", "marks no voxel"), ("truncated", "damaged or incomplete")])
def test_a_users_mask_that_is_empty_or_damaged_is_refused(dataset: Any, fault: str, message: str) -> None:
    raw, preprocessed, plans, true = dataset
    noise = np.random.default_rng(0).integers(0, 200, true.shape, dtype=np.uint8)
    path = raw / "lungsTr" / "a.nii.gz"
    write(path, np.zeros_like(true) if fault == "empty" else noise)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"lungsTr/a\.nii\.gz .*{message}"):
        ensure(raw, preprocessed, plans)
