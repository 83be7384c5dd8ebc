"""`gasnet-nnunet compare`: what it takes, refuses and writes, with untrained models that nnU-Net itself saved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import tiny_dataset
from matplotlib.image import imread
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.comparison import Comparison, compare_models, make_folder
from gasnet_nnunet.comparison_inputs import Model, find_cases, find_model, find_models, read_groups
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.organ_masks import VERSION
from gasnet_nnunet.splits import Fold

DATASET = "Dataset501_Tiny"
CASES = ("diseased_7", "diseased_8", "healthy_7")


@pytest.fixture
def data(nnunet_folders: Path) -> Path:
    """CTs, masks and lungs of three patients, and predictions of a good and a poor model."""
    for case in CASES:
        phantom = tiny_dataset.patient(case)
        tiny_dataset.write_image(phantom.ct, nnunet_folders / f"ct/{case}_0000.nii.gz")
        tiny_dataset.write_image(phantom.lesion.astype(np.uint8), nnunet_folders / f"mask/{case}.nii.gz")
        tiny_dataset.write_image(phantom.lung.astype(np.uint8), nnunet_folders / f"lung/{case}.nii.gz")
        tiny_dataset.write_image(phantom.lesion.astype(np.uint8), nnunet_folders / f"good/{case}.nii.gz")
        shifted = np.roll(phantom.lesion, 3, axis=2)
        shifted[8, 20:24, 12:16] = 1
        tiny_dataset.write_image(shifted.astype(np.uint8), nnunet_folders / f"poor/{case}.nii.gz")
    return nnunet_folders


def two(data: Path) -> list[Model]:
    return [find_model("poor", data / "poor"), find_model("good", data / "good")]


def run(data: Path, models: list[Model], *, draw: bool = True, **options: Any) -> Comparison:
    cases = find_cases(models, data / "mask", images=data / "ct" if draw else None, lungs=data / "lung")
    return compare_models(models, cases, data / "out", device="cpu", num_processes=1, **options)


@pytest.fixture
def trained(data: Path) -> Path:
    """A model folder as `nnUNetv2_train` leaves it, but for the training."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = tiny_dataset.plans(DATASET)
    # By its files nnU-Net tells how preprocessed data are stored.
    stored = data / "preprocessed" / DATASET / plans["configurations"]["3d_fullres"]["data_identifier"]
    stored.mkdir(parents=True)
    (stored / "case.b2nd").touch()
    torch.manual_seed(0)
    dataset_json = {**tiny_dataset.DATASET_JSON, "numTraining": 1}
    trainer = nnUNetTrainer(
        {**plans, "continue_training": False}, "3d_fullres", 0, dataset_json, device=torch.device("cpu")
    )
    trainer.initialize()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


# What it writes -------------------------------------------------------------------------------------------------------


