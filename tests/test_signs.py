"""Signs of trouble in the curves of a training, each found where it is and only there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gasnet_nnunet.progress import TrainingCurves
from gasnet_nnunet.selection import BestEpoch
from gasnet_nnunet.signs import SIGNS, best_epoch, signs_of_trouble, verdict

EPOCHS = 20
FALLING = np.linspace(0.1, 0.01, EPOCHS)
WELL: dict[str, Any] = {
    "epoch": range(EPOCHS),
    "L_lab": np.linspace(0.5, -0.8, EPOCHS),
    "L_D_healthy": 0.5,
    "L_D_restored": 0.6,
    "L_D_diseased": 0.4,
    "D_healthy": 0.2,
    "D_diseased": 0.8,
    "M_healthy": FALLING,
    "M_diseased": 0.2,
    "pseudo_dice": np.linspace(0.0, 0.8, EPOCHS),
    "score": np.linspace(0.1, 0.9, EPOCHS),
    "loss_scale": 2.0**14,
}


def curves(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({**WELL, **columns})


def found(rows: pd.DataFrame) -> list[str]:
    return [sign.name for sign in signs_of_trouble(rows) if sign.level == "bad"]


def text_of(rows: pd.DataFrame, name: str) -> str:
    return next(sign.text for sign in signs_of_trouble(rows) if sign.name == name)


def late(start: int, before: Any, after: float) -> np.ndarray:
    return np.where(np.arange(EPOCHS) < start, before, after)


def test_nothing_is_found_in_a_good_training() -> None:
    signs = signs_of_trouble(curves())
    assert [sign.name for sign in signs] == list(SIGNS)
    assert {sign.level for sign in signs} == {"good"}
    assert verdict(signs) == "No signs of trouble."


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("losses no longer numbers", {"L_lab": late(12, -0.5, math.nan)}),
        ("losses no longer numbers", {"L_lab": late(12, -0.5, math.inf)}),
        ("losses no longer numbers", {"L_D_healthy": late(12, 0.5, math.nan)}),
        ("updates left out", {"loss_scale": late(12, 2.0**14, 2.0**-9)}),
        ("M^ rising late on healthy volumes", {"M_healthy": late(15, FALLING, 0.12)}),
        ("M^ alike on both kinds", {"M_diseased": 0.02, "M_healthy": 0.018}),
        ("an empty or wrong mask", {"M_diseased": late(5, 0.1, 2e-4), "M_healthy": late(5, 0.05, 1e-5)}),
        ("an empty or wrong mask", {"pseudo_dice": 0.0}),
        ("D winning", {f"L_D_{kind}": late(14, 0.5, 0.01) for kind in ("healthy", "restored", "diseased")}),
        ("D seeing no difference", {"D_healthy": 0.78}),
    ],
)
def test_each_sign_is_found_alone(name: str, columns: dict[str, Any]) -> None:
    rows = curves(**columns)
    assert found(rows) == [name]
    assert verdict(signs_of_trouble(rows)) == f"Signs of trouble: {name}."


@pytest.mark.parametrize(
    "columns",
    [
        {"L_ps": late(5, math.nan, 0.3)},  # not on yet
        {"M_healthy": FALLING[::-1] / 8},  # little, although it doubles
        {"M_healthy": late(3, 0.3, 0.02)},  # early, and gone
        {"M_healthy": [0.02] * 10 + [0.15] + [0.02] * 9},  # one epoch
        {"L_D_healthy": late(18, 0.5, 0.0), "L_D_restored": 0.01, "L_D_diseased": 0.01},  # not long
    ],
)
def test_passing_moments_are_no_signs(columns: dict[str, Any]) -> None:
    assert found(curves(**columns)) == []


def test_texts_name_epochs_and_what_to_do() -> None:
    rising = curves(M_healthy=late(15, FALLING, 0.2), score=late(15, WELL["score"], 0.0))
    assert "checkpoint_best is of epoch 14" in text_of(rising, "M^ rising late on healthy volumes")
    won = curves(**{f"L_D_{kind}": late(14, 0.5, 0.01) for kind in ("healthy", "restored", "diseased")})
    assert "since epoch 14" in text_of(won, "D winning")
    assert "after epoch 11" in text_of(curves(L_lab=late(12, -0.5, math.nan)), "losses no longer numbers")


def test_short_training_is_not_judged() -> None:
    signs = signs_of_trouble(curves().head(4))
    assert {sign.level for sign in signs} == {"unknown"}
    assert verdict(signs) == "Too early to tell."
    assert verdict([]) == "Too early to tell."
    assert signs_of_trouble(TrainingCurves(Path("nowhere")).read()) == []


def test_baseline_has_no_signs_of_g_and_d() -> None:
    columns = ["epoch", "L_lab", "M_healthy", "M_diseased", "pseudo_dice", "score"]
    rows = curves().assign(**{name: math.nan for name in WELL if name not in columns})
    assert not [sign for sign in signs_of_trouble(rows) if sign.name.startswith("D ")]
    assert len(signs_of_trouble(rows)) == 4


def test_best_epoch_is_that_of_the_checkpoint() -> None:
    scores = np.random.default_rng(0).uniform(size=EPOCHS)
    rule = BestEpoch()
    saved = [epoch for epoch, score in enumerate(scores) if rule.update(score)]
    assert best_epoch(curves(score=scores)) == saved[-1]
    assert best_epoch(curves().drop(columns="score")) is None
