"""Generator G and discriminator D, sized from the topology that nnU-Net planned for the segmenter.

After CycleGAN (Zhu et al., the paper's reference 56) with spectral norm in D (Miyato et al., 57), in 3D. Both are fully
convolutional, so that any patch size works; strides and kernels come from the plan, so that an anisotropic patch is not
pooled along its short axis. Neither exists at test time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.settings import GASNetSettings

Triple = tuple[int, int, int]


class Topology:
    """Strides and kernel sizes of the plan's stages; stage 0 is the full resolution.

    Args:
        strides: Stride of each stage in (Z, Y, X).
        kernel_sizes: Kernel size of each stage in (Z, Y, X).

    Raises:
        UserError: The plan is not three-dimensional or has no down-sampling.
    """

    def __init__(self, strides: Sequence[Sequence[int] | int], kernel_sizes: Sequence[Sequence[int] | int]) -> None:
        self.strides = [_triple(stride) for stride in strides]
        self.kernel_sizes = [_triple(kernel) for kernel in kernel_sizes]
        if len(self.strides) < 2:
            raise UserError(
                "The plan's network has no down-sampling, so G and D cannot be sized from it; plan a larger patch"
            )

    @classmethod
    def from_arch_kwargs(cls, arch_kwargs: Mapping[str, Any]) -> Topology:
        """Read the topology from a configuration's `architecture.arch_kwargs`.

        Raises:
            UserError: The architecture does not tell its strides and kernel sizes, or is not three-dimensional.
        """
        if "strides" not in arch_kwargs or "kernel_sizes" not in arch_kwargs:
            raise UserError(
                "GASNet sizes its generator and discriminator from `strides` and `kernel_sizes` in the plan's "
                f"architecture.arch_kwargs, which holds only {', '.join(arch_kwargs)}; add both to the plan"
            )
        return cls(arch_kwargs["strides"], arch_kwargs["kernel_sizes"])

    def down(self, stage: int) -> tuple[Triple, Triple]:
        """Kernel and stride of the step down into a stage; beyond the plan's last stage, that of the last."""
        stage = min(stage, len(self.strides) - 1)
        return self.kernel_sizes[stage], self.strides[stage]


def _triple(value: Sequence[int] | int) -> Triple:
    if isinstance(value, int):
        return value, value, value
    if len(value) != 3:
        raise UserError(f"GASNet trains 3D configurations; this plan's network has {len(value)}D strides or kernels")
    z, y, x = value
    return int(z), int(y), int(x)


def _same(kernel: Triple) -> Triple:
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2