def test_folders_of_predictions_are_compared(data: Path) -> None:
    groups = pd.DataFrame({"site": ["A", "B", "A"]}, index=pd.Index(CASES, name="case"))
    result = run(data, two(data), groups=groups)
    rows = pd.read_csv(data / "out/cases.csv").set_index(["model", "case"])
    assert rows.index.tolist() == [(model, case) for model in ("poor", "good") for case in CASES]
    assert rows.loc[("good", "diseased_7"), "dice"] == 1
    assert rows.loc[("poor", "healthy_7"), "false_positive_lung"] > 0
    assert rows["site"].tolist() == ["A", "B", "A"] * 2
    summary = json.loads((data / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["models"]["good"]["dice"] == {"mean": 1, "sd": 0, "n": 2}
    assert summary["subsets"]["site"]["B"]["good"]["dice"] == {"mean": 1, "sd": None, "n": 1}
    dice = next(row for row in summary["differences"] if row["metric"] == "dice")
    assert dice["model"] == "good"
    assert 0 < dice["low"] <= dice["difference"] <= dice["high"]
    text = (data / "out/summary.md").read_text(encoding="utf-8")
    assert "2 models on 3 cases (2 with lesion, 1 without)" in text
    assert "### site: B, 1 case (1 with lesion, 0 without)" in text
    assert sorted(path.stem for path in (data / "out/overlays").iterdir()) == list(CASES)
    assert imread(data / "out/comparison.png").std() > 0.05
    assert result.reference == "poor"
    assert not list((data / "out").rglob(".*"))


def test_lungs_of_cases_without_lesion_are_computed(data: Path) -> None:
    models = two(data)
    cases = find_cases(models, data / "mask", images=data / "ct")
    result = compare_models(models, cases, data / "out", num_processes=1)
    given = run(data, models).frames["poor"].loc["healthy_7", "false_positive_lung"]
    assert result.frames["poor"].loc["healthy_7", "false_positive_lung"] == pytest.approx(given, rel=0.3)
    assert result.frames["poor"].loc["diseased_7", "false_positive_lung"] != given
    assert sorted(path.name for path in (data / "out/lungs").iterdir()) == ["computed.json", "healthy_7.nii.gz"]


def test_computed_lungs_are_kept_until_the_package_finds_others(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = two(data)
    cases = find_cases(models, data / "mask", images=data / "ct")

    def share() -> float:
        frame = compare_models(models, cases, data / "out", num_processes=1).frames["poor"]
        return float(frame.loc[["healthy_7"], "false_positive_lung"].sum())

    found = share()
    everything = np.ones(tiny_dataset.SIZE, np.uint8)
    tiny_dataset.write_image(everything, data / "out/lungs/healthy_7.nii.gz")
    kept = share()
    assert kept < found, "taken from the file"
    monkeypatch.setattr("gasnet_nnunet.comparison.VERSION", VERSION + 1)
    assert share() == found
    tiny_dataset.write_image(everything, data / "out/lungs/healthy_7.nii.gz")
    tiny_dataset.write_image(tiny_dataset.patient("healthy_7").ct, data / "ct/healthy_7_0000.nii.gz")
    assert share() == found, "of a CT that was written anew"


def test_without_cts_predictions_are_measured_but_not_drawn(data: Path) -> None:
    models = two(data)
    cases = find_cases(models, data / "mask")
    result = compare_models(models, cases, data / "out", reference="good", num_processes=1)
    assert len(result.frames["good"]) == 3
    assert not (data / "out/overlays").exists()
    assert "overlays" not in (data / "out/summary.md").read_text(encoding="utf-8")


def test_prediction_of_nothing_and_ignored_voxels_are_remarked_on(data: Path) -> None:
    empty = np.zeros(tiny_dataset.SIZE, np.uint8)
    tiny_dataset.write_image(empty, data / "poor/diseased_7.nii.gz")
    mask = tiny_dataset.patient("diseased_8").lesion.astype(np.uint8)
    mask[:2] = 2
    tiny_dataset.write_image(mask, data / "mask/diseased_8.nii.gz")
    (data / "mask/dataset.json").write_text(json.dumps(tiny_dataset.DATASET_JSON))
    notes = run(data, two(data)).notes
    assert any(note.startswith("poor found nothing in cases with lesion (diseased_7)") for note in notes)
    assert any("'ignore' in the masks of diseased_8" in note for note in notes)


def labelled(folder: Path, **labels: int) -> None:
    """Make a folder of predictions one of a model with these labels."""
    (folder / "plans.json").write_text(json.dumps({"dataset_name": DATASET}))
    content = {**tiny_dataset.DATASET_JSON, "labels": {"background": 0, **labels}}
    (folder / "dataset.json").write_text(json.dumps(content))


def in_two_classes(folder: Path) -> None:
    """Write the lesion of a mask's or a prediction's lower half as another class."""
    for case in CASES[:2]:
        lesion = tiny_dataset.patient(case).lesion.astype(np.uint8)
        middle = int(np.argwhere(lesion).mean(axis=0)[1])
        lesion[:, middle:] *= 2
        tiny_dataset.write_image(lesion, folder / f"{case}.nii.gz")


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_ignored_by_one_model_is_lesion_to_another(data: Path, first: int) -> None:
    labelled(data / "poor", lesion=1, ignore=2)
    labelled(data / "good", glass=1, consolidation=2, ignore=3)
    in_two_classes(data / "good")

    def models() -> list[Model]:
        return two(data)[:: -1 if first else 1]

    result = run(data, models(), draw=False)
    assert result.frames["good"]["dice"].mean() == 1
    assert (result.frames["good"]["ignored_ml"] == 0).all()
    assert not [column for column in result.frames["good"] if column.startswith("dice_")]
    in_two_classes(data / "mask")
    with pytest.raises(
        UserError, match=r"mask/diseased_7\.nii\.gz holds \[2\], which .* every model's alike, does not"
    ):
        run(data, models(), draw=False)
    (data / "mask/dataset.json").write_text((data / "good/dataset.json").read_text())
    assert run(data, models(), draw=False).frames["good"]["dice"].mean() == 1


def test_classes_that_masks_do_not_tell_apart_have_no_dice(data: Path) -> None:
    for name in ("poor", "good"):
        labelled(data / name, glass=1, consolidation=2, ignore=3)
    in_two_classes(data / "good")
    result = run(data, two(data), draw=False)
    assert result.frames["good"]["dice"].mean() == 1
    assert "dice_glass" not in result.frames["good"]
    assert any("no mask shows consolidation" in note for note in result.notes)
    in_two_classes(data / "mask")
    assert run(data, two(data), draw=False).frames["good"]["dice_consolidation"].mean() == 1


def test_cases_of_which_nothing_is_known_are_left_out(data: Path) -> None:
    (data / "mask/dataset.json").write_text(json.dumps(tiny_dataset.DATASET_JSON))
    tiny_dataset.write_image(np.full(tiny_dataset.SIZE, 2, np.uint8), data / "mask/diseased_8.nii.gz")
    groups = pd.DataFrame({"site": ["A", "B", "A"]}, index=pd.Index(CASES, name="case"))
    result = run(data, two(data), draw=False, groups=groups)
    assert result.frames["good"].index.tolist() == ["diseased_7", "healthy_7"]
    assert any("1 of 3 cases are left out" in note and "diseased_8" in note for note in result.notes)
    for case in CASES:
        tiny_dataset.write_image(np.full(tiny_dataset.SIZE, 2, np.uint8), data / f"mask/{case}.nii.gz")
    with pytest.raises(UserError, match="The masks of all 3 cases are 'ignore'"):
        run(data, two(data), draw=False)


def test_a_subset_may_be_called_as_a_metric_is(data: Path) -> None:
    groups = pd.DataFrame({"lesions": list("ABA"), "model": list("XXY")}, index=pd.Index(CASES, name="case"))
    run(data, two(data), draw=False, groups=groups)
    rows = pd.read_csv(data / "out/cases.csv")
    assert rows["lesions (subset)"].tolist() == list("ABA") * 2
    assert rows["model (subset)"].tolist() == list("XXY") * 2
    assert rows["lesions"].notna().all()


def test_a_comparison_that_fails_leaves_the_earlier_one_and_what_it_says_of_it(data: Path) -> None:
    run(data, two(data), draw=False)
    before = (data / "out/compare.json").read_text()
    tiny_dataset.write_image(np.full(tiny_dataset.SIZE, -3, np.int16), data / "good/healthy_7.nii.gz")
    with pytest.raises(UserError, match=r"good/healthy_7\.nii\.gz holds the value -3"):
        run(data, [find_model("other", data / "good")], draw=False)
    assert (data / "out/compare.json").read_text() == before
    assert len(pd.read_csv(data / "out/cases.csv")) == 6


def test_folder_of_others_is_left_alone_and_an_earlier_comparison_replaced(data: Path) -> None:
    (data / "out").mkdir()
    (data / "out/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no earlier comparison"):
        run(data, two(data))
    (data / "out/thesis.txt").rename(data / "thesis.txt")
    run(data, two(data))
    (data / "out/notes.txt").write_text("mine")
    run(data, two(data)[:1])
    assert len(pd.read_csv(data / "out/cases.csv")) == 3
    assert (data / "out/notes.txt").exists()
    with pytest.raises(UserError, match="is a file"):
        make_folder(data / "thesis.txt")


# Trained models -------------------------------------------------------------------------------------------------------


def test_missing_predictions_are_made_by_nnunet_once(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    models = [find_model("new", trained), find_model("good", data / "good")]
    assert models[0].folds == ("0",)
    result = run(data, models)
    assert "new" in result.seconds
    assert capsys.readouterr().out == ""
    folder = data / "out/predictions/new"
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(trained), ("0",))
    (data / "own").mkdir()
    predictor.predict_from_files_sequential(str(data / "ct"), str(data / "own"))
    for case in CASES:
        ours, own = (
            sitk.GetArrayFromImage(sitk.ReadImage(place / f"{case}.nii.gz")) for place in (folder, data / "own")
        )
        assert np.array_equal(ours, own)

    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
    (folder / "healthy_7.nii.gz").unlink()
    again = run(data, models)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
    assert {name for name in before if before[name] != after[name]} == {"healthy_7.nii.gz"}
    assert "new" in again.seconds
    assert "new" not in run(data, models).seconds
    pd.testing.assert_frame_equal(again.frames["new"], result.frames["new"])

    checkpoint = trained / "fold_0/checkpoint_final.pth"
    shutil.copy(checkpoint, trained / "copy")
    shutil.move(trained / "copy", checkpoint)
    run(data, models)
    assert {path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}.isdisjoint(after.values())


def test_validation_folders_are_compared(data: Path, trained: Path) -> None:
    for fold, cases in {"0": CASES[:1], "1": CASES[1:]}.items():
        (trained / f"fold_{fold}/validation").mkdir(parents=True)
        for case in cases:
            shutil.copy(data / f"good/{case}.nii.gz", trained / f"fold_{fold}/validation")
    model = find_model(None, trained, validation=True)
    assert sorted(model.predictions) == sorted(CASES)
    cases = find_cases([model], data / "mask", images=data / "ct", needs_images=False)
    assert compare_models([model], cases, data / "out", num_processes=1).frames[model.name]["dice"].mean() == 1
    one = find_model("one", trained / "fold_1", validation=True)
    assert sorted(one.predictions) == sorted(CASES[1:])
    folder = find_model("folder", trained / "fold_1/validation")
    assert folder.predictions == one.predictions
    assert folder.dataset_json["file_ending"] == ".nii.gz"

    with pytest.raises(UserError, match="is fold 1, but -f takes 0"):
        find_model("one", trained / "fold_1", folds=["0"], validation=True)
    with pytest.raises(UserError, match=r"predicted different cases .* or choose folds with -f"):
        find_cases([model, one], data / "mask", images=data / "ct", needs_images=False)

    def record(fold: int, train: Sequence[str], val: Sequence[str]) -> None:
        cases = Fold(tuple(train), tuple(val), diseased=(), healthy=(), val_diseased=(), val_healthy=())
        (trained / f"fold_{fold}/debug.json").write_text(json.dumps({"_cases": str(cases)}))

    record(0, CASES[1:], CASES[:1])
    record(1, CASES[:1], CASES[1:])
    model = find_model(None, trained, validation=True)
    assert not find_cases([model], data / "mask", needs_images=False).notes
    record(1, CASES[1:], CASES[1:])
    one = find_model("one", trained / "fold_1", validation=True)
    note = find_cases([one], data / "mask", needs_images=False).notes[0]
    assert note.startswith("one has learnt from diseased_8, healthy_7")

    shutil.copy(data / "good/diseased_7.nii.gz", trained / "fold_1/validation")
    with pytest.raises(UserError, match="diseased_7 are validated on in fold 1 and in an earlier one"):
        find_model(None, trained, validation=True)
    shutil.rmtree(trained / "fold_1/validation")
    with pytest.raises(UserError, match=r"fold_1/validation holds no predictions"):
        find_model(None, trained, validation=True)


# What is refused ------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_compared(data: Path, trained: Path) -> None:
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        find_model(None, data / "nowhere")
    with pytest.raises(UserError, match="neither folds nor predictions"):
        find_model(None, data / "raw")
    with pytest.raises(UserError, match="has no fold_3; it has fold_0"):
        find_model(None, trained, folds=["3"])
    with pytest.raises(UserError, match=r"fold_0 has no checkpoint_best\.pth; it has checkpoint_final\.pth"):
        find_model(None, trained, checkpoint="best")
    checkpoint = trained / "fold_0/checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged or incomplete"):
        find_model(None, trained)
    checkpoint.unlink()
    with pytest.raises(UserError, match="no checkpoint at all"):
        find_model(None, trained)
    (trained / "plans.json").unlink()
    with pytest.raises(UserError, match=r"has no plans\.json"):
        find_model(None, trained)


def test_models_of_a_dataset(data: Path) -> None:
    results = data / "results" / DATASET
    for name in ("A__p__2d", "A__q__2d", "B__p__2d"):
        (results / name / "fold_0").mkdir(parents=True)
    assert list(find_models(results)) == ["A__p", "A__q", "B__p"]
    assert list(find_models(results, plans=["p"])) == ["A", "B"]
    assert find_models(results, trainers=["B"]) == {"B": results / "B__p__2d"}
    with pytest.raises(UserError, match=r"has the trainer C .* there are: A__p__2d"):
        find_models(results, trainers=["A", "C"])
    with pytest.raises(UserError, match="holds no trained model"):
        find_models(data / "mask")


def test_cases_that_do_not_match(data: Path, trained: Path) -> None:
    models = two(data)
    with pytest.raises(UserError, match="There are no masks"):
        find_cases(models, data / "raw")
    with pytest.raises(UserError, match="There are no CTs"):
        find_cases(models, data / "mask", images=data / "raw")
    with pytest.raises(UserError, match="has yet to predict: name the folder of CTs"):
        find_cases([find_model(None, trained)], data / "mask")
    (data / "mask/diseased_8.nii.gz").rename(data / "kept.nii.gz")
    with pytest.raises(UserError, match=r"1 of 3 cases have no mask in .*: diseased_8 .* A healthy case needs"):
        find_cases(models, data / "mask", images=data / "ct")
    (data / "kept.nii.gz").rename(data / "mask/diseased_8.nii.gz")
    (data / "good/diseased_7.nii.gz").unlink()
    with pytest.raises(UserError, match=r"good has no prediction of 1 of 3 cases: diseased_7"):
        find_cases(two(data), data / "mask", images=data / "ct")
    with pytest.raises(UserError, match=r"poor and good predicted different cases \(3 and 2\).* diseased_7"):
        find_cases(two(data), data / "mask")
    (data / "ct/diseased_7_0000.nii.gz").unlink()
    notes = find_cases(two(data), data / "mask", images=data / "ct").notes
    assert "belong to no case that was compared: diseased_7" in notes[0]


@pytest.mark.parametrize("place", ["ct/diseased_7_0000", "poor/diseased_7", "lung/diseased_7"])
def test_other_grids_are_all_named_before_anything_is_done(data: Path, place: str) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8))
    sitk.WriteImage(image, data / f"{place}.nii.gz")
    with pytest.raises(UserError, match=rf"{place}\.nii\.gz does not lie on the grid of .*size 6 x 5 x 4"):
        run(data, two(data))
    assert not (data / "out").exists()


