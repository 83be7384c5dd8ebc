"""HU, nnU-Net's normalised units and the [-1, 1] window of G and D: the one place that converts between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gasnet_nnunet.errors import UserError


class IntensityWindow:
    """Affine map between nnU-Net-normalised intensities and the window [-1, 1] in which G and D live.

    CTNormalization is affine after its clip, `x = (clip(HU, p0.5, p99.5) - mean) / std`, so the clip bounds put through
    the same map are the ends of the window, and going from one space to the other is one multiply-add.

    Args:
        bounds: Lower and upper end of each channel's window in nnU-Net-normalised units.

    Examples:
        >>> window = IntensityWindow([(-1.0, 3.0)])
        >>> window.to_window(torch.tensor([[[[[1.0, 9.0]]]]])).flatten().tolist()
        [0.0, 1.0]
        >>> window.from_window(torch.zeros(1, 1, 1, 1, 1)).item()
        1.0
    """

    def __init__(self, bounds: Sequence[tuple[float, float]]) -> None:
        self.bounds = tuple((float(low), float(high)) for low, high in bounds)
        """Lower and upper end of each channel's window, nnU-Net-normalised."""
        low, high = torch.tensor(self.bounds, dtype=torch.float32).T
        self.low = low
        """Lower end of each channel's window, nnU-Net-normalised, shape (C,)."""
        self._centre = ((high + low) / 2)[:, None, None, None]
        self._half = ((high - low) / 2)[:, None, None, None]

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any], normalization_schemes: Sequence[str]) -> IntensityWindow | None:
        """The window that the clip of CTNormalization implies, or `None` if a channel has another scheme.

        Raises:
            UserError: The plans' clip bounds of a channel are empty, so that all of its voxels would be equal.
        """
        if any(scheme != "CTNormalization" for scheme in normalization_schemes):
            return None
        bounds = []
        for channel in range(len(normalization_schemes)):
            properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
            low, high = properties["percentile_00_5"], properties["percentile_99_5"]
            if not low < high:
                raise UserError(
                    f"The plans clip channel {channel} to [{low}, {high}] HU, which leaves no contrast. Check that the "
                    "images hold HU, then plan again."
                )
            std = max(properties["std"], 1e-8)
            bounds.append(((low - properties["mean"]) / std, (high - properties["mean"]) / std))
        return cls(bounds)

    def to(self, device: torch.device) -> IntensityWindow:
        """Move to a device, in place; returns itself."""
        self.low, self._centre, self._half = (t.to(device) for t in (self.low, self._centre, self._half))
        return self

    def to_window(self, x: Tensor) -> Tensor:
        """nnU-Net-normalised -> [-1, 1], clamped: augmentation and resampling overshoot, and tanh cannot follow.

        Shape: (B, C, Z, Y, X) -> (B, C, Z, Y, X)
        """
        return ((x.float() - self._centre) / self._half).clamp(-1, 1)

    def from_window(self, x: Tensor) -> Tensor:
        """[-1, 1] -> nnU-Net-normalised.

        Shape: (B, C, Z, Y, X) -> (B, C, Z, Y, X)
        """
        return x * self._half + self._centre

    def __repr__(self) -> str:
        return f"IntensityWindow({[(round(low, 4), round(high, 4)) for low, high in self.bounds]})"


def normalised_to_hu(x: Any, plans: Mapping[str, Any], channel: int = 0) -> Any:
    """Undo CTNormalization's affine part (not its clip): nnU-Net-normalised -> HU, for arrays and tensors alike."""
    properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
    return x * max(properties["std"], 1e-8) + properties["mean"]


def measure_window(dataset: Any, *, cases: int = 20, voxels: int = 100_000) -> IntensityWindow:
    """The 0.5 and 99.5 percentiles of each channel of the preprocessed data, for normalisations without a clip.

    Args:
        dataset: nnU-Net's access to the preprocessed cases.
        cases: At most this many cases are read, spread over the dataset.
        voxels: Voxels drawn from each.
    """
    rng = np.random.default_rng(0)
    identifiers = dataset.identifiers[:: math.ceil(len(dataset.identifiers) / cases)]
    samples = []
    for identifier in identifiers:
        volume = np.asarray(dataset.load_case(identifier)[0][:])
        volume = volume.reshape(len(volume), -1)
        samples.append(volume[:, rng.integers(volume.shape[1], size=voxels)])
    low, high = np.percentile(np.concatenate(samples, axis=1), (0.5, 99.5), axis=1)
    return IntensityWindow([(float(a), float(b)) for a, b in zip(low, high, strict=True)])
