"""Planning with nnU-Net's own functions on tiny phantoms: refusals first, then the plans, the split and the data."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.geometry import nnunet_topology
from gasnet_nnunet.lungs import CaseGeometry
from gasnet_nnunet.phantom import Kind, make_phantom
from gasnet_nnunet.planner import PlanningChoices, WholeLungPlanner, resolve_choices
from gasnet_nnunet.planning import (
    Planned,
    check_plans_name,
    fingerprint_is_current,
    make_plans,
    prepare_organ_masks,
    preprocessing_is_current,
    run_preprocessing,
)
from gasnet_nnunet.raw_dataset import GEOMETRY_CACHE, check_grids, check_measures, find_dataset, measure_dataset
from gasnet_nnunet.segmenters import SEGMENTERS, segmenter_of
from gasnet_nnunet.settings import GASNetSettings

NAME = "Dataset801_Phantom"
SIZE, SPACING = (20, 56, 56), (10.0, 6.0, 6.0)
KINDS: dict[str, Kind] = {"a": "labelled", "b": "diseased", "c": "diseased", "d": "healthy", "e": "healthy"}
SMALL = PlanningChoices(patch_size=(16, 32, 32), base_features=4, batch_size=2)
SETTINGS = GASNetSettings(patches="volume", num_epochs=2)


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's three folders with one raw dataset: one mask, two diseased, two healthy."""
    folder = tmp_path_factory.mktemp("nnunet")
    for name in ("preprocessed", "results"):
        (folder / name).mkdir()
    raw = folder / "raw" / NAME
    for index, (case, kind) in enumerate(KINDS.items()):
        phantom = make_phantom(np.random.default_rng(index), kind, SIZE, SPACING)
        write(raw / "imagesTr" / f"{case}_0000.nii.gz", phantom.ct)
        label = np.full_like(phantom.lesion, 2) if kind == "diseased" else phantom.lesion
        write(raw / "labelsTr" / f"{case}.nii.gz", label)
    (raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "lesion": 1, "ignore": 2},
                "numTraining": len(KINDS),
                "file_ending": ".nii.gz",
            }
        )
    )
    return folder


def use(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        patch.setenv(f"nnUNet_{name}", str(folder / name))
    # The deterministic training of the tests; nnU-Net's own planner fails with it.
    patch.setenv("nnUNet_n_proc_DA", "0")
    return folder


@pytest.fixture
def nnunet(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the raw dataset, not planned yet."""
    return use(Path(shutil.copytree(template, tmp_path / "nnunet")), monkeypatch)


@pytest.fixture
def raw(nnunet: Path) -> Path:
    return nnunet / "raw" / NAME


@pytest.fixture(scope="module")
def planned_once(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planned]:
    folder = Path(shutil.copytree(template, tmp_path_factory.mktemp("planned") / "nnunet"))
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        planned = make_plans("801", SMALL, SETTINGS)
        assert run_preprocessing(planned)
        prepare_organ_masks(planned)
    return folder, planned


@pytest.fixture
def planned(planned_once: tuple[Path, Planned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the dataset, planned and preprocessed."""
    return use(Path(shutil.copytree(planned_once[0], tmp_path / "nnunet")), monkeypatch)


def plans_of(folder: Path, name: str = "GASNetPlans") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "preprocessed" / NAME / f"{name}.json").read_text(encoding="utf-8"))
    return content


# Choices --------------------------------------------------------------------------------------------------------------


def test_command_line_wins_over_preset() -> None:
    choices, settings = resolve_choices("small", (16, 64, 64), [8], ["num_epochs=3", "hu_window=[-1000,400]"])

    assert choices == PlanningChoices(
        patch_size=(16, 64, 64), base_features=8, max_features=128, batch_size=2, hu_window=(-1000, 400)
    )
    assert settings.num_epochs == 3
    assert settings.generator_features == 8
    assert settings.patches == "volume"


