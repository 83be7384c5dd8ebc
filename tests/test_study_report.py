"""Tables of a study, out of scores that are written down here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pandas as pd

from gasnet_nnunet.evaluation import to_markdown
from gasnet_nnunet.study.definition import Study
from gasnet_nnunet.study.report import _cells, _differences, _fitting
from gasnet_nnunet.study.workspace import Workspace

ARMS = {"supervised": {"title": "Supervised"}, "gasnet": {"title": "GASNet"}}
RUNS = pd.DataFrame(
    {"arm": list(ARMS), "masks": 1, "repeat": 0, "fold": 0, "state": "done", "updates": 100, "training_seconds": 60}
)


def workspace(groups: dict[str, str] | None = None) -> Workspace:
    study = Study.model_validate({"dataset": 1, "masks": [1], "arms": ARMS})
    return cast(Workspace, SimpleNamespace(study=study, groups=groups or {}))


def scores(**of_arms: dict[str, float]) -> pd.DataFrame:
    """Results of runs whose Dice is given for each case."""
    rows: list[dict[str, Any]] = [
        {
            "arm": arm,
            "masks": 1,
            "repeat": 0,
            "fold": 0,
            "case": case,
            "dice": dice,
            "lesion_ml": 1.0,
            "ignored_ml": 0.0,
        }
        for arm, dices in of_arms.items()
        for case, dice in dices.items()
    ]
    return pd.DataFrame(rows).assign(sensitivity=0.5, specificity=0.5, false_positive_lung=float("nan"))


def test_several_lesion_classes_have_a_dice_each() -> None:
    results = scores(supervised={"a": 0.5, "b": 0.5}, gasnet={"a": 0.6, "b": 0.7})
    results = results.assign(dice_ggo=[0.1, 0.3, 0.2, 0.5], dice_consolidation=[0.4, float("nan"), 0.8, float("nan")])
    header, _, supervised, gasnet = to_markdown(_cells(workspace(), RUNS, results)).splitlines()
    assert header.split(" | ")[-5:-3] == ["Dice ggo %", "Dice consolidation %"]
    assert supervised.split(" | ")[-5:-3] == ["20.0 ± 14.1", "40.0"]
    assert gasnet.split(" | ")[-5:-3] == ["35.0 ± 21.2", "80.0"]
    # Of a subset in which no case has a class, and of runs that are not done, the columns are the same.
    for cells in (_cells(workspace(), RUNS, results, "b"), _cells(workspace(), RUNS, results, "nobody")):
        assert to_markdown(cells).splitlines()[0] == header
    (text,) = _differences(workspace(), RUNS, results)
    assert "| GASNet | Dice ggo % | 2 | +15.0 |" in text


def test_differences_are_between_patients() -> None:
    results = scores(supervised={"a": 0.5, "b": 0.5, "c": 0.5}, gasnet={"a": 0.6, "b": 0.8, "c": 0.7})
    (text,) = _differences(workspace({"a": "p", "b": "p"}), RUNS, results)
    assert "over the 2 patients or groups that the 3 cases are of" in text
    assert "| GASNet | Dice % | 2 | +20.0 |" in text
    (text,) = _differences(workspace(), RUNS, results)
    assert "over the cases." in text
    assert "| GASNet | Dice % | 3 | +20.0 |" in text


def test_overlays_show_what_the_others_are_compared_with() -> None:
    arms = [f"arm{number}" for number in range(9)]
    study = Study.model_validate({"dataset": 1, "arms": {arm: {} for arm in arms}, "reference": "arm8"})
    assert _fitting(study, arms) == ["arm8", "arm0", "arm1", "arm2", "arm3", "arm4"]
    assert _fitting(study, ["arm2", "arm1"]) == ["arm2", "arm1"]
