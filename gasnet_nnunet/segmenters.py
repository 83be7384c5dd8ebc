"""The networks that may take the place of S, as nnU-Net plans: the paper's Fig. 11 compares three of them.

A plan's `network_class_name` may name any importable class, so that none of these needs a trainer of its own. All of
them share the planned topology, from which G and D are sized as well, and nnU-Net's contract: logits as a list from
the full resolution down under deep supervision, otherwise a tensor, switched by `decoder.deep_supervision`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual import BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from gasnet_nnunet.errors import UserError

SHARED_KWARGS = (
    *("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "conv_bias", "norm_op", "norm_op_kwargs"),
    *("dropout_op", "dropout_op_kwargs", "nonlin", "nonlin_kwargs"),
)
"""What every segmenter takes over from the plan."""
FIRST_BOTTLENECK = 2
"""Stage from which VB-Net's blocks are bottlenecks; its two finest have too few features to squeeze."""


class VBNet(ResidualUNet):
    """V-Net with bottlenecks: residual blocks in encoder and decoder, squeezed in the deeper stages.

    V-Net (Milletari et al., the paper's reference 22) as VB-Net has it (Shan et al., its reference 8): convolutions of
    three voxels, and blocks of 1, 3 and 1 voxels with a quarter of the features from the third stage on. Norm and
    non-linearity are the plan's; down- and up-sampling are nnU-Net's.

    Args:
        bottleneck_ratio: Features of a stage for each feature inside its bottlenecks.
        arch_kwargs: Of `ResidualUNet`.

    Shape: (B, C, Z, Y, X) -> (B, K, Z, Y, X) or, under deep supervision, a list of them from the finest level down.
    """

    def __init__(self, *, bottleneck_ratio: int = 4, **arch_kwargs: Any) -> None:
        super().__init__(**arch_kwargs)
        widths, stages = self.encoder.output_channels, len(self.encoder.stages)
        for level in range(FIRST_BOTTLENECK, stages):
            self.encoder.stages[level] = self._bottlenecks(
                self.encoder.stages[level], widths[level - 1], level, self.encoder.strides[level], bottleneck_ratio
            )
        # The decoder's stages run from the coarsest to the finest.
        for level in range(FIRST_BOTTLENECK, stages - 1):
            self.decoder.stages[stages - 2 - level] = self._bottlenecks(
                self.decoder.stages[stages - 2 - level], 2 * widths[level], level, 1, bottleneck_ratio
            )

    def _bottlenecks(
        self, stage: StackedResidualBlocks, width_in: int, level: int, stride: int | Sequence[int], ratio: int
    ) -> StackedResidualBlocks:
        encoder = self.encoder
        width = encoder.output_channels[level]
        return StackedResidualBlocks(
            n_blocks=len(stage.blocks),
            conv_op=encoder.conv_op,
            input_channels=width_in,
            output_channels=width,
            kernel_size=encoder.kernel_sizes[level],
            initial_stride=stride,
            conv_bias=encoder.conv_bias,
            norm_op=encoder.norm_op,
            norm_op_kwargs=encoder.norm_op_kwargs,
            dropout_op=encoder.dropout_op,
            dropout_op_kwargs=encoder.dropout_op_kwargs,
            nonlin=encoder.nonlin,
            nonlin_kwargs=encoder.nonlin_kwargs,
            block=BottleneckD,
            bottleneck_channels=max(width // ratio, 1),
        )


class UNetPlusPlus(PlainConvUNet):
    """U-Net++ (Zhou et al., the paper's reference 23): nnU-Net's plain encoder and a decoder of nested skips.

    As there, node (i, j) joins the nodes (i, 0) to (i, j - 1) of its level and the up-sampled node (i + 1, j - 1).
    Deep supervision is nnU-Net's, of the last node of each level, instead of all nodes of the finest level: nnU-Net's
    loss compares one output with each resolution of the labels.

    Args:
        arch_kwargs: Of `PlainConvUNet`.

    Shape: (B, C, Z, Y, X) -> (B, K, Z, Y, X) or, under deep supervision, a list of them from the finest level down.
    """

    decoder: Any

    def __init__(self, **arch_kwargs: Any) -> None:
        super().__init__(**arch_kwargs)
        plain = self.decoder
        # As many convolutions as in the decoder that is replaced, whose stages run from the coarsest to the finest.
        convolutions = [len(stage.convs) for stage in reversed(plain.stages)]
        self.decoder = NestedDecoder(self.encoder, plain.num_classes, convolutions, plain.deep_supervision)


class NestedDecoder(nn.Module):
    """The nodes (i, j) with j > 0 of U-Net++.

    Args:
        encoder: Encoder whose skips are the nodes (i, 0).
        num_classes: Logits K.
        convolutions: Convolutions of a node, for each level from the finest on.
        deep_supervision: Whether all levels are returned; nnU-Net sets the attribute at any time.
    """

    def __init__(
        self, encoder: PlainConvEncoder, num_classes: int, convolutions: Sequence[int], deep_supervision: bool
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.num_classes = num_classes
        self.strides = encoder.strides
        self.widths = encoder.output_channels
        levels = len(self.widths) - 1
        up_sampling = get_matching_convtransp(conv_op=encoder.conv_op)
        # Typed as what they are; to a type checker an item of a ModuleList is any module.
        self.up_samplings: Any = nn.ModuleList()
        self.nodes: Any = nn.ModuleList()
        for level, width in enumerate(self.widths[:-1]):
            stride = encoder.strides[level + 1]
            columns = range(1, levels - level + 1)
            self.up_samplings.append(
                nn.ModuleList(
                    up_sampling(self.widths[level + 1], width, stride, stride, bias=encoder.conv_bias) for _ in columns
                )
            )
            self.nodes.append(
                nn.ModuleList(
                    StackedConvBlocks(
                        convolutions[level],
                        encoder.conv_op,
                        (column + 1) * width,
                        width,
                        encoder.kernel_sizes[level],
                        1,
                        encoder.conv_bias,
                        encoder.norm_op,
                        encoder.norm_op_kwargs,
                        encoder.dropout_op,
                        encoder.dropout_op_kwargs,
                        encoder.nonlin,
                        encoder.nonlin_kwargs,
                    )
                    for column in columns
                )
            )
        # Of every level whether deep supervision is on or not, and by nnU-Net's name: it finds the heads by it.
        self.seg_layers = nn.ModuleList(encoder.conv_op(width, num_classes, 1) for width in self.widths[:-1])

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits from the encoder's skips, the finest first."""
        rows = [[skip] for skip in skips]
        for column in range(len(self.nodes)):
            for level in range(len(self.nodes) - column):
                below = self.up_samplings[level][column](rows[level + 1][column])
                rows[level].append(self.nodes[level][column](torch.cat([*rows[level], below], 1)))
        if not self.deep_supervision:
            return self.seg_layers[0](rows[0][-1])
        return [head(row[-1]) for head, row in zip(self.seg_layers, rows[:-1], strict=True)]

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Voxels of all feature maps for an input (Z, Y, X), nnU-Net's measure of memory."""
        total, size = 0, np.array(input_size)
        for level, nodes in enumerate(self.nodes):
            size = size // np.array(self.strides[level])
            voxels = int(np.prod(size))
            total += sum(int(node.compute_conv_feature_map_size(list(size))) for node in nodes)
            total += len(nodes) * self.widths[level] * voxels
            if self.deep_supervision or level == 0:
                total += self.num_classes * voxels
        return total


@dataclass(frozen=True)
class Segmenter:
    """A network that may take the place of S.

    Args:
        description: What it is.
        network: Its class.
        convolutions: Name of the argument that holds the convolutions or blocks of each encoder stage.
        encoder: Those numbers, the last one for all further stages.
        decoder: Convolutions or blocks of each decoder stage from the finest on, the last one for all further stages.
        extra: Further arguments.
        feature_maps_in_8_gb: Feature map voxels that fit 8 GB at a batch of 2: nnU-Net's measure of memory, and its
            own two numbers.
    """

    description: str
    network: type[nn.Module]
    convolutions: str
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    extra: Mapping[str, Any]
    feature_maps_in_8_gb: int

    @property
    def network_class_name(self) -> str:
        """Its class as plans name it."""
        return f"{self.network.__module__}.{self.network.__name__}"


SEGMENTERS: dict[str, Segmenter] = {
    "plain": Segmenter("nnU-Net's U-Net", PlainConvUNet, "n_conv_per_stage", (2,), (2,), {}, 560_000_000),
    "resenc": Segmenter(
        "nnU-Net's residual-encoder U-Net",
        ResidualEncoderUNet,
        "n_blocks_per_stage",
        (1, 3, 4, 6),
        (1,),
        {},
        680_000_000,
    ),
    # Blocks as in V-Net and VB-Net.
    "vbnet": Segmenter(
        "V-Net with bottlenecks (VB-Net)",
        VBNet,
        "n_blocks_per_stage",
        (1, 1, 2, 3),
        (1, 2, 3),
        {"bottleneck_ratio": 4},
        680_000_000,
    ),
    "unetpp": Segmenter("U-Net++", UNetPlusPlus, "n_conv_per_stage", (2,), (2,), {}, 560_000_000),
}
"""Name for `gasnet-nnunet plan --segmenter` -> network."""


def apply_segmenter(configuration: dict[str, Any], segmenter: str) -> dict[str, Any]:
    """A plans configuration with another network in the same patch, strides, kernels and features.

    Args:
        configuration: A configuration of nnU-Net's plans, with any of nnU-Net's or these architectures; not changed.
        segmenter: A name of `SEGMENTERS`.

    Raises:
        UserError: There is no such segmenter, or the configuration's architecture does not tell its topology.

    Examples:
        >>> kwargs = dict.fromkeys(SHARED_KWARGS) | {"n_stages": 3, "strides": [1, 2, 2], "kernel_sizes": [3, 3, 3]}
        >>> new = apply_segmenter({"architecture": {"arch_kwargs": kwargs}}, "resenc")["architecture"]
        >>> new["network_class_name"], new["arch_kwargs"]["n_blocks_per_stage"]
        ('dynamic_network_architectures.architectures.unet.ResidualEncoderUNet', [1, 3, 4])
    """
    chosen = find_segmenter(segmenter)
    arch_kwargs = configuration.get("architecture", {}).get("arch_kwargs", {})
    missing = [name for name in SHARED_KWARGS if name not in arch_kwargs]
    if missing:
        raise UserError(
            f"The segmenter '{segmenter}' takes over the planned network's topology, but architecture.arch_kwargs of "
            f"the plans does not tell {', '.join(missing)}. Start from plans by nnU-Net or gasnet-nnunet plan."
        )
    stages = int(arch_kwargs["n_stages"])
    architecture = {
        "network_class_name": chosen.network_class_name,
        "arch_kwargs": {
            **{name: copy.deepcopy(arch_kwargs[name]) for name in SHARED_KWARGS},
            chosen.convolutions: _repeat_last(chosen.encoder, stages),
            "n_conv_per_stage_decoder": _repeat_last(chosen.decoder, stages - 1)[::-1],
            **chosen.extra,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return {**configuration, "architecture": architecture}


def find_segmenter(name: str) -> Segmenter:
    """The segmenter of a name.

    Raises:
        UserError: There is none; the existing ones are listed.
    """
    if name not in SEGMENTERS:
        raise UserError(f"There is no segmenter '{name}'. Segmenters: {', '.join(SEGMENTERS)}.")
    return SEGMENTERS[name]


def segmenter_of(configuration: Mapping[str, Any]) -> str | None:
    """Name of the segmenter that a plans configuration holds, `None` if it is none of `SEGMENTERS`."""
    found = configuration["architecture"]["network_class_name"]
    return next((name for name, segmenter in SEGMENTERS.items() if segmenter.network_class_name == found), None)


def needs_this_package(configuration: Mapping[str, Any]) -> bool:
    """Whether the network of a plans configuration is one of ours, which stock nnU-Net cannot import."""
    return str(configuration["architecture"]["network_class_name"]).startswith("gasnet_nnunet.")


def _repeat_last(numbers: tuple[int, ...], length: int) -> list[int]:
    return [numbers[min(index, len(numbers) - 1)] for index in range(length)]
