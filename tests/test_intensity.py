"""HU, nnU-Net's normalised units and the window of G and D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.intensity import IntensityWindow, measure_window, normalised_to_hu

PAPER = {"percentile_00_5": -1250.0, "percentile_99_5": 250.0, "mean": -500.0, "std": 750.0}


def plans_of(*properties: dict[str, float]) -> dict[str, Any]:
    return {"foreground_intensity_properties_per_channel": {str(n): entry for n, entry in enumerate(properties)}}


def normalise(hu: np.ndarray, properties: dict[str, float]) -> np.ndarray:
    return CTNormalization(use_mask_for_norm=False, intensityproperties=properties).run(hu.astype(np.float32))


@given(
    low=st.floats(-2000, 0),
    width=st.floats(50, 3000),
    mean=st.floats(-1000, 500),
    std=st.floats(10, 1000),
    seed=st.integers(0, 1000),
)
def test_window_is_the_clip_of_nnunet(low: float, width: float, mean: float, std: float, seed: int) -> None:
    properties = {"percentile_00_5": low, "percentile_99_5": low + width, "mean": mean, "std": std}
    window = IntensityWindow.from_plans(plans_of(properties), ["CTNormalization"])
    assert window is not None
    hu = np.random.default_rng(seed).uniform(low - 500, low + width + 500, (1, 1, 3, 4, 5))
    expected = 2 * (np.clip(hu, low, low + width) - low) / width - 1
    found = window.to_window(torch.from_numpy(normalise(hu, properties)))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


def test_the_window_of_the_paper_changes_nothing() -> None:
    window = IntensityWindow.from_plans(plans_of(PAPER), ["CTNormalization"])
    assert window is not None
    assert window.bounds == ((-1.0, 1.0),)
    hu = np.array([-3000.0, -1250.0, -500.0, 0.0, 250.0, 3000.0])
    x = torch.from_numpy(normalise(hu, PAPER)).view(1, 1, 1, 1, 6)
    torch.testing.assert_close(window.to_window(x), x)


def test_overshoot_is_clamped_and_half_precision_becomes_single() -> None:
    window = IntensityWindow([(-1.0, 3.0)])
    x = torch.tensor([-5.0, -1.0, 1.0, 3.0, 4.2], dtype=torch.float16).view(1, 1, 1, 1, 5)
    found = window.to_window(x)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]


def test_every_channel_has_its_own_window() -> None:
    window = IntensityWindow([(0.0, 2.0), (-10.0, 10.0)])
    assert window.low.tolist() == [0.0, -10.0]
    x = torch.tensor([2.0, 5.0]).view(1, 2, 1, 1, 1)
    assert window.to_window(x).flatten().tolist() == [1.0, 0.5]


@given(low=st.floats(-100, 100), width=st.floats(0.1, 100), value=st.floats(-1, 1))
def test_there_and_back(low: float, width: float, value: float) -> None:
    window = IntensityWindow([(low, low + width)])
    x = torch.full((1, 1, 1, 1, 1), value)
    torch.testing.assert_close(window.to_window(window.from_window(x)), x, atol=1e-3, rtol=0)


def test_bounds_come_back_as_they_were_given() -> None:
    bounds = ((-1.4142135623730951, 2.718281828459045),)
    assert IntensityWindow(bounds).bounds == bounds


def test_other_normalisations_have_no_window_in_the_plans() -> None:
    assert IntensityWindow.from_plans(plans_of(PAPER, PAPER), ["CTNormalization", "ZScoreNormalization"]) is None


def test_a_clip_without_contrast_is_refused() -> None:
    flat = {**PAPER, "percentile_99_5": -1250.0}
    with pytest.raises(UserError, match=r"channel 1 to \[-1250.0, -1250.0\] HU"):
        IntensityWindow.from_plans(plans_of(PAPER, flat), ["CTNormalization", "CTNormalization"])


def test_hu_come_back_from_normalised_values() -> None:
    properties = {**PAPER, "mean": -300.0, "std": 431.7}
    hu = np.linspace(-1250, 250, 7)
    np.testing.assert_allclose(normalised_to_hu(normalise(hu, properties), plans_of(properties)), hu, rtol=1e-5)
    second = normalised_to_hu(torch.zeros(1), plans_of(PAPER, properties), channel=1)
    assert second.item() == -300.0


def test_a_window_is_measured_on_preprocessed_cases(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = []
    for number in range(3):
        data = np.stack([rng.normal(number, 1, (8, 16, 16)), rng.uniform(-7, 5, (8, 16, 16))]).astype(np.float32)
        seg = np.zeros((1, 8, 16, 16), np.int16)
        shape = (1, 8, 16, 16)
        nnUNetDatasetBlosc2.save_case(data, seg, {}, str(tmp_path / f"case_{number}"), chunks=shape, blocks=shape)
        values.append(data.reshape(2, -1))
    window = measure_window(nnUNetDatasetBlosc2(str(tmp_path)))
    expected = np.percentile(np.concatenate(values, axis=1), (0.5, 99.5), axis=1).T
    np.testing.assert_allclose(window.bounds, expected, atol=0.1)


@pytest.mark.parametrize(("count", "read"), [(1, 1), (20, 20), (39, 20), (41, 14)])
def test_no_more_cases_are_measured_than_promised(count: int, read: int) -> None:
    class Cases:
        def __init__(self) -> None:
            self.identifiers = [str(number) for number in range(count)]
            self.seen: list[str] = []

        def load_case(self, identifier: str) -> tuple[np.ndarray]:
            self.seen.append(identifier)
            return (np.linspace(0, 1, 8).reshape(1, 2, 2, 2),)

    cases = Cases()
    measure_window(cases, voxels=10)
    assert len(cases.seen) == read


def test_the_window_moves_to_a_device() -> None:
    window = IntensityWindow([(-1.0, 1.0)]).to(torch.device("meta"))
    tensors = [value for value in vars(window).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3
    assert all(tensor.device.type == "meta" for tensor in tensors)
