"""A trained model at work on one CT: nnU-Net's own mask, and what G adds to it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tiny_dataset
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import gasnet_nnunet
from gasnet_nnunet import resampling
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.inference import LoadedModel
from gasnet_nnunet.intensity import normalised_to_hu
from gasnet_nnunet.resampling import interpolate_slab, resample_logits, slabs
from gasnet_nnunet.trained_model import find_model_folder

TILTED = (0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, 1.0)
"""A patient who lies on one side a little."""


def use_folders(environment: pytest.MonkeyPatch, folder: Path) -> Path:
    """Point nnU-Net to folders of a test's own."""
    for name in ("raw", "preprocessed", "results"):
        environment.setenv(f"nnUNet_{name}", str(folder / name))
    return folder


def averaged(plans: dict[str, Any]) -> None:
    """Settings by which the checkpoint's `network_weights` hold the average of S."""
    plans["configurations"][tiny_dataset.CONFIGURATION]["gasnet"]["averaged_iterations"] = 4


@pytest.fixture(scope="module")
def two_folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as environment:
        root = use_folders(environment, tmp_path_factory.mktemp("two"))
        folder = tiny_dataset.write_model(root, folds=(0, 1), change=averaged)
    for path in folder.glob("fold_*/*.pth"):
        content = torch.load(path, weights_only=False)
        for weight in content["gasnet"]["segmenter"].values():
            weight.zero_()  # what went on training predicts nothing
        torch.save(content, path)
    return folder


@pytest.fixture(scope="module")
def model(two_folds: Path) -> LoadedModel:
    return gasnet_nnunet.load_model(two_folds, folds=[0], device="cpu")


def phantom(size: tuple[int, int, int] = tiny_dataset.SIZE, spacing: tuple[float, ...] | None = None) -> Any:
    """A CT of some size, with a border of zeros that nnU-Net crops and values that its clip takes away.

    Args:
        size: Voxels (Z, Y, X).
        spacing: Voxel size (Z, Y, X) in mm that it claims; `None` for that of the body shown.
    """
    drawn = [edge * n / m for edge, n, m in zip(tiny_dataset.SPACING, tiny_dataset.SIZE, size, strict=True)]
    ct = sitk.GetImageFromArray(tiny_dataset.patient("diseased_7").ct)
    ct.SetSpacing(tiny_dataset.SPACING[::-1])
    same = sitk.Transform()
    shown = sitk.Resample(ct, size[::-1], same, sitk.sitkLinear, (0, 0, 0), drawn[::-1], ct.GetDirection(), -1000)
    values = sitk.GetArrayFromImage(shown)
    values[:, :, -3:] = 0
    values[2:4, 5:9, 5:9] = 3000
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((spacing or drawn)[::-1])
    image.SetOrigin((3.0, -40.0, 7.0))
    image.SetDirection(TILTED)
    return image


def predicted(folder: Path, ct: Any, tmp_path: Path, folds: tuple[int, ...]) -> np.ndarray:
    """The mask of nnU-Net's own prediction."""
    sitk.WriteImage(ct, tmp_path / "ct_0000.nii.gz")
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    predictor.predict_from_files_sequential([[str(tmp_path / "ct_0000.nii.gz")]], str(tmp_path), False, True)
    return sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "ct.nii.gz"))


@pytest.mark.parametrize(
    ("size", "spacing", "folds"),
    [
        pytest.param((20, 40, 56), None, (0,), id="resampled in space"),
        pytest.param((90, 60, 56), (3.0, 0.9, 0.9), (0, 1), id="resampled slice by slice"),
        pytest.param((14, 32, 38), tiny_dataset.SPACING, (0,), id="not resampled"),
        pytest.param((8, 20, 22), tiny_dataset.SPACING, (0, 1), id="smaller than a patch"),
    ],
)
def test_mask_is_that_of_nnunet(
    two_folds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int, int],
    spacing: tuple[float, ...] | None,
    folds: tuple[int, ...],
) -> None:
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 20_000)
    ct = phantom(size, spacing)
    loaded = LoadedModel(two_folds, folds=folds, device="cpu")
    expected = predicted(two_folds, ct, tmp_path, folds)
    assert 0 < expected.sum() < expected.size
    for result in (loaded.segment(ct), loaded.restore(ct)):
        np.testing.assert_array_equal(result.mask, expected)
        assert result.mask.dtype == expected.dtype
        inside = np.abs(result.probability - 0.6) > 1e-3
        np.testing.assert_array_equal(result.mask[inside], (result.probability > 0.6)[inside])