def test_features_of_every_stage_are_kept() -> None:
    assert resolve_choices("default", None, [8, 16, 24], [])[0].base_features == (8, 16, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huge", None, [], []), "no preset 'huge'"),
        (("default", (4, 64, 64), [], []), "patch_size.*greater than or equal to 8"),
        (("default", None, [0], []), "base_features"),
        (("default", None, [], ["num_epoch=3"]), "Did you mean 'num_epochs'"),
        (("default", None, [], ["hu_window=[250,-1250]"]), "hu_window must rise"),
        (("default", None, [], ["batch_size=0"]), "batch_size"),
        (("default", None, [], ["segmenter=unet++"]), "no segmenter 'unet\\+\\+'; segmenters are plain, resenc"),
    ],
)
def test_impossible_choices_are_refused_by_name(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_choices(*arguments)


# Refusals before any work ---------------------------------------------------------------------------------------------


def test_folder_not_set(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(UserError, match="nnUNet_results is not set"):
        find_dataset("801")


@pytest.mark.parametrize(
    ("name", "message"), [("802", "found none"), ("lung", "no dataset"), ("Dataset802_X", "not exist")]
)
def test_unknown_dataset(nnunet: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_dataset(name)


def test_two_datasets_of_one_id(nnunet: Path) -> None:
    (nnunet / "raw" / "Dataset801_Other").mkdir()
    with pytest.raises(UserError, match=f"several .*{NAME}"):
        find_dataset("801")


def test_broken_dataset_json(raw: Path) -> None:
    (raw / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is no readable JSON"):
        find_dataset("801")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numTraining": 4}, "numTraining 4, but there are 5 cases"),
        ({"channel_names": {"0": "CT", "1": "PET"}}, "a has 1 image files .* names 2 channels"),
        ({"file_ending": ".mha"}, r"<case>_0000\.mha"),
    ],
)
def test_dataset_json_that_does_not_fit_the_files(raw: Path, changes: dict[str, Any], message: str) -> None:
    edit(raw / "dataset.json", **changes)
    with pytest.raises(UserError, match=message):
        find_dataset("801")


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [((20, 56, 55), SPACING, "size"), (SIZE, (10.0, 6.0, 5.0), "spacing")],
)
def test_label_on_another_grid(
    raw: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], message: str
) -> None:
    write(raw / "labelsTr" / "d.nii.gz", np.zeros(shape, np.uint8), spacing)
    with pytest.raises(UserError, match=rf"d\.nii\.gz.*d_0000\.nii\.gz: {message}"):
        check_grids(find_dataset("801"))


def test_broken_scan_is_named_and_the_others_are_not_measured_again(raw: Path) -> None:
    (raw / "imagesTr" / "d_0000.nii.gz").write_bytes(b"no image")
    dataset = find_dataset("801")
    with pytest.raises(UserError, match=r"d_0000\.nii\.gz"):
        measure_dataset(dataset, "lungs")

    assert sorted(json.loads((dataset.preprocessed / GEOMETRY_CACHE).read_text(encoding="utf-8"))) == [
        "a",
        "b",
        "c",
        "e",
    ]


def test_truncated_scan_is_named(raw: Path) -> None:
    path = raw / "imagesTr" / "c_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"c_0000\.nii\.gz is damaged or incomplete"):
        measure_dataset(find_dataset("801"), "lungs")


def test_scan_with_nan_is_named(raw: Path) -> None:
    values = np.zeros(SIZE, np.float32)
    values[3, 4, 5] = np.nan
    write(raw / "imagesTr" / "e_0000.nii.gz", values)
    with pytest.raises(UserError, match=r"e_0000\.nii\.gz has 1 voxels that are NaN"):
        measure_dataset(find_dataset("801"), "lungs")


def measure(low: float, high: float, *, box: bool = True) -> CaseGeometry:
    values = (low, low, (low + high) / 2, high, high)
    corners = ((1, 9), (1, 9), (1, 9)) if box else None
    return CaseGeometry((10, 10, 10), (1.0, 1.0, 1.0), corners, (8.0,) * 3 if box else (0.0,) * 3, 0.5, values)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 4095), (-1, 1), (-400, 600)])
def test_values_that_are_not_hounsfield_units_are_refused(nnunet: Path, low: float, high: float) -> None:
    measures = {"a": measure(-1024, 1500), "b": measure(low, high, box=False)}
    with pytest.raises(UserError, match=rf"1 of 2 CTs.*: b\. b runs from {low} to {high}.*--rescale LO HI HU_LO HU_HI"):
        check_measures(find_dataset("801"), measures, "lungs")


