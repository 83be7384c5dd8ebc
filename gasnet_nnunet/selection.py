"""The rule that picks `checkpoint_best` when there may be only one mask.

With one mask the validation case is the training case, whose Dice says little. Held-out diseased and healthy volumes
still carry a label each, so the score of an epoch is

    score = (pseudo Dice + separation) / 2 * calm
    separation = P(M^ of a diseased volume > M^ of a healthy one), the area under the ROC curve of mean M^ in the lungs
    calm = 1 - min(1, 10 * share of the lungs of healthy volumes called lesion)

and, as in nnU-Net, the checkpoint is the epoch with the highest moving average (0.9 old + 0.1 new). Where no
volumes are held out, training volumes take their place; without both kinds the separation is left out, without healthy
ones calm is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

MEMORY = 0.9
"""Weight of the past in the moving average, as nnU-Net's for its pseudo Dice."""


@dataclass(frozen=True)
class VolumeReading:
    """What S says of a held-out volume whose kind is known.

    Args:
        case: Name of the case.
        healthy: Its kind.
        mean: Mean M^ in the lungs, 0 to 1.
        burden: Share of the lungs that is called lesion, 0 to 1.
    """

    case: str
    healthy: bool
    mean: float
    burden: float


def separation(readings: Sequence[VolumeReading]) -> float:
    """Area under the ROC curve of mean M^ for diseased against healthy volumes; NaN unless there are both.

    Examples:
        >>> separation([VolumeReading("a", True, 0.1, 0.0), VolumeReading("b", False, 0.4, 0.2)])
        1.0
    """
    healthy = [reading.mean for reading in readings if reading.healthy]
    diseased = [reading.mean for reading in readings if not reading.healthy]
    if not healthy or not diseased:
        return math.nan
    return float(mannwhitneyu(diseased, healthy).statistic / (len(healthy) * len(diseased)))


def epoch_score(pseudo_dice: float, readings: Sequence[VolumeReading]) -> float:
    """Score of one epoch, 0 (useless) to 1, by the rule at the head of this module.

    Args:
        pseudo_dice: nnU-Net's pseudo Dice on the masked validation cases, 0 to 1.
        readings: What S says of held-out volumes; may be empty.
    """
    burdens = [reading.burden for reading in readings if reading.healthy]
    calm = 1 - min(1.0, 10 * float(np.mean(burdens))) if burdens else 1.0
    parts = [part for part in (pseudo_dice, separation(readings)) if not math.isnan(part)]
    return calm * float(np.mean(parts)) if parts else 0.0


class BestEpoch:
    """Remembers the moving average of the score and whether an epoch is the best so far."""

    def __init__(self) -> None:
        self.average: float | None = None
        self.best: float | None = None

    def update(self, score: float) -> bool:
        """Take an epoch's score; whether its moving average is the highest so far."""
        self.average = score if self.average is None else MEMORY * self.average + (1 - MEMORY) * score
        if self.best is not None and self.average <= self.best:
            return False
        self.best = self.average
        return True

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"average": self.average, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.average, self.best = state["average"], state["best"]

    def __repr__(self) -> str:
        return f"BestEpoch(average={self.average}, best={self.best})"
