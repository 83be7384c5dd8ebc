"""The losses against their equations in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from scipy.special import expit, log_softmax, softmax
from torch import Tensor
from torch.nn import functional

from gasnet_nnunet.losses import (
    HEALTHY,
    NOT_HEALTHY,
    healthy_loss,
    judged_as,
    lesion_logit,
    lesion_probability,
    mil_loss,
    outside_loss,
    reconstruction_loss,
    scale_gradient,
    suspicion_loss,
)
from gasnet_nnunet.synthesis import restore

SEEDS = st.integers(0, 10_000)
CHANNELS = st.integers(2, 4)
SPREAD = st.floats(0.1, 30)


def draw(seed: int, channels: int, spread: float, *, batch: int = 2) -> tuple[Tensor, np.ndarray]:
    """Logits (B, K, 3, 4, 5) in single precision for us and in double precision for the reference."""
    logits = torch.randn(batch, channels, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * spread
    return logits, logits.double().numpy()


def uniform(value: float, channels: int = 2) -> Tensor:
    """Label-map logits that say "lesion" by `value` everywhere."""
    logits = torch.zeros(1, channels, 2, 2, 2)
    logits[:, 1] = value
    return logits


@given(SEEDS, CHANNELS, SPREAD)
def test_lesion_probability_of_label_maps(seed: int, channels: int, spread: float) -> None:
    logits, z = draw(seed, channels, spread)
    found = lesion_probability(logits, regions=False)
    assert found.shape == (2, 1, 3, 4, 5)
    np.testing.assert_allclose(found[:, 0], 1 - softmax(z, axis=1)[:, 0], rtol=1e-4, atol=1e-6)


@given(SEEDS, st.integers(1, 4), SPREAD)
def test_lesion_probability_of_regions(seed: int, channels: int, spread: float) -> None:
    logits, z = draw(seed, channels, spread)
    found = lesion_probability(logits, regions=True)
    np.testing.assert_allclose(found[:, 0], expit(z).max(1), rtol=1e-4, atol=1e-6)


@given(SEEDS, CHANNELS, SPREAD)
def test_healthy_loss_is_the_cross_entropy_against_background(seed: int, channels: int, spread: float) -> None:
    logits, z = draw(seed, channels, spread)
    expected = -log_softmax(z, axis=1)[:, 0].mean()
    np.testing.assert_allclose(healthy_loss([logits], [1.0], regions=False), expected, rtol=1e-5, atol=1e-5)


def test_healthy_loss_is_the_cross_entropy_part_of_nnunets_losses() -> None:
    logits, _ = draw(0, 3, 3.0)
    label_maps = DC_and_CE_loss({}, {}, weight_dice=0)
    expected = label_maps(logits, torch.zeros(2, 1, 3, 4, 5))
    torch.testing.assert_close(healthy_loss([logits], [1.0], regions=False), expected)
    regions = DC_and_BCE_loss({}, {}, weight_dice=0)
    torch.testing.assert_close(healthy_loss([logits], [1.0], regions=True), regions(logits, torch.zeros_like(logits)))


def test_deep_supervision_weighs_the_levels() -> None:
    levels = [uniform(1.0), uniform(2.0), torch.full((1, 2, 1, 1, 1), math.nan)]
    single = [float(healthy_loss([level], [1.0], regions=False)) for level in levels[:2]]
    # A level of weight zero is left out, as in nnU-Net, not multiplied by zero.
    found = healthy_loss(levels, [0.6, 0.4, 0.0], regions=False)
    assert float(found) == pytest.approx(0.6 * single[0] + 0.4 * single[1])
    with pytest.raises(ValueError, match="zip"):
        healthy_loss(levels, [1.0], regions=False)


@given(SEEDS, CHANNELS, SPREAD)
def test_mil_loss_is_the_logarithm_of_the_maximum(seed: int, channels: int, spread: float) -> None:
    logits, z = draw(seed, channels, spread, batch=3)
    log_background = log_softmax(z, axis=1)[:, 0]
    m = -np.expm1(log_background)
    expected_volumes = -np.log(m.max((1, 2, 3))).mean()
    expected_bag = -np.log(m.max())
    found = [float(mil_loss(logits, regions=False, bag=bag)) for bag in (False, True)]
    np.testing.assert_allclose(found, [expected_volumes, expected_bag], rtol=1e-4, atol=1e-6)


@given(SEEDS, st.integers(1, 4), SPREAD)
def test_mil_loss_of_regions(seed: int, channels: int, spread: float) -> None:
    logits, z = draw(seed, channels, spread, batch=3)
    expected = np.logaddexp(0, -z.max((1, 2, 3, 4))).mean()
    np.testing.assert_allclose(mil_loss(logits, regions=True, bag=False), expected, rtol=1e-4, atol=1e-6)


def test_one_lesion_satisfies_a_bag_but_not_every_volume() -> None:
    logits = torch.cat([uniform(-8.0), uniform(-8.0), uniform(8.0)])
    assert mil_loss(logits, regions=False, bag=True) < 1e-3
    assert float(mil_loss(logits, regions=False, bag=False)) == pytest.approx(2 / 3 * 8, abs=1e-2)


@pytest.mark.parametrize("regions", [False, True])
def test_mil_gradient_reaches_the_voxel_of_the_maximum_alone(regions: bool) -> None:
    logits = torch.full((2, 2, 3, 3, 3), -3.0)
    logits[:, 0] = 3.0 if not regions else -3.0
    logits[0, 1, 1, 2, 0] = -1.0
    logits[1, 1, 2, 2, 2] = 0.5
    logits.requires_grad_()
    mil_loss(logits, regions=regions, bag=False).backward()
    assert logits.grad is not None
    touched = logits.grad[:, 1].nonzero().tolist()
    assert touched == [[0, 1, 2, 0], [1, 2, 2, 2]]


@pytest.mark.parametrize("regions", [False, True])
def test_a_confident_miss_in_half_precision_is_finite_and_can_be_unlearnt(regions: bool) -> None:
    logits = torch.full((1, 2, 2, 2, 2), -100.0, dtype=torch.float16)
    if not regions:
        logits[:, 0] = 100.0
    naive = -logits.sigmoid()[:, 1].amax().log()
    assert naive.isinf()
    logits.requires_grad_()
    loss = mil_loss(logits, regions=regions, bag=False)
    assert float(loss.detach()) == pytest.approx(100.0 if regions else 200.0)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # d softplus(-z) / dz = -1 here, shared among the voxels (and regions) that tie for the maximum.
    lesion_channels = logits.grad if regions else logits.grad[:, 1:]
    assert float(lesion_channels.float().sum()) == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize("value", [-65504.0, -100.0, 100.0, 65504.0])
@pytest.mark.parametrize("regions", [False, True])
def test_no_loss_overflows_at_the_ends_of_half_precision(value: float, regions: bool) -> None:
    logits = torch.full((2, 3, 2, 2, 2), value, dtype=torch.float16)
    logits[:, 0] = -value
    logits.requires_grad_()
    total = (
        healthy_loss([logits], [1.0], regions=regions)
        + mil_loss(logits, regions=regions, bag=False)
        + judged_as(logits.flatten(), HEALTHY)
        + judged_as(logits.flatten(), NOT_HEALTHY)
        + lesion_probability(logits, regions=regions).sum()
    )
    assert total.dtype == torch.float32
    assert total.isfinite()
    total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@given(SEEDS, st.floats(0.1, 50), st.sampled_from([HEALTHY, NOT_HEALTHY]))
def test_judged_as_is_the_binary_cross_entropy(seed: int, spread: float, label: float) -> None:
    logit = torch.randn(5, generator=torch.Generator().manual_seed(seed)) * spread
    z = logit.double().numpy()
    sign = 1 if label == HEALTHY else -1
    np.testing.assert_allclose(judged_as(logit, label), np.logaddexp(0, sign * z).mean(), rtol=1e-5, atol=1e-6)


def test_a_volume_that_d_sees_through_still_teaches() -> None:
    logit = torch.tensor([20.0], requires_grad=True)
    judged_as(logit, HEALTHY).backward()
    assert logit.grad is not None
    assert float(logit.grad) == pytest.approx(1.0)


@given(SEEDS)
def test_reconstruction_loss(seed: int) -> None:
    a, b = torch.rand(2, 2, 1, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1)
    difference = (a.double() - b.double()).numpy()
    np.testing.assert_allclose(reconstruction_loss(a, b, "mse"), (difference**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(reconstruction_loss(a, b, "l1"), np.abs(difference).mean(), rtol=1e-5)
    assert reconstruction_loss(a.half(), b.half(), "mse").dtype == torch.float32


def test_good_predictions_cost_less_than_bad_ones() -> None:
    diseased, empty = uniform(6.0), uniform(-6.0)
    for regions in (False, True):
        assert mil_loss(diseased, regions=regions, bag=False) < mil_loss(empty, regions=regions, bag=False)
        assert healthy_loss([empty], [1.0], regions=regions) < healthy_loss([diseased], [1.0], regions=regions)
    says_healthy, says_not = torch.tensor([-4.0]), torch.tensor([4.0])
    assert judged_as(says_healthy, HEALTHY) < judged_as(says_not, HEALTHY)
    assert judged_as(says_not, NOT_HEALTHY) < judged_as(says_healthy, NOT_HEALTHY)
    image = torch.linspace(-1, 1, 8).view(1, 1, 2, 2, 2)
    for kind in ("mse", "l1"):
        assert reconstruction_loss(image, image, kind) == 0
        assert reconstruction_loss(image * 0.9, image, kind) < reconstruction_loss(image * 0.5, image, kind)


@given(SEEDS, st.floats(1e-4, 2))
def test_scaling_a_gradient_leaves_the_value(seed: int, factor: float) -> None:
    x = torch.rand(1, 1, 3, 4, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, factor))


def test_s_sees_the_adversary_divided_by_lambda_and_g_sees_it_whole() -> None:
    diseased = torch.full((1, 1, 2, 2, 2), 0.5)
    gradients = []
    for factor in (1.0, 1 / 100):
        generated = torch.full_like(diseased, -0.5).requires_grad_()
        mask = torch.full_like(diseased, 0.25).requires_grad_()
        restore(diseased, generated, scale_gradient(mask, factor)).square().sum().backward()
        assert mask.grad is not None
        assert generated.grad is not None
        gradients.append((mask.grad, generated.grad))
    (mask_full, generated_full), (mask_scaled, generated_scaled) = gradients
    assert mask_full.abs().min() > 0
    torch.testing.assert_close(mask_scaled * 100, mask_full)
    torch.testing.assert_close(generated_scaled, generated_full)


def test_lesion_logit_of_two_classes_is_their_difference() -> None:
    logits, z = draw(1, 2, 5.0)
    np.testing.assert_allclose(lesion_logit(logits, regions=False)[:, 0], z[:, 1] - z[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_lesions_far_from_the_lungs_cost_and_those_near_them_do_not(regions: bool) -> None:
    zone = torch.zeros(1, 1, 5, 9, 9)
    zone[..., 1:4, 2:7, 2:7] = 1
    logits = torch.full((1, 1 if regions else 2, 5, 9, 9), -20.0)
    if not regions:
        logits[:, 0] = 20.0

    def loss(*voxel: int) -> float:
        guess = logits.clone()
        guess[(0, slice(None), *voxel)] = torch.tensor([20.0] if regions else [-20.0, 20.0])
        return float(outside_loss(guess, zone, regions=regions))

    for near in ((2, 4, 4), (1, 4, 4), (2, 6, 2), (3, 2, 6)):
        assert loss(*near) < 1e-6
    for far in ((0, 4, 4), (2, 7, 4), (2, 4, 1), (4, 0, 0)):
        assert loss(*far) > 0.01


@pytest.mark.parametrize(("weight", "times"), [(0.05, 1), (0.05, 20), (0.2, 100)])
def test_suspicion_weighs_how_often_diseased_and_healthy_volumes_show_a_voxel(weight: float, times: int) -> None:
    odds = weight * times
    logits = torch.zeros(1, 2, 2, 3, 3)
    logits[:, 1] = math.log(odds)
    logits.requires_grad_()
    everywhere = torch.ones(1, 1, 2, 3, 3)
    in_diseased = times * weight * suspicion_loss(logits, everywhere, regions=False)
    (in_diseased + healthy_loss([logits], [1.0], regions=False)).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)
    torch.testing.assert_close(lesion_probability(logits, regions=False), odds / (1 + odds) * everywhere)


@pytest.mark.parametrize("regions", [False, True])
def test_suspicion_is_about_the_lungs_alone(regions: bool) -> None:
    logits = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    lungs = torch.zeros(2, 1, 4, 5, 6)
    lungs[:, :, 1:3, 2:4] = 1
    loss = suspicion_loss(logits, lungs, regions=regions)
    loss.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().amax(1, keepdim=True) > 0
    assert torch.equal(touched, lungs > 0)
    probability = lesion_probability(logits, regions=regions).clamp(min=1e-12)
    torch.testing.assert_close(loss, -(probability.log() * lungs).mean())


def test_everything_outside_the_lungs_is_compared_with_background() -> None:
    logits = torch.randn(2, 3, 4, 5, 6)
    expected = functional.cross_entropy(logits, torch.zeros(2, 4, 5, 6, dtype=torch.long))
    torch.testing.assert_close(outside_loss(logits, torch.zeros(2, 1, 4, 5, 6), regions=False), expected)
