"""What is measured of one predicted volume: the paper's metrics (section IV-C), surfaces, lesions one by one, volumes.

Every label above 0 is lesion. Where a metric is not defined it is NaN and left out of the means: all but specificity
and the volumes of a case without lesion, which is judged by its false positives instead. A prediction that finds
nothing of a lesion gets the worst value that each metric has. docs/compare.md gives definitions and sources.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from gasnet_nnunet.lungs import bounding_box

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]

TOLERANCE_MM = 3.0
"""Tolerance of the surface Dice: that of Ma et al. (Medical Physics 48, 2021) for COVID-19 lesions."""
LESION_OVERLAP = 0.1
"""Share of a lesion that has to be found, as Commowick et al. (Scientific Reports 8, 2018) for F1 of detection."""
CLASS_PREFIX = "dice_"
"""Of the columns with the Dice of one lesion class."""


def score_case(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    lung: ArrayLike | None = None,
    spacing: Spacing = (1.0, 1.0, 1.0),
    ignore_label: int | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, float]:
    """All metrics of one volume.

    Args:
        prediction: Predicted labels (Z, Y, X).
        reference: True labels (Z, Y, X).
        lung: Lung mask (Z, Y, X), for the share of the lung that is falsely called lesion.
        spacing: Size of a voxel in mm (Z, Y, X).
        ignore_label: Voxels of this reference label are not counted, in both.
        classes: Label values of each lesion class, for a Dice of its own; several values are a region of nnU-Net's.
        tolerance_mm: Distance in mm up to which surfaces agree.

    Returns:
        The values of `overlap_scores`, `surface_scores`, `lesion_scores` and `volume_scores`, `ignored_ml`, and
        `dice_<class>` of each class.

    Examples:
        >>> score = score_case([[[0, 1, 1, 0]]], [[[0, 0, 1, 1]]])
        >>> score["dice"], score["sensitivity"], score["specificity"], score["lesion_f1"]
        (0.5, 0.5, 0.5, 1.0)
        >>> score_case([[[0, 1]]], [[[0, 0]]])["dice"]
        nan
    """
    labels, truth = np.asarray(prediction), np.asarray(reference)
    counted = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    found, true = (labels > 0) & counted, (truth > 0) & counted
    scores = {
        **overlap_scores(found, true, counted),
        **surface_scores(found, true, spacing, tolerance_mm=tolerance_mm),
        **lesion_scores(found, true),
        **volume_scores(found, true, spacing, lung=None if lung is None else (np.asarray(lung) > 0) & counted),
        "ignored_ml": float((~counted).sum()) * math.prod(spacing) / 1000,
    }
    for name, values in (classes or {}).items():
        of_class = overlap_scores(np.isin(labels, values) & counted, np.isin(truth, values) & counted, counted)
        scores[f"{CLASS_PREFIX}{name}"] = of_class["dice"]
    return scores


def overlap_scores(found: Mask, true: Mask, counted: Mask | None = None) -> dict[str, float]:
    """Dice, sensitivity and specificity of section IV-C of the paper, from the voxels of one volume.

    Args:
        found: Predicted lesion (Z, Y, X).
        true: True lesion (Z, Y, X).
        counted: Voxels that count (Z, Y, X); all if `None`. Neither lesion reaches out of them.

    Returns:
        `dice` = 2 TP / (2 TP + FP + FN), `sensitivity` = TP / (TP + FN), `specificity` = TN / (TN + FP), as shares of
        1. NaN: Dice and sensitivity without a true lesion, specificity without a voxel free of it.
    """
    tp, fp, fn = (int(np.count_nonzero(voxels)) for voxels in (true & found, found & ~true, true & ~found))
    tn = (true.size if counted is None else int(np.count_nonzero(counted))) - tp - fp - fn
    return {
        "dice": 2 * tp / (2 * tp + fp + fn) if tp + fn else math.nan,
        "sensitivity": tp / (tp + fn) if tp + fn else math.nan,
        "specificity": tn / (tn + fp) if tn + fp else math.nan,
    }


def surface_scores(found: Mask, true: Mask, spacing: Spacing, *, tolerance_mm: float) -> dict[str, float]:
    """Distance of the surfaces and the share of them that agrees, by MONAI.

    Args:
        found: Predicted lesion (Z, Y, X).
        true: True lesion (Z, Y, X).
        spacing: Size of a voxel in mm (Z, Y, X).
        tolerance_mm: Distance in mm up to which surfaces agree.

    Returns:
        `hd95_mm`: 95th percentile of the distances from the surface voxels of either to the other's, the larger of
        both directions; where nothing is found, the diagonal of the volume. `surface_dice`: share of both surfaces, by
        their area, that lies within the tolerance of the other; 0 where nothing is found. NaN without a true lesion.
    """
    if not true.any():
        return {"hd95_mm": math.nan, "surface_dice": math.nan}
    if not found.any():
        return {"hd95_mm": math.hypot(*(np.array(true.shape) * spacing)), "surface_dice": 0.0}
    # Here, because MONAI takes seconds to import.
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    # The voxels beyond both lesions change nothing but the time it takes; MONAI's own cropping copies the whole first.
    box = bounding_box(found | true)
    assert box is not None, "one of the two is not empty"
    crop = tuple(slice(*edges) for edges in box)
    masks = {
        name: torch.from_numpy(np.pad(mask[crop], 1))[None, None] for name, mask in (("y_pred", found), ("y", true))
    }
    options: dict[str, Any] = {"include_background": True, "spacing": [float(size) for size in spacing], **masks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of arguments that it passes itself
        distance = compute_hausdorff_distance(percentile=95, **options)
        agreeing = compute_surface_dice(class_thresholds=[tolerance_mm], use_subvoxels=True, **options)
    return {"hd95_mm": float(distance), "surface_dice": float(agreeing)}


def lesion_scores(found: Mask, true: Mask) -> dict[str, float]:
    """How many lesions are detected, after Commowick et al. (Scientific Reports 8, 2018), with one overlap for both.

    A lesion is a piece of voxels that touch by faces, edges or corners. A true one is detected if a tenth of it is
    found; a predicted one is a false alarm if less than a tenth of it is true.

    Args:
        found: Predicted lesion (Z, Y, X).
        true: True lesion (Z, Y, X).

    Returns:
        `lesions` and `lesions_detected`, `predicted_lesions` and `false_lesions`: counts. `lesion_sensitivity`:
        detected / true. `lesion_precision`: 1 - false alarms / predicted, NaN where nothing is predicted. `lesion_f1`:
        their harmonic mean, 0 where nothing is detected. NaN without a true lesion, but for the counts and precision.
    """
    true_overlaps, found_overlaps = _overlaps(true, found), _overlaps(found, true)
    detected = int((true_overlaps >= LESION_OVERLAP).sum())
    right = int((found_overlaps >= LESION_OVERLAP).sum())
    sensitivity = detected / len(true_overlaps) if len(true_overlaps) else math.nan
    precision = right / len(found_overlaps) if len(found_overlaps) else math.nan
    f1 = 2 * sensitivity * precision / (sensitivity + precision) if detected and right else 0.0
    return {
        "lesions": float(len(true_overlaps)),
        "lesions_detected": float(detected),
        "predicted_lesions": float(len(found_overlaps)),
        "false_lesions": float(len(found_overlaps) - right),
        "lesion_sensitivity": sensitivity,
        "lesion_precision": precision,
        "lesion_f1": f1 if len(true_overlaps) else math.nan,
    }


def volume_scores(found: Mask, true: Mask, spacing: Spacing, *, lung: Mask | None = None) -> dict[str, float]:
    """Volumes, and how far they are off.

    Args:
        found: Predicted lesion (Z, Y, X).
        true: True lesion (Z, Y, X).
        spacing: Size of a voxel in mm (Z, Y, X).
        lung: Lungs (Z, Y, X).

    Returns:
        `lesion_ml` and `predicted_ml`; `volume_difference_ml` = predicted - true; `volume_error_ml`, its absolute
        value; `false_positive_ml`; `false_positive_lung`, the share of the lungs' voxels that are falsely called
        lesion, NaN without lungs.
    """
    ml = math.prod(spacing) / 1000
    false = found & ~true
    lesion_ml, predicted_ml = np.count_nonzero(true) * ml, np.count_nonzero(found) * ml
    share = math.nan if lung is None or not lung.any() else np.count_nonzero(false & lung) / np.count_nonzero(lung)
    return {
        "lesion_ml": lesion_ml,
        "predicted_ml": predicted_ml,
        "volume_difference_ml": predicted_ml - lesion_ml,
        "volume_error_ml": abs(predicted_ml - lesion_ml),
        "false_positive_ml": np.count_nonzero(false) * ml,
        "false_positive_lung": share,
    }


def _overlaps(lesions: Mask, other: Mask) -> NDArray[np.float64]:
    """Of each piece of a mask, the share that lies in another mask."""
    pieces, number = ndimage.label(lesions, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(pieces[lesions], minlength=number + 1)[1:]
    shared = np.bincount(pieces[lesions & other], minlength=number + 1)[1:]
    return shared / sizes
