"""The lesion burden: volumes, shares, sides, thirds and densities, whatever the order of the voxels."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from gasnet_nnunet.burden import burden_of, find_lungs
from gasnet_nnunet.phantom import make_phantom
from gasnet_nnunet.volumes import Grid

SPACING = (4.0, 3.0, 3.0)
SHAPE = (60, 70, 90)
TILTED = tuple(np.array([[0.96, 0.0, 0.28], [-0.0784, 0.96, 0.2688], [-0.2688, -0.28, 0.9216]]).ravel())
"""Turned by 16 degrees about two axes."""


def grid_of(shape: tuple[int, ...], direction: tuple[float, ...] = tuple(np.eye(3).ravel())) -> Grid:
    return Grid(shape[::-1], SPACING[::-1], (5.0, -7.0, 30.0), direction)


def ball(z: float, y: float, x: float, radius: float, shape: tuple[int, ...] = SHAPE) -> NDArray[np.bool_]:
    """A ball around a place in mm."""
    axes = (np.arange(n) * edge for n, edge in zip(shape, SPACING, strict=True))
    places = np.meshgrid(*axes, indexing="ij")
    return sum((a - b) ** 2 for a, b in zip(places, (z, y, x), strict=True)) < radius**2  # type: ignore[return-value]


@pytest.fixture(scope="module")
def chest() -> dict[str, NDArray[np.generic]]:
    """The right lung (towards low X), the larger left lung, which touches it, and lesions in places of their own."""
    right, left = ball(110, 100, 72, 60), ball(110, 100, 188, 65)
    bridge = np.zeros(SHAPE, bool)
    bridge[25:28, 33:35, 40:48] = True
    lesion = (ball(150, 100, 70, 12) | ball(75, 100, 190, 15) | ball(110, 100, 200, 10)) & (right | left)
    ct = np.full(SHAPE, -900, np.int16)
    ct[5:-5, 5:-5, 3:-3] = 40
    ct[right | left | bridge] = -850
    ct[lesion] = -500
    ct[ball(75, 100, 190, 15)] = -50
    return {"lungs": right | left | bridge, "lesion": lesion, "ct": ct}


def assert_like(burden: dict[str, float], expected: dict[str, float], tolerance: float = 1e-9) -> None:
    for name, value in expected.items():
        assert burden[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def expected_of(chest: dict[str, NDArray[np.generic]]) -> dict[str, float]:
    """What must come out, computed from the drawing: X up is the left, Z up is the head."""
    ml = float(np.prod(SPACING)) / 1000
    lungs, lesion = chest["lungs"], chest["lesion"]
    z, _, x = np.indices(SHAPE)
    rows = np.flatnonzero(lungs.any(axis=(1, 2)))
    third = ((rows[-1] - z) / (rows[-1] - rows[0]) * 3).astype(int).clip(0, 2)
    parts = {"left": x * SPACING[2] > 130, "right": x * SPACING[2] <= 130}
    parts |= {name: third == number for number, name in enumerate(("upper", "middle", "lower"))}
    values = {"lesion_ml": lesion.sum() * ml, "lung_ml": lungs.sum() * ml}
    for name, part in parts.items():
        values[f"{name}_lesion_ml"] = (lesion & part).sum() * ml
        values[f"{name}_percent"] = 100 * (lesion & part).sum() / (lungs & part).sum()
    return values


def test_places_of_a_drawn_chest(chest: dict[str, NDArray[np.generic]]) -> None:
    burden = burden_of(chest["lesion"], chest["ct"], grid_of(SHAPE), lungs=chest["lungs"])
    expected = expected_of(chest)
    assert_like({**burden}, {name: value for name, value in expected.items() if "t_percent" not in name})
    # Where the lungs touch, voxels may fall to either.
    assert_like({**burden}, expected, tolerance=0.03)
    assert burden["left_percent"] > 1.5 * burden["right_percent"] > 0
    assert burden["lesion_percent"] == pytest.approx(100 * burden["lesion_ml"] / burden["lung_ml"])
    assert burden["components"] == 3
    assert burden["component_ml"] == sorted(burden["component_ml"], reverse=True)
    assert sum(burden["component_ml"]) == pytest.approx(burden["lesion_ml"])
    assert burden["lesion_outside_lung_ml"] == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(), (0,), (2,), (0, 1, 2)])
def test_stored_in_any_order(
    chest: dict[str, NDArray[np.generic]], order: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    """Axes swapped and run backwards, as in sagittal series and in NIfTI files of other programs."""
    image = sitk.GetImageFromArray(chest["ct"])
    image.SetSpacing(SPACING[::-1])
    turned = sitk.Flip(sitk.PermuteAxes(image, order), [axis in flips for axis in range(3)])
    stored = {}
    for name, values in chest.items():
        part = sitk.GetImageFromArray(values.astype(np.int16))
        part.CopyInformation(image)
        part = sitk.Flip(sitk.PermuteAxes(part, order), [axis in flips for axis in range(3)])
        stored[name] = sitk.GetArrayFromImage(part)
    burden = burden_of(stored["lesion"], stored["ct"], Grid.of(turned), lungs=stored["lungs"])
    assert_like(burden, expected_of(chest), tolerance=0.02)


def test_oblique_directions_tell_up_and_left(chest: dict[str, NDArray[np.generic]]) -> None:
    """The same patient on a tilted grid: what is up follows the direction, not the slices."""
    grid = grid_of((75, 95, 105), TILTED)
    reference = sitk.Image(grid.size, sitk.sitkInt16)
    reference.SetSpacing(grid.spacing)
    reference.SetDirection(grid.direction)
    middle = np.array([n * edge / 2 for n, edge in zip(SHAPE[::-1], SPACING[::-1], strict=True)])
    centre = np.array(reference.TransformContinuousIndexToPhysicalPoint([n / 2 for n in grid.size]))
    reference.SetOrigin((middle - centre).tolist())
    tilted = {}
    for name, values in chest.items():
        image = sitk.GetImageFromArray(values.astype(np.int16))
        image.SetSpacing(SPACING[::-1])
        tilted[name] = sitk.GetArrayFromImage(
            sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor)
        )
    burden = burden_of(tilted["lesion"], tilted["ct"], Grid.of(reference), lungs=tilted["lungs"])
    expected = expected_of(chest)
    assert_like(burden, expected, tolerance=0.12)
    wrong = burden_of(tilted["lesion"], tilted["ct"], grid_of(tilted["ct"].shape), lungs=tilted["lungs"])
    assert abs(wrong["upper_percent"] / expected["upper_percent"] - 1) > 0.2, "the tilt matters"


def test_densities(chest: dict[str, NDArray[np.generic]]) -> None:
    restored = np.where(chest["lesion"], -840, chest["ct"])
    burden = burden_of(chest["lesion"], chest["ct"], grid_of(SHAPE), lungs=chest["lungs"], restored=restored)
    dense = (chest["lesion"] & (chest["ct"] == -50)).sum() / chest["lesion"].sum()
    assert burden["consolidated_percent"] == pytest.approx(100 * dense)
    assert burden["ground_glass_ml"] + burden["consolidated_ml"] == pytest.approx(burden["lesion_ml"])
    assert burden["lesion_mean_hu"] == pytest.approx(-500 * (1 - dense) - 50 * dense)
    assert burden["lesion_mean_hu_restored"] == -840
    assert burden["lung_mean_hu"] > burden["lung_mean_hu_restored"]
    at_threshold = burden_of(np.ones((2, 2, 2)), np.full((2, 2, 2), -200), grid_of((2, 2, 2)))
    assert at_threshold["consolidated_percent"] == 100


def test_one_lung(chest: dict[str, NDArray[np.generic]]) -> None:
    lungs = chest["lungs"].copy()
    lungs[:, :, 44:] = False
    burden = burden_of(chest["lesion"] & lungs, chest["ct"], grid_of(SHAPE), lungs=lungs)
    assert burden["right_lung_ml"] == pytest.approx(burden["lung_ml"])
    assert burden["left_lung_ml"] == 0
    assert burden["left_percent"] is None


def test_lungs_grown_together_are_cut_where_they_are_thin() -> None:
    lungs = ball(110, 100, 75, 60) | ball(110, 100, 185, 60)
    lungs[20:36, 25:42, 20:67] = True
    ct = np.full(SHAPE, 40, np.int16)
    burden = burden_of(ball(110, 100, 230, 10) & lungs, ct, grid_of(SHAPE), lungs=lungs)
    assert burden["left_lung_ml"] == pytest.approx(burden["right_lung_ml"], rel=0.1)
    assert burden["right_lesion_ml"] == 0 < burden["left_lesion_ml"]


def test_lesions_that_the_lung_mask_misses_are_lung_too(chest: dict[str, NDArray[np.generic]]) -> None:
    lesion = chest["lesion"]
    burden = burden_of(lesion, chest["ct"], grid_of(SHAPE), lungs=chest["lungs"] & ~lesion)
    assert burden["lesion_outside_lung_ml"] == pytest.approx(burden["lesion_ml"])
    assert_like(burden, expected_of(chest), tolerance=0.02)


def test_what_lies_apart_from_the_lungs_is_no_lung(chest: dict[str, NDArray[np.generic]]) -> None:
    """False alarms in the air or in the bowel."""
    lesion = chest["lesion"].copy()
    lesion[1:4, 2:6, 2:6] = True
    burden = burden_of(lesion, chest["ct"], grid_of(SHAPE), lungs=chest["lungs"])
    alarm = 48 * np.prod(SPACING) / 1000
    expected = expected_of(chest)
    assert burden["lesion_ml"] == pytest.approx(expected.pop("lesion_ml") + alarm)
    assert burden["lesion_outside_lung_ml"] == pytest.approx(alarm)
    assert burden["components"] == 4
    assert_like(burden, expected, tolerance=0.03)
    assert burden["lesion_percent"] == pytest.approx(100 * (burden["lesion_ml"] - alarm) / burden["lung_ml"])


def test_nothing_to_measure() -> None:
    ct = np.full((4, 4, 4), -800)
    empty = np.zeros((4, 4, 4), np.uint8)
    healthy = burden_of(empty, ct, grid_of((4, 4, 4)), lungs=np.ones((4, 4, 4)))
    assert healthy["lesion_ml"] == healthy["lesion_percent"] == healthy["components"] == 0
    assert healthy["ground_glass_percent"] is None
    assert healthy["lesion_mean_hu"] is None
    for lungs in (None, empty):
        unknown = burden_of(empty + 1, ct, grid_of((4, 4, 4)), lungs=lungs)
        assert unknown["lesion_ml"] == pytest.approx(64 * np.prod(SPACING) / 1000)
        assert [unknown[name] for name in ("lung_ml", "lesion_percent", "left_percent", "upper_percent")] == [None] * 4
    assert unknown.keys() == healthy.keys()


def test_lungs_are_found_in_any_orientation() -> None:
    phantom = make_phantom(np.random.default_rng(0), "healthy", size=(30, 64, 64), spacing=(8.0, 5.5, 5.5))
    axial = sitk.GetImageFromArray(phantom.ct)
    axial.SetSpacing(phantom.spacing[::-1])
    coronal = sitk.PermuteAxes(axial, (0, 2, 1))
    lungs = find_lungs(phantom.ct, Grid.of(axial))
    assert lungs.any()
    found = find_lungs(sitk.GetArrayFromImage(coronal), Grid.of(coronal))
    np.testing.assert_array_equal(found, lungs.transpose(1, 0, 2))