@pytest.mark.parametrize("low", [-1024, -2048, -3024, -1250])
def test_hounsfield_units_pass(nnunet: Path, low: float) -> None:
    check_measures(find_dataset("801"), {"a": measure(low, 1500)}, "lungs")


def test_crop_of_soft_tissue_passes_without_lungs(nnunet: Path) -> None:
    check_measures(find_dataset("801"), {"a": measure(-150, 300)}, "body")


def test_scan_without_lungs_is_named(nnunet: Path) -> None:
    with pytest.raises(UserError, match=r"No lungs found in b\..*lungsTr/b\.nii\.gz.*organ=body"):
        check_measures(find_dataset("801"), {"a": measure(-1024, 0), "b": measure(-1024, 0, box=False)}, "lungs")


@pytest.mark.parametrize("name", ["", "a/b", "nnUNet__Plans", "-p", "plans.json"])
def test_names_that_nnunet_cannot_use(nnunet: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        check_plans_name(find_dataset("801"), name)


def test_plans_of_nnunet_are_left_alone(nnunet: Path) -> None:
    path = nnunet / "preprocessed" / NAME / "nnUNetPlans.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"configurations": {"3d_fullres": {}}}))
    with pytest.raises(UserError, match="was not made by gasnet-nnunet plan"):
        make_plans("801", SMALL, SETTINGS, plans_name="nnUNetPlans")


def test_channel_that_is_no_ct_has_no_lungs(raw: Path) -> None:
    edit(raw / "dataset.json", channel_names={"0": "MRI"})
    with pytest.raises(UserError, match=r"channel 0 .* is not named 'CT' \(channels: MRI\).*organ=volume"):
        make_plans("801", SMALL, SETTINGS)


def test_split_without_a_mask_is_refused_before_measuring(nnunet: Path) -> None:
    split = nnunet / "preprocessed" / NAME / "splits_final.json"
    split.parent.mkdir()
    split.write_text(json.dumps([{"train": ["b", "d"], "val": ["a"]}]))
    with pytest.raises(UserError, match="no case with a mask in 'train'"):
        make_plans("801", SMALL, SETTINGS)

    assert json.loads(split.read_text(encoding="utf-8")) == [{"train": ["b", "d"], "val": ["a"]}]
    assert not (split.parent / GEOMETRY_CACHE).exists()


def test_two_different_splits_are_refused(raw: Path, nnunet: Path) -> None:
    split = nnunet / "preprocessed" / NAME / "splits_final.json"
    split.parent.mkdir()
    split.write_text(json.dumps([{"train": ["a"], "val": ["a"]}]))
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["a"]}]))
    with pytest.raises(UserError, match="two different splits"):
        make_plans("801", SMALL, SETTINGS)


# Measuring ------------------------------------------------------------------------------------------------------------


def test_own_lung_mask_wins_and_is_noticed(raw: Path) -> None:
    computed = measure_dataset(find_dataset("801"), "lungs")
    mask = np.zeros(SIZE, np.uint8)
    mask[2:12, 10:20, 5:30] = 1
    write(raw / "lungsTr" / "b.nii.gz", mask)

    measured = measure_dataset(find_dataset("801"), "lungs")

    assert measured["b"].box_mm == (100.0, 60.0, 150.0)
    assert measured["a"] == computed["a"]


def test_unchanged_cases_are_not_measured_again(raw: Path) -> None:
    dataset = find_dataset("801")
    first = measure_dataset(dataset, "lungs")
    # The same size and time, but no image any more: reading it would fail.
    path = raw / "imagesTr" / "c_0000.nii.gz"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert measure_dataset(dataset, "lungs") == first

    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"c_0000\.nii\.gz"):
        measure_dataset(dataset, "lungs")


# Plans ----------------------------------------------------------------------------------------------------------------


def test_one_patch_holds_the_true_lungs(planned_once: tuple[Path, Planned]) -> None:
    result = planned_once[1]

    assert result.cut_off == []
    for index, kind in enumerate(KINDS.values()):
        lung = np.argwhere(make_phantom(np.random.default_rng(index), kind, SIZE, SPACING).lung)
        extent = (lung.max(0) + 1 - lung.min(0)) * SPACING
        assert np.all(extent <= result.patch_mm)


