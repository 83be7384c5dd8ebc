"""Spacing and patch: one patch must hold the lungs of nearly every case, by nnU-Net's own topology rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gasnet_nnunet.geometry import Fits, Geometry, choose_geometry, covering_extent, nnunet_topology

millimetres = st.floats(80.0, 450.0)
boxes = st.lists(st.tuples(millimetres, millimetres, millimetres), min_size=1, max_size=60).map(np.array)
in_plane = st.floats(0.5, 3.0)
voxels = st.tuples(st.floats(0.5, 10.0), in_plane).map(lambda size: (size[0], size[1], size[1]))
edges = st.integers(16, 256)


def fits(limit: int) -> Fits:
    return lambda spacing, patch: bool(np.prod(patch) <= limit)


@given(extents=boxes)
def test_covering_extent_holds_95_percent_along_all_axes_at_once(extents: np.ndarray) -> None:
    extent = covering_extent(extents)

    assert np.mean(np.all(extents <= extent, axis=1)) >= 0.95


def test_covering_extent_leaves_out_few_giants() -> None:
    ordinary = np.tile([300.0, 200.0, 300.0], (39, 1))

    assert covering_extent(np.vstack([ordinary, [900.0, 900.0, 900.0]])).tolist() == [300.0, 200.0, 300.0]


@given(
    extents=boxes,
    spacings=st.lists(voxels, min_size=1, max_size=20).map(np.array),
    patch=st.tuples(edges, edges, edges),
)
def test_given_patch_holds_nearly_every_box(
    extents: np.ndarray, spacings: np.ndarray, patch: tuple[int, int, int]
) -> None:
    geometry = choose_geometry(extents, spacings, patch)

    assert geometry.holds(extents).mean() >= 0.95
    assert all(chosen >= wanted for chosen, wanted in zip(geometry.patch_size, patch, strict=True))
    assert geometry.spacing[1] == geometry.spacing[2]
    # No voxels are invented, and none are given away: a finer spacing would lose boxes or be finer than the data.
    finest = spacings.min(axis=0)
    assert np.all(np.array(geometry.spacing) >= finest * (1 - 1e-9))
    room = (np.array(geometry.patch_size) - 1) * geometry.spacing
    tight = np.isclose(room, covering_extent(extents)) | np.isclose(geometry.spacing, finest)
    assert tight[0]
    assert tight[1:].any()


@given(extents=boxes, spacings=st.lists(voxels, min_size=1, max_size=20).map(np.array), limit=st.integers(2**14, 2**22))
def test_derived_patch_holds_the_boxes_and_fits_the_memory(
    extents: np.ndarray, spacings: np.ndarray, limit: int
) -> None:
    geometry = choose_geometry(extents, spacings, fits_memory=fits(limit))

    assert np.prod(geometry.patch_size) <= limit
    assert geometry.holds(extents).mean() >= 0.95
    assert np.all(np.array(geometry.spacing) >= np.median(spacings, axis=0) * (1 - 1e-9))


@given(extents=boxes, spacings=st.lists(voxels, min_size=1, max_size=5).map(np.array), limit=st.integers(2**16, 2**22))
def test_more_memory_never_coarsens(extents: np.ndarray, spacings: np.ndarray, limit: int) -> None:
    little = choose_geometry(extents, spacings, fits_memory=fits(limit))
    much = choose_geometry(extents, spacings, fits_memory=fits(8 * limit))

    assert np.prod(much.spacing) <= np.prod(little.spacing) * (1 + 1e-9)


@given(
    extents=boxes, spacings=st.lists(voxels, min_size=1, max_size=5).map(np.array), patch=st.tuples(edges, edges, edges)
)
def test_every_stage_divides_the_patch(extents: np.ndarray, spacings: np.ndarray, patch: tuple[int, int, int]) -> None:
    geometry = choose_geometry(extents, spacings, patch)

    assert np.all(np.array(geometry.patch_size) % np.prod(geometry.topology.strides, axis=0) == 0)
    assert geometry.topology == nnunet_topology(geometry.spacing, geometry.patch_size)


def test_enough_memory_keeps_the_data_spacing() -> None:
    geometry = choose_geometry(np.array([[300.0, 200.0, 300.0]]), np.array([[5.0, 2.0, 2.0]]))

    assert geometry.spacing == (5.0, 2.0, 2.0)
    assert geometry.remarks == ()


def test_coarsening_spares_the_coarse_axis_and_says_so() -> None:
    extents, spacings = np.array([[300.0, 200.0, 300.0]]), np.array([[6.0, 0.8, 0.8]])

    geometry = choose_geometry(extents, spacings, fits_memory=fits(60 * 96 * 96))

    assert geometry.spacing[0] < 1.5 * 6.0
    assert geometry.spacing[1] > 2.0
    assert "coarsened" in geometry.remarks[0]


def test_patch_of_the_paper() -> None:
    extents = np.random.default_rng(0).normal([300, 210, 300], [25, 15, 20], (40, 3))

    geometry = choose_geometry(extents, np.tile([1.0, 0.7, 0.7], (40, 1)), (40, 160, 160))

    assert geometry.patch_size == (40, 160, 160)
    assert 7.5 < geometry.spacing[0] < 10
    assert 1.9 < geometry.spacing[2] < 2.5
    assert geometry.topology.strides[1] == (1, 2, 2)


def test_patch_larger_than_the_lungs_keeps_the_finest_spacing_and_says_so() -> None:
    geometry = choose_geometry(np.array([[200.0, 150.0, 200.0]]), np.array([[5.0, 2.0, 2.0]]), (64, 160, 160))

    assert geometry.spacing == (5.0, 2.0, 2.0)
    assert "Z, Y, X" in geometry.remarks[0]


def test_indivisible_patch_is_enlarged_and_says_so() -> None:
    geometry = choose_geometry(np.array([[300.0, 200.0, 300.0]]), np.array([[1.0, 1.0, 1.0]]), (30, 100, 100))

    assert geometry.patch_size == (32, 112, 112)
    assert "30 x 100 x 100 became 32 x 112 x 112" in geometry.remarks[0]


def test_axes_of_very_different_data_spacing_are_not_tied() -> None:
    sagittal = np.tile([1.0, 1.0, 6.0], (4, 1))

    geometry = choose_geometry(np.tile([300.0, 200.0, 300.0], (4, 1)), sagittal, (96, 96, 32))

    assert geometry.spacing[2] > 2 * geometry.spacing[1]


@given(start=st.floats(0.0, 1.0), spacing=st.floats(1.0, 5.0), edge=st.integers(8, 64))
def test_a_box_that_holds_meets_no_more_voxels_than_the_patch_has(start: float, spacing: float, edge: int) -> None:
    geometry = Geometry((spacing,) * 3, nnunet_topology((spacing,) * 3, (edge,) * 3))
    size = geometry.patch_size[0]
    extent = (size - 1) * spacing
    assume(geometry.holds(np.full((1, 3), extent))[0])

    first, last = np.floor(start), np.floor((start * spacing + extent) / spacing - 1e-9)

    assert last - first + 1 <= size


@pytest.mark.parametrize("factor", [1.001, 2.0])
def test_a_larger_box_does_not_hold(factor: float) -> None:
    extent = np.array([[300.0, 200.0, 300.0]])
    geometry = choose_geometry(extent, np.array([[1.0, 1.0, 1.0]]), (40, 80, 80))

    assert geometry.holds(extent).all()
    assert not geometry.holds(factor * extent).any()
