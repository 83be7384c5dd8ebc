"""The terms G and D add, who moves in which step, and resuming."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from gasnet_nnunet.adversary import Adversary
from gasnet_nnunet.intensity import IntensityWindow
from gasnet_nnunet.losses import HEALTHY, NOT_HEALTHY, judged_as
from gasnet_nnunet.networks import Topology
from gasnet_nnunet.settings import GASNetSettings
from gasnet_nnunet.synthesis import restore

TOPOLOGY = Topology([1, (1, 2, 2), 2], [(1, 3, 3), 3, 3])
OFF: dict[str, Any] = {
    "weight_adversarial": 0.0,
    "weight_generated": 0.0,
    "weight_diseased": 0.0,
    "weight_reconstruction": 0.0,
}
CPU = torch.device("cpu")


def adversary_of(*, seed: int = 0, channels: int = 1, device: torch.device = CPU, **changes: Any) -> Adversary:
    torch.manual_seed(seed)
    settings = GASNetSettings(
        **{
            "generator_features": 2,
            "generator_residual_blocks": 1,
            "discriminator_features": 2,
            "learning_rate_g": 1e-2,
            "learning_rate_d": 1e-2,
            **changes,
        }
    )
    window = IntensityWindow([(-1.5, 2.5)] * channels)
    return Adversary(settings, TOPOLOGY, window, device, num_epochs=10)


def pair(seed: int = 0, *, channels: int = 1, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """I_d, I_h, nnU-Net-normalised with overshoot, and M^."""
    draw = torch.Generator().manual_seed(seed)
    diseased, healthy = torch.rand(2, 2, channels, 4, 12, 9, generator=draw) * 6 - 2.5
    mask = torch.rand(2, 1, 4, 12, 9, generator=draw)
    return diseased.to(device), healthy.to(device), mask.to(device)


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def weights(adversary: Adversary, name: str) -> dict[str, Tensor]:
    """Parameters and buffers of one network."""
    return copy_of(adversary.state_dict()[name])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def step_generator(adversary: Adversary, seed: int) -> None:
    diseased, healthy, mask = pair(seed)
    adversary.optimizers["generator"].zero_grad()
    terms = adversary.fooling_terms(diseased, mask)
    reconstruction = adversary.reconstruction_term(healthy)
    assert reconstruction is not None
    (sum(terms.values()) + reconstruction).backward()
    adversary.optimizers["generator"].step()


def test_the_terms_are_those_of_the_equations() -> None:
    adversary = adversary_of(weight_adversarial=2.0, weight_generated=3.0, weight_reconstruction=5.0)
    diseased, healthy, mask = pair()
    window = adversary.window
    assert adversary.discriminator is not None
    d = adversary.discriminator.eval()
    with torch.no_grad():
        x = window.to_window(diseased)
        assert x.abs().max() == 1
        generated = adversary.generate(x)
        i_s = restore(x, generated, mask)
        h = window.to_window(healthy)
        expected = {
            "L_adv": 2 * judged_as(d(i_s), HEALTHY),
            "L_IgToD": 3 * judged_as(d(generated), HEALTHY),
        }
        expected_reconstruction = 5 * (adversary.generate(h) - h).square().mean()
        found = adversary.fooling_terms(diseased, mask)
        reconstruction = adversary.reconstruction_term(healthy)
    torch.testing.assert_close(found, expected)
    assert reconstruction is not None
    torch.testing.assert_close(reconstruction, expected_reconstruction)


def test_a_draw_that_overflows_costs_one_update_of_d() -> None:
    adversary = adversary_of()
    before = weights(adversary, "discriminator")
    diseased, healthy, mask = pair()
    report = adversary.discriminator_step(diseased * torch.inf, healthy, mask * torch.nan)
    assert torch.isnan(report["L_D_restored"])
    assert adversary.discriminator is not None
    parameters = dict(adversary.discriminator.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in parameters.items())
    report = adversary.discriminator_step(diseased, healthy, mask)
    assert all(torch.isfinite(value) for value in report.values())
    assert not all(torch.equal(before[name], value) for name, value in parameters.items())


def test_the_gradient_of_g_leaves_room_in_half_precision() -> None:
    adversary = adversary_of()
    x = torch.linspace(-1, 1, 432).reshape(1, 1, 4, 12, 9)
    assert adversary.generator is not None
    gradients = []
    for generate in (adversary.generator, adversary.generate):
        adversary.optimizers["generator"].zero_grad()
        generated = generate(x)
        generated.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adversary.generator.parameters()])
    torch.testing.assert_close(gradients[1], [gradient / 64 for gradient in gradients[0]])
    torch.testing.assert_close(adversary.generate(x), adversary.generator(x), rtol=0, atol=0)


def test_a_training_of_before_goes_on_with_moments_of_the_gradients_that_g_gets_now() -> None:
    resumed, moments = adversary_of(), []
    adversary = adversary_of()
    step_generator(adversary, 0)
    state = copy_of(adversary.state_dict())
    for scale in (1.0, 64.0):
        for entry in state["optimizer_generator"]["state"].values():
            entry["exp_avg"] *= scale
            entry["exp_avg_sq"] *= scale**2
        resumed.load_state_dict(copy_of(state))
        moments.append(copy_of(resumed.optimizers["generator"].state_dict()["state"]))
        state.pop("generator_gradient", None)
    torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_flow_into_s_and_g_and_s_gets_its_share(channels: int) -> None:
    gradients = {}
    for lambda_s in (1.0, 100.0):
        adversary = adversary_of(lambda_s=lambda_s, channels=channels, weight_generated=0.0)
        diseased, _, mask = pair(channels=channels)
        mask.requires_grad_()
        adversary.fooling_terms(diseased, mask)["L_adv"].backward()
        assert mask.grad is not None
        assert adversary.generator is not None
        of_g = [p.grad for p in adversary.generator.parameters()]
        gradients[lambda_s] = (mask.grad, of_g)
    assert gradients[1.0][0].abs().max() > 0
    torch.testing.assert_close(gradients[100.0][0] * 100, gradients[1.0][0])
    torch.testing.assert_close(gradients[100.0][1], gradients[1.0][1])


def test_generated_volumes_teach_g_alone() -> None:
    adversary = adversary_of(weight_adversarial=0.0)
    diseased, _, mask = pair()
    mask.requires_grad_()
    terms = adversary.fooling_terms(diseased, mask)
    assert list(terms) == ["L_IgToD"]
    terms["L_IgToD"].backward()
    assert mask.grad is None
    assert adversary.generator is not None
    assert all(p.grad is not None for p in adversary.generator.parameters())


def test_d_is_frozen_while_s_and_g_step() -> None:
    adversary = adversary_of()
    adversary.start_epoch(0)
    before = weights(adversary, "discriminator")
    assert any(name.endswith("_u") for name in before)
    for seed in range(3):
        step_generator(adversary, seed)
    assert equal(weights(adversary, "discriminator"), before)
    d = adversary.discriminator
    assert d is not None
    assert all(p.grad is None for p in d.parameters())
    # and ready for its own step
    assert d.training
    assert all(p.requires_grad for p in d.parameters())


def test_the_step_of_s_and_g_moves_g() -> None:
    adversary = adversary_of()
    before = weights(adversary, "generator")
    step_generator(adversary, 0)
    after = weights(adversary, "generator")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_ds_step_moves_d_alone() -> None:
    adversary = adversary_of()
    adversary.start_epoch(0)
    of_g, of_d = weights(adversary, "generator"), weights(adversary, "discriminator")
    adversary.discriminator_step(*pair())
    assert equal(weights(adversary, "generator"), of_g)
    assert adversary.generator is not None
    assert all(p.grad is None for p in adversary.generator.parameters())
    after = weights(adversary, "discriminator")
    originals = [name for name in after if name.endswith("original")]
    assert len(originals) == 4
    assert all(not torch.equal(after[name], of_d[name]) for name in originals)


def test_d_reports_each_of_its_inputs() -> None:
    adversary = adversary_of(weight_diseased=0.25)
    diseased, healthy, mask = pair()
    state = copy_of(adversary.state_dict())
    report = adversary.discriminator_step(diseased, healthy, mask)
    assert all(not value.requires_grad for value in report.values())

    adversary.load_state_dict(state)
    d = adversary.discriminator
    assert d is not None
    with torch.no_grad():
        x, h = adversary.window.to_window(diseased), adversary.window.to_window(healthy)
        generated = adversary.generate(x)
        inputs = {"healthy": h, "restored": restore(x, generated, mask), "generated": generated, "diseased": x}
        logits = dict(zip(inputs, d(torch.cat(list(inputs.values()))).chunk(4), strict=True))
    expected = {}
    for name, logit in logits.items():
        expected[f"L_D_{name}"] = judged_as(logit, HEALTHY if name == "healthy" else NOT_HEALTHY)
        expected[f"D_{name}"] = logit.sigmoid().mean()
    torch.testing.assert_close({name: report[name] for name in expected}, expected)
    assert report.keys() == expected.keys()


def test_d_minimises_the_weighted_sum() -> None:
    settings: dict[str, Any] = {"weight_adversarial": 0.5, "weight_generated": 2.0, "weight_diseased": 0.25}
    adversary, twin = adversary_of(**settings), adversary_of(**settings)
    diseased, healthy, mask = pair()
    report = adversary.discriminator_step(diseased, healthy, mask)
    found = [p.grad for p in adversary.discriminator.parameters()] if adversary.discriminator else []

    assert twin.discriminator is not None
    x, h = twin.window.to_window(diseased), twin.window.to_window(healthy)
    with torch.no_grad():
        generated = twin.generate(x)
    logits = twin.discriminator(torch.cat([h, restore(x, generated, mask), generated, x])).chunk(4)
    total = judged_as(logits[0], HEALTHY)
    for weight, logit in zip((0.5, 2.0, 0.25), logits[1:], strict=True):
        total = total + weight * judged_as(logit, NOT_HEALTHY)
    total.backward()
    torch.testing.assert_close(found, [p.grad for p in twin.discriminator.parameters()])
    assert set(report) == {
        f"{kind}_{name}" for kind in ("L_D", "D") for name in ("healthy", "restored", "generated", "diseased")
    }


@pytest.mark.parametrize(
    ("weight", "absent"),
    [("weight_adversarial", "restored"), ("weight_generated", "generated"), ("weight_diseased", "diseased")],
)
def test_a_term_that_is_off_is_no_input_of_d(weight: str, absent: str) -> None:
    changes: dict[str, Any] = {weight: 0.0}
    report = adversary_of(**changes).discriminator_step(*pair())
    assert len(report) == 6
    assert not any(name.endswith(absent) for name in report)


def test_d_learns_to_tell_the_kinds_apart() -> None:
    adversary = adversary_of(weight_adversarial=0.0, weight_generated=1e-6)
    shape = (4, 1, 4, 12, 12)
    first: dict[str, Tensor] = {}
    for step in range(40):
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(step)) * 0.2
        last = adversary.discriminator_step(noise[0] + 1.0, noise[1] - 0.5, torch.zeros(shape))
        first = first or last
    assert last["L_D_healthy"] + last["L_D_diseased"] < 0.8 * (first["L_D_healthy"] + first["L_D_diseased"])
    assert last["D_healthy"] < last["D_diseased"]


@pytest.mark.parametrize(
    ("on", "generator", "discriminator"),
    [
        ({}, False, False),
        ({"weight_diseased": 1.0}, False, False),
        ({"weight_reconstruction": 1.0}, True, False),
        ({"weight_adversarial": 1.0}, True, True),
        ({"weight_generated": 1.0}, True, True),
    ],
)
def test_terms_that_are_off_build_no_network(on: dict[str, Any], generator: bool, discriminator: bool) -> None:
    adversary = adversary_of(**{**OFF, **on})
    assert (adversary.generator is not None) == generator == adversary.settings.needs_generator
    assert (adversary.discriminator is not None) == discriminator == adversary.settings.needs_discriminator
    names = [name for name, built in (("generator", generator), ("discriminator", discriminator)) if built]
    assert list(adversary.optimizers) == names
    expected = {*names, *(f"optimizer_{name}" for name in names), *(["generator_gradient"] if generator else [])}
    assert set(adversary.state_dict()) == expected
    diseased, healthy, mask = pair()
    assert bool(adversary.fooling_terms(diseased, mask)) == discriminator
    assert (adversary.reconstruction_term(healthy) is not None) == bool(on.get("weight_reconstruction"))
    assert repr(adversary)


def test_a_resumed_training_goes_on_as_if_nothing_had_happened() -> None:
    adversary, resumed = adversary_of(seed=0), adversary_of(seed=1)

    def train(which: Adversary, epochs: range) -> list[dict[str, Tensor]]:
        reports = []
        for epoch in epochs:
            which.start_epoch(epoch)
            step_generator(which, seed=epoch)
            reports.append(which.discriminator_step(*pair(100 + epoch)))
        return reports

    train(adversary, range(3))
    resumed.load_state_dict(copy_of(adversary.state_dict()))
    assert train(adversary, range(3, 6)) == train(resumed, range(3, 6))
    for name in ("generator", "discriminator"):
        assert equal(weights(adversary, name), weights(resumed, name))


def test_learning_rates_follow_nnunets_schedule() -> None:
    adversary = adversary_of(learning_rate_g=1e-3, learning_rate_d=2e-3)
    for epoch in (0, 5, 9, 2):
        adversary.start_epoch(epoch)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in adversary.optimizers.values()]
        assert rates == pytest.approx([1e-3 * (1 - epoch / 10) ** 0.9, 2e-3 * (1 - epoch / 10) ** 0.9])


def test_both_pools_reach_d_through_the_same_map() -> None:
    adversary = adversary_of(weight_adversarial=0.0)
    same, _, mask = pair()
    report = adversary.discriminator_step(same, same.clone(), mask)
    torch.testing.assert_close(report["D_healthy"], report["D_diseased"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision of nnU-Net is cuda's alone")
def test_d_runs_in_single_precision_under_autocast() -> None:
    device = torch.device("cuda")
    adversary = adversary_of(device=device)
    diseased, healthy, mask = pair(device=device)
    assert adversary.discriminator is not None
    seen: list[torch.dtype] = []
    adversary.discriminator.body[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cuda"):
        terms = adversary.fooling_terms(diseased, mask)
        report = adversary.discriminator_step(diseased, healthy, mask)
    assert set(seen) == {torch.float32}
    assert all(term.dtype == torch.float32 for term in [*terms.values(), *report.values()])