def test_cases_that_set_the_size_are_named(planned_once: tuple[Path, Planned]) -> None:
    result = planned_once[1]

    for name, axis in zip("ZYX", range(3), strict=True):
        largest = max(measure.box_mm[axis] for measure in result.measures.values())
        named = re.search(rf"(\w) \([^)]*{name}", result.decisive_cases)
        assert named
        assert result.measures[named.group(1)].box_mm[axis] == largest


def test_plans_hold_what_was_chosen(planned: Path, planned_once: tuple[Path, Planned]) -> None:
    plans = plans_of(planned)
    configuration = plans["configurations"]["3d_fullres"]

    assert plans == planned_once[1].plans
    assert plans["plans_name"] == "GASNetPlans"
    assert configuration["data_identifier"] == "GASNetPlans_3d_fullres"
    assert configuration["patch_size"] == [16, 32, 32]
    assert configuration["batch_size"] == 2
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 32]
    assert configuration["spacing"][1] == configuration["spacing"][2]
    assert GASNetSettings.from_dict(configuration["gasnet"]) == SETTINGS
    assert plans["transpose_forward"] == [0, 1, 2]


def test_plans_have_the_keys_of_nnunets_own(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    theirs = ExperimentPlanner(NAME).plan_experiment()
    ours = plans_of(planned)

    assert set(ours) == set(theirs)
    configuration, reference = (plans["configurations"]["3d_fullres"] for plans in (ours, theirs))
    assert set(configuration) == set(reference) | {"gasnet"}
    assert set(configuration["architecture"]["arch_kwargs"]) == set(reference["architecture"]["arch_kwargs"])
    for key in (
        set(reference)
        - {"data_identifier", "batch_size", "patch_size", "spacing", "architecture"}
        - {"median_image_size_in_voxels", "resampling_fn_probabilities_kwargs"}
    ):
        assert configuration[key] == json.loads(json.dumps(reference[key])), key
    key = "resampling_fn_probabilities_kwargs"
    assert configuration[key] == {**reference[key], "force_separate_z": False}


def test_nnunet_reads_the_plans(planned: Path) -> None:
    manager = PlansManager(str(planned / "preprocessed" / NAME / "GASNetPlans.json"))
    configuration = manager.get_configuration("3d_fullres")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        2,
    )

    assert manager.experiment_planner_class is ExperimentPlanner
    assert network.compute_conv_feature_map_size(configuration.patch_size) > 0


def test_preprocessed_data_lie_in_the_window_and_hold_the_lungs(planned: Path) -> None:
    folder = planned / "preprocessed" / NAME / "GASNetPlans_3d_fullres"
    data = blosc2.open(str(folder / "a.b2nd"), mode="r")[:]
    spacing = np.array(plans_of(planned)["configurations"]["3d_fullres"]["spacing"])

    assert sorted(path.stem for path in folder.glob("*.pkl")) == sorted(KINDS)
    # -1250 to 250 HU becomes 0 to 2, nnU-Net's padding of 0 its lower bound; cubic resampling overshoots a little.
    raw = sitk.GetArrayFromImage(sitk.ReadImage(planned / "raw" / NAME / "imagesTr" / "a_0000.nii.gz"))
    assert np.median(data) == pytest.approx((np.median(raw) + 1250) / 750, abs=0.1)
    assert data.min() > -0.2
    assert data.max() < 2.2
    assert data.shape[1:] == tuple(np.round(np.array(SIZE) * SPACING / spacing).astype(int))


def test_masks_of_the_lungs_are_made_for_every_case(planned: Path) -> None:
    folder = planned / "preprocessed" / NAME
    masks = folder / "gasnet_organ_masks" / "GASNetPlans_3d_fullres" / "lungs"
    assert sorted(path.stem for path in masks.iterdir()) == sorted(KINDS)
    data = blosc2.open(str(folder / "GASNetPlans_3d_fullres" / "a.b2nd"), mode="r")[0]
    lungs = blosc2.open(str(masks / "a.b2nd"), mode="r")[:] == 1
    assert 0.05 < lungs.mean() < 0.5
    # 1.0 is -500 HU.
    assert (data[lungs] < 1.0).mean() > 0.7


def test_split_is_label_aware(planned: Path) -> None:
    splits = json.loads((planned / "preprocessed" / NAME / "splits_final.json").read_text(encoding="utf-8"))

    assert [fold["train"] for fold in splits] == [["a"]]
    assert sorted(splits[0]["healthy"] + splits[0]["val_healthy"]) == ["d", "e"]


