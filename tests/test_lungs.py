"""Lungs of procedural chests: ellipsoids of air in a body, in whatever shape CTs come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.lungs import bounding_box, measure_case, segment_body, segment_lungs

SPACING = (6.0, 3.0, 3.0)
EXTENT = (270.0, 252.0, 348.0)
"""Size of the volume (Z, Y, X) in mm; z grows towards the head, y towards the back."""


class Chest(NamedTuple):
    ct: NDArray[np.float32]
    lungs: NDArray[np.bool_]
    body: NDArray[np.bool_]
    spacing: tuple[float, ...]


def ellipsoid(grid: Any, centre: tuple[float, float, float], axes: tuple[float, float, float]) -> NDArray[np.bool_]:
    return sum(((x - c) / a) ** 2 for x, c, a in zip(grid, centre, axes, strict=True)) < 1


def chest(spacing: tuple[float, ...] = SPACING, *, lungs: bool = True, degrees: float = 0.0, seed: int = 0) -> Chest:
    """Body with arms cut off, two lungs with vessels, heart, trachea, stomach gas, a table, air around, noise in HU."""
    shape = [round(extent / edge) for extent, edge in zip(EXTENT, spacing, strict=True)]
    z, y, x = (
        ((np.arange(n) + 0.5) * edge - n * edge / 2).reshape([-1 if k == axis else 1 for k in range(3)])
        for axis, (n, edge) in enumerate(zip(shape, spacing, strict=True))
    )
    turn = np.deg2rad(degrees)
    grid = (z, y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn))
    ct = np.full(shape, -1000.0)
    ct[np.broadcast_to((np.abs(grid[1] - 112) < 4) & (np.abs(grid[2]) < 150), shape)] = 50  # the table
    body = np.broadcast_to((grid[1] / 100) ** 2 + (grid[2] / 145) ** 2 < 1, shape)
    ct[body] = -90
    ct[np.broadcast_to((grid[1] / 88) ** 2 + (grid[2] / 130) ** 2 < 1, shape)] = 40
    ct[ellipsoid(grid, (-112, -10, 60), (22, 35, 35))] = -1000  # stomach
    found = np.zeros(shape, bool)
    if lungs:
        for side in (-66, 66):
            found |= ellipsoid(grid, (20, 0, side), (95, 70, 45))
        found &= ~ellipsoid(grid, (-10, -25, 15), (50, 38, 42))
        ct[found] = -860
        ct[np.broadcast_to((grid[0] > 40) & ((grid[1] - 5) ** 2 + grid[2] ** 2 < 8**2), shape)] = -1000
        # Vessels run through; all of them belong to the lungs.
        rng = np.random.default_rng(seed)
        branches = ndimage.gaussian_filter(rng.normal(size=shape), [4 / edge for edge in spacing])
        ct[found & (branches > 2.2 * branches.std())] = 0
    ct += np.random.default_rng(seed + 1).normal(0, 20, shape)
    return Chest(ct.astype(np.float32), found, body, spacing)


@pytest.fixture(scope="module")
def standard() -> Chest:
    return chest()


def dice(found: NDArray[Any], truth: NDArray[Any]) -> float:
    assert found.dtype == bool
    assert found.shape == truth.shape
    return 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())


@pytest.mark.parametrize(
    ("spacing", "degrees"), [((3.0, 3.0, 3.0), 0), ((9.7, 2.3, 2.6), 0), ((2.0, 4.1, 3.7), 0), (SPACING, 20)]
)
def test_lungs_are_found_at_any_spacing_and_turn(spacing: tuple[float, ...], degrees: float) -> None:
    phantom = chest(spacing, degrees=degrees)
    assert dice(segment_lungs(phantom.ct, spacing), phantom.lungs) > 0.96


def equalised(ct: NDArray[np.float32]) -> NDArray[np.float32]:
    """8-bit slices of raised contrast, mapped onto HU: lung near -1000, tissue near -400."""
    grey = 255 * np.clip((ct + 1050) / 1300, 0, 1) ** 0.7
    return (np.round(0.1 * 255 + 0.6 * grey) / 255 * 1500 - 1250).astype(np.float32)


def padded(ct: NDArray[np.float32]) -> NDArray[np.float32]:
    y, x = np.indices(ct.shape[1:]) / np.array(ct.shape[1:])[:, None, None] - 0.5
    return np.where(np.hypot(y * EXTENT[1], x * EXTENT[2]) > 172, np.float32(-3024), ct)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda ct: np.clip(ct, -1000, 200), id="clipped"),
        pytest.param(lambda ct: np.clip(ct, -800, 100), id="clipped above the lung's level"),
        pytest.param(padded, id="padding of -3024 around the field of view"),
        pytest.param(equalised, id="contrast-equalised"),
        pytest.param(lambda ct: ct.astype(np.int16), id="integers"),
        pytest.param(lambda ct: ct + np.random.default_rng(7).normal(0, 120, ct.shape), id="low dose"),
    ],
)
def test_lungs_are_found_whatever_was_done_to_the_values(standard: Chest, change: Callable[[Any], Any]) -> None:
    assert dice(segment_lungs(change(standard.ct), standard.spacing), standard.lungs) > 0.95


@pytest.mark.parametrize(
    "window",
    [
        pytest.param(np.s_[14:36], id="lungs touch the first and the last slice"),
        pytest.param(np.s_[:, 8:-8, 12:-12], id="field of view cuts the body"),
        pytest.param(np.s_[::-1], id="head first"),
    ],
)
def test_lungs_are_found_in_every_part_of_the_scan(standard: Chest, window: Any) -> None:
    assert dice(segment_lungs(standard.ct[window], standard.spacing), standard.lungs[window]) > 0.95


def test_gas_in_the_stomach_is_no_lung(standard: Chest) -> None:
    z, _, x = np.indices(standard.ct.shape)
    stomach = (z < 8) & (standard.ct < -900) & standard.body & (x > standard.ct.shape[2] // 2)
    assert stomach.sum() > 500
    assert not (segment_lungs(standard.ct, standard.spacing) & stomach).any()


def test_consolidation_at_the_pleura_and_nodules_are_part_of_the_lungs(standard: Chest) -> None:
    z, y, x = (np.indices(standard.ct.shape).T * SPACING).T
    consolidation = standard.lungs & ((z - 156) ** 2 + (y - 186) ** 2 + (x - 245) ** 2 < 15**2)
    nodule = standard.lungs & ((z - 156) ** 2 + (y - 120) ** 2 + (x - 105) ** 2 < 9**2)
    assert (consolidation & ndimage.binary_dilation(~standard.lungs)).any()
    assert consolidation.sum() > 120
    assert nodule.sum() > 20
    found = segment_lungs(np.where(consolidation | nodule, np.float32(30), standard.ct), standard.spacing)
    assert found[consolidation].mean() > 0.6
    assert found[nodule].all()
    assert dice(found, standard.lungs) > 0.96


def test_consolidation_at_the_heart_is_part_of_the_lungs(standard: Chest) -> None:
    z, y, x = (np.indices(standard.ct.shape).T * SPACING).T
    consolidation = standard.lungs & ((z - 130) ** 2 + (y - 126) ** 2 + (x - 215) ** 2 < 38**2)
    assert consolidation.sum() > 1500
    texture = np.random.default_rng(3).normal(-330, 80, standard.ct.shape).astype(np.float32)
    found = segment_lungs(np.where(consolidation, texture, standard.ct), standard.spacing)
    assert found[consolidation].mean() > 0.9
    assert dice(found, standard.lungs) > 0.97


@pytest.mark.parametrize(
    "ct",
    [
        pytest.param(chest((9.0, 6.0, 6.0), lungs=False).ct, id="abdomen with gas in the stomach"),
        pytest.param(np.full((12, 40, 40), -1000.0), id="air alone"),
        pytest.param(np.zeros((12, 40, 40)), id="zeros"),
        pytest.param(np.random.default_rng(0).normal(0, 30, (12, 40, 40)), id="tissue alone"),
        pytest.param(np.where(np.indices((12, 40, 40))[2] < 20, -100.0, 50.0), id="fat and muscle"),
        pytest.param(np.full((1, 3, 2), -1000.0), id="a few voxels"),
    ],
)
def test_scan_without_lungs_gives_an_empty_mask(ct: NDArray[Any]) -> None:
    found = segment_lungs(ct, (9.0, 6.0, 6.0))
    assert found.shape == ct.shape
    assert not found.any()


def test_body_is_filled_and_without_table(standard: Chest) -> None:
    found = segment_body(standard.ct, standard.spacing)
    assert dice(found, standard.body) > 0.97
    assert found[standard.lungs].all()
    assert not segment_body(np.full((4, 9, 9), -1000.0), SPACING).any()


def test_bounding_box_is_half_open() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[3, 5, 4] = True
    box = bounding_box(mask)
    assert box == ((1, 4), (2, 6), (3, 5))
    assert mask[tuple(slice(*axis) for axis in box)].sum() == mask.sum()


def write(path: Path, array: NDArray[Any], spacing: tuple[float, ...]) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)
    return path


def test_case_is_measured_with_the_computed_or_the_users_mask(standard: Chest, tmp_path: Path) -> None:
    ct = write(tmp_path / "ct.nii.gz", standard.ct.astype(np.int16), standard.spacing)
    computed = measure_case(ct, None, "lungs")
    assert computed.shape == standard.ct.shape
    assert computed.spacing == pytest.approx(standard.spacing)
    true_box = bounding_box(standard.lungs)
    assert computed.box is not None
    assert true_box is not None
    assert np.abs(np.subtract(computed.box, true_box)).max() <= 1
    assert computed.box_mm == pytest.approx([(b - a) * s for (a, b), s in zip(computed.box, SPACING, strict=True)])
    assert computed.organ_fraction == pytest.approx(standard.lungs.mean(), rel=0.05)
    low, half_percent, median, _, high = computed.intensity
    assert (low, high) == (standard.ct.astype(np.int16).min(), standard.ct.astype(np.int16).max())
    assert low <= half_percent < median < high

    own = np.zeros(standard.ct.shape, np.uint8)
    own[3:9, 10:20, 30:50] = 7
    mask = write(tmp_path / "mask.nii.gz", own, standard.spacing)
    assert measure_case(ct, mask, "lungs").box == ((3, 9), (10, 20), (30, 50))
    assert measure_case(ct, None, "volume").box == tuple((0, n) for n in own.shape)
    assert measure_case(ct, None, "body").organ_fraction == pytest.approx(standard.body.mean(), rel=0.05)


def test_what_cannot_be_measured_is_named(standard: Chest, tmp_path: Path) -> None:
    ct = write(tmp_path / "ct.nii.gz", standard.ct.astype(np.int16), standard.spacing)
    other = write(tmp_path / "other.nii.gz", np.ones((4, 5, 6), np.uint8), standard.spacing)
    with pytest.raises(UserError, match=r"other\.nii\.gz has shape \(4, 5, 6\)"):
        measure_case(ct, other, "lungs")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.nii\.gz"):
        measure_case(broken, None, "lungs")
    empty = measure_case(write(tmp_path / "air.nii.gz", np.full((9, 20, 20), -1000, np.int16), SPACING), None, "lungs")
    assert empty.box is None
    assert empty.box_mm == (0, 0, 0)