def test_faults_of_masks_are_told_before_anything_is_predicted(data: Path, trained: Path) -> None:
    tiny_dataset.write_image(np.full(tiny_dataset.SIZE, 9, np.uint8), data / "mask/healthy_7.nii.gz")
    with pytest.raises(UserError, match=r"mask/healthy_7\.nii\.gz holds \[9\]"):
        run(data, [find_model(None, trained)])
    assert not (data / "out").exists()


def test_names_must_differ_and_the_reference_exist(data: Path) -> None:
    good = find_model("a b", data / "good")
    with pytest.raises(UserError, match="Names of models must differ: a b, a_b"):
        run(data, [good, find_model("a_b", data / "poor")])
    with pytest.raises(UserError, match="no model 'best'"):
        run(data, [good], reference="best")


# Subsets --------------------------------------------------------------------------------------------------------------


def test_subsets_come_from_a_manifest_or_dataset_json(tmp_path: Path) -> None:
    manifest = tmp_path / "cases.csv"
    manifest.write_text("Image;Site;age\nscans/a_0000.nii.gz;north;50\nb.nii.gz;;60\nc.nii.gz;south;60\n")
    groups = read_groups(["a", "b"], ["Site"], manifest=manifest, dataset_json={})
    assert groups["Site"].to_dict() == {"a": "north", "b": "not given"}
    details = {"gasnet": {"cases": {"a": {"site": "north"}, "b": {"site": "south", "age": 3}}}}
    assert read_groups(["a", "b"], ["site"], manifest=None, dataset_json=details)["site"].tolist() == ["north", "south"]
    assert read_groups(["x"], [], manifest=None, dataset_json={}).shape == (1, 0)
    with pytest.raises(UserError, match=r"gasnet\.cases, says nothing about 1 of 2 cases: x"):
        read_groups(["a", "x"], ["site"], manifest=None, dataset_json=details)
    with pytest.raises(UserError, match="has no 'sex' of any case; it has age, site"):
        read_groups(["a", "b"], ["sex"], manifest=None, dataset_json=details)
    with pytest.raises(UserError, match="no column 'sex'"):
        read_groups(["a"], ["sex"], manifest=manifest, dataset_json={})
    many = {"gasnet": {"cases": {str(i): {"id": i} for i in range(20)}}}
    with pytest.raises(UserError, match="'id' has 20 values"):
        read_groups(map(str, range(20)), ["id"], manifest=None, dataset_json=many)