def test_replanning_keeps_split_configurations_and_data(planned: Path) -> None:
    folder = planned / "preprocessed" / NAME
    plans = plans_of(planned)
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    (folder / "GASNetPlans.json").write_text(json.dumps(plans))
    split = [{"train": ["a"], "val": ["a"], "diseased": ["b"], "healthy": ["d"]}]
    (folder / "splits_final.json").write_text(json.dumps(split))
    written = (folder / "GASNetPlans_3d_fullres" / "a.pkl").stat().st_mtime_ns

    result = make_plans("801", replace(SMALL, batch_size=3), SETTINGS.replace(num_epochs=5))
    ran = run_preprocessing(result)

    configurations = plans_of(planned)["configurations"]
    assert configurations["mine"] == {"inherits_from": "3d_fullres", "batch_size": 7}
    assert configurations["3d_fullres"]["batch_size"] == 3
    assert configurations["3d_fullres"]["gasnet"]["num_epochs"] == 5
    assert json.loads((folder / "splits_final.json").read_text(encoding="utf-8")) == split
    assert not result.splits_are_ours
    assert result.unused == "c, e"
    assert not ran
    assert (folder / "GASNetPlans_3d_fullres" / "a.pkl").stat().st_mtime_ns == written


def test_data_are_made_again_only_if_they_would_differ(planned: Path) -> None:
    folder = planned / "preprocessed" / NAME
    result = make_plans("801", SMALL, SETTINGS)
    assert preprocessing_is_current(result)

    window = make_plans("801", replace(SMALL, hu_window=(-1000, 500)), SETTINGS)
    assert not preprocessing_is_current(window)
    # CTNormalization then maps this window to [0, 2], so that nnU-Net's padding by 0 is its lower bound.
    values = window.plans["foreground_intensity_properties_per_channel"]["0"]
    assert [values[key] for key in ("percentile_00_5", "percentile_99_5", "mean", "std")] == [-1000, 500, -1000, 750]

    (folder / "GASNetPlans_3d_fullres" / "b.pkl").rename(folder / "b.pkl")
    assert not preprocessing_is_current(result)
    (folder / "b.pkl").rename(folder / "GASNetPlans_3d_fullres" / "b.pkl")
    assert preprocessing_is_current(result)

    os.utime(planned / "raw" / NAME / "labelsTr" / "d.nii.gz")
    assert not preprocessing_is_current(result)


def test_fingerprint_of_other_data_is_not_used(planned: Path) -> None:
    dataset = find_dataset("801")
    assert fingerprint_is_current(dataset)

    assert not fingerprint_is_current(replace(dataset, files={"a": dataset.files["a"]}))
    os.utime(planned / "raw" / NAME / "imagesTr" / "d_0000.nii.gz")
    assert not fingerprint_is_current(dataset)


def test_trained_model_is_not_planned_over(planned: Path) -> None:
    fold = planned / "results" / NAME / "GASNetTrainer__GASNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    before = plans_of(planned)

    with pytest.raises(UserError, match=r"holds a model trained with GASNetPlans.*patch_size.*another --name"):
        make_plans("801", replace(SMALL, patch_size=(16, 48, 48)), SETTINGS)
    assert plans_of(planned) == before

    make_plans("801", SMALL, SETTINGS.replace(num_epochs=9))
    assert plans_of(planned)["configurations"]["3d_fullres"]["gasnet"]["num_epochs"] == 9


def test_derived_patch_fits_the_memory_target(planned: Path) -> None:
    choices = PlanningChoices()
    ample = make_plans("801", choices, SETTINGS, plans_name="Ample", gpu_memory_gb=8)
    tight = make_plans("801", choices, SETTINGS, plans_name="Tight", gpu_memory_gb=0.05)

    assert ample.geometry.spacing == SPACING
    assert np.prod(tight.geometry.patch_size) < np.prod(ample.geometry.patch_size)
    assert np.prod(tight.geometry.spacing) > np.prod(ample.geometry.spacing)
    assert ample.cut_off == tight.cut_off == []
    assert ample.configuration["batch_size"] == 2


