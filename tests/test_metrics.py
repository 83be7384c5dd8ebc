from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.spatial.distance import cdist

from gasnet_nnunet.metrics import lesion_scores, overlap_scores, score_case, surface_scores

SPACING = (4.0, 2.0, 1.5)
SHAPE = (4, 6, 7)


def cube(z: slice, y: slice, x: slice) -> np.ndarray:
    array = np.zeros((4, 6, 8), dtype=np.int16)
    array[z, y, x] = 1
    return array


TRUE = cube(slice(1, 3), slice(0, 4), slice(0, 4))  # 32 voxels
HALF = cube(slice(1, 3), slice(0, 4), slice(2, 6))  # 16 of them and 16 others
NOTHING = np.zeros_like(TRUE)
LUNG = cube(slice(0, 4), slice(0, 4), slice(0, 5))

masks = arrays(bool, SHAPE, elements=st.booleans())
lesions = masks.filter(lambda mask: mask.any())


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a neighbour at a face that is not in the mask, in mm."""
    padded = np.pad(mask, 1)
    return (np.argwhere(padded & ~ndimage.binary_erosion(padded)) - 1) * SPACING


def test_metrics_are_those_of_the_paper() -> None:
    score = score_case(HALF, TRUE, spacing=(5.0, 10.0, 10.0))
    assert (score["dice"], score["sensitivity"]) == (0.5, 0.5)
    assert score["specificity"] == pytest.approx(144 / 160)
    assert (score["lesion_ml"], score["predicted_ml"], score["false_positive_ml"]) == (16, 16, 8)
    assert (score["volume_difference_ml"], score["volume_error_ml"]) == (0, 0)
    assert np.isnan(score["false_positive_lung"])


def test_volume_error_has_no_sign_but_the_difference_has() -> None:
    score = score_case(TRUE[:2], np.ones_like(TRUE[:2]), spacing=(10.0, 10.0, 10.0))
    assert (score["volume_difference_ml"], score["volume_error_ml"]) == (16 - 96, 80)


@pytest.mark.parametrize(("prediction", "specificity"), [(NOTHING, 1.0), (HALF, 160 / 192)])
def test_healthy_case_is_judged_by_false_positives_alone(prediction: np.ndarray, specificity: float) -> None:
    score = score_case(prediction, NOTHING, lung=LUNG, spacing=(10.0, 10.0, 10.0))
    undefined = ("dice", "sensitivity", "hd95_mm", "surface_dice", "lesion_f1", "lesion_sensitivity")
    assert all(math.isnan(score[name]) for name in undefined)
    assert score["specificity"] == pytest.approx(specificity)
    assert score["false_positive_ml"] == prediction.sum()
    assert score["false_positive_lung"] == prediction[:, :4, :5].sum() / 80
    assert score["false_lesions"] == prediction.any()


def test_missing_every_lesion_has_the_worst_values() -> None:
    score = score_case(NOTHING, TRUE, spacing=SPACING)
    assert (score["dice"], score["sensitivity"], score["specificity"]) == (0, 0, 1)
    assert (score["surface_dice"], score["lesion_f1"], score["lesion_sensitivity"]) == (0, 0, 0)
    assert score["hd95_mm"] == pytest.approx(math.hypot(4 * 4.0, 6 * 2.0, 8 * 1.5))


def test_several_lesion_classes_count_as_one_and_each_by_itself() -> None:
    reference = TRUE * 2
    reference[1, :4, 2:4] = 3
    score = score_case(TRUE * 2, reference, classes={"ggo": (2,), "other": (3,), "both": (2, 3), "none": (4,)})
    assert score["dice"] == 1
    assert (score["dice_ggo"], score["dice_other"], score["dice_both"]) == (pytest.approx(48 / 56), 0, 1)
    assert math.isnan(score["dice_none"])


def test_ignored_voxels_do_not_count() -> None:
    reference = TRUE * 2
    reference[1, :4, 2:4] = 3
    score = score_case(HALF, reference, ignore_label=3, spacing=(10.0, 10.0, 10.0))
    assert score["sensitivity"] == 8 / 24
    assert score["specificity"] == pytest.approx(144 / 160)
    assert score["ignored_ml"] == 8
    assert score_case(reference, reference, ignore_label=3, spacing=SPACING)["hd95_mm"] == 0


@settings(max_examples=40)
@given(lesions, lesions)
def test_hd95_is_that_of_all_pairs_of_surface_voxels(found: np.ndarray, true: np.ndarray) -> None:
    distances = cdist(surface(found), surface(true))
    expected = max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))
    assert surface_scores(found, true, SPACING, tolerance_mm=1.0)["hd95_mm"] == pytest.approx(expected, rel=1e-4)


@settings(max_examples=40)
@given(lesions, lesions, st.floats(0, 20))
def test_surface_scores_are_symmetric_and_grow_with_the_tolerance(
    found: np.ndarray, true: np.ndarray, tolerance: float
) -> None:
    score = surface_scores(found, true, SPACING, tolerance_mm=tolerance)
    assert surface_scores(true, found, SPACING, tolerance_mm=tolerance) == pytest.approx(score)
    assert 0 <= score["surface_dice"] <= 1 + 1e-6
    assert surface_scores(found, true, SPACING, tolerance_mm=tolerance + 5)["surface_dice"] >= score["surface_dice"]
    assert surface_scores(true, true, SPACING, tolerance_mm=0) == pytest.approx({"hd95_mm": 0, "surface_dice": 1})


def test_surface_dice_counts_area_within_the_tolerance() -> None:
    """Two slabs, thick as a slice is 4 mm, one shifted by a slice: the tolerance decides about their faces."""
    slab = np.zeros((12, 30, 30), bool)
    slab[3:7, 1:-1, 1:-1] = True
    shifted = np.roll(slab, 1, axis=0)
    assert surface_scores(shifted, slab, (4.0, 1.0, 1.0), tolerance_mm=4.0)["surface_dice"] == pytest.approx(1)
    assert surface_scores(shifted, slab, (4.0, 1.0, 1.0), tolerance_mm=3.0)["surface_dice"] < 0.6


@given(masks, masks)
def test_shares_lie_between_0_and_1(found: np.ndarray, true: np.ndarray) -> None:
    score = {**overlap_scores(found, true), **lesion_scores(found, true)}
    for name in ("dice", "sensitivity", "specificity", "lesion_f1", "lesion_sensitivity", "lesion_precision"):
        assert math.isnan(score[name]) or 0 <= score[name] <= 1
    assert math.isnan(score["lesion_f1"]) == (not true.any())
    assert score["lesions_detected"] <= score["lesions"]
    if true.any():
        assert lesion_scores(true, true)["lesion_f1"] == 1


def test_lesions_are_found_one_by_one() -> None:
    true = np.zeros((1, 5, 40), bool)
    true[0, 1:3, 0:10] = True  # 20 voxels, 2 of them found
    true[0, 1:3, 12:22] = True  # 20 voxels, 1 of them found
    true[0, 3, 22] = True  # touches the second one by a corner
    true[0, 1, 30] = True  # found, with 9 false voxels around
    found = np.zeros_like(true)
    found[0, 1, 8:10] = found[0, 1, 12] = found[0, 4, 0:3] = True
    found[0, 0:2, 28:33] = True
    assert lesion_scores(found, true) == {
        "lesions": 3,
        "lesions_detected": 2,
        "predicted_lesions": 4,
        "false_lesions": 1,
        "lesion_sensitivity": pytest.approx(2 / 3),
        "lesion_precision": pytest.approx(3 / 4),
        "lesion_f1": pytest.approx(2 * (2 / 3) * (3 / 4) / (2 / 3 + 3 / 4)),
    }