def _block(channels_in: int, channels_out: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, kernel, stride, _same(kernel), bias=False),
        nn.InstanceNorm3d(channels_out, affine=True),
        nn.LeakyReLU(0.2, inplace=True),
    )


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, kernel: Triple) -> None:
        super().__init__()
        self.first = _block(channels, channels, kernel)
        self.second = nn.Sequential(
            nn.Conv3d(channels, channels, kernel, padding=_same(kernel), bias=False),
            nn.InstanceNorm3d(channels, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Generator(nn.Module):
    """G: I_d -> I_g. Encoder-decoder with skips, residual blocks at the bottom, tanh at the end.

    Args:
        channels: Image channels C.
        topology: The plan's strides and kernels.
        features: Feature maps at full resolution, doubled at each down-sampling.
        downsamplings: Strided stages, at most as many as the plan has.
        residual_blocks: Residual blocks at the lowest resolution.

    Shape: (B, C, Z, Y, X) in [-1, 1] -> (B, C, Z, Y, X) in [-1, 1], in single precision.
    """

    def __init__(
        self, channels: int, topology: Topology, *, features: int, downsamplings: int, residual_blocks: int
    ) -> None:
        super().__init__()
        stages = range(1, min(downsamplings, len(topology.strides) - 1) + 1)
        widths = [features * 2**stage for stage in (0, *stages)]
        self.stem = _block(channels, features, topology.kernel_sizes[0])
        self.encoder = nn.ModuleList(
            _block(widths[stage - 1], widths[stage], *topology.down(stage)) for stage in stages
        )
        bottom = topology.kernel_sizes[len(widths) - 1]
        self.bottleneck = nn.Sequential(*(_ResidualBlock(widths[-1], bottom) for _ in range(residual_blocks)))
        self.decoder = nn.ModuleList(
            _block(widths[stage] + widths[stage - 1], widths[stage - 1], topology.kernel_sizes[stage - 1])
            for stage in reversed(stages)
        )
        self.head = nn.Conv3d(features, channels, topology.kernel_sizes[0], padding=_same(topology.kernel_sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for down in self.encoder:
            skips.append(down(skips[-1]))
        y = self.bottleneck(skips.pop())
        for up in self.decoder:
            skip = skips.pop()
            # Nearest-neighbour up-sampling and a convolution leave no checkerboard for D to learn from.
            y = up(torch.cat([functional.interpolate(y, size=skip.shape[2:]), skip], 1))
        # In half precision tanh is exactly 1 from 4.2 on and has no gradient left.
        return torch.tanh(self.head(y).float())


class Discriminator(nn.Module):
    """D: a volume or patch -> one logit, 0 for real healthy, 1 for everything else.

    Strided convolutions with spectral norm, then the mean over the positions of the last map. Spectral norm bounds what
    a convolution can do to its worst input; ordinary inputs shrink three- to fourfold at each 3D convolution, until
    lesions that fill a few percent of the lungs no longer move the logit and D learns nothing but the prior of its
    labels. A fixed gain after each convolution undoes that.

    Args:
        channels: Image channels C.
        topology: The plan's strides and kernels.
        features: Feature maps of the first convolution, doubled with each further one (at most eight-fold).
        layers: Strided convolutions, at most as many as the plan has, so that the last map keeps a few positions.
        norm: "none" or "instance".
        gain: Factor after each convolution.

    Shape: (B, C, Z, Y, X) in [-1, 1] -> (B,)
    """

    def __init__(
        self, channels: int, topology: Topology, *, features: int, layers: int, norm: str, gain: float
    ) -> None:
        super().__init__()
        layers = min(layers, len(topology.strides) - 1)
        widths = [channels, *(features * min(2**layer, 8) for layer in range(layers + 1))]
        blocks: list[nn.Module] = []
        for layer, (channels_in, channels_out) in enumerate(pairwise(widths)):
            kernel, stride = topology.down(layer + 1)
            if layer == layers:
                stride = (1, 1, 1)
            blocks.append(spectral_norm(nn.Conv3d(channels_in, channels_out, kernel, stride, _same(kernel))))
            blocks.append(_Gain(gain))
            if norm == "instance" and layer > 0:
                blocks.append(nn.InstanceNorm3d(channels_out))
            blocks.append(nn.LeakyReLU(0.2, inplace=True))
        self.body = nn.Sequential(*blocks)
        self.head = nn.Sequential(spectral_norm(nn.Conv3d(widths[-1], 1, 1)), _Gain(gain))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).flatten(1).mean(1)


class _Gain(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def build_generator(settings: GASNetSettings, topology: Topology, channels: int) -> Generator:
    """G as the settings size it, for images of some channels."""
    return Generator(
        channels,
        topology,
        features=settings.generator_features,
        downsamplings=settings.generator_downsamplings,
        residual_blocks=settings.generator_residual_blocks,
    )


def build_discriminator(settings: GASNetSettings, topology: Topology, channels: int) -> Discriminator:
    """D as the settings size it, for images of some channels."""
    return Discriminator(
        channels,
        topology,
        features=settings.discriminator_features,
        layers=settings.discriminator_layers,
        norm=settings.discriminator_norm,
        gain=settings.discriminator_gain,
    )
