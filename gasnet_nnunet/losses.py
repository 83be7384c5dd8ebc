"""The losses of GASNet as pure functions on tensors. Symbols as in the paper, arXiv 2010.09456, section III.

S's outputs are logits z of shape (B, K, Z, Y, X). For label maps channel 0 is the background and a softmax follows; for
region-based training (`regions=True`) every channel is a region of its own behind a sigmoid. All losses are computed in
single precision from logits, so that half precision cannot saturate them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

HEALTHY = 0.0
"""D's label of a real healthy volume."""
NOT_HEALTHY = 1.0
"""D's label of everything else."""


def lesion_logit(logits: Tensor, *, regions: bool) -> Tensor:
    """Logit of "any lesion": `logsumexp(z_1..z_K-1) - z_0`, or the maximum over regions.

    Shape: logits (B, K, Z, Y, X) -> (B, 1, Z, Y, X), in single precision.
    """
    logits = logits.float()
    if regions:
        return logits.amax(1, keepdim=True)
    return logits[:, 1:].logsumexp(1, keepdim=True) - logits[:, :1]


def lesion_probability(logits: Tensor, *, regions: bool) -> Tensor:
    """M^, the probability of "any lesion": `1 - softmax(z)_0`, or the maximum of the regions' sigmoids.

    Shape: logits (B, K, Z, Y, X) -> (B, 1, Z, Y, X), in [0, 1], in single precision.
    """
    return lesion_logit(logits, regions=regions).sigmoid()


def healthy_loss(outputs: Sequence[Tensor], weights: Sequence[float], *, regions: bool) -> Tensor:
    """L_hea = CE(S(I_h), 0): cross-entropy of a healthy volume's prediction against an all-zero mask.

    The Dice part of nnU-Net's loss has no gradient on an all-zero mask, so this is the cross-entropy alone.

    Args:
        outputs: Logits of each deep-supervision level, (B, K, Z, Y, X) each, finest first.
        weights: Weight of each level.
        regions: Whether the channels are regions.

    Shape: -> scalar
    """
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for logits, weight in zip(outputs, weights, strict=True):
        if weight:
            z = logits.float()
            voxelwise = functional.softplus(z) if regions else z.logsumexp(1) - z[:, 0]
            total = total + weight * voxelwise.mean()
    return total


def mil_loss(logits: Tensor, *, regions: bool, bag: bool) -> Tensor:
    """L_MIL = -log max_v M^(I_d)_v: at least one voxel of a diseased volume is lesion.

    In single precision from logits, `softplus(-max_v logit_v)`, because the logarithm of a half-precision probability
    is infinite for a confident miss.

    Args:
        logits: (B, K, Z, Y, X)
        regions: Whether the channels are regions.
        bag: The batch is a bag of patches of one patient: the maximum is over all of it. Otherwise every item is a
            volume: maximum per item, then the mean.

    Shape: -> scalar
    """
    z = lesion_logit(logits, regions=regions).flatten(1)
    return functional.softplus(-(z.max() if bag else z.amax(1))).mean()


def outside_loss(logits: Tensor, near: Tensor, *, regions: bool) -> Tensor:
    """L_out: cross-entropy of a diseased volume's prediction against zero, far from its lungs.

    Args:
        logits: (B, K, Z, Y, X)
        near: Lungs and what is near them, where it says nothing, (B, 1, Z, Y, X), 0 or 1.
        regions: Whether the channels are regions.

    Shape: -> scalar, the mean over all voxels with those near the lungs counted as 0
    """
    return (functional.softplus(lesion_logit(logits, regions=regions)) * (1 - near)).mean()


def suspicion_loss(logits: Tensor, lungs: Tensor, *, regions: bool) -> Tensor:
    """L_sus: every voxel in the lungs of a diseased volume counts as lesion, to be weighed against L_hea.

    Learning from negative and unlabelled voxels: with this at weight w and L_hea at weight 1, the M^ that minimises
    both is `w p_d / (w p_d + p_h)`, where p_d and p_h are how often such a voxel occurs in diseased and in healthy
    volumes. It is near w for what both have, and above 0.5 only for what diseased volumes show 1 / w times as often.

    Args:
        logits: (B, K, Z, Y, X)
        lungs: Lung mask of the diseased volume, (B, 1, Z, Y, X), 0 or 1.
        regions: Whether the channels are regions.

    Shape: -> scalar, the mean over all voxels, as L_hea, with those outside the lungs counted as 0
    """
    return (functional.softplus(-lesion_logit(logits, regions=regions)) * lungs).mean()


def judged_as(logit: Tensor, label: float) -> Tensor:
    """Binary cross-entropy of D's logits against one label for all of them (`HEALTHY` or `NOT_HEALTHY`).

    With `HEALTHY` for D(I_s) and D(I_g) this is the non-saturating form of what S and G minimise; with the true labels
    it is a part of what D minimises (L_GAN, L_IdToD, L_IgToD).

    Shape: (B,) -> scalar
    """
    logit = logit.float()
    return functional.binary_cross_entropy_with_logits(logit, torch.full_like(logit, label))


def reconstruction_loss(reconstructed: Tensor, healthy: Tensor, kind: str) -> Tensor:
    """L_recons = MSE(G(I_h), I_h), or the mean absolute error of the authors' code ("l1").

    Shape: (B, C, Z, Y, X), (B, C, Z, Y, X), both in [-1, 1] -> scalar
    """
    if kind == "mse":
        return functional.mse_loss(reconstructed.float(), healthy.float())
    return functional.l1_loss(reconstructed.float(), healthy.float())


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` unchanged, with its gradient multiplied by `factor`.

    On M^ inside I_s with factor 1 / lambda_S, S sees `L_S + L_GAN / lambda_S` while G sees L_GAN.
    """
    constant = x.detach()
    return constant + factor * (x - constant)