# Patients -------------------------------------------------------------------------------------------------------------


def test_differences_are_between_the_patients_of_a_manifest_or_of_the_masks(data: Path) -> None:
    details = {"diseased_7": {"patient": "p"}, "diseased_8": {"patient": "p"}, "elsewhere": {"patient": "q"}}
    (data / "mask/dataset.json").write_text(
        json.dumps({**tiny_dataset.DATASET_JSON, "gasnet": {"cases": details}}), encoding="utf-8"
    )
    cases = find_cases(two(data), data / "mask")
    assert cases.patients == {"diseased_7": "p", "diseased_8": "p"}
    result = compare_models(two(data), cases, data / "out", num_processes=1)
    dice = result.differences.set_index("metric").loc["dice"]
    gain = 1 - result.frames["poor"].loc[["diseased_7", "diseased_8"], "dice"].mean()
    assert (dice["n"], dice["difference"]) == (1, pytest.approx(gain))
    summary = (data / "out/summary.md").read_text(encoding="utf-8")
    assert "over the 2 patients or groups that the 3 cases are of" in summary

    manifest = data / "cases.csv"
    manifest.write_text("case,Patient\ndiseased_7,x\nhealthy_7,x\ndiseased_8,\n")
    assert find_cases(two(data), data / "mask", manifest=manifest).patients == {"diseased_7": "x", "healthy_7": "x"}
    manifest.write_text("case,site\ndiseased_7,north\n")
    assert find_cases(two(data), data / "mask", manifest=manifest).patients == cases.patients
    manifest.write_text("case,patient\nsomebody,x\n")
    with pytest.raises(UserError, match=r"whom somebody show, but nothing about any of the cases.* diseased_7"):
        find_cases(two(data), data / "mask", manifest=manifest)