def test_one_number_a_stage_must_fit_the_stages(planned: Path) -> None:
    with pytest.raises(UserError, match="names 2 stages, but the planned network has 4"):
        make_plans("801", replace(SMALL, base_features=(4, 8)), SETTINGS)
    planned_again = make_plans("801", replace(SMALL, base_features=(4, 6, 8, 500), max_features=10), SETTINGS)
    assert planned_again.configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 6, 8, 10]


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_segmenter_is_planned_in_the_same_geometry(segmenter: str, planned: Path) -> None:
    plain = plans_of(planned)["configurations"]["3d_fullres"]
    result = make_plans("801", replace(SMALL, segmenter=segmenter), SETTINGS, plans_name="Other")
    configuration = result.configuration

    assert segmenter_of(configuration) == segmenter
    for key in ("patch_size", "spacing", "batch_size", "normalization_schemes"):
        assert configuration[key] == plain[key]
    kwargs = configuration["architecture"]["arch_kwargs"]
    for key in ("strides", "kernel_sizes", "features_per_stage"):
        assert kwargs[key] == plain["architecture"]["arch_kwargs"][key]
    if segmenter == "plain":
        assert configuration["architecture"] == plain["architecture"]


def test_derived_batch_follows_the_segmenters_need_of_memory(planned: Path) -> None:
    """U-Net++ has more feature maps than the plain U-Net at the same features."""
    choices = replace(SMALL, patch_size=(24, 64, 64), base_features=16, batch_size=None)
    planner, heavier = (
        WholeLungPlanner(
            find_dataset("801"), {}, replace(choices, segmenter=name), SETTINGS, plans_name="X", gpu_memory_gb=1
        )
        for name in ("plain", "unetpp")
    )
    topology = nnunet_topology((5.0, 3.0, 3.0), (24, 64, 64))
    assert heavier.feature_maps(topology) > 1.5 * planner.feature_maps(topology)
    assert heavier.batch_size(topology, 1e9) < planner.batch_size(topology, 1e9)


# Going on from a trained model ----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(planned: Path, tmp_path: Path) -> Path:
    """A checkpoint, as far as planning reads it, of a model that was trained on this dataset with other plans."""
    choices = replace(SMALL, patch_size=(16, 48, 48), hu_window=(-1000, 400), batch_size=1, segmenter="vbnet")
    settings = SETTINGS.replace(generator_features=4, lambda_s=7.0)
    plans = make_plans("801", choices, settings, plans_name="First").plans
    content = {
        "network_weights": {},
        "trainer_name": "GASNetTrainer",
        "init_args": {
            "plans": plans,
            "configuration": "3d_fullres",
            "dataset_json": json.loads((planned / "raw" / NAME / "dataset.json").read_text(encoding="utf-8")),
        },
        "gasnet": {"adversary": {"generator": {}, "discriminator": {}}},
    }
    path = tmp_path / "checkpoint_final.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("by_option", [True, False])
def test_plans_take_over_what_the_weights_need(by_option: bool, checkpoint: Path, planned: Path) -> None:
    assignments = ["num_epochs=3", *([] if by_option else [f"init_from={checkpoint}"])]
    choices, settings = resolve_choices(None, None, [], assignments, init_from=checkpoint if by_option else None)
    result = make_plans("801", choices, settings, plans_name="Second")

    first, second = (plans_of(planned, name) for name in ("First", "Second"))
    old, new = (plans["configurations"]["3d_fullres"] for plans in (first, second))
    properties = "foreground_intensity_properties_per_channel"
    assert second[properties] == first[properties]
    differing = {key for key in new if new[key] != old[key]}
    assert differing == {"data_identifier", "gasnet"}
    assert settings.differences(GASNetSettings.from_dict(old["gasnet"])) == [
        "num_epochs: 3 -> 2",
        f"init_from: {checkpoint} -> None",
    ]
    assert settings == GASNetSettings.from_dict(new["gasnet"])
    assert result.window_reason == "that of the checkpoint."


