"""The rule that picks `checkpoint_best`."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from gasnet_nnunet.selection import BestEpoch, VolumeReading, epoch_score, separation

# Few distinct values, so that ties are common.
MEANS = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), min_size=1, max_size=8)


def readings(diseased: list[float], healthy: list[float], burden: float = 0.0) -> list[VolumeReading]:
    """Volumes with these means of M^; every healthy one has this share of its lungs called lesion."""
    return [VolumeReading(f"d{n}", False, mean, 0.3) for n, mean in enumerate(diseased)] + [
        VolumeReading(f"h{n}", True, mean, burden) for n, mean in enumerate(healthy)
    ]


@given(MEANS, MEANS)
def test_separation_is_the_chance_of_the_right_order(diseased: list[float], healthy: list[float]) -> None:
    pairs = [(d > h) + 0.5 * (d == h) for d in diseased for h in healthy]
    assert separation(readings(diseased, healthy)) == pytest.approx(sum(pairs) / len(pairs))


def test_separation_needs_both_kinds() -> None:
    assert math.isnan(separation([]))
    assert math.isnan(separation(readings([0.5], [])))
    assert math.isnan(separation(readings([], [0.5])))


@pytest.mark.parametrize(
    ("dice", "volumes", "score"),
    [
        (0.6, readings([0.5, 0.4], [0.1, 0.2]), (0.6 + 1.0) / 2),
        (0.6, readings([0.1, 0.2], [0.5, 0.4]), (0.6 + 0.0) / 2),
        (0.6, readings([0.5], [0.1], burden=0.03), (0.6 + 1.0) / 2 * 0.7),
        (0.6, readings([0.5], [0.1], burden=0.1), 0.0),
        (0.6, readings([0.5], [0.1], burden=0.9), 0.0),
        (0.6, readings([], [0.1], burden=0.05), 0.6 * 0.5),
        (0.6, readings([0.5], []), 0.6),
        (0.6, [], 0.6),
        (math.nan, readings([0.5], [0.1]), 1.0),
        (math.nan, [], 0.0),
    ],
)
def test_the_score_is_the_documented_rule(dice: float, volumes: list[VolumeReading], score: float) -> None:
    assert epoch_score(dice, volumes) == pytest.approx(score)


@given(st.floats(0, 1) | st.just(math.nan), MEANS | st.just([]), MEANS | st.just([]), st.floats(0, 1))
def test_a_score_is_never_nan(dice: float, diseased: list[float], healthy: list[float], burden: float) -> None:
    assert 0 <= epoch_score(dice, readings(diseased, healthy, burden)) <= 1


def test_a_diverged_network_scores_nothing() -> None:
    assert epoch_score(0.0, readings([math.nan, math.nan], [math.nan, math.nan])) == 0.0


def test_a_collapse_that_keeps_its_dice_scores_less() -> None:
    good = epoch_score(0.7, readings([0.2, 0.3], [0.01, 0.02], burden=0.001))
    repaints_healthy_lungs = epoch_score(0.7, readings([0.4, 0.5], [0.2, 0.3], burden=0.06))
    sees_no_difference = epoch_score(0.7, readings([0.2, 0.3], [0.3, 0.2], burden=0.001))
    assert good > sees_no_difference > repaints_healthy_lungs


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_best_epoch_has_nnunets_highest_moving_average(scores: list[float]) -> None:
    best = BestEpoch()
    logger = MetaLogger(output_folder=".", resume=False)
    is_best = []
    for epoch, score in enumerate(scores):
        is_best.append(best.update(score))
        logger.log("mean_fg_dice", score, epoch)
    averages = logger.get_value("ema_fg_dice", step=None)
    assert best.average == pytest.approx(averages[-1])
    assert best.best == pytest.approx(max(averages))
    for epoch in range(1, len(scores)):
        lead = averages[epoch] - max(averages[:epoch])
        # nnU-Net rounds in another order, so what is equal may differ in the last digit.
        assert is_best[epoch] == (lead > 0) or abs(lead) < 1e-12
    assert is_best[0]


def test_an_epoch_that_is_no_better_is_not_the_best() -> None:
    best = BestEpoch()
    assert [best.update(0.0) for _ in range(3)] == [True, False, False]


def test_it_goes_on_from_a_checkpoint() -> None:
    whole, resumed = BestEpoch(), BestEpoch()
    scores = [0.2, 0.6, 0.5, 0.1, 0.9, 0.8]
    expected = [whole.update(score) for score in scores]
    first = BestEpoch()
    found = [first.update(score) for score in scores[:3]]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [resumed.update(score) for score in scores[3:]]
    assert found == expected
    assert resumed.state_dict() == whole.state_dict()