def test_patients_of_what_a_model_learnt_from_are_not_those_of_the_cases(data: Path, trained: Path) -> None:
    details = {"cases": {"diseased_7": {"patient": "p"}, "diseased_8": {"patient": "p"}}}
    (trained / "dataset.json").write_text(json.dumps({**tiny_dataset.DATASET_JSON, "gasnet": details}))
    models = [find_model("new", trained)]
    assert find_cases(models, data / "mask", images=data / "ct").patients == {}


# The command ----------------------------------------------------------------------------------------------------------


def test_command_prints_the_table(data: Path) -> None:
    words = ["compare", "-o", data / "out", "--model", f"good={data / 'good'}", data / "poor", "--masks", data / "mask"]
    words += ["-i", data / "ct", "--reference", "poor", "--num-processes", 1]
    ended = CliRunner().invoke(app, list(map(str, words)))
    assert ended.exit_code == 0, ended.output
    text = re.sub(r"\s+", " ", ended.output)
    assert "3 cases, mean ± standard deviation" in text
    assert "Paired differences from poor" in text
    assert "100.0 ± 0.0" in text
    assert str(data / "out" / "summary.md") in ended.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the models"),
        (["-m", "=x"], "expected NAME=FOLDER"),
        (["-m", "a=nowhere"], "There is no folder nowhere"),
        (["-tr", "nnUNetTrainer"], "name it with -d"),
        (["-device", "tpu"], "The device is 'tpu'"),
    ],
)
def test_command_refuses(words: list[str], message: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["compare", "-o", str(tmp_path / "out"), *words])
    assert isinstance(ended.exception, UserError)
    assert message in str(ended.exception)
    assert not (tmp_path / "out").exists()