def test_command_goes_on_from_a_checkpoint(checkpoint: Path, planned: Path) -> None:
    from typer.testing import CliRunner

    from gasnet_nnunet.cli import app

    words = ["plan", "-d", "801", "--init-from", str(checkpoint), "--name", "Second", "--no-preprocess"]
    result = CliRunner().invoke(app, [*words, "--num-processes", "1"], env={"COLUMNS": "300"})

    assert result.exit_code == 0, result.output
    text = re.sub(r"[\s│]+", " ", result.output)
    for expected in (
        f"(goes on from {NAME})",
        f"weights GASNetTrainer on {NAME}",
        "16 x 48 x 48 that of the checkpoint.",
        "-1000 to 400 HU that of the checkpoint.",
        "vbnet V-Net with bottlenecks (VB-Net); predicting needs this package.",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("small", None, [], []), "Leave out --preset"),
        ((None, (16, 32, 32), [8], ["hu_window=[-1000,300]"]), "Leave out hu_window, patch_size, base_features"),
    ],
)
def test_what_the_checkpoint_settles_cannot_be_chosen(
    arguments: tuple[Any, ...], message: str, checkpoint: Path
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_choices(*arguments, init_from=checkpoint)


def test_dataset_that_the_checkpoint_does_not_fit_is_refused_before_any_work(
    checkpoint: Path, planned: Path, tmp_path: Path
) -> None:
    choices, settings = resolve_choices(None, None, [], [], init_from=checkpoint)
    edit(planned / "raw" / NAME / "dataset.json", labels={"background": 0, "nodule": 1, "ignore": 2})
    with pytest.raises(UserError, match=r'labels .*"lesion": 1.* there, .*"nodule": 1.* here'):
        make_plans("801", choices, settings, plans_name="Second")
    content = torch.load(checkpoint, weights_only=False)
    torch.save({**content, "gasnet": {}}, checkpoint)
    edit(planned / "raw" / NAME / "dataset.json", labels={"background": 0, "lesion": 1, "ignore": 2})
    with pytest.raises(UserError, match="holds no generator and no discriminator"):
        make_plans("801", choices, settings, plans_name="Second")
    assert not (planned / "preprocessed" / NAME / "Second.json").exists()


def test_other_modality_keeps_nnunets_normalisation(planned: Path) -> None:
    edit(planned / "raw" / NAME / "dataset.json", channel_names={"0": "MRI"})

    result = make_plans(
        "801", PlanningChoices(patch_size=(24, 64, 64), base_features=4), SETTINGS.replace(organ="volume")
    )

    fingerprint = json.loads((planned / "preprocessed" / NAME / "dataset_fingerprint.json").read_text(encoding="utf-8"))
    assert result.configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert (
        result.plans["foreground_intensity_properties_per_channel"]
        == fingerprint["foreground_intensity_properties_per_channel"]
    )
    assert result.measures["a"].box_mm == (200.0, 336.0, 336.0)


def test_window_of_another_organ_comes_from_the_data(planned: Path) -> None:
    result = make_plans("801", SMALL, SETTINGS.replace(organ="body"))

    window = result.plans["foreground_intensity_properties_per_channel"]["0"]
    assert -1100 < window["percentile_00_5"] < -900
    assert 30 < window["percentile_99_5"] < 1500


def test_command_prints_choices_and_next_commands(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from gasnet_nnunet.cli import app

    words = ["plan", "-d", "801", "--preset", "small", "--patch", "16", "32", "32", "--features", "4", "8", "16", "32"]
    words += ["--set", "num_epochs=7", "batch_size=1", "--name", "Mine", "--no-preprocess", "--num-processes", "1"]
    result = CliRunner().invoke(app, words)

    assert result.exit_code == 0, result.output
    configuration = plans_of(planned, "Mine")["configurations"]["3d_fullres"]
    assert configuration["gasnet"]["num_epochs"] == 7
    assert configuration["batch_size"] == 1
    text = re.sub(r"\s+", " ", result.output)
    for expected in (
        "5 of 5 cases",
        "-1250 to 250 HU",
        "7 epochs x 20 iterations",
        "Estimate:",
        "fold 0",
        "nnUNetv2_preprocess -d 801 -plans_name Mine -c 3d_fullres",
        "nnUNetv2_train 801 3d_fullres 0 -tr GASNetTrainer -p Mine",
        "-c 3d_fullres -f 0 -tr GASNetTrainer -p Mine",
    ):
        assert expected in text


def test_folder_that_cannot_be_made_is_one_message(nnunet: Path) -> None:
    (nnunet / "preprocessed" / NAME).write_text("a file")
    with pytest.raises(UserError, match="cannot be made"):
        make_plans("801", SMALL, SETTINGS)
