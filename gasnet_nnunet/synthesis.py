"""The restored volume I_s (Eq. 1) and the pseudo-labelled volume I_ps with its label M_ps (section III-C)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gasnet_nnunet.losses import lesion_probability


def restore(diseased: Tensor, generated: Tensor, mask: Tensor) -> Tensor:
    """I_s = M^ * I_g + (1 - M^) * I_d (Eq. 1).

    Args:
        diseased: I_d, (B, C, Z, Y, X) in [-1, 1].
        generated: I_g = G(I_d), same shape and range.
        mask: M^, (B, 1, Z, Y, X) in [0, 1].

    Shape: -> (B, C, Z, Y, X) in [-1, 1]
    """
    return mask * generated + (1 - mask) * diseased


def paste_lesions(diseased: Tensor, healthy: Tensor, mask: Tensor) -> Tensor:
    """I_ps = I_h * (1 - m) + I_d * m, with m = M^(I_d) * M_lung(I_h).

    Args:
        diseased: I_d.
        healthy: I_h.
        mask: m; scaled by a factor below 1 it makes the same lesion fainter, with the tissue of I_h shining through.

    Shape: (B, C, Z, Y, X), (B, C, Z, Y, X), (B, 1, Z, Y, X) -> (B, C, Z, Y, X), in the units of the images
    """
    return healthy * (1 - mask) + diseased * mask


def soft_border(mask: Tensor) -> Tensor:
    """The mean of a binary mask over the 3 x 3 voxels around each in its slice: pasted with it, nothing has a cut edge.

    Shape: (B, 1, Z, Y, X), 0 or 1 -> (B, 1, Z, Y, X) in [0, 1]
    """
    return functional.avg_pool3d(mask, (1, 3, 3), stride=1, padding=(0, 1, 1))


def visible_lesions(
    diseased: Tensor, mask: Tensor, lungs: Tensor, *, contrast: float, radius: Sequence[int], bag: bool
) -> Tensor:
    """Where what S calls lesion is denser than the rest of its own lungs.

    S teaches itself by L_ps: once it calls lung tissue lesion in which nothing can be seen, pasting that tissue labels
    nothing as lesion, and the next S finds more of it.

    Args:
        diseased: I_d, (B, C, Z, Y, X) in [-1, 1].
        mask: M^, (B, 1, Z, Y, X) in [0, 1].
        lungs: Lung mask of I_d, (B, 1, Z, Y, X), 0 or 1. What of it is no lesion by M^ is compared with.
        contrast: Least difference, in shares of the window, of the mean of a lesion in a box around each voxel.
        radius: Half the box in voxels, (Z, Y, X).
        bag: The batch is a bag of patches of one patient, whose lungs are compared with as a whole.

    Shape: -> (B, 1, Z, Y, X), 0 or 1; 1 where any channel shows it, 0 where there are no lungs to compare with
    """
    rest = lungs * (mask < 0.5)
    over = (0, 2, 3, 4) if bag else (2, 3, 4)
    voxels = rest.sum(over, keepdim=True)
    usual = (diseased * rest).sum(over, keepdim=True) / voxels.clamp(min=1)
    weighted, weight = diseased * mask, mask
    for axis, half in enumerate(radius):
        window = [2 * half + 1 if other == axis else 1 for other in range(3)]
        padding = [n // 2 for n in window]
        weighted, weight = (functional.avg_pool3d(x, window, stride=1, padding=padding) for x in (weighted, weight))
    difference = weighted / weight.clamp(min=torch.finfo(weight.dtype).tiny) - usual
    # The window is 2 wide.
    return ((difference > 2 * contrast).any(1, keepdim=True) & (voxels > 0)).to(mask.dtype)


def pseudo_label(
    logits: Tensor,
    lungs: Tensor,
    *,
    regions: bool,
    labels: tuple[int, ...],
    ignore_label: int,
    margin: float,
    ignore_above: float | None = None,
) -> Tensor:
    """M_ps: lesion where m >= 0.5 + xi, background where m <= 0.5 - xi, ignored in between.

    With several lesion classes a lesion voxel takes the most probable of them. For regions, region r is set where
    m_r >= 0.5 + xi, and the last channel, nnU-Net's ignore channel, where any region is in between.

    Args:
        logits: S(I_d), (B, K, Z, Y, X).
        lungs: Lung mask of the healthy volume, (B, 1, Z, Y, X), 0 or 1.
        regions: Whether the channels are regions.
        labels: Label value of each lesion channel (channels 1 to K-1 of label maps); unused for regions.
        ignore_label: Value of ignored voxels of label maps; unused for regions.
        margin: The paper's xi.
        ignore_above: Ignore voxels with m above this as well.

    Shape: -> (B, 1, Z, Y, X) int16 label map, or (B, K + 1, Z, Y, X) bool for regions
    """
    floor = 0.5 - margin if ignore_above is None else ignore_above
    if regions:
        m = logits.float().sigmoid() * lungs
        unsure = ((m > floor) & (m < 0.5 + margin)).any(1, keepdim=True)
        return torch.cat([m >= 0.5 + margin, unsure], 1)
    m = lesion_probability(logits, regions=False) * lungs
    values = torch.tensor(labels, dtype=torch.int16, device=logits.device)
    classes = values[logits[:, 1:].argmax(1, keepdim=True)]
    target = torch.where(m >= 0.5 + margin, classes, torch.zeros_like(classes))
    return torch.where((m > floor) & (m < 0.5 + margin), torch.full_like(target, ignore_label), target)
