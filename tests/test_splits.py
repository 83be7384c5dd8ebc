"""Label-aware splits."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.cohort import Case, Cohort, Kind
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.splits import check_splits, make_repeats, make_splits, read_fold, write_splits

OURS = {"train": ["labelled_000"], "val": ["labelled_001"], "diseased": ["diseased_000"], "healthy": ["healthy_000"]}


def cohort_of(labelled: int, diseased: int, healthy: int) -> Cohort:
    cases = {}
    for count, kind in ((labelled, Kind.LABELLED), (diseased, Kind.DISEASED), (healthy, Kind.HEALTHY)):
        for number in range(count):
            name = f"{kind.value}_{number:03d}"
            cases[name] = Case(name, kind, 50 if kind is Kind.LABELLED else 0, float(kind is Kind.DISEASED))
    return Cohort(cases)


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@given(labelled=st.integers(1, 12), diseased=st.integers(0, 130), healthy=st.integers(1, 130))
def test_every_dealt_fold_can_be_trained(labelled: int, diseased: int, healthy: int) -> None:
    cohort = cohort_of(labelled, diseased, healthy)
    splits = make_splits(cohort)
    assert len(splits) == min(5, labelled)
    for fold in splits:
        assert fold["train"]
        assert fold["val"]
        assert fold["healthy"]
        if labelled > 1:
            assert sorted(fold["train"] + fold["val"]) == cohort.labelled
        assert sorted(fold["diseased"] + fold["val_diseased"]) == cohort.diseased
        assert sorted(fold["healthy"] + fold["val_healthy"]) == cohort.healthy
        for held_out, count in ((fold["val_diseased"], diseased), (fold["val_healthy"], healthy)):
            assert len(held_out) <= 20
            assert bool(held_out) == (count >= 3)
    assert sorted(case for fold in splits for case in fold["val"]) == cohort.labelled


def test_one_mask_is_trained_and_validated_on() -> None:
    (fold,) = make_splits(cohort_of(1, 10, 10))
    assert fold["train"] == fold["val"] == ["labelled_000"]
    assert len(fold["val_diseased"]) == 2


def test_folds_hold_out_different_volumes_and_are_reproducible() -> None:
    cohort = cohort_of(5, 10, 10)
    splits = make_splits(cohort)
    assert splits == make_splits(cohort)
    assert splits != make_splits(cohort, seed=1)
    assert sorted(case for fold in splits for case in fold["val_diseased"]) == cohort.diseased


def test_written_splits_are_read_back(tmp_path: Path) -> None:
    cohort, path = cohort_of(3, 6, 6), tmp_path / "splits_final.json"
    splits = make_splits(cohort)
    assert write_splits(path, splits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["splits_final.json"]
    fold = read_fold(path, 1, cohort)
    assert {key: list(value) for key, value in vars(fold).items()} == splits[1]
    assert check_splits(path, cohort) == 3
    assert not fold.validates_on_training_cases


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path / "splits_final.json", [{"train": ["mine"], "val": ["mine"]}])
    assert not write_splits(path, make_splits(cohort_of(3, 6, 6)))
    assert "mine" in path.read_text(encoding="utf-8")
    path.write_text("no JSON at all")
    assert not write_splits(path, make_splits(cohort_of(3, 6, 6)))
    assert path.read_text(encoding="utf-8") == "no JSON at all"
    path.unlink()
    assert write_splits(path, make_splits(cohort_of(3, 6, 6)))
    assert write_splits(path, make_splits(cohort_of(3, 6, 6))), "the same splits again are no conflict"


def test_fold_all_trains_on_everything() -> None:
    cohort = cohort_of(3, 30, 4)
    fold = read_fold(Path("unused.json"), "all", cohort)
    assert fold.train == fold.val == tuple(cohort.labelled)
    assert fold.diseased == tuple(cohort.diseased)
    assert len(fold.val_diseased) == 10
    assert fold.val_healthy == fold.healthy
    assert fold.validates_on_training_cases


def test_a_plain_split_of_all_cases_is_understood(tmp_path: Path) -> None:
    cohort = cohort_of(2, 2, 2)
    train = ["labelled_000", "diseased_000", "healthy_000"]
    val = ["labelled_001", "diseased_001", "healthy_001"]
    fold = read_fold(save(tmp_path / "s.json", [{"train": train, "val": val}]), 0, cohort)
    assert fold.train == ("labelled_000",)
    assert fold.val == ("labelled_001",)
    assert (fold.diseased, fold.healthy) == (("diseased_000",), ("healthy_000",))
    assert (fold.val_diseased, fold.val_healthy) == (("diseased_001",), ("healthy_001",))


def test_a_plain_split_of_the_masks_takes_all_other_volumes(tmp_path: Path) -> None:
    cohort = cohort_of(2, 2, 3)
    path = save(tmp_path / "s.json", [{"train": ["labelled_000"], "val": ["labelled_001", "healthy_002"]}])
    fold = read_fold(path, 0, cohort)
    assert fold.diseased == ("diseased_000", "diseased_001")
    assert fold.healthy == ("healthy_000", "healthy_001")
    assert fold.val_healthy == ("healthy_002",)


def test_a_masked_case_may_be_listed_as_diseased(tmp_path: Path) -> None:
    entry = {**OURS, "diseased": ["labelled_002"]}
    fold = read_fold(save(tmp_path / "s.json", [entry]), 0, cohort_of(3, 0, 1))
    assert fold.diseased == ("labelled_002",)
    assert fold.val_healthy == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": []}, "no case with a mask in 'train'"),
        ({"val": []}, "no case with a mask in 'val'"),
        ({"healthy": []}, "no healthy case"),
        ({"train": ["labelled_000", "who"]}, "'train' names who"),
        ({"train": ["diseased_001"]}, "takes labelled cases, but names diseased_001, which is diseased"),
        ({"healthy": ["labelled_002"]}, "takes healthy cases"),
        ({"val": ["labelled_000", "labelled_001"]}, "both trains on and holds out labelled_000"),
        ({"val_diseased": ["diseased_000"]}, "both trains on and holds out diseased_000"),
        ({"diseased": ["labelled_001"]}, "both trains on and holds out labelled_001"),
        ({"diseased": ["labelled_000"]}, "in two training lists"),
    ],
)
def test_folds_that_cannot_be_trained_are_refused(tmp_path: Path, change: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_fold(save(tmp_path / "s.json", [{**OURS, **change}]), 0, cohort_of(3, 3, 3))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (["diseased_000", "healthy_000"], ["labelled_000"], "no case with a mask in 'train'"),
        (["labelled_000", "healthy_000"], ["diseased_000"], "no case with a mask in 'val'"),
        (["labelled_000", "diseased_000"], ["labelled_001"], "no healthy case"),
    ],
)
def test_plain_folds_that_cannot_be_trained_are_refused(
    tmp_path: Path, train: list[str], val: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_fold(save(tmp_path / "s.json", [{"train": train, "val": val}]), 0, cohort_of(3, 3, 3))


@pytest.mark.parametrize("fold", [2, 7, -1])
def test_a_fold_beyond_the_file_is_refused(tmp_path: Path, fold: int) -> None:
    cohort, path = cohort_of(2, 3, 3), tmp_path / "s.json"
    write_splits(path, make_splits(cohort))
    with pytest.raises(UserError, match=r"has 2 folds \(0 to 1\)"):
        read_fold(path, fold, cohort)


@pytest.mark.parametrize("text", ["{ torn", "[]", "{}", '["a"]', '[{"train": ["a"]}]', '[{"train": "a", "val": []}]'])
def test_files_that_are_no_splits_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"s\.json"):
        read_fold(path, 0, cohort_of(1, 1, 1))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no split file"):
        read_fold(tmp_path / "s.json", 0, cohort_of(1, 1, 1))


# By patient -----------------------------------------------------------------------------------------------------------


def with_patients(cohort: Cohort, **patients: str) -> Cohort:
    """The cohort with the patients of some cases, by case."""
    return Cohort({name: replace(case, patient=patients.get(name)) for name, case in cohort.cases.items()})


@given(
    labelled=st.integers(2, 9),
    volumes=st.integers(0, 40),
    patients=st.integers(2, 12),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_no_patient_is_on_both_sides_of_a_fold(
    labelled: int, volumes: int, patients: int, seed: int, data: st.DataObject
) -> None:
    cohort = cohort_of(labelled, volumes, volumes + 1)
    draw = st.lists(st.integers(0, patients), min_size=len(cohort.cases), max_size=len(cohort.cases))
    owners = dict(zip(cohort.cases, data.draw(draw), strict=True))
    # Patient 0 stands for not known; one healthy case of nobody else's is always there to learn from.
    known = {case: f"p{owner}" for case, owner in owners.items() if owner and case != "healthy_000"}
    cohort = with_patients(cohort, **known)
    masked = {known.get(case, case) for case in cohort.labelled}
    splits = make_splits(cohort, seed=seed)
    assert len(splits) == min(5, len(masked))
    assert sorted(case for fold in splits for case in fold["val"]) == cohort.labelled
    for fold in splits:
        learnt = {known.get(case, case) for key in ("train", "diseased", "healthy") for case in fold[key]}
        held_out = {known.get(case, case) for key in ("val", "val_diseased", "val_healthy") for case in fold[key]}
        if len(masked) > 1:
            assert not learnt & held_out
        everywhere = [case for cases in fold.values() for case in cases]
        assert set(everywhere) == set(cohort.cases)


def test_folds_are_balanced_by_masks() -> None:
    cohort = with_patients(cohort_of(6, 0, 3), labelled_000="a", labelled_001="a", labelled_002="a")
    splits = make_splits(cohort, folds=2)
    assert sorted(len(fold["val"]) for fold in splits) == [3, 3]


def test_masks_of_one_patient_are_trained_and_validated_on(tmp_path: Path) -> None:
    cohort = with_patients(cohort_of(2, 1, 1), labelled_000="a", labelled_001="a")
    path = tmp_path / "s.json"
    assert write_splits(path, make_splits(cohort))
    fold = read_fold(path, 0, cohort)
    assert fold.train == fold.val == ("labelled_000", "labelled_001")


@pytest.mark.parametrize("folds", [1, 4])
def test_more_folds_than_patients_with_masks_are_refused(folds: int) -> None:
    with pytest.raises(UserError, match=rf"{folds} folds were asked for, but there are 3 masks of 3 patients"):
        make_splits(cohort_of(3, 3, 3), folds=folds)


def test_more_than_five_folds_hold_out_all_volumes_in_turn() -> None:
    cohort = cohort_of(8, 16, 16)
    splits = make_splits(cohort, folds=8)
    assert sorted(case for fold in splits for case in fold["val_healthy"]) == cohort.healthy


def test_a_fold_without_a_healthy_case_to_learn_from_is_refused() -> None:
    cohort = with_patients(cohort_of(2, 0, 2), labelled_000="a", healthy_000="a", healthy_001="a")
    with pytest.raises(UserError, match="no healthy case to learn from"):
        make_splits(cohort)


# Repeats with other masks ---------------------------------------------------------------------------------------------


@given(masks=st.integers(2, 12), labelled=st.integers(1, 3), repeats=st.integers(1, 5), seed=st.integers(0, 3))
def test_repeats_differ_in_the_masks_only(masks: int, labelled: int, repeats: int, seed: int) -> None:
    cohort = cohort_of(masks, 10, 10)
    if math.comb(masks - 1, labelled) < repeats:
        with pytest.raises(UserError, match="Ask for fewer"):
            make_repeats(cohort, labelled=labelled, repeats=repeats, seed=seed)
        return
    folds = make_repeats(cohort, labelled=labelled, repeats=repeats, seed=seed)
    assert len({tuple(fold["train"]) for fold in folds}) == repeats
    for fold in folds:
        assert len(fold["train"]) == labelled
        hidden = set(fold["diseased"]) & set(cohort.labelled)
        assert sorted([*fold["train"], *hidden, *fold["val"]]) == cohort.labelled
        for key in ("val", "healthy", "val_healthy", "val_diseased"):
            assert fold[key] == folds[0][key]
        assert set(fold["diseased"]) - hidden == set(folds[0]["diseased"]) - set(cohort.labelled)


def test_no_mask_is_chosen_twice_while_there_are_others() -> None:
    folds = make_repeats(cohort_of(12, 3, 3), labelled=2, repeats=3)
    assert len({case for fold in folds for case in fold["train"]}) == 6


def test_repeats_keep_patients_together(tmp_path: Path) -> None:
    owners = {f"labelled_{number:03d}": "abc"[number // 2] for number in range(6)}
    cohort = with_patients(cohort_of(6, 4, 4), **owners, diseased_000="a", diseased_001="b", diseased_002="c")
    folds = make_repeats(cohort, labelled=1, repeats=4)
    for fold in folds:
        (held_out,) = {owners[case] for case in fold["val"]}
        assert len(fold["val"]) == 2
        for case in ("diseased_000", "diseased_001", "diseased_002"):
            assert (case in fold["val_diseased"]) >= (cohort.cases[case].patient == held_out)
            assert (case in fold["diseased"]) != (case in fold["val_diseased"])
    write_splits(tmp_path / "s.json", folds)
    assert check_splits(tmp_path / "s.json", cohort) == 4


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """A dataset of label files: four masks, two of them of one patient, two diseased and four healthy cases."""
    folder = nnunet_folders / "raw" / "Dataset007_Tiny"
    kinds = {"labelled": (4, 1), "diseased": (2, 2), "healthy": (4, 0)}
    for kind, (count, value) in kinds.items():
        for number in range(count):
            label = np.full((2, 4, 4), value if kind == "diseased" else 0, np.uint8)
            label[0, 0] = value
            tiny_dataset.write_image(label, folder / "labelsTr" / f"{kind}_{number}.nii.gz")
            tiny_dataset.write_image(label, folder / "imagesTr" / f"{kind}_{number}_0000.nii.gz")
    cases = {"labelled_0": {"patient": "x", "severity": 2}, "labelled_1": {"patient": "x"}}
    content = {**tiny_dataset.DATASET_JSON, "numTraining": 10, "gasnet": {"cases": cases}}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def run(*words: str) -> str:
    """Run the command; what it refuses is raised as by `main`."""
    result = CliRunner().invoke(app, ["splits", "-d", "7", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_command_writes_a_split_by_patient_before_planning(raw: Path, nnunet_folders: Path) -> None:
    output = run()
    path = nnunet_folders / "preprocessed" / "Dataset007_Tiny" / "splits_final.json"
    folds = json.loads(path.read_text(encoding="utf-8"))
    assert len(folds) == 3
    assert [fold["val"] for fold in folds].count(["labelled_0", "labelled_1"]) == 1
    assert "the patients of 2 of 10 cases" in output
    assert "-f 0 1 2" in output
    assert "gasnet-nnunet plan -d 7" in output
    assert str(path) in output
    content = path.read_text(encoding="utf-8")
    assert str(path) in run(), "the same split again is no conflict"
    assert path.read_text(encoding="utf-8") == content


def test_command_repeats_with_other_masks_and_says_what_nnunet_wants(raw: Path, nnunet_folders: Path) -> None:
    output = run("--labelled", "1", "--repeats", "2")
    assert "want each case validated in one fold only" in output
    folds = json.loads(
        (nnunet_folders / "preprocessed" / "Dataset007_Tiny" / "splits_final.json").read_text(encoding="utf-8")
    )
    assert [len(fold["train"]) for fold in folds] == [1, 1]
    assert folds[0]["val"] == folds[1]["val"]


def test_command_keeps_an_existing_split(raw: Path, nnunet_folders: Path) -> None:
    run()
    folder = nnunet_folders / "preprocessed" / "Dataset007_Tiny"
    path = folder / "splits_final.json"
    first = path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="exists already and is another split"):
        run("--folds", "2")
    assert path.read_text(encoding="utf-8") == first
    assert f"is now {path}.old." in run("--folds", "2", "--overwrite")
    second = path.read_text(encoding="utf-8")
    assert (folder / "splits_final.json.old").read_text(encoding="utf-8") == first
    run("--seed", "3", "--overwrite")
    assert (folder / "splits_final.json.old").read_text(encoding="utf-8") == first
    assert (folder / "splits_final.json.old.2").read_text(encoding="utf-8") == second


def test_command_minds_trained_models(raw: Path, nnunet_folders: Path) -> None:
    run()
    trained = nnunet_folders / "results" / "Dataset007_Tiny" / "GASNetTrainer__GASNetPlans__3d_fullres"
    for fold in ("fold_1", "fold_all"):
        (trained / fold).mkdir(parents=True)
        (trained / fold / "checkpoint_best.pth").touch()
    run()
    with pytest.raises(UserError, match="fold_1 were trained on another split") as refused:
        run("--folds", "2")
    assert "fold_all" not in str(refused.value)
    assert "trained on the old split, to which their validation belongs:" in run("--folds", "2", "--overwrite")


def test_command_works_where_only_preprocessed_data_are_left(raw: Path, nnunet_folders: Path) -> None:
    folder = nnunet_folders / "preprocessed" / "Dataset007_Tiny"
    shutil.copytree(raw / "labelsTr", folder / "gt_segmentations")
    shutil.copy(raw / "dataset.json", folder)
    (folder / "GASNetPlans.json").touch()
    shutil.rmtree(raw)
    assert "nnUNetv2_train 7 3d_fullres 0 -tr GASNetTrainer" in run("--folds", "2")
    assert len(json.loads((folder / "splits_final.json").read_text(encoding="utf-8"))) == 2


def test_command_notices_cases_that_were_added_since_planning(raw: Path, nnunet_folders: Path) -> None:
    folder = nnunet_folders / "preprocessed" / "Dataset007_Tiny" / "gt_segmentations"
    shutil.copytree(raw / "labelsTr", folder)
    assert "other cases than" not in run()
    (folder / "healthy_3.nii.gz").unlink()
    assert "has other cases than nnUNet_raw. Plan again" in run()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "2", "--labelled", "1"], "give either"),
        (["--repeats", "2"], "--repeats needs --labelled"),
        (["--folds", "4"], "4 folds were asked for, but there are 4 masks of 3 patients"),
    ],
)
def test_command_refuses_options_that_do_not_fit(raw: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*words)


def test_command_names_a_split_in_the_raw_folder(raw: Path) -> None:
    (raw / "splits_final.json").write_text("[]")
    with pytest.raises(UserError, match=r"raw/Dataset007_Tiny/splits_final\.json is a split already"):
        run()


def test_patients_must_stand_in_the_details_of_cases(raw: Path) -> None:
    content = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    content["gasnet"]["cases"] = {"labelled_0": "x"}
    (raw / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="must have"):
        run()
