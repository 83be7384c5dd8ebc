"""What a training will cost: time by a measurement, memory by nnU-Net's feature map rule, disk by counting voxels."""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from gasnet_nnunet.devices import choose_device
from gasnet_nnunet.networks import Topology, build_discriminator, build_generator
from gasnet_nnunet.segmenters import SEGMENTERS, segmenter_of
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings
from gasnet_nnunet.steps import cpu_computes_in_bfloat16, training_precision

FORWARD = 1 / 3
"""Share of a forward pass in a forward and a backward pass."""
MEASURED_VOXELS = {"cpu": 2**15, "cuda": 2**21, "mps": 2**20}
"""Largest patch that is timed, if the network allows it; times grow in proportion to voxels."""
BYTES_PER_VOXEL = 4 + 2
"""nnU-Net's preprocessed data before compression: float32 image of one channel, int16 label."""


@dataclasses.dataclass(frozen=True)
class Passes:
    """Forward-and-backward passes of one volume that an iteration takes; a forward alone counts a third.

    Args:
        segmenter: Of S.
        generator: Of G.
        discriminator: Of D.
    """

    segmenter: float
    generator: float
    discriminator: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Estimate of a training.

    Args:
        device: Where it was measured, e.g. "cpu".
        seconds_per_iteration: Of one S+G update with its D updates, if nothing else runs and the data never wait.
        hours: Of the training.
        memory_gb: Peak memory of the networks' feature maps.
        disk_gb: Preprocessed data before compression.
    """

    device: str
    seconds_per_iteration: float
    hours: float
    memory_gb: float
    disk_gb: float


def passes_per_iteration(settings: GASNetSettings, batch_size: int) -> Passes:
    """Count the passes of Algorithm 1, averaged over the training.

    S+G update: S on I_l, on lesions of I_l in I_h, on I_h and I_d, and on I_ps once it has joined; G on I_d and I_h; D
    on I_s and I_g.
    The average of S, where there is one, looks at I_d before L_ps. Each D update: S and G forward on I_d; D on I_h,
    I_s, I_d and I_g.

    Examples:
        >>> passes_per_iteration(GASNetSettings(discriminator_steps=3), batch_size=2)
        Passes(segmenter=13.5, generator=6.0, discriminator=28.0)
    """
    volumes = settings.volumes_per_step or batch_size
    g, d = settings.needs_generator, settings.needs_discriminator
    d_updates = settings.discriminator_steps if d else 0
    adversarial, generated = bool(settings.weight_adversarial), bool(settings.weight_generated)
    pseudo = 1 + FORWARD * (settings.averaged_iterations > 1)
    labelled = batch_size + settings.pasted_patches(batch_size) if settings.weight_labelled else 0
    segmenter = labelled + volumes * (
        bool(settings.weight_healthy)
        + bool(settings.weight_mil or settings.weight_outside or settings.weight_suspicion or adversarial)
        + bool(settings.weight_pseudo) * (1 - settings.pseudo_start) * pseudo
        + d_updates * adversarial * FORWARD
    )
    generator = volumes * (d + bool(settings.weight_reconstruction) + d_updates * FORWARD) if g else 0.0
    judged = 1 + adversarial + generated + bool(settings.weight_diseased)
    discriminator = volumes * (adversarial + generated + d_updates * judged) if d else 0.0
    return Passes(float(segmenter), float(generator), float(discriminator))


def estimate_cost(configuration: dict[str, Any], *, channels: int, labels: int, voxels: int) -> Cost:
    """Time a pass of S, G and D on the available device and count the rest.

    Args:
        configuration: The planned configuration with GASNet's settings.
        channels: Image channels.
        labels: Labels, as nnU-Net counts them for its memory rule.
        voxels: Voxels of all cases at the target spacing.
    """
    settings = GASNetSettings.from_dict(configuration[PLANS_KEY])
    device = choose_device(mps=True)
    patch = tuple(configuration["patch_size"])
    arch = configuration["architecture"]
    batch_size = configuration["batch_size"]
    volumes = settings.volumes_per_step or batch_size
    passes = passes_per_iteration(settings, batch_size)
    topology = Topology.from_arch_kwargs(arch["arch_kwargs"])
    timed = _timed_patch(patch, topology, MEASURED_VOXELS[device])

    def build() -> tuple[nn.Module, nn.Module, nn.Module]:
        segmenter = get_network_from_plans(
            arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"], channels, labels, False, True
        )
        return (
            segmenter,
            build_generator(settings, topology, channels),
            build_discriminator(settings, topology, channels),
        )

    # D is always in single precision.
    mixed = training_precision(device, bfloat16=settings.cpu_bfloat16 and cpu_computes_in_bfloat16())
    per_volume = np.prod(patch) / np.prod(timed)
    counts = (passes.segmenter, passes.generator, passes.discriminator)
    precisions: tuple[AbstractContextManager[Any], ...] = (mixed, mixed, nullcontext())
    seconds = per_volume * sum(
        count * _seconds_of_a_pass(network.to(device), channels, timed, device, precision)
        for precision, count, network in zip(precisions, counts, build(), strict=True)
        if count
    )
    with torch.device("meta"):
        maps_s, maps_g, maps_d = (_feature_maps(network, channels, patch) for network in build())
    # The heaviest moment: S(I_d), G(I_d), D(I_s) and D(I_g) share one backward; or S on the labelled batch alone.
    # Without mixed precision every value takes twice the room.
    room = 2 if device == "cpu" else 1
    adversary = bool(counts[1]) * room * maps_g + bool(counts[2]) * 2 * 2 * maps_d
    heaviest = max(batch_size * room * maps_s, volumes * (room * maps_s + adversary))
    return Cost(
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        seconds_per_iteration=float(seconds),
        hours=float(seconds) * settings.num_epochs * settings.iterations_per_epoch / 3600,
        memory_gb=heaviest * _bytes_per_feature_map_voxel(configuration) / 1e9,
        disk_gb=voxels * (BYTES_PER_VOXEL + 4 * (channels - 1)) / 1e9,
    )


def _bytes_per_feature_map_voxel(configuration: dict[str, Any]) -> float:
    """By nnU-Net's own references: two patches of so many feature map voxels take 8 GB (mixed precision)."""
    return 8e9 / (2 * SEGMENTERS[segmenter_of(configuration) or "plain"].feature_maps_in_8_gb)