@pytest.mark.parametrize("shape", [(40, 24, 26), (7, 24, 26), (9, 11, 13)])
@pytest.mark.parametrize("spacing", [(5.0, 1.0, 1.0), (2.0, 1.5, 1.5)])
@pytest.mark.parametrize("separate", [None, False])
def test_slabs_are_resampled_as_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    separate: bool | None,
) -> None:
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 2000)
    plans = tiny_dataset.plans("Dataset501_Tiny")
    plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"]["force_separate_z"] = separate
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 9, 11, 13), generator=generator).half()
    new_spacing = tuple(s * a / b for s, a, b in zip(spacing, logits.shape[1:], shape, strict=True))
    whole = configuration.resampling_fn_probabilities(logits, shape, spacing, new_spacing)
    parts = list(resample_logits(logits, shape, spacing, new_spacing, configuration))
    assert [rows for rows, _ in parts] == list(slabs(shape))
    assert len(parts) > 1 or shape == (9, 11, 13)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], axis=1), whole)


def test_slab_is_interpolated_as_the_whole() -> None:
    volume = torch.randn((5, 6, 7), generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(volume[None, None], (13, 9, 20), mode="trilinear", align_corners=False)
    parts = [interpolate_slab(volume, (13, 9, 20), rows) for rows in (slice(0, 4), slice(4, 13))]
    np.testing.assert_allclose(np.concatenate(parts), whole[0, 0].numpy(), atol=1e-5)


def test_restored_ct_is_eq_1_of_the_unclipped_ct(model: LoadedModel) -> None:
    ct = phantom((12, 36, 35), tiny_dataset.SPACING)
    values = sitk.GetArrayFromImage(ct)
    result = model.restore(ct, threshold=0.5)
    low = result.probability < 0.5
    assert 0 < low.sum() < low.size
    assert result.restored.dtype == values.dtype
    np.testing.assert_array_equal(result.restored[low], values[low])
    m = result.probability.astype(float)
    mixed = m * result.generated + (1 - m) * values
    np.testing.assert_allclose(result.restored[~low], mixed[~low], atol=1)
    np.testing.assert_array_equal(result.difference, values - result.restored)
    np.testing.assert_array_equal(result.generated[:, :, -3:], 0)  # cropped away: G has not seen it
    assert -1000 <= result.generated.min() < result.generated.max() <= 200, "the plan's window"
    assert values.max() == 3000
    image = result.image("restored")
    assert (image.GetSpacing(), image.GetOrigin(), image.GetDirection()) == (
        ct.GetSpacing(),
        ct.GetOrigin(),
        ct.GetDirection(),
    )


def test_threshold_0_and_1_are_all_and_nothing(model: LoadedModel) -> None:
    ct = phantom((8, 20, 22), tiny_dataset.SPACING)
    assert np.count_nonzero(model.restore(ct, threshold=0.0).difference[:, :, :-3]) > 0.9 * 8 * 20 * 19
    np.testing.assert_array_equal(model.restore(ct, threshold=1.0).difference, 0)


def test_generated_is_what_g_makes_of_the_window(model: LoadedModel) -> None:
    """On the plan's own grid, in one window, padded with air and not with the mean."""
    rng = np.random.default_rng(0)
    ct = rng.integers(-1100, 300, (8, 32, 32)).astype(np.float32)
    result = model.restore(ct, tiny_dataset.SPACING)
    ((generator, window),) = model._generators
    plans = model.plans.plans
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    normalised = (np.clip(ct, -1000, 200) - properties["mean"]) / properties["std"]
    padded = torch.nn.functional.pad(torch.from_numpy(normalised)[None, None], (0, 0, 0, 0, 2, 2), value=window.low[0])
    with torch.inference_mode():
        expected = window.from_window(generator(window.to_window(padded)))[0, 0, 2:-2]
    np.testing.assert_allclose(result.generated, normalised_to_hu(expected.numpy(), plans), atol=0.1)
    assert result.generated.dtype == np.float32


def test_folds_are_averaged(two_folds: Path, model: LoadedModel) -> None:
    ct = phantom((8, 20, 22), tiny_dataset.SPACING)
    both = LoadedModel(two_folds, device="cpu")
    assert both.folds == ["0", "1"]
    one, other, mean = (
        loaded.restore(ct).generated.astype(float)
        for loaded in (model, LoadedModel(two_folds, folds=["1"], device="cpu"), both)
    )
    assert np.abs(one - other).max() > 20
    np.testing.assert_allclose(mean, (one + other) / 2, atol=2)


def test_arrays_and_images_give_the_same(model: LoadedModel) -> None:
    ct = phantom((8, 20, 22), tiny_dataset.SPACING)
    by_image = model.restore(ct)
    by_array = model.restore(sitk.GetArrayFromImage(ct), ct.GetSpacing()[::-1])
    for name in ("mask", "probability", "restored", "generated", "difference"):
        np.testing.assert_array_equal(getattr(by_image, name), getattr(by_array, name))


def test_a_result_is_told_in_a_line(model: LoadedModel) -> None:
    told = repr(model.restore(phantom()))
    assert told.startswith("Restoration(")
    assert "lesion voxels" in told
    assert "array" not in told


def test_types_of_a_ct(model: LoadedModel) -> None:
    ct = sitk.GetArrayFromImage(phantom((8, 20, 22), tiny_dataset.SPACING))
    unsigned = model.restore((ct + 2000).astype(np.uint16), tiny_dataset.SPACING)
    assert unsigned.restored.dtype == np.int32, "HU below 0 have no place in it"
    wide = ct.copy()
    wide[0, 0, 0] = 32767
    assert model.restore(wide, tiny_dataset.SPACING).difference.dtype == np.int32


def test_progress_is_told(model: LoadedModel) -> None:
    told: list[float] = []
    model.restore(phantom((16, 32, 40), tiny_dataset.SPACING), on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    # Windows along each axis, at half a patch, of what is not cropped; each twice for S, mirrored, and once for G.
    sizes = zip((16, 32, 37), tiny_dataset.PATCH, strict=True)
    assert len(told) == 3 * math.prod(math.ceil((size - patch) / (patch / 2)) + 1 for size, patch in sizes)


def test_bad_cts_are_refused(model: LoadedModel) -> None:
    ct = np.zeros((8, 20, 22), np.float32)
    ct[2] = -500
    with pytest.raises(UserError, match=r"2 channels, but the model takes 1 \(CT\)"):
        model.segment(np.stack([ct, ct]), tiny_dataset.SPACING)
    with pytest.raises(UserError, match="spacing"):
        model.segment(ct)
    with pytest.raises(UserError, match="0 throughout"):
        model.segment(np.zeros_like(ct), tiny_dataset.SPACING)
    ct[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        model.restore(ct, tiny_dataset.SPACING)


def test_model_without_g_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_dataset.write_model(use_folders(monkeypatch, tmp_path), "SupervisedBaselineTrainer")
    loaded = gasnet_nnunet.load_model(folder, device="cpu")
    ct = phantom((8, 20, 22), tiny_dataset.SPACING)
    assert loaded.segment(ct).mask.any()
    with pytest.raises(UserError, match="holds the segmenter alone"):
        loaded.restore(ct)


def test_models_of_another_world_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_dataset.write_model(use_folders(monkeypatch, tmp_path))
    found = find_model_folder(
        "501", trainer="GASNetTrainer", plans="nnUNetPlans", configuration=tiny_dataset.CONFIGURATION
    )
    assert found == folder
    with pytest.raises(UserError, match="it has GASNetTrainer__nnUNetPlans__3d_fullres"):
        find_model_folder("501", trainer="nnUNetTrainer", plans="nnUNetPlans", configuration="3d_fullres")
    with pytest.raises(UserError, match=r"has no fold_3; it has fold_0"):
        LoadedModel(folder, folds=[3])
    with pytest.raises(UserError, match=r"fold_0 has no checkpoint_best.pth; it has checkpoint_final.pth"):
        LoadedModel(folder, checkpoint="best")
    with pytest.raises(UserError, match=r"has no plans.json"):
        LoadedModel(tmp_path)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    whole = checkpoint.read_bytes()
    content = torch.load(checkpoint, weights_only=False)
    torch.save({**content, "trainer_name": "nnUNetTrainerOfSomebody"}, checkpoint)
    with pytest.raises(UserError, match=r"nnU-Net cannot load .*nnUNetTrainerOfSomebody"):
        LoadedModel(folder)
    for values in content["gasnet"]["adversary"]["generator"].values():
        values.resize_(0)
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=r"The generator in .*checkpoint_final.pth is not the one"):
        LoadedModel(folder)
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"checkpoint_final.pth cannot be read .*truncated"):
        LoadedModel(folder)


def test_package_imports_nothing_heavy() -> None:
    code = """
import sys, gasnet_nnunet
assert callable(gasnet_nnunet.load_model)
print(sorted({"torch", "nnunetv2", "SimpleITK", "numpy", "scipy"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
