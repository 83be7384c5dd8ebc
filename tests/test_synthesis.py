"""I_s, I_ps and M_ps, and nnU-Net's own losses on M_ps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from scipy.special import expit, softmax
from torch import Tensor, nn

from gasnet_nnunet.intensity import IntensityWindow
from gasnet_nnunet.losses import lesion_probability
from gasnet_nnunet.synthesis import paste_lesions, pseudo_label, restore, soft_border, visible_lesions

SEEDS = st.integers(0, 10_000)
DICE = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
IGNORE = 9


def random(seed: int, *shape: int) -> Tensor:
    """Uniform in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def logits_of(m: float) -> list[float]:
    """Two logits whose lesion probability is `m`."""
    return [0.0, math.log(m / (1 - m))]


@given(SEEDS)
def test_restore_is_equation_one(seed: int) -> None:
    diseased, generated = random(seed, 2, 2, 2, 3, 4, 5) * 2 - 1
    mask = random(seed + 1, 2, 1, 3, 4, 5)
    restored = restore(diseased, generated, mask)
    m, i_g, i_d = (t.double().numpy() for t in (mask, generated, diseased))
    np.testing.assert_allclose(restored, m * i_g + (1 - m) * i_d, atol=1e-6)
    assert restored.abs().max() <= 1 + 1e-6
    assert torch.equal(restore(diseased, generated, torch.zeros_like(mask)), diseased)
    assert torch.equal(restore(diseased, generated, torch.ones_like(mask)), generated)


@given(SEEDS)
def test_pasting_takes_lesions_from_the_diseased_volume(seed: int) -> None:
    diseased, healthy = random(seed, 2, 2, 2, 3, 4, 5) * 4 - 2
    mask = random(seed + 1, 2, 1, 3, 4, 5)
    pasted = paste_lesions(diseased, healthy, mask)
    m, i_d, i_h = (t.double().numpy() for t in (mask, diseased, healthy))
    np.testing.assert_allclose(pasted, i_h * (1 - m) + i_d * m, atol=1e-6)
    assert torch.equal(paste_lesions(diseased, healthy, torch.zeros_like(mask)), healthy)
    assert torch.equal(paste_lesions(diseased, healthy, torch.ones_like(mask)), diseased)


@given(SEEDS)
def test_pasting_means_the_same_in_both_units(seed: int) -> None:
    window = IntensityWindow([(-1.5, 2.5)])
    diseased, healthy = random(seed, 2, 1, 1, 3, 4, 5) * 4 - 1.5
    mask = random(seed + 1, 1, 1, 3, 4, 5)
    inside = paste_lesions(window.to_window(diseased), window.to_window(healthy), mask)
    torch.testing.assert_close(window.to_window(paste_lesions(diseased, healthy, mask)), inside, atol=1e-5, rtol=0)


@given(
    seed=SEEDS,
    labels=st.sampled_from([(1,), (1, 2), (1, 2, 3)]),
    margin=st.floats(0, 0.45),
    share=st.none() | st.floats(0, 1),
)
def test_pseudo_label_of_label_maps(seed: int, labels: tuple[int, ...], margin: float, share: float | None) -> None:
    ignore_above = None if share is None else share * (0.5 - margin)
    logits = (random(seed, 2, 1 + len(labels), 3, 4, 5) - 0.5) * 12
    lungs = (random(seed + 1, 2, 1, 3, 4, 5) > 0.3).float()
    found = pseudo_label(
        logits, lungs, regions=False, labels=labels, ignore_label=IGNORE, margin=margin, ignore_above=ignore_above
    )
    assert found.shape == (2, 1, 3, 4, 5)
    assert found.dtype == torch.int16
    p = softmax(logits.double().numpy(), axis=1)
    m = (1 - p[:, 0]) * lungs[:, 0].numpy()
    floor = 0.5 - margin if ignore_above is None else ignore_above
    expected = np.full(m.shape, IGNORE)
    expected[m <= floor] = 0
    sure = m >= 0.5 + margin
    expected[sure] = np.array(labels)[p[:, 1:].argmax(1)][sure]
    # Voxels within rounding of a threshold may fall on either side.
    clear = np.min([np.abs(m - floor), np.abs(m - 0.5 - margin)], axis=0) > 1e-5
    clear |= m == 0
    np.testing.assert_array_equal(found[:, 0].numpy()[clear], expected[clear])


