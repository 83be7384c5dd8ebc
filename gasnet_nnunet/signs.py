"""Signs of trouble in a training, read from its curves: the collapse watch's verdict in words.

Each sign looks at the columns of `gasnet_progress.csv` (see `progress.TrainingCurves`). The thresholds are rules of
thumb; the text of a sign gives the numbers, so that a reader can judge by the curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from gasnet_nnunet.selection import BestEpoch

Level = Literal["good", "bad", "unknown"]
Finding = tuple[bool, str]
"""Whether a sign is there, and what the curves show."""

FEWEST_EPOCHS = 5
"""Nothing is said of a shorter training."""
LATE = 0.2
"""Share of the epochs, at least three, that are "late"."""
RISE = 0.02
"""Rise of mean M^ on healthy volumes that counts, and to at least twice its lowest."""
D_WON = 0.05
"""Mean loss of D below which it has won; ln 2 = 0.69 is a coin's."""
D_SEES = 0.05
"""Difference of D's mean outputs for diseased and healthy volumes below which it sees none."""
ALIKE = 1.5
"""Mean M^ on diseased over that on healthy volumes below which both are alike."""
EMPTY = 1e-3
"""Mean M^ on diseased volumes below which the mask is empty."""

LOW_SCALE = 1.0
"""Loss scale below which half precision has no room left; nnU-Net begins with 65536."""


@dataclass(frozen=True)
class Sign:
    """What a look at the curves says.

    Args:
        name: What was looked for.
        level: "bad" if it is there, "good" if it is not, "unknown" where the curves do not tell.
        text: The finding in a sentence or two.
    """

    name: str
    level: Level
    text: str


def signs_of_trouble(curves: pd.DataFrame) -> list[Sign]:
    """Look for every sign that the columns allow.

    Args:
        curves: One row an epoch, as `TrainingCurves.read` returns it; a trainer without G and D leaves their columns
            empty, and their signs are left out.

    Examples:
        >>> rows = pd.DataFrame({"epoch": range(9), "M_healthy": [0.1] * 6 + [0.5] * 3, "M_diseased": [0.5] * 9})
        >>> [sign.name for sign in signs_of_trouble(rows) if sign.level == "bad"]
        ['M^ rising late on healthy volumes', 'M^ alike on both kinds']
    """
    signs = []
    for name, (columns, look) in SIGNS.items():
        if not all(column in curves and curves[column].notna().any() for column in columns):
            continue
        if len(curves) < FEWEST_EPOCHS:
            signs.append(Sign(name, "unknown", f"Too early to tell: {len(curves)} epochs, {FEWEST_EPOCHS} at least."))
        else:
            found, text = look(curves)
            signs.append(Sign(name, "bad" if found else "good", text))
    return signs


def verdict(signs: Sequence[Sign]) -> str:
    """All signs in one sentence.

    Examples:
        >>> verdict([Sign("D winning", "bad", ""), Sign("an empty mask", "good", "")])
        'Signs of trouble: D winning.'
    """
    bad = [sign.name for sign in signs if sign.level == "bad"]
    if bad:
        return f"Signs of trouble: {', '.join(bad)}."
    if not signs or all(sign.level == "unknown" for sign in signs):
        return "Too early to tell."
    return "No signs of trouble."


def best_epoch(curves: pd.DataFrame) -> int | None:
    """Epoch of `checkpoint_best.pth` by the rule of `selection`; `None` without scores."""
    rule, best = BestEpoch(), None
    for epoch, score in zip(curves["epoch"], curves.get("score", []), strict=False):
        if rule.update(float(score)):
            best = int(epoch)
    return best


def not_finite(curves: pd.DataFrame) -> Finding:
    """A loss that was a number and is none any more."""
    for name in ("L_lab", *(str(column) for column in curves if str(column).startswith("L_"))):
        finite = np.isfinite(curves[name])
        if finite.any() and not bool(finite.iloc[-1]):
            rate = "learning_rate_d" if name.startswith("L_D_") else "learning_rate_s"
            last = curves.loc[finite, "epoch"].max()
            return True, f"{name} is no number any more after epoch {last:.0f}: the weights are lost. Lower {rate}."
    return False, "The losses are numbers to the end."


def overflowing(curves: pd.DataFrame) -> Finding:
    """A loss scale so low that gradients must have overflowed again and again; each time the update was left out."""
    scale = float(curves["loss_scale"].iloc[-1])
    text = f"nnU-Net's loss scale at the end: {scale:g}."
    if scale >= LOW_SCALE:
        return False, text
    return True, f"{text} S and G overflow in half precision, and their updates are left out. Lower learning_rate_s."


