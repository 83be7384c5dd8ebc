"""The cases of a study's runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from gasnet_nnunet.cohort import Case, Cohort, Kind
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.splits import read_fold
from gasnet_nnunet.study.definition import Groups, Study
from gasnet_nnunet.study.splits import Deal, check_patterns, make_deals, read_groups


def cohort(labelled: int = 6, diseased: int = 3, healthy: int = 6) -> Cohort:
    counts = {Kind.LABELLED: labelled, Kind.DISEASED: diseased, Kind.HEALTHY: healthy}
    cases = {}
    for kind, count in counts.items():
        for number in range(count):
            name = f"{kind.value}_{number}"
            cases[name] = Case(name, kind, 50 if kind is Kind.LABELLED else 0, float(kind is Kind.DISEASED))
    return Cohort(cases)


def study(**changes: object) -> Study:
    return Study.model_validate({"dataset": 1, "arms": {"a": {}}, **changes})


def by_anatomy(cases: Cohort, number: int = 3) -> dict[str, str]:
    return {case: f"anatomy_{int(case.rsplit('_', 1)[1]) % number}" for case in cases.cases}


def check(deal: Deal, cases: Cohort, groups: dict[str, str]) -> None:
    """Nobody who is tested is learnt from, nobody is left out, and no mask beyond the chosen ones is seen."""
    learnt = {*deal.train, *deal.diseased, *deal.healthy}
    assert not learnt & set(deal.test)
    assert not {groups.get(case, case) for case in learnt} & {groups.get(case, case) for case in deal.test}
    assert len(deal.train) == deal.masks
    held_out = {groups.get(case, case) for case in deal.test}
    assert learnt == {case for case in cases.cases if groups.get(case, case) not in held_out}


@pytest.mark.parametrize("test", ["auto", 2, ("labelled_1", "healthy_0"), "rest"])
def test_one_set_of_test_cases(test: object) -> None:
    cases = cohort()
    deals = make_deals(study(test=test, masks=[1, 3], repeats=3), cases, {})
    assert [(deal.masks, deal.repeat) for deal in deals] == [(n, r) for n in (1, 3) for r in range(3)]
    for deal in deals:
        check(deal, cases, {})
    singles = [deal.train[0] for deal in deals[:3]]
    assert len(set(singles)) == 3
    for single, triple in zip(deals[:3], deals[3:], strict=True):
        assert set(single.train) < set(triple.train)
    if test != "rest":
        assert len({deal.test for deal in deals}) == 1
        assert any(case.startswith("healthy") for case in deals[0].test)
    else:
        assert [sum(case.startswith("labelled") for case in deal.test) for deal in deals] == [5] * 3 + [3] * 3


def test_cross_validation_tests_every_case_once() -> None:
    cases = cohort(labelled=10, healthy=5)
    deals = make_deals(study(folds=5, repeats=2), cases, {})
    assert len(deals) == 10
    tested = [case for deal in deals if deal.repeat == 0 for case in deal.test]
    assert sorted(tested) == sorted([*cases.labelled, *cases.healthy])
    for deal in deals:
        check(deal, cases, {})
        assert sum(case.startswith("healthy") for case in deal.test) == 1


@pytest.mark.parametrize("changes", [{"folds": 3}, {"test": 1}, {"test": ("anatomy_1",)}])
def test_groups_stay_on_one_side(changes: dict[str, object]) -> None:
    cases = cohort()
    groups = by_anatomy(cases)
    for deal in make_deals(study(**changes), cases, groups):
        check(deal, cases, groups)
        # A diseased case of a tested anatomy has no mask to be tested by, but is not learnt from either.
        assert not any(groups[case] in {groups[other] for other in deal.test} for case in deal.diseased)


def test_patients_of_images_ts_are_not_learnt_from() -> None:
    cases = cohort()
    groups = {**by_anatomy(cases), "new_0": "anatomy_2", "new_1": "anatomy_9"}
    (deal,) = make_deals(study(repeats=1), cases, groups, images_ts={"new_0", "new_1"})
    assert deal.test == ("new_0", "new_1")
    assert not {groups[case] for case in (*deal.train, *deal.diseased, *deal.healthy)} & {"anatomy_2"}


def test_masks_that_were_put_aside_are_tested() -> None:
    for test in (("diseased_1",), "hidden"):
        (deal,) = make_deals(study(repeats=1, test=test), cohort(), {}, truths={"diseased_1"})
        assert deal.test == ("diseased_1",)


def test_the_choice_may_be_given() -> None:
    deals = make_deals(study(labelled=["labelled_4", "labelled_2"], test=("labelled_0",), repeats=2), cohort(), {})
    assert [deal.train for deal in deals] == [("labelled_4",), ("labelled_2",)]
    assert "labelled_5" in deals[0].diseased


def test_repeats_that_are_added_leave_the_others_as_they_were() -> None:
    cases = cohort(labelled=7)
    choices = [
        [deal.train for deal in make_deals(study(masks=[1], repeats=repeats, test=("healthy_0",)), cases, {})]
        for repeats in range(1, 8)
    ]
    for fewer, more in itertools.pairwise(choices):
        assert more[: len(fewer)] == fewer
    assert len(set(choices[-1])) == 7


def test_images_ts_among_patterns_adds_its_cases() -> None:
    both = study(repeats=1, test=("imagesTs", "labelled_1"))
    (deal,) = make_deals(both, cohort(), {}, images_ts={"new_0"})
    assert set(deal.test) == {"labelled_1", "new_0"}
    alone = [
        make_deals(study(repeats=1, test=test), cohort(), {}, images_ts={"new_0"})
        for test in ("imagesTs", ("imagesTs",))
    ]
    assert [deal.test for (deal,) in alone] == [("new_0",)] * 2


def test_alike_choices_come_once() -> None:
    deals = make_deals(study(masks=[1], repeats=5, test=("labelled_0",)), cohort(labelled=2), {})
    assert len(deals) == 1


def test_nnunet_and_the_trainer_read_the_fold(tmp_path: Path) -> None:
    cases = cohort()
    (deal,) = make_deals(study(masks=[2], repeats=1, test=1), cases, {})
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([deal.entry()]))
    fold = read_fold(path, 0, cases)
    assert set(fold.train) == set(deal.train)
    assert fold.val == (deal.train[0],)
    assert set(fold.diseased) == set(deal.diseased)
    # Without the entry that says so, two patients in both lists are a mistake.
    path.write_text(json.dumps([{**deal.entry(), "val_is_learnt": False}]))
    with pytest.raises(UserError, match="both trains on and holds out"):
        read_fold(path, 0, cases)


def test_an_arm_may_learn_from_some_volumes_only() -> None:
    (deal,) = make_deals(study(repeats=1, test=1), cohort(), {})
    entry = deal.entry(["healthy_*"])
    assert entry["diseased"] == []
    assert entry["healthy"] == sorted(deal.healthy)
    with pytest.raises(UserError, match="no healthy case"):
        deal.entry(["nothing_*"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": [6], "test": 1}, "only 5 cases with a mask are left"),
        ({"folds": 7}, "folds: 7 are asked for, but cases with masks are of 6 patients"),
        ({"test": 6}, "at least one has to be learnt from"),
        ({"test": ("labeled_1",)}, "'labeled_1' is no case or group"),
        ({"test": "imagesTs"}, "no test cases with masks"),
        ({"test": "hidden"}, "no mask was put aside"),
        ({"labelled": ["diseased_0"]}, "'diseased_0' is no case with a mask"),
        ({"test": ("healthy_*", "labelled_0")}, "none is left to learn from"),
    ],
)
def test_refuses_what_the_dataset_does_not_have(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as problem:
        make_deals(study(**changes), cohort(), {})
    assert message in str(problem.value)


def test_refuses_patterns_that_match_nothing() -> None:
    cases = cohort()
    asked = study(volumes=("disesed_*", "healthy_*"), subsets={"old": "nobody"}, test=2)
    deals = make_deals(asked, cases, {})
    with pytest.raises(
        UserError, match=r"^volumes: 'disesed_\*' is no case [^:]*\. subsets: 'nobody' is no test case [^:]*\.$"
    ):
        check_patterns(asked, cases, deals)
    fine = study(volumes=("diseased_*", "healthy_*"), subsets={"all": "*"}, test=2)
    check_patterns(fine, cases, make_deals(fine, cases, {}))


def test_groups_of_a_file(tmp_path: Path) -> None:
    cases = cohort(labelled=2, diseased=0, healthy=1)
    (tmp_path / "a.json").write_text(json.dumps({"labelled_0": {"anatomy": "x"}, "labelled_1": {"anatomy": "y"}}))
    (tmp_path / "a.csv").write_text("case,scanner\nlabelled_0,x\nlabelled_1,y\n")
    expected = {"labelled_0": "x", "labelled_1": "y"}
    assert read_groups(cases, Groups(file=tmp_path / "a.json", key="anatomy"), {}) == expected
    assert read_groups(cases, Groups(file=tmp_path / "a.csv", key="scanner"), {"new_0": "p"}) == {
        **expected,
        "new_0": "p",
    }
    with pytest.raises(UserError, match="there are anatomy"):
        read_groups(cases, Groups(file=tmp_path / "a.json", key="scanner"), {})
    with pytest.raises(UserError, match=r"groups\.key is missing"):
        read_groups(cases, Groups(file=tmp_path / "a.json"), {})
    for text, message in (
        ("case,scanner\nlabelled_0,x\nlabelled_0,x\nlabelled_0,y\n", "'labelled_0' into two groups, x and y"),
        ("case,scanner\n", "holds no case"),
        ("case,scaner\nlabelled_0,x,too many\n", "there are case, scaner"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_groups(cases, Groups(file=tmp_path / "a.csv", key="scanner"), {})


def test_patients_of_images_ts_are_known_and_not_learnt_from() -> None:
    cases = Cohort({**cohort().cases, "twin": Case("twin", Kind.HEALTHY, 0, 0.0)})
    groups = read_groups(cases, None, {"twin": "p", "new_0": "p", "new_1": "p"})
    (deal,) = make_deals(study(repeats=1), cases, groups, images_ts={"new_0", "new_1"})
    assert "twin" not in deal.healthy


def test_a_file_may_not_take_a_patient_apart(tmp_path: Path) -> None:
    cases = Cohort({name: Case(name, Kind.HEALTHY, 0, 0.0) for name in ("a", "b")})
    (tmp_path / "g.json").write_text(json.dumps({"a": "x", "b": "y"}))
    with pytest.raises(UserError, match="the patient p into two groups"):
        read_groups(cases, Groups(file=tmp_path / "g.json"), {"a": "p", "b": "p"})