def test_thresholds_belong_to_lesion_and_background() -> None:
    m = torch.tensor([0.2, 0.25, 0.5, 0.75, 0.8])
    logits = torch.stack([torch.zeros(5), torch.logit(m)])[None, :, None, None]
    assert lesion_probability(logits, regions=False).flatten().tolist() == pytest.approx(m.tolist())
    lungs = torch.ones(1, 1, 1, 1, 5)

    def label(margin: float, ignore_above: float | None = None) -> list[int]:
        found = pseudo_label(
            logits, lungs, regions=False, labels=(1,), ignore_label=2, margin=margin, ignore_above=ignore_above
        )
        return found.flatten().tolist()

    # These two are the thresholds themselves, not values within rounding of them.
    assert logits[0, 1, 0, 0, [1, 2]].sigmoid().tolist() == [0.25, 0.5]
    assert label(0.25) == [0, 0, 2, 1, 1]
    assert label(0.0) == [0, 0, 1, 1, 1]
    assert label(0.25, ignore_above=0.22) == [0, 2, 2, 1, 1]
    assert label(0.25, ignore_above=0.0) == [2, 2, 2, 1, 1]


def test_nothing_is_pasted_or_ignored_outside_the_healthy_lungs() -> None:
    logits = torch.tensor([logits_of(0.99), logits_of(0.5), logits_of(0.01)]).T[None, :, None, None]
    lungs = torch.zeros(1, 1, 1, 1, 3)
    found = pseudo_label(logits, lungs, regions=False, labels=(1,), ignore_label=2, margin=0.3, ignore_above=0.0)
    assert found.flatten().tolist() == [0, 0, 0]


@given(seed=SEEDS, regions=st.integers(1, 3), margin=st.floats(0, 0.45))
def test_pseudo_label_of_regions(seed: int, regions: int, margin: float) -> None:
    logits = (random(seed, 2, regions, 3, 4, 5) - 0.5) * 12
    lungs = (random(seed + 1, 2, 1, 3, 4, 5) > 0.3).float()
    found = pseudo_label(logits, lungs, regions=True, labels=(), ignore_label=0, margin=margin)
    assert found.shape == (2, regions + 1, 3, 4, 5)
    assert found.dtype == torch.bool
    m = expit(logits.double().numpy()) * lungs.numpy()
    between = (m > 0.5 - margin) & (m < 0.5 + margin)
    clear = ((np.abs(np.abs(m - 0.5) - margin) > 1e-5) | (m == 0)).all(1)
    expected = np.concatenate([m >= 0.5 + margin, between.any(1, keepdims=True)], axis=1)
    np.testing.assert_array_equal(found.numpy().swapaxes(0, 1)[:, clear], expected.swapaxes(0, 1)[:, clear])


