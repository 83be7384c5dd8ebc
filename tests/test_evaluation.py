from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from rich.console import Console

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.evaluation import (
    METRICS,
    PAPER_METRICS,
    evaluate_folder,
    markdown_table,
    plot_comparison,
    plot_overlays,
    rich_table,
    summarise,
)
from gasnet_nnunet.metrics import score_case


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (2.0, 2.0, 5.0), **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array, dtype=np.int16))
    image.SetSpacing(spacing)
    if "origin" in more:
        image.SetOrigin(more["origin"])
    sitk.WriteImage(image, path)


def cube(z: slice, y: slice, x: slice) -> np.ndarray:
    array = np.zeros((4, 6, 8), dtype=np.int16)
    array[z, y, x] = 1
    return array


TRUE = cube(slice(1, 3), slice(0, 4), slice(0, 4))  # 32 voxels
HALF = cube(slice(1, 3), slice(0, 4), slice(2, 6))  # 16 of them and 16 others
NOTHING = np.zeros_like(TRUE)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """References, lungs, images and predictions of two models for a diseased and a healthy case."""
    write(tmp_path / "reference/ill.nii.gz", TRUE)
    write(tmp_path / "reference/well.nii.gz", NOTHING)
    for case in ("ill", "well"):
        write(tmp_path / f"lung/{case}.nii.gz", cube(slice(0, 4), slice(0, 4), slice(0, 5)))
        write(tmp_path / f"ct/{case}_0000.nii.gz", TRUE * 500 - 900)
    write(tmp_path / "poor/ill.nii.gz", HALF)
    write(tmp_path / "poor/well.nii.gz", HALF)
    write(tmp_path / "good/ill.nii.gz", TRUE)
    write(tmp_path / "good/well.nii.gz", NOTHING)
    return tmp_path


def test_metrics_are_those_of_the_paper() -> None:
    score = score_case(HALF, TRUE, spacing=(5.0, 10.0, 10.0))
    assert score["dice"] == 0.5
    assert score["sensitivity"] == 0.5
    assert score["specificity"] == pytest.approx(144 / 160)
    assert (score["lesion_ml"], score["predicted_ml"], score["false_positive_ml"]) == (16, 16, 8)
    assert np.isnan(score["false_positive_lung"])


@pytest.mark.parametrize(("prediction", "specificity"), [(NOTHING, 1.0), (HALF, 160 / 192)])
def test_healthy_case_has_no_dice_but_false_positives(prediction: np.ndarray, specificity: float) -> None:
    score = score_case(prediction, NOTHING, lung=cube(slice(0, 4), slice(0, 4), slice(0, 5)))
    assert np.isnan(score["dice"])
    assert np.isnan(score["sensitivity"])
    assert score["specificity"] == pytest.approx(specificity)
    assert 1000 * score["false_positive_ml"] == pytest.approx(prediction.sum())
    assert score["false_positive_lung"] == prediction[:, :4, :5].sum() / 80


def test_missing_every_lesion_is_zero_not_nan() -> None:
    score = score_case(NOTHING, TRUE)
    assert (score["dice"], score["sensitivity"], score["specificity"]) == (0, 0, 1)


def test_several_lesion_classes_count_as_one_and_ignored_voxels_do_not_count() -> None:
    reference = TRUE * 2
    reference[1, :4, 2:4] = 3
    assert score_case(TRUE, reference)["dice"] == 1
    ignoring = score_case(HALF, reference, ignore_label=3)
    assert ignoring["sensitivity"] == 8 / 24
    assert ignoring["specificity"] == pytest.approx(144 / 160)


def test_folder_gives_a_row_a_case(folders: Path) -> None:
    frame = evaluate_folder(folders / "poor", folders / "reference", lungs=folders / "lung")
    assert frame.index.tolist() == ["ill", "well"]
    assert frame.loc["ill", "dice"] == 0.5
    assert frame.loc["ill", "lesion_ml"] == pytest.approx(32 * 0.02)
    assert frame["dice"].isna().tolist() == [False, True]
    assert frame.loc["well", "false_positive_lung"] == pytest.approx(24 / 80)


def test_predictions_without_reference_and_other_files_are_left_alone(folders: Path) -> None:
    write(folders / "poor/another.nii.gz", HALF)
    (folders / "poor/plans.json").write_text("{}")
    assert len(evaluate_folder(folders / "poor", folders / "reference")) == 2


