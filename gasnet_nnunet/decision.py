"""The probability from which on S calls a voxel lesion, as biases of its heads.

nnU-Net takes the most probable class, so it calls lesion what is lesion with a probability above 0.5. With biases that
are lower by the logit of another threshold, everything that knows the weights alone (`nnUNetv2_predict`, an exported
model, ONNX) decides by that threshold. Training goes on with S as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gasnet_nnunet.errors import UserError

HEADS_KEY = "gasnet_head_biases"
"""Where a checkpoint of ours or an exported one holds the heads' biases as training has them."""
HEAD_BIAS = re.compile(r"(^|\.)seg_layers\.\d+\.bias$")
"""Names of the heads' biases in S's weights; nnU-Net finds the heads of any network by the same name."""


def head_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases of S's heads, a copy; empty for a network of other names or heads without biases."""
    return {name: value.clone() for name, value in weights.items() if HEAD_BIAS.search(name)}


def decide_at(weights: Mapping[str, Tensor], threshold: float, *, regions: bool) -> dict[str, Tensor]:
    """Weights of S whose M^ is 0.5 where it was the threshold: logit(m') = logit(m) - logit(threshold).

    Of several classes the most probable one has to be that much above the background.

    Args:
        weights: State of S; not changed.
        threshold: Above 0 and below 1.
        regions: Whether the channels are regions; else the first one is the background.

    Raises:
        UserError: S has no heads that could carry a threshold other than 0.5.
    """
    if threshold == 0.5:
        return dict(weights)
    biases = head_biases(weights)
    if not biases:
        raise UserError(
            f"lesion_threshold is {threshold:g}, but this network has no biases named seg_layers.N.bias to carry it. "
            "Set lesion_threshold=0.5 for it."
        )
    for bias in biases.values():
        bias[0 if regions else 1 :] -= math.log(threshold / (1 - threshold))
    return {**weights, **biases}


def weights_in_training(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that a checkpoint predicts with, without the threshold in their heads.

    Args:
        checkpoint: Content of any of nnU-Net's; what is not ours or from before there was a threshold has none.
    """
    return {**checkpoint["network_weights"], **checkpoint.get(HEADS_KEY, {})}


def carried_logit(checkpoint: Mapping[str, Any]) -> float:
    """Logit of the threshold that a checkpoint's heads carry: what they take off the lesions' logits, 0 for none."""
    heads, shifted = checkpoint.get(HEADS_KEY, {}), checkpoint["network_weights"]
    # The last channel is a lesion's, with and without a background; all heads carry the same.
    shifts = [float(heads[name][-1] - shifted[name][-1]) for name in heads.keys() & shifted.keys()]
    return shifts[0] if shifts else 0.0


def called_lesion(logits: Tensor, threshold: float, *, regions: bool) -> Tensor:
    """What a checkpoint with this threshold calls lesion, from logits without it.

    Shape: (B, K, Z, Y, X) -> (B, 1, Z, Y, X), bool
    """
    most = logits.amax(1, keepdim=True) if regions else logits[:, 1:].amax(1, keepdim=True) - logits[:, :1]
    return most > math.log(threshold / (1 - threshold))