def label_maps_case(labels: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    ignore_label = max(labels) + 1
    logits = (random(3, 2, 1 + len(labels), 4, 5, 6) - 0.5) * 8
    lungs = torch.ones(2, 1, 4, 5, 6)
    target = pseudo_label(logits, lungs, regions=False, labels=labels, ignore_label=ignore_label, margin=0.3)
    loss = DC_and_CE_loss(DICE, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
    return loss, logits, target, (target == ignore_label).expand_as(logits)


def regions_case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    logits = (random(3, 2, 2, 4, 5, 6) - 0.5) * 8
    target = pseudo_label(logits, torch.ones(2, 1, 4, 5, 6), regions=True, labels=(), ignore_label=0, margin=0.3)
    loss = DC_and_BCE_loss({}, {**DICE, "do_bg": True}, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    return loss, logits, target, target[:, -1:].expand_as(logits)


@pytest.mark.parametrize("kind", ["one class", "three classes", "regions"])
def test_nnunets_loss_ignores_what_is_unsure(kind: str) -> None:
    cases = {"one class": (1,), "three classes": (1, 2, 3)}
    loss, logits, target, ignored = regions_case() if kind == "regions" else label_maps_case(cases[kind])
    # S's logits of I_ps are other logits than those of I_d that made M_ps.
    other = (random(8, *logits.shape) - 0.5) * 4
    other.requires_grad_()
    # nnU-Net hands its losses label maps in single precision, see its training transforms.
    value = loss(other, target if kind == "regions" else target.float())
    value.backward()
    assert other.grad is not None
    assert 0 < ignored.float().mean() < 1
    assert (other.grad[ignored] == 0).all()
    assert (other.grad[~ignored] != 0).float().mean() > 0.5
    with torch.no_grad():
        changed = torch.where(ignored, other + 50 * random(9, *logits.shape), other)
        torch.testing.assert_close(loss(changed, target if kind == "regions" else target.float()), value)


def test_a_volume_of_which_nothing_is_sure_has_a_finite_loss() -> None:
    logits = torch.zeros(1, 2, 3, 3, 3)
    target = pseudo_label(
        logits, torch.ones(1, 1, 3, 3, 3), regions=False, labels=(1,), ignore_label=2, margin=0.3
    ).float()
    assert (target == 2).all()
    other = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    loss = DC_and_CE_loss(DICE, {}, ignore_label=2, dice_class=MemoryEfficientSoftDiceLoss)(other, target)
    loss.backward()
    assert loss.isfinite()
    assert other.grad is not None
    assert other.grad.abs().max() < 1e-3


def test_learning_from_pseudo_labels_ranks_agreement_over_contradiction() -> None:
    loss, logits, target, _ = label_maps_case((1, 2, 3))
    assert loss(logits * 2, target.float()) < loss(-logits, target.float())


def test_a_soft_border_is_the_mean_of_the_neighbours_in_its_slice() -> None:
    mask = torch.zeros(1, 1, 3, 5, 5)
    mask[0, 0, 1, 1:4, 1:4] = 1
    soft = soft_border(mask)
    assert soft[0, 0, 1, 2, 2] == 1
    assert soft[0, 0, 1, 1, 2] == pytest.approx(6 / 9)
    assert soft[0, 0, 1, 0, 0] == pytest.approx(1 / 9)
    assert not soft[0, 0, [0, 2]].any()


# What may be pasted ---------------------------------------------------------------------------------------------------

DENSE = (slice(2, 5), slice(4, 8), slice(4, 8))
PLAIN = (slice(2, 5), slice(4, 8), slice(14, 18))
DARK = (slice(6, 9), slice(14, 18), slice(4, 8))


def lungs_with_three_findings() -> tuple[Tensor, Tensor, Tensor]:
    """I_d at -0.5 with a denser, a like and a darker place that S calls lesion; in the second lies a vessel."""
    image = torch.full((1, 1, 10, 22, 22), -0.5) + 0.05 * torch.randn(1, 1, 10, 22, 22)
    mask = torch.full((1, 1, 10, 22, 22), 1e-4)
    for place, value in ((DENSE, -0.3), (PLAIN, -0.5), (DARK, -0.8)):
        image[(0, 0, *place)] = value
        mask[(0, 0, *place)] = 0.9
    image[0, 0, :, 5, 15] = 0.3
    lungs = torch.zeros_like(mask)
    lungs[..., 1:-1, 2:-2, 2:-2] = 1
    image[lungs == 0] = 1.0
    return image, mask, lungs


def seen_in(image: Tensor, mask: Tensor, lungs: Tensor, contrast: float = 0.05, *, bag: bool = False) -> Tensor:
    return visible_lesions(image, mask, lungs, contrast=contrast, radius=(1, 3, 3), bag=bag)


def test_lesions_are_pasted_where_they_can_be_seen() -> None:
    torch.manual_seed(0)
    image, mask, lungs = lungs_with_three_findings()
    seen = seen_in(image, mask, lungs)
    assert seen.shape == mask.shape
    assert set(seen.unique().tolist()) <= {0.0, 1.0}
    assert seen[(0, 0, *DENSE)].all()
    assert not seen[(0, 0, *PLAIN)].any()
    assert not seen[(0, 0, *DARK)].any()
    assert not seen_in(image, mask, lungs, contrast=0.2)[(0, 0, *DENSE)].any()


def test_one_channel_is_enough_to_see_a_lesion() -> None:
    torch.manual_seed(0)
    image, mask, lungs = lungs_with_three_findings()
    seen = seen_in(torch.cat([torch.zeros_like(image), image], 1), mask, lungs)
    assert seen.shape == mask.shape
    assert seen[(0, 0, *DENSE)].all()
    assert not seen[(0, 0, *PLAIN)].any()


def test_a_bag_is_compared_with_all_lungs_of_its_patient() -> None:
    torch.manual_seed(0)
    image, mask, lungs = lungs_with_three_findings()
    full, found = torch.full_like(image, -0.3), torch.full_like(mask, 0.9)  # a patch that is all lesion,
    found[..., :2] = 1e-4  # but for what S leaves out at its border
    patches = torch.cat([image, image, full]), torch.cat([mask, mask, found]), torch.cat([lungs, lungs, lungs])
    assert not seen_in(*patches)[2].any()
    assert seen_in(*patches, bag=True)[2].all()
    assert not seen_in(*patches, bag=True)[(0, 0, *PLAIN)].any()


def test_nothing_is_seen_without_lungs_to_compare_with() -> None:
    image, mask, lungs = lungs_with_three_findings()
    assert not seen_in(image, mask, torch.zeros_like(lungs)).any()
    assert not seen_in(image, torch.full_like(mask, 0.9), lungs).any()