def test_missing_prediction_is_named(folders: Path) -> None:
    (folders / "poor/well.nii.gz").unlink()
    with pytest.raises(UserError, match=r"poor lacks 1 of 2 cases .* well\.nii\.gz"):
        evaluate_folder(folders / "poor", folders / "reference")
    with pytest.raises(UserError, match="no reference"):
        evaluate_folder(folders / "poor", folders / "nowhere")


@pytest.mark.parametrize(
    ("array", "changes", "name"),
    [
        (np.zeros((4, 6, 7)), {}, "size 7 x 6 x 4 instead of 8 x 6 x 4"),
        (TRUE, {"spacing": (2.0, 2.0, 4.0)}, "spacing 2 x 2 x 4 instead of 2 x 2 x 5"),
        (TRUE, {"origin": (0.0, 3.0, 0.0)}, "origin"),
    ],
)
def test_other_geometry_is_refused(folders: Path, array: np.ndarray, changes: dict, name: str) -> None:
    write(folders / "poor/ill.nii.gz", array, **changes)
    with pytest.raises(UserError, match=rf"poor/ill\.nii\.gz does not lie on the grid of .*: {name}"):
        evaluate_folder(folders / "poor", folders / "reference")


def test_file_that_is_no_image_is_named(folders: Path) -> None:
    (folders / "poor/ill.nii.gz").write_bytes(b"nothing of the sort")
    with pytest.raises(UserError, match=r"poor/ill\.nii\.gz cannot be read"):
        evaluate_folder(folders / "poor", folders / "reference")


def both(folders: Path) -> dict[str, pd.DataFrame]:
    return {
        model: evaluate_folder(folders / model, folders / "reference", lungs=folders / "lung")
        for model in ("poor", "good")
    }


def test_summary_keeps_diseased_and_healthy_apart() -> None:
    frame = pd.DataFrame(
        {
            "dice": [0.4, 0.8, np.nan],
            "sensitivity": [0.5, 0.7, np.nan],
            "specificity": [0.9, 1.0, 0.1],
            "lesion_ml": [3.0, 4.0, 0.0],
            "false_positive_lung": [0.3, 0.3, 0.02],
        }
    )
    summary = summarise({"model": frame})
    assert summary.loc["model", ("dice", "mean")] == pytest.approx(0.6)
    assert summary.loc["model", ("dice", "sd")] == pytest.approx(0.4 / np.sqrt(2))
    assert summary.loc["model", ("specificity", "mean")] == pytest.approx(0.95)
    assert summary.loc["model", ("false_positive_lung", "mean")] == pytest.approx(0.02)
    assert summary.loc["model", ("false_positive_lung", "n")] == 1


def test_tables_show_percent(folders: Path) -> None:
    frames = both(folders)
    lines = markdown_table(frames, metrics=PAPER_METRICS).splitlines()
    assert lines[0] == "| Model | Dice % | Sensitivity % | Specificity % | Lung called lesion, healthy % |"
    assert lines[2:] == ["| poor | 50.0 | 50.0 | 90.00 | 30.00 |", "| good | 100.0 | 100.0 | 100.00 | 0.00 |"]
    assert markdown_table(frames).splitlines()[2].count("|") == len(METRICS) + 2
    console = Console(width=120, record=True, file=(folders / "table.txt").open("w"))
    console.print(rich_table(frames, title="Phantoms"))
    assert "100.0" in console.export_text()


def test_figures_are_drawn(folders: Path) -> None:
    frames = both(folders)
    plot_comparison(frames, folders / "comparison.png")
    plot_overlays(
        folders / "overlays.png",
        images=folders / "ct",
        references=folders / "reference",
        predictions={"poor": folders / "poor", "good": folders / "good"},
        cases=["ill", "well"],
    )
    for name in ("comparison", "overlays"):
        assert imread(folders / f"{name}.png").std() > 0.05
    assert not list(folders.glob(".*"))


def test_overlay_colours_what_was_found_missed_and_false(folders: Path) -> None:
    plot_overlays(
        folders / "overlays.png",
        images=folders / "ct",
        references=folders / "reference",
        predictions={"poor": folders / "poor"},
        cases=["ill"],
    )
    pixels = imread(folders / "overlays.png")[..., :3]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 0.7) & (green > 0.5) & (blue < 0.3)).any(), "yellow: false alarm"
    assert ((green > 0.5) & (red < 0.35) & (blue < 0.5)).any(), "green: missed"
    assert ((red > 0.35) & (red < 0.6) & (green < 0.45) & (blue < 0.3)).any(), "brown: found"
