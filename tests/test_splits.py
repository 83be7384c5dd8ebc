"""Label-aware splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gasnet_nnunet.cohort import Case, Cohort, Kind
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.splits import check_splits, make_splits, read_fold, write_splits

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
    assert "mine" in path.read_text()
    path.write_text("no JSON at all")
    assert not write_splits(path, make_splits(cohort_of(3, 6, 6)))
    assert path.read_text() == "no JSON at all"
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
