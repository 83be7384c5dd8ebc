from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from rich.console import Console

from gasnet_nnunet.comparison_figures import plot_case, plot_comparison, plot_overlays
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.evaluation import (
    METRICS,
    PAPER_METRICS,
    check_references,
    check_scans,
    differences_text,
    evaluate_files,
    evaluate_folder,
    markdown_table,
    paired_differences,
    rich_table,
    shown_metrics,
    summarise,
)


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
    with pytest.raises(UserError, match=r"poor/ill\.nii\.gz (cannot be read|is damaged)"):
        evaluate_folder(folders / "poor", folders / "reference")


def both(folders: Path) -> dict[str, pd.DataFrame]:
    return {
        model: evaluate_folder(folders / model, folders / "reference", lungs=folders / "lung")
        for model in ("poor", "good")
    }


def test_summary_keeps_diseased_and_healthy_apart() -> None:
    frame = pd.DataFrame(
        {
            "dice": [0.4, 0.8, np.nan, np.nan],
            "sensitivity": [0.5, 0.7, np.nan, np.nan],
            "specificity": [0.9, 1.0, 0.1, 0.2],
            "lesion_ml": [3.0, 4.0, 0.0, 0.0],
            "ignored_ml": [0.0, 1.0, 0.0, 9.0],  # of the last it is not known whether it has a lesion
            "false_positive_lung": [0.3, 0.3, 0.02, 0.9],
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


def test_a_figure_of_nothing_says_so(folders: Path) -> None:
    well = evaluate_folder(folders / "poor", folders / "reference").loc[["well"]]
    assert shown_metrics({"poor": well}).keys().isdisjoint(PAPER_METRICS), "healthy, and no lungs to take a share of"
    plot_comparison({"poor": well, "good": well}, folders / "comparison.png", metrics=PAPER_METRICS)
    assert (imread(folders / "comparison.png")[..., :3] < 0.5).any(), "the sentence"
    plot_comparison({"poor": well.iloc[:0]}, folders / "comparison.png")


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


@pytest.mark.parametrize(
    ("values", "message"), [(-1, "holds the value -1"), (7, r"holds \[7\], which dataset.json does not")]
)
def test_values_that_are_no_labels_are_refused(folders: Path, values: int, message: str) -> None:
    write(folders / "poor/ill.nii.gz", TRUE * values)
    references = {"ill": folders / "reference/ill.nii.gz"}
    with pytest.raises(UserError, match=rf"poor/ill\.nii\.gz {message}"):
        evaluate_files({"ill": folders / "poor/ill.nii.gz"}, references, labels=(0, 1))
    with pytest.raises(UserError, match=rf"poor/ill\.nii\.gz {message}"):
        check_references({"ill": folders / "poor/ill.nii.gz"}, labels=(0, 1))


def test_cases_without_lesion_are_told(folders: Path) -> None:
    write(folders / "reference/other.nii.gz", TRUE * 2)
    references = {case: folders / f"reference/{case}.nii.gz" for case in ("ill", "well", "other")}
    assert check_references(references) == {"ill": True, "well": False, "other": True}
    assert check_references(references, ignore_label=2) == {"ill": True, "well": False, "other": None}


def frame(**columns: list[float]) -> pd.DataFrame:
    number = len(next(iter(columns.values())))
    index = pd.Index([f"case_{i}" for i in range(number)], name="case")
    return pd.DataFrame({"lesion_ml": [5.0] * number, "ignored_ml": [0.0] * number, **columns}, index=index)


def test_paired_differences_are_of_the_same_cases() -> None:
    worse = frame(dice=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    better = worse.assign(dice=worse["dice"] + [0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16])
    shuffled = better.sample(frac=1, random_state=0)
    row = paired_differences({"worse": worse, "better": shuffled}, reference="worse").iloc[0]
    assert (row["model"], row["metric"], row["n"]) == ("better", "dice", 7)
    assert row["difference"] == pytest.approx(0.13)
    assert 0.1 < row["low"] < 0.13 < row["high"] < 0.16
    assert row["p"] == pytest.approx(2 / 2**7), "all seven of one sign"
    back = paired_differences({"worse": worse, "better": shuffled}, reference="better").iloc[0]
    assert back["difference"] == pytest.approx(-0.13)


def test_differences_of_a_patients_cases_are_one() -> None:
    worse = frame(dice=[0.1, 0.1, 0.1, 0.1, 0.1])
    better = worse.assign(dice=[0.2, 0.3, 0.4, 0.6, 0.1])
    patients = {"case_0": "p", "case_1": "p", "case_2": "p", "case_3": "q", "elsewhere": "q"}
    row = paired_differences({"worse": worse, "better": better}, reference="worse", patients=patients).iloc[0]
    # 0.2 on the mean of p's three cases, 0.5 of q, and 0 of case_4, of whom nothing is known.
    assert row["n"] == 3
    assert row["difference"] == pytest.approx((0.2 + 0.5 + 0) / 3)
    assert row["p"] == 0.5, "two patients of one sign, and a tie"
    alone = paired_differences({"worse": worse, "better": better}, reference="worse").iloc[0]
    assert (alone["n"], alone["difference"]) == (5, pytest.approx((0.1 + 0.2 + 0.3 + 0.5) / 5))
    # A patient without lesion in one CT counts by the others.
    well = [model.assign(lesion_ml=[0.0, 5, 5, 5, 5]) for model in (worse, better)]
    row = paired_differences(dict(zip(("worse", "better"), well, strict=True)), reference="worse", patients=patients)
    assert row.loc[0, "difference"] == pytest.approx((0.25 + 0.5 + 0) / 3)


def test_differences_that_say_nothing() -> None:
    alike = paired_differences({"a": frame(dice=[0.4, 0.5]), "b": frame(dice=[0.4, 0.5])}, reference="a").iloc[0]
    assert (alike["difference"], alike["low"], alike["high"], alike["p"]) == (0, 0, 0, 1)
    single = {"a": frame(dice=[0.4]), "b": frame(dice=[0.5])}
    one = paired_differences(single, reference="a")
    assert one.loc[0, ["low", "high", "p"]].isna().all()
    assert differences_text(one, single).loc["b"].tolist() == ["Dice %", "1", "+10.0", "", ""]


def test_differences_need_the_same_cases_and_a_known_model() -> None:
    frames = {"a": frame(dice=[0.4, 0.5]), "b": frame(dice=[0.4])}
    with pytest.raises(UserError, match=r"b and a were tested on different cases: case_1"):
        paired_differences(frames, reference="a")
    with pytest.raises(UserError, match=r"no model 'c' .* the models are a, b"):
        paired_differences(frames, reference="c")


def test_single_classes_and_many_models_are_shown(tmp_path: Path) -> None:
    frames = {f"model {i}": frame(dice=[0.4, 0.5], dice_ggo=[0.1 * i, np.nan]) for i in range(7)}
    assert markdown_table(frames).splitlines()[0] == "| Model | Dice % | Dice ggo % |"
    plot_comparison(frames, tmp_path / "many.png")
    assert imread(tmp_path / "many.png").std() > 0.05


def test_nothing_is_drawn_where_nothing_is_known(folders: Path) -> None:
    truth = HALF.copy()
    truth[-1] = 2  # ignored, of which nothing is found
    write(folders / "reference/ill.nii.gz", truth)
    files = {"image": folders / "ct/ill_0000.nii.gz", "reference": folders / "reference/ill.nii.gz"}
    predictions = {"poor": folders / "poor/ill.nii.gz"}
    write(predictions["poor"], HALF)
    pictures = {}
    for name, ignore in (("known", None), ("ignored", 2)):
        plot_case(folders / f"{name}.png", case="ill", predictions=predictions, ignore_label=ignore, **files)
        pictures[name] = imread(folders / f"{name}.png")[..., :3]
    green = {name: ((p[..., 1] > 0.5) & (p[..., 0] < 0.35) & (p[..., 2] < 0.5)).any() for name, p in pictures.items()}
    assert green == {"known": True, "ignored": False}


def test_scans_are_read_whole(folders: Path) -> None:
    scan = folders / "ct/ill_0000.nii.gz"
    check_scans([scan])
    scan.write_bytes(scan.read_bytes()[: scan.stat().st_size // 2])
    with pytest.raises(UserError, match="ill_0000"):
        check_scans([scan, folders / "ct/well_0000.nii.gz"])


def test_case_is_drawn_where_lesion_misses_and_false_alarms_are(folders: Path) -> None:
    false_alarm = HALF.copy()
    false_alarm[3] = 1
    write(folders / "poor/ill.nii.gz", false_alarm)
    files = {"image": folders / "ct/ill_0000.nii.gz", "reference": folders / "reference/ill.nii.gz"}
    plot_case(folders / "case.png", case="ill", predictions={"poor": folders / "poor/ill.nii.gz"}, **files)
    tall = imread(folders / "case.png").shape
    plot_case(folders / "good.png", case="ill", predictions={"good": folders / "good/ill.nii.gz"}, **files)
    assert tall[0] > 1.5 * imread(folders / "good.png").shape[0], "a perfect prediction needs one slice"