def test_a_manifest_says_whom_the_cases_show_or_divides_them(data: Path) -> None:
    manifest = data / "cases.csv"
    manifest.write_text("case,site\ndiseased_7,north\n")
    words = ["compare", "-o", data / "out", "-m", data / "good", "--masks", data / "mask", "--manifest", manifest]
    ended = CliRunner().invoke(app, list(map(str, words)))
    assert isinstance(ended.exception, UserError)
    assert "--manifest needs --by" in str(ended.exception)
    assert not (data / "out").exists()
    manifest.write_text("case,patient\ndiseased_7,p\ndiseased_8,p\n")
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    provenance = json.loads((data / "out/compare.json").read_text(encoding="utf-8"))
    assert provenance["patients"] == {"diseased_7": "p", "diseased_8": "p"}


def test_subsets_are_those_of_the_masks_whatever_a_model_has_learnt_from(data: Path) -> None:
    for place, sex in (("mask", "F"), ("good", "M")):
        details = {"cases": {case: {"sex": sex} for case in CASES}}
        labelled(data / place, lesion=1, ignore=2)
        content = json.loads((data / place / "dataset.json").read_text())
        (data / place / "dataset.json").write_text(json.dumps({**content, "gasnet": details}))
    words = ["compare", "-o", data / "out", "-m", data / "good", "--masks", data / "mask", "--by", "sex"]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    assert set(pd.read_csv(data / "out/cases.csv")["sex"]) == {"F"}


def test_command_takes_the_models_and_test_cases_of_a_dataset(
    data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gasnet_nnunet.raw_dataset as raw_dataset

    for name, place in (("imagesTs", "ct"), ("labelsTs", "mask"), ("lungsTs", "lung")):
        shutil.copytree(data / place, data / "raw" / DATASET / name)
    folders = raw_dataset.DatasetFolders(data / "raw" / DATASET, data / "preprocessed" / DATASET, trained.parent)
    monkeypatch.setattr(raw_dataset, "dataset_folders", lambda name: folders)
    words = ["compare", "-o", str(data / "out"), "-d", "501", "-tr", "nnUNetTrainer", "-f", "0", "-device", "cpu"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, (ended.output, ended.exception)
    assert "Predicting nnUNetTrainer took" in ended.output
    assert len(pd.read_csv(data / "out/cases.csv")) == 3