def healthy_rises_late(curves: pd.DataFrame) -> Finding:
    """M^ on healthy volumes far above its lowest at the end: the collapse of the paper's Figs. 4 and 5."""
    values = curves["M_healthy"]
    smooth = values.rolling(3, min_periods=1).median()
    lowest, late = float(smooth.min()), _late(values)
    where = curves["epoch"].iloc[int(np.nanargmin(smooth))]
    text = f"Mean M^ on healthy volumes: {late:.2g} at the end, {lowest:.2g} around epoch {where:.0f}, its lowest."
    if late - lowest < RISE or late < 2 * lowest:
        return False, text
    best = best_epoch(curves)
    advice = "" if best is None else f" checkpoint_best is of epoch {best}: predict with -chk checkpoint_best.pth."
    return True, f"{text} It rose late, as in a collapse.{advice}"


def alike_on_both_kinds(curves: pd.DataFrame) -> Finding:
    """M^ hardly higher on diseased than on healthy volumes."""
    healthy, diseased = _late(curves["M_healthy"]), _late(curves["M_diseased"])
    text = f"Mean M^ at the end: {diseased:.2g} on diseased, {healthy:.2g} on healthy volumes."
    if diseased > ALIKE * healthy:
        return False, text
    return True, f"{text} Less than {ALIKE:g} : 1, so S hardly tells the two kinds apart."


def mask_empty(curves: pd.DataFrame) -> Finding:
    """S that calls nothing lesion, or nothing that is in the masks."""
    diseased = _late(curves["M_diseased"])
    dice = _late(curves["pseudo_dice"]) if "pseudo_dice" in curves else math.nan
    text = f"Mean M^ on diseased volumes at the end: {diseased:.2g}; pseudo Dice: {dice:.2f}."
    if diseased < EMPTY:
        return True, f"{text} S calls next to nothing lesion. Train longer or raise learning_rate_s."
    if dice < 0.01:
        return True, (
            f"{text} What S calls lesion, above lesion_threshold, is nothing or not what the masks hold. Train longer."
        )
    return False, text


def discriminator_wins(curves: pd.DataFrame) -> Finding:
    """D's loss near 0 for long, so that G and S learn nothing from it any more."""
    columns = [name for name in curves if str(name).startswith("L_D_")]
    losses = curves[columns].mean(axis=1)
    run = int((losses < D_WON)[::-1].cumprod().sum())
    text = f"D's mean loss at the end: {_late(losses):.2g} (0.69 is a coin's)."
    if run < _late_epochs(curves):
        return False, text
    return True, (
        f"{text} Below {D_WON:g} since epoch {curves['epoch'].iloc[-run]:.0f}: D wins. Lower learning_rate_d, "
        "discriminator_layers or discriminator_features."
    )


def discriminator_blind(curves: pd.DataFrame) -> Finding:
    """D that says the same of healthy and of diseased volumes, so that it cannot lead S and G anywhere."""
    healthy, diseased = _late(curves["D_healthy"]), _late(curves["D_diseased"])
    text = f'D\'s mean "not healthy" at the end: {diseased:.2f} of diseased, {healthy:.2f} of healthy volumes.'
    if diseased - healthy >= D_SEES:
        return False, text
    return True, f"{text} S and G learn little from it. Train longer, or raise discriminator_steps or learning_rate_d."


SIGNS: dict[str, tuple[tuple[str, ...], Callable[[pd.DataFrame], Finding]]] = {
    "losses no longer numbers": (("L_lab",), not_finite),
    "updates left out": (("loss_scale",), overflowing),
    "M^ rising late on healthy volumes": (("M_healthy",), healthy_rises_late),
    "M^ alike on both kinds": (("M_healthy", "M_diseased"), alike_on_both_kinds),
    "an empty or wrong mask": (("M_diseased",), mask_empty),
    "D winning": (("L_D_healthy", "L_D_restored"), discriminator_wins),
    "D seeing no difference": (("D_healthy", "D_diseased"), discriminator_blind),
}
"""Every sign: the columns it needs, and how to look for it."""


def _late_epochs(curves: pd.DataFrame | pd.Series) -> int:
    return max(3, math.ceil(LATE * len(curves)))


def _late(values: pd.Series) -> float:
    """Mean over the late epochs that have a value."""
    return float(values.tail(_late_epochs(values)).mean())
