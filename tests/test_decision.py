"""The threshold in the heads of S."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gasnet_nnunet.decision import (
    HEADS_KEY,
    called_lesion,
    carried_logit,
    decide_at,
    head_biases,
    weights_in_training,
)
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.losses import lesion_logit


class Heads(nn.Module):
    """Two heads as in nnU-Net's decoders; logits are what they make of the finest features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Conv3d(1, 3, 1)
        self.seg_layers = nn.ModuleList(nn.Conv3d(3, classes, 1) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.seg_layers[-1](self.body(image))
        return logits


IMAGE = torch.linspace(-30, 30, 64).reshape(1, 1, 4, 4, 4)


@given(st.floats(0.02, 0.98), st.integers(2, 4), st.booleans(), st.integers(0, 100))
def test_m_is_a_half_where_it_was_the_threshold(threshold: float, classes: int, regions: bool, seed: int) -> None:
    torch.manual_seed(seed)
    network = Heads(classes)
    with torch.no_grad():
        before = lesion_logit(network(IMAGE), regions=regions)
        network.load_state_dict(decide_at(network.state_dict(), threshold, regions=regions))
        after = lesion_logit(network(IMAGE), regions=regions)
    shift = math.log(threshold / (1 - threshold))
    torch.testing.assert_close(after, before - shift, atol=1e-3, rtol=1e-4)
    clear = (before - shift).abs() > 1e-3
    assert torch.equal((after.sigmoid() > 0.5)[clear], (before.sigmoid() > threshold)[clear])


def test_only_the_lesions_biases_of_every_head_change_and_come_back() -> None:
    weights = Heads(3).state_dict()
    original = {name: value.clone() for name, value in weights.items()}
    new = decide_at(weights, 0.85, regions=False)
    changed = {name for name in weights if not torch.equal(new[name], weights[name])}
    assert changed == {"seg_layers.0.bias", "seg_layers.1.bias"} == set(head_biases(weights))
    assert all(torch.equal(new[name][0], weights[name][0]) for name in changed), "the background's"
    assert all(torch.equal(weights[name], original[name]) for name in weights), "what went in"
    checkpoint = {"network_weights": new, HEADS_KEY: head_biases(weights)}
    back = weights_in_training(checkpoint)
    assert all(torch.equal(back[name], original[name]) for name in weights)
    assert carried_logit(checkpoint) == pytest.approx(math.log(0.85 / 0.15), abs=1e-5)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_called_lesion_is_what_nnunet_calls_lesion_by_such_heads(threshold: float, regions: bool) -> None:
    torch.manual_seed(1)
    network = Heads(3)
    with torch.no_grad():
        network.seg_layers[-1].bias -= 4 * regions  # or any of them is found everywhere
        called = called_lesion(network(IMAGE), threshold, regions=regions)
        network.load_state_dict(decide_at(network.state_dict(), threshold, regions=regions))
        logits = network(IMAGE)
    found = (logits.sigmoid() > 0.5).any(1, keepdim=True) if regions else logits.argmax(1, keepdim=True) > 0
    assert torch.equal(called, found)
    assert 0 < called.sum() < called.numel()


def test_half_is_nnunets_way_for_any_network() -> None:
    weights = nn.Conv3d(1, 2, 1).state_dict()
    assert decide_at(weights, 0.5, regions=False) == weights
    assert weights_in_training({"network_weights": weights}) == weights, "no checkpoint of ours"
    assert carried_logit({"network_weights": weights}) == 0


@pytest.mark.parametrize("network", [nn.Conv3d(1, 2, 1), nn.ModuleDict({"seg_layers": nn.Conv3d(1, 2, 1)})])
def test_network_without_such_heads_is_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match=r"lesion_threshold is 0.9, .* seg_layers.N.bias .* Set lesion_threshold=0.5"):
        decide_at(network.state_dict(), 0.9, regions=False)