def _timed_patch(patch: tuple[int, ...], topology: Topology, most: int) -> tuple[int, ...]:
    """The patch, its longest axes halved until it has at most `most` voxels and as far as the network allows it."""
    divisor = np.prod(topology.strides, axis=0)
    size = np.array(patch)
    while np.prod(size) > most:
        half = -(-size // 2 // divisor) * divisor
        axis = int(np.argmax(size - half))
        smaller = np.where(np.arange(len(size)) == axis, half, size)
        # Instance norm needs at least two voxels at the lowest resolution.
        if half[axis] == size[axis] or np.prod(smaller // divisor) < 2:
            break
        size = smaller
    return tuple(int(edge) for edge in size)


def _seconds_of_a_pass(
    network: nn.Module, channels: int, patch: tuple[int, ...], device: str, precision: AbstractContextManager[Any]
) -> float:
    """Seconds of one forward and backward pass of one volume, the fastest of three.

    On a CPU it is the processor time of one thread, shared out to all cores, as nnU-Net trains there: with other work
    on the machine, threads that wait for each other make the time on the wall clock meaningless.
    """
    x = torch.zeros(1, channels, *patch, device=device)
    threads = torch.get_num_threads()
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        for _ in range(3):
            start = clock()
            with precision:
                out = network(x)
            loss = torch.stack([o.float().square().mean() for o in (out if isinstance(out, list | tuple) else [out])])
            loss.sum().backward()
            # Waits until the device has finished.
            next(network.parameters()).grad.sum().item()  # type: ignore[union-attr]
            seconds.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds) / ((os.cpu_count() or 1) if device == "cpu" else 1)


def _feature_maps(network: nn.Module, channels: int, patch: tuple[int, ...]) -> int:
    """Voxels of all convolutions' outputs for one patch, as nnU-Net counts them."""
    counted = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(count)
    network(torch.zeros(1, channels, *patch, device="meta"))
    return counted
