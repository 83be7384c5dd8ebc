"""The estimate of a training's cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gasnet_nnunet.estimate import _timed_patch, estimate_cost, passes_per_iteration
from gasnet_nnunet.networks import Topology
from gasnet_nnunet.settings import GASNetSettings

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
KERNELS = ((1, 3, 3), (3, 3, 3), (3, 3, 3))


def configuration(patch: tuple[int, int, int] = (8, 16, 16), batch_size: int = 2, **settings: Any) -> dict[str, Any]:
    return {
        "patch_size": list(patch),
        "batch_size": batch_size,
        "gasnet": GASNetSettings(generator_features=4, discriminator_features=4, **settings).to_dict(),
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 16],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": KERNELS,
                "strides": STRIDES,
                "n_conv_per_stage": [2, 2, 2],
                "n_conv_per_stage_decoder": [2, 2],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def test_formula_of_the_docs() -> None:
    b, v, k, start = 3, 2, 5, 0.25

    settings = GASNetSettings(volumes_per_step=v, discriminator_steps=k, pseudo_start=start)
    passes = passes_per_iteration(settings, b)
    averaged = passes_per_iteration(settings.replace(averaged_iterations=20), b)

    assert passes.segmenter == pytest.approx(3 * b + 2 * v + v * (1 - start) + k * v / 3)
    assert averaged.segmenter == pytest.approx(passes.segmenter + v * (1 - start) / 3)
    assert passes.generator == pytest.approx(2 * v + k * v / 3)
    assert passes.discriminator == pytest.approx(2 * v + 4 * k * v)


def test_terms_that_are_off_cost_nothing() -> None:
    off: dict[str, Any] = {
        f"weight_{name}": 0.0
        for name in ("adversarial", "generated", "diseased", "reconstruction", "pseudo", "mil", "outside")
    }

    passes = passes_per_iteration(GASNetSettings(**off, weight_healthy=0.0, pasted_share=0.0), 2)

    assert (passes.segmenter, passes.generator, passes.discriminator) == (2, 0, 0)


@pytest.mark.parametrize("patch", [(8, 16, 16), (40, 160, 160), (128, 128, 128)])
def test_timed_patch_is_small_and_divisible(patch: tuple[int, int, int]) -> None:
    timed = _timed_patch(patch, Topology(STRIDES, KERNELS), 2**16)

    assert np.prod(timed) <= 2**16
    assert np.all(np.array(timed) % np.prod(STRIDES, axis=0) == 0)
    assert np.all(np.array(timed) <= patch)


def test_timed_patch_leaves_two_voxels_to_instance_norm() -> None:
    timed = _timed_patch((32, 64, 64), Topology(STRIDES, KERNELS), 1)

    assert np.prod(np.array(timed) // np.prod(STRIDES, axis=0)) >= 2


def test_memory_and_disk_grow_with_what_they_hold() -> None:
    small = estimate_cost(configuration(), channels=1, labels=3, voxels=10**9)
    large = estimate_cost(configuration((16, 16, 16), batch_size=4), channels=2, labels=3, voxels=10**9)

    assert large.memory_gb == pytest.approx(4 * small.memory_gb, rel=0.05)
    assert (small.disk_gb, large.disk_gb) == (6, 10)


def test_hours_are_those_of_all_iterations() -> None:
    cost = estimate_cost(configuration(num_epochs=3, iterations_per_epoch=7), channels=1, labels=3, voxels=1)

    assert cost.seconds_per_iteration > 0
    assert cost.hours == pytest.approx(cost.seconds_per_iteration * 21 / 3600)


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    estimate_cost(configuration(), channels=1, labels=3, voxels=1)

    assert torch.get_num_threads() == before
