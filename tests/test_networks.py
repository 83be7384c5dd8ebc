"""G and D for any plan: odd and anisotropic patches, several channels, spectral norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.networks import Discriminator, Generator, Topology

ISOTROPIC = Topology([1, 2, 2], [3, 3, 3])
ANISOTROPIC = Topology([(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)], [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)])


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Strides and kernels as nnU-Net's planner writes them: 1 or 2, and 1 or 3; stage 0 keeps the resolution."""
    stages = draw(st.integers(2, 4))
    strides = [(1, 1, 1), *(draw(st.tuples(*[st.sampled_from([1, 2])] * 3)) for _ in range(stages - 1))]
    kernels = [draw(st.tuples(*[st.sampled_from([1, 3])] * 3)) for _ in range(stages)]
    return Topology(strides, kernels)


SHAPES = st.tuples(st.integers(5, 9), st.integers(6, 13), st.integers(6, 13))


def generator(topology: Topology, *, channels: int = 1, downsamplings: int = 2, blocks: int = 1) -> Generator:
    torch.manual_seed(0)
    return Generator(channels, topology, features=2, downsamplings=downsamplings, residual_blocks=blocks)


def discriminator(
    topology: Topology, *, channels: int = 1, layers: int = 3, norm: str = "none", gain: float = 4.0
) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(channels, topology, features=2, layers=layers, norm=norm, gain=gain)


def volumes(batch: int, channels: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """In [-1, 1]."""
    return torch.rand(batch, channels, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@settings(max_examples=25)
@given(topology=topologies(), shape=SHAPES, channels=st.integers(1, 3), blocks=st.integers(0, 1))
def test_g_keeps_shape_and_range(topology: Topology, shape: tuple[int, ...], channels: int, blocks: int) -> None:
    x = volumes(2, channels, shape)
    y = generator(topology, channels=channels, blocks=blocks)(x)
    assert y.shape == x.shape
    assert y.abs().max() <= 1
    assert y.std() > 0


@settings(max_examples=25)
@given(
    topology=topologies(),
    shape=SHAPES,
    channels=st.integers(1, 3),
    layers=st.integers(1, 4),
    norm=st.sampled_from(["none", "instance"]),
)
def test_d_gives_one_logit_a_volume(
    topology: Topology, shape: tuple[int, ...], channels: int, layers: int, norm: str
) -> None:
    # Instance norm needs more than one voxel: nnU-Net's own networks end at 4 and more along an axis.
    shape = tuple(2 * n for n in shape)
    logits = discriminator(topology, channels=channels, layers=layers, norm=norm)(volumes(2, channels, shape))
    assert logits.shape == (2,)
    assert logits.isfinite().all()


@pytest.mark.parametrize("topology", [ISOTROPIC, ANISOTROPIC], ids=["isotropic", "anisotropic"])
@pytest.mark.parametrize("shape", [(7, 33, 20), (24, 16, 18)])
def test_odd_and_anisotropic_patches(topology: Topology, shape: tuple[int, ...]) -> None:
    x = volumes(1, 2, shape)
    assert generator(topology, channels=2)(x).shape == x.shape
    assert discriminator(topology, channels=2)(x).shape == (1,)


def test_the_plans_strides_are_followed() -> None:
    x = volumes(1, 1, (8, 32, 32))
    g, d = generator(ANISOTROPIC, downsamplings=2), discriminator(ANISOTROPIC, layers=3)
    y = g.stem(x)
    for down in g.encoder:
        y = down(y)
    assert y.shape == (1, 8, 8, 8, 8)
    assert d.body(x).shape == (1, 16, 4, 4, 4)
    assert [module.kernel_size for module in d.body if isinstance(module, nn.Conv3d)] == [
        (1, 3, 3),
        (3, 3, 3),
        (3, 3, 3),
        (3, 3, 3),
    ]


def test_no_more_stages_than_the_plan_has() -> None:
    assert len(generator(ISOTROPIC, downsamplings=9).encoder) == 2
    deep = discriminator(ISOTROPIC, layers=9, norm="instance")
    strides = [module.stride for module in deep.body if isinstance(module, nn.Conv3d)]
    assert strides == [(2, 2, 2), (2, 2, 2), (1, 1, 1)]
    assert deep(volumes(1, 1, (8, 8, 8))).isfinite().all()


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_every_convolution_of_d_has_spectral_norm_one(norm: str) -> None:
    d = discriminator(ANISOTROPIC, norm=norm)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.mul_(7)
        for seed in range(60):
            d(volumes(1, 1, (4, 16, 16), seed))
    d.eval()
    convolutions = [module for module in d.modules() if isinstance(module, nn.Conv3d)]
    assert len(convolutions) == 5
    for convolution in convolutions:
        assert is_parametrized(convolution, "weight")
        matrix = convolution.weight.detach().flatten(1).numpy()
        assert np.linalg.svd(matrix, compute_uv=False)[0] == pytest.approx(1.0, abs=0.02)


def test_d_judges_every_volume_of_a_batch_alone() -> None:
    d = discriminator(ISOTROPIC, norm="instance").eval()
    x = volumes(3, 1, (8, 8, 8))
    torch.testing.assert_close(torch.cat([d(volume[None]) for volume in x]), d(x))


def test_d_without_instance_norm_sees_a_change_of_density() -> None:
    x = volumes(1, 1, (8, 8, 8)) * 0.5
    d = discriminator(ISOTROPIC).eval()
    with torch.no_grad():
        assert (d(x + 0.3) - d(x)).abs().item() > 1e-4


def test_every_convolution_of_d_has_its_gain() -> None:
    x = volumes(2, 1, (8, 16, 16))
    logits = []
    for gain in (1.0, 3.0):
        d = discriminator(ANISOTROPIC, gain=gain).eval()
        with torch.no_grad():
            for name, parameter in d.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
            logits.append(d(x))
    # Four convolutions and the head, each homogeneous without its bias.
    torch.testing.assert_close(logits[1], logits[0] * 3.0**5)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_every_parameter_learns(network: str) -> None:
    model: nn.Module = generator(ANISOTROPIC) if network == "generator" else discriminator(ANISOTROPIC)
    model(volumes(2, 1, (8, 16, 16))).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_a_saturated_tanh_still_learns_in_half_precision() -> None:
    g = generator(ISOTROPIC)
    with torch.no_grad():
        assert g.head.bias is not None
        g.head.bias.fill_(6.0)
        g.head.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = g(volumes(1, 1, (8, 8, 8)))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert g.head.bias.grad is not None
    assert float(g.head.bias.grad) > 0


def test_a_topology_is_read_from_nnunets_plans() -> None:
    arch_kwargs: dict[str, Any] = {
        "n_stages": 3,
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    }
    topology = Topology.from_arch_kwargs(arch_kwargs)
    assert topology.down(1) == ((3, 3, 3), (1, 2, 2))
    assert topology.down(7) == ((3, 3, 3), (2, 2, 2))
    assert topology.kernel_sizes[0] == (1, 3, 3)


@pytest.mark.parametrize(
    ("arch_kwargs", "message"),
    [
        ({"n_stages": 3, "features": [8]}, "holds only n_stages, features"),
        ({"strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3], [3, 3]]}, "2D strides"),
        ({"strides": [[1, 1, 1]], "kernel_sizes": [[3, 3, 3]]}, "no down-sampling"),
    ],
)
def test_plans_without_a_usable_topology_are_refused(arch_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Topology.from_arch_kwargs(arch_kwargs)
