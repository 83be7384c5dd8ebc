"""Streams of pairs: what is read, where, how it is padded and how it is augmented."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage
from torch import Tensor

from gasnet_nnunet.lungs import Box
from gasnet_nnunet.organ_masks import OrganMasks
from gasnet_nnunet.sampling import (
    PairLoader,
    PairTransform,
    PastedLoader,
    VolumeReader,
    patch_start,
    read_patch,
    spread_positions,
    watch_patches,
)
from gasnet_nnunet.synthesis import soft_border

LOW = (-2.0, -3.0, -4.0)
CASES: dict[str, tuple[tuple[int, int, int], Box]] = {
    "d0": ((20, 30, 40), ((2, 18), (5, 25), (6, 34))),
    "d1": ((17, 28, 33), ((1, 17), (8, 28), (2, 30))),
    "h0": ((24, 26, 36), ((7, 23), (3, 23), (3, 31))),
    "h1": ((20, 30, 44), ((0, 16), (6, 26), (9, 37))),
}
"""Shape and lung box of each case; the boxes are of one size, at places an odd and an even number of voxels apart."""
BOX_SIZE = (16, 20, 28)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> VolumeReader:
    """Preprocessed cases whose three channels hold each voxel's own z, y and x, and masks that fill the boxes."""
    data_folder, mask_folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("masks")
    for case, (shape, box) in CASES.items():
        data = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
        seg = np.zeros((1, *shape), np.int16)
        chunks = {"chunks": (1, *shape), "blocks": (1, *shape)}
        nnUNetDatasetBlosc2.save_case(data, seg, {"class_locations": {}}, str(data_folder / case), **chunks)
        mask = np.zeros(shape, np.uint8)
        mask[tuple(slice(*axis) for axis in box)] = 1
        blosc2.asarray(mask, urlpath=str(mask_folder / f"{case}.b2nd"))
    masks = OrganMasks(mask_folder, {case: box for case, (_, box) in CASES.items()}, {})
    return VolumeReader(nnUNetDatasetBlosc2(str(data_folder)), masks, LOW)


def still(patch_size: tuple[int, ...]) -> ComposeTransforms:
    """A crop and nothing else."""
    return ComposeTransforms([SpatialTransform(patch_size, patch_center_dist_from_border=0, random_crop=False)])


def nnunets(
    patch_size: tuple[int, ...], *, degrees: float = 20.0, mirror: tuple[int, ...] = (0, 1, 2), dummy_2d: bool = False
) -> ComposeTransforms:
    """nnU-Net's own training augmentation."""
    angle = math.radians(degrees)
    transforms = nnUNetTrainer.get_training_transforms(
        patch_size, (-angle, angle), [[1.0] * 3, [0.5] * 3], mirror, dummy_2d, foreground_labels=[1], ignore_label=2
    )
    assert isinstance(transforms, ComposeTransforms)
    return transforms


def loader(
    reader: VolumeReader,
    patch_size: tuple[int, int, int],
    *,
    read_size: tuple[int, int, int] | None = None,
    bag: bool = False,
    batch_size: int = 4,
    jitter: float = 0.0,
    transforms: ComposeTransforms | None = None,
    diseased: tuple[str, ...] = ("d0", "d1"),
    healthy: tuple[str, ...] = ("h0", "h1"),
    with_diseased_mask: bool = True,
    margin: tuple[int, int, int] | None = None,
) -> PairLoader:
    return PairLoader(
        reader,
        diseased,
        healthy,
        batch_size=batch_size,
        read_size=read_size or patch_size,
        patch_size=patch_size,
        transform=PairTransform(transforms or still(patch_size), reader.low),
        bag=bag,
        jitter=jitter,
        with_diseased_mask=with_diseased_mask,
        margin=margin,
    )


def seed(number: int) -> None:
    np.random.seed(number)
    torch.manual_seed(number)


# Places --------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 12), number=st.integers(0, 1000))
def test_positions_fill_every_stratum_of_every_axis(count: int, number: int) -> None:
    positions = spread_positions(count, np.random.default_rng(number))
    assert positions.shape == (count, 3)
    strata = np.sort(np.floor(positions * count).astype(int), axis=0)
    np.testing.assert_array_equal(strata, np.arange(count)[:, None].repeat(3, axis=1))


AXES = st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))


@given(AXES)
def test_a_patch_lies_inside_the_box_or_the_box_inside_the_patch(axis: tuple[int, int, int, float]) -> None:
    low, extent, size, position = axis
    high = low + extent
    start = patch_start(((low, high),) * 3, [position] * 3, [size] * 3, [size] * 3)[0]
    if size <= extent:
        assert low <= start
        assert start + size <= high
        # from one end of the box to the other
        assert abs(start - (low + position * (extent - size))) <= 0.5
    else:
        assert start <= low
        assert start + size >= high
        assert abs((low - start) - (start + size - high)) <= 1


@given(AXES, st.integers(-60, 60))
def test_boxes_at_other_places_are_covered_alike(axis: tuple[int, int, int, float], offset: int) -> None:
    low, extent, size, position = axis
    box = ((low, low + extent),) * 3
    moved = ((low + offset, low + extent + offset),) * 3
    starts = [patch_start(b, [position] * 3, [size] * 3, [size + 3] * 3, [0.03] * 3) for b in (box, moved)]
    assert [b - a for a, b in zip(*starts, strict=True)] == [offset] * 3


@given(AXES, st.integers(0, 20))
def test_what_is_read_around_a_patch_has_its_centre(axis: tuple[int, int, int, float], more: int) -> None:
    low, extent, size, position = axis
    box = ((low, low + extent),) * 3
    start = patch_start(box, [position] * 3, [size] * 3, [size] * 3)[0]
    wider = patch_start(box, [position] * 3, [size] * 3, [size + 2 * more] * 3)[0]
    assert wider == start - more


def test_jitter_is_a_share_of_the_patch() -> None:
    box: Box = ((10, 30), (10, 30), (10, 30))
    start = patch_start(box, [0.5] * 3, [10, 20, 40], [10, 20, 40], [0.1, -0.1, 0.25])
    assert start == [15 + 1, 10 - 2, 0 + 10]
    wider = patch_start(box, [0.5] * 3, [10, 20, 40], [16, 26, 46], [0.1, -0.1, 0.25])
    assert wider == [n - 3 for n in start]


# Reading -------------------------------------------------------------------------------------------------------------


@st.composite
def patches(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int]]:
    """An array (Z, Y, X) or (C, Z, Y, X), and a patch that may lie partly or wholly outside."""
    shape = draw(st.tuples(*[st.integers(1, 5)] * 3))
    leading = draw(st.sampled_from([(), (1,), (2,)]))
    array = np.arange(1, 1 + math.prod(leading + shape), dtype=np.float32).reshape(leading + shape)
    start = [draw(st.integers(-9, 9)) for _ in range(3)]
    size = [draw(st.integers(1, 8)) for _ in range(3)]
    return array, start, size


def padded(array: np.ndarray, start: list[int], size: list[int], value: float) -> np.ndarray:
    """The patch by numpy: pad far enough all around, then cut."""
    far = 20
    leading = [(0, 0)] * (array.ndim - 3)
    everything = np.pad(array, [*leading, *[(far, far)] * 3], constant_values=value)
    z, y, x = (slice(s + far, s + far + n) for s, n in zip(start, size, strict=True))
    return everything[..., z, y, x]


@given(patch=patches(), stored=st.booleans())
def test_a_patch_is_read_as_numpy_pads(patch: tuple[np.ndarray, list[int], list[int]], stored: bool) -> None:
    array, start, size = patch
    found = read_patch(blosc2.asarray(array) if stored else array, start, size)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found, padded(array, start, size, 0))


@given(patch=patches())
def test_an_offset_stands_for_what_pads(patch: tuple[np.ndarray, list[int], list[int]]) -> None:
    array, start, size = patch
    if array.ndim == 3:
        array = array[None]
    low = torch.tensor([-1.25] * len(array))[:, None, None, None]
    found = read_patch(array, start, size, low) + low
    np.testing.assert_allclose(found, padded(array, start, size, -1.25))


def test_a_patch_wholly_outside_is_all_padding() -> None:
    array = np.ones((2, 3, 3, 3), np.float32)
    for start in ([-9, 0, 0], [9, 0, 0], [0, -5, 12]):
        assert read_patch(array, start, [4, 3, 2]).count_nonzero() == 0


@pytest.mark.filterwarnings("error")
def test_a_read_only_memory_map_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "case.npy", np.ones((1, 4, 4, 4), np.float32))
    array = np.load(tmp_path / "case.npy", mmap_mode="r")
    patch = read_patch(array, [1, 1, 1], [2, 2, 2])
    patch += 1
    assert array[0, 1, 1, 1] == 1


def test_images_are_padded_with_the_lower_end_of_each_channels_window(reader: VolumeReader) -> None:
    patch = reader.image("d0", [-2, -2, -2], [4, 4, 4]) + reader.low
    assert patch[:, 0, 0, 0].tolist() == list(LOW)
    assert patch[:, 2, 3, 2].tolist() == [0, 1, 0]
    mask = reader.mask("d0", [16, 23, 32], [4, 4, 4])
    assert mask.shape == (1, 4, 4, 4)
    assert int(mask.sum()) == 2 * 2 * 2


@given(
    start=st.tuples(*[st.integers(-12, 40)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    margin=st.tuples(*[st.integers(0, 7)] * 3),
)
def test_lungs_beside_a_patch_are_near_it(
    reader: VolumeReader, start: tuple[int, ...], size: tuple[int, ...], margin: tuple[int, ...]
) -> None:
    far = 60
    grown = ndimage.maximum_filter(np.pad(reader.masks.load("d0"), far), [2 * m + 1 for m in margin])
    expected = grown[tuple(slice(far + s, far + s + n) for s, n in zip(start, size, strict=True))]
    np.testing.assert_array_equal(reader.near("d0", start, size, margin)[0], expected)


# Augmentation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_every_transform_of_nnunet_that_touches_an_image_is_used(dummy_2d: bool) -> None:
    transforms = nnunets((8, 16, 16), dummy_2d=dummy_2d)
    pair = PairTransform(transforms, torch.zeros(1, 1, 1, 1))
    used = [*pair.geometry, *pair.intensity]
    image, segmentation = torch.rand(1, 8, 16, 16), torch.zeros(1, 8, 16, 16, dtype=torch.int16)
    left_out = [t for t in transforms.transforms if t not in used]
    assert left_out
    for transform in left_out:
        assert torch.equal(transform(image=image.clone(), segmentation=segmentation)["image"], image)
    assert len(pair.intensity) == 7
    assert all(isinstance(t, RandomTransform) and isinstance(t.transform, ImageOnlyTransform) for t in pair.intensity)
    assert len(pair.geometry) == (4 if dummy_2d else 2)


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_a_pair_and_its_masks_move_together(dummy_2d: bool) -> None:
    patch_size, read_size = (8, 16, 16), (8 if dummy_2d else 12, 24, 24)
    low = torch.tensor([-1.5, -2.5])[:, None, None, None]
    pair = PairTransform(nnunets(patch_size, dummy_2d=dummy_2d), low)
    pair.intensity = []
    seed(0)
    lesion = torch.zeros(2, *read_size)
    lesion[:, 2:6, 9:17, 5:13] = 3.0
    mask = (lesion[:1] > 0).float()
    moved = 0
    crop = None
    for _ in range(40):
        (first, second), (mask_1, mask_2) = pair([lesion, lesion.clone()], [mask, mask.clone()])
        assert first.shape == (2, *patch_size)
        assert mask_1.shape == (1, *patch_size)
        assert torch.equal(first, second)
        assert torch.equal(mask_1, mask_2)
        assert set(mask_1.unique().tolist()) <= {0.0, 1.0}
        # Image and mask are interpolated each in its own way; where the one is clear, the other agrees.
        clear = ((first - low) > 2.5).all(0) | ((first - low) < 0.5).all(0)
        assert torch.equal(((first - low) > 1.5)[0][clear], (mask_1[0] > 0)[clear])
        crop = first if crop is None else crop
        moved += not torch.equal(first, crop)
    assert moved > 20


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_a_zone_moves_with_the_images(dummy_2d: bool) -> None:
    patch_size, read_size = (8, 16, 16), (8 if dummy_2d else 12, 24, 24)
    low = torch.tensor([-1.5, -2.5])[:, None, None, None]
    pair = PairTransform(nnunets(patch_size, dummy_2d=dummy_2d), low)
    zone = torch.zeros(1, *read_size)
    zone[:, 2:6, 9:17, 5:13] = 1.0
    seed(0)
    for _ in range(40):
        images, masks = pair([torch.rand(2, *read_size), torch.rand(2, *read_size)], [zone, 1 - zone], zone)
        assert [image.shape for image in images] == [(2, *patch_size)] * 2
        assert [mask.shape for mask in masks] == [(1, *patch_size)] * 3
        assert set(masks[2].unique().tolist()) <= {0.0, 1.0}
        # nnU-Net resamples masks and images each in its own way; where they differ is a border of less than a voxel.
        mask, found = masks[0][0].numpy(), masks[2][0].numpy()
        assert (ndimage.minimum_filter(mask, 3) <= found).all()
        assert (found <= ndimage.maximum_filter(mask, 3)).all()
        assert (found != mask).mean() < 0.02


def test_what_rotation_brings_in_is_the_lower_end_of_the_window() -> None:
    patch_size = (8, 12, 12)
    low = torch.full((1, 1, 1, 1), -1.5)
    pair = PairTransform(nnunets(patch_size, degrees=45), low)
    pair.intensity = []
    seed(1)
    image = torch.full((1, *patch_size), 0.5)
    padded_somewhere = 0
    for _ in range(60):
        (found, _), (mask,) = pair([image, image], [torch.ones(1, *patch_size)])
        # -1.5 + 0.5 = -1 is the image; nnU-Net's own padding with 0 would lie above it.
        assert found.min() >= -1.5
        assert found.max() <= -1.0 + 1e-5
        padded_somewhere += bool(found.min() == -1.5)
        assert mask.min() >= 0
    assert padded_somewhere > 5


def test_intensities_are_drawn_apart_and_from_one_distribution() -> None:
    patch_size = (6, 10, 10)
    low = torch.full((1, 1, 1, 1), -1.0)
    pair = PairTransform(nnunets(patch_size), low)
    pair.geometry = []
    seed(2)
    image = torch.rand(1, *patch_size)
    alike = 0
    spreads: tuple[list[float], list[float]] = ([], [])
    changed = [0, 0]
    draws = 300
    for _ in range(draws):
        moved, _ = pair([image.clone(), image.clone()], [torch.ones(1, *patch_size)])
        alike += torch.equal(*moved)
        for pool, found in enumerate(moved):
            changed[pool] += not torch.allclose(found, image + low)
            spreads[pool].append(float(found.std()))
    # Applied with 0.1, 0.2, 0.15, 0.15, 0.25, 0.1 and 0.3; blur and low resolution only touch every other image.
    expected = 1 - 0.9 * (1 - 0.1) * 0.85 * 0.85 * (1 - 0.125) * 0.9 * 0.7
    error = 4 * math.sqrt(expected * (1 - expected) / draws)
    assert [count / draws for count in changed] == pytest.approx([expected] * 2, abs=error)
    assert alike / draws == pytest.approx((1 - expected) ** 2, abs=error)
    difference = np.mean(spreads[0]) - np.mean(spreads[1])
    assert abs(difference) < 4 * math.sqrt(sum(np.var(s) / draws for s in spreads))


# Batches -------------------------------------------------------------------------------------------------------------


def boxes_of(keys: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """First voxel of the lung box of each diseased and each healthy case, (B, 3, 1, 1, 1)."""
    starts = torch.tensor([[[CASES[case][1][axis][0] for axis in range(3)] for case in key] for key in keys])
    return starts[:, 0, :, None, None, None], starts[:, 1, :, None, None, None]


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize(
    ("patch_size", "read_size"), [((8, 8, 8), (8, 8, 8)), ((7, 9, 12), (9, 12, 15)), ((24, 32, 40), (26, 35, 47))]
)
def test_pairs_are_laid_lung_on_lung(
    reader: VolumeReader, patch_size: tuple[int, int, int], read_size: tuple[int, int, int], jitter: float, bag: bool
) -> None:
    seed(3)
    batch = loader(reader, patch_size, read_size=read_size, jitter=jitter, bag=bag).generate_train_batch()
    assert batch["diseased"].shape == batch["healthy"].shape == (4, 3, *patch_size)
    start_d, start_h = boxes_of(batch["keys"])
    low = reader.low[None]
    # A voxel's value is its place, so its place in the lung box is known wherever it is not padding.
    inside = ((batch["diseased"] != low) & (batch["healthy"] != low)).all(1, keepdim=True).expand(-1, 3, -1, -1, -1)
    assert inside.float().mean() > 0.1
    torch.testing.assert_close((batch["diseased"] - start_d)[inside], (batch["healthy"] - start_h)[inside])
    assert torch.equal(batch["lungs"], batch["lungs_diseased"])
    place = batch["healthy"] - start_h
    in_box = ((place >= 0) & (place < torch.tensor(BOX_SIZE)[:, None, None, None])).all(1, keepdim=True)
    assert torch.equal(batch["lungs"] > 0, in_box & inside[:, :1])


def test_a_patch_larger_than_the_lungs_holds_them(reader: VolumeReader) -> None:
    seed(4)
    batch = loader(reader, (24, 32, 40)).generate_train_batch()
    assert batch["lungs"].sum((1, 2, 3, 4)).tolist() == [math.prod(BOX_SIZE)] * 4
    middle = [n // 2 for n in BOX_SIZE]
    _, start_h = boxes_of(batch["keys"])
    assert ((batch["healthy"] - start_h)[:, :, 12, 16, 20] == torch.tensor(middle)).all()


def test_a_bag_is_one_patient_spread_over_its_lungs(reader: VolumeReader) -> None:
    seed(5)
    patch_size = (6, 6, 6)
    stream = loader(reader, patch_size, bag=True)
    covered = np.zeros(BOX_SIZE, bool)
    patients = set()
    for _ in range(60):
        batch = stream.generate_train_batch()
        assert len(set(batch["keys"])) == 1
        patients.add(batch["keys"][0])
        start_d, _ = boxes_of(batch["keys"])
        first = (batch["diseased"] - start_d)[:, :, 0, 0, 0]
        reach = torch.tensor(BOX_SIZE) - torch.tensor(patch_size)
        assert (first >= 0).all()
        assert (first <= reach).all()
        # Along each axis one patch in every quarter of the box, up to the rounding to voxels.
        quarters = first.sort(0).values / reach
        assert (quarters >= torch.arange(4)[:, None] / 4 - 0.5 / reach).all()
        assert (quarters <= torch.arange(1, 5)[:, None] / 4 + 0.5 / reach).all()
        for z, y, x in first.int().tolist():
            covered[z : z + 6, y : y + 6, x : x + 6] = True
    assert len(patients) == 4
    # All of every axis, and of the box all but what only patches in its very corners hold.
    assert all(covered.any(others).all() for others in ((1, 2), (0, 2), (0, 1)))
    assert covered.mean() > 0.75


def test_every_item_of_a_batch_of_volumes_is_another_pair_of_patients(reader: VolumeReader) -> None:
    seed(6)
    stream = loader(reader, (8, 8, 8), batch_size=2)
    seen = set()
    for _ in range(20):
        keys = stream.generate_train_batch()["keys"]
        assert {d for d, _ in keys} == {"d0", "d1"}
        assert {h for _, h in keys} == {"h0", "h1"}
        seen.update(keys)
    assert len(seen) == 4


def test_one_patient_of_each_kind_is_enough(reader: VolumeReader) -> None:
    stream = loader(reader, (8, 8, 8), diseased=("d1",), healthy=("h0",), batch_size=3, with_diseased_mask=False)
    batch = stream.generate_train_batch()
    assert batch["keys"] == [("d1", "h0")] * 3
    assert not {"lungs_diseased", "near_diseased"} & set(batch)


def test_a_batch_tells_what_is_near_the_diseased_lungs(reader: VolumeReader) -> None:
    seed(13)
    margin = (2, 3, 4)
    stream = loader(reader, (6, 8, 8), jitter=2.0, margin=margin)
    beside = 0
    for _ in range(10):
        batch = stream.generate_train_batch()
        near, start = batch["near_diseased"], boxes_of(batch["keys"])[0]
        # A voxel's value is its place, by which it is known how far from the lung box it lies.
        place = batch["diseased"] - start
        reach = torch.tensor(margin)[:, None, None, None]
        expected = ((place >= -reach) & (place < torch.tensor(BOX_SIZE)[:, None, None, None] + reach)).all(1, True)
        inside = (batch["diseased"] != reader.low).all(1, keepdim=True)
        assert torch.equal(near[inside] > 0, expected[inside])
        beside += int((near.amax((1, 2, 3, 4)) > batch["lungs_diseased"].amax((1, 2, 3, 4))).sum())
    assert beside > 0  # patches without lungs that are near some


def test_both_pools_are_treated_alike(reader: VolumeReader) -> None:
    seed(7)
    same = loader(reader, (8, 10, 12), diseased=("d0",), healthy=("d0",), jitter=0.1, with_diseased_mask=True)
    batch = same.generate_train_batch()
    assert torch.equal(batch["diseased"], batch["healthy"])
    assert torch.equal(batch["lungs"], batch["lungs_diseased"])


def test_seeds_repeat_a_batch_with_nnunets_augmentation(reader: VolumeReader) -> None:
    patch_size = (8, 12, 12)

    def batch(number: int) -> dict[str, Any]:
        seed(number)
        options: dict[str, Any] = {"transforms": nnunets(patch_size), "jitter": 0.05, "margin": (1, 2, 2)}
        return next(loader(reader, patch_size, read_size=(11, 18, 18), **options))

    first, again, other = batch(8), batch(8), batch(9)
    assert first["keys"] == again["keys"]
    for name in ("diseased", "healthy", "lungs", "lungs_diseased", "near_diseased"):
        assert first[name].isfinite().all()
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["diseased"], other["diseased"])


def test_a_loader_can_be_sent_to_another_process(reader: VolumeReader) -> None:
    patch_size = (8, 12, 12)
    stream = loader(reader, patch_size, transforms=nnunets(patch_size))
    copy = pickle.loads(pickle.dumps(stream))
    seed(10)
    expected = next(stream)
    seed(10)
    found = next(copy)
    assert torch.equal(found["diseased"], expected["diseased"])


def test_worker_processes_draw_for_themselves(reader: VolumeReader) -> None:
    patch_size = (8, 12, 12)
    stream = NonDetMultiThreadedAugmenter(
        data_loader=loader(reader, patch_size, transforms=nnunets(patch_size), jitter=0.1),
        transform=None,
        num_processes=2,
        num_cached=2,
        seeds=[0, 1],
    )
    try:
        batches = [next(stream)["diseased"] for _ in range(6)]
    finally:
        stream._finish()
    assert all(batch.shape == (4, 3, *patch_size) for batch in batches)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


# Watching ------------------------------------------------------------------------------------------------------------


def test_watched_patches_are_always_the_same(reader: VolumeReader) -> None:
    seed(11)
    images, lungs = watch_patches(reader, "h0", (6, 6, 6), 5)
    assert images.shape == (5, 3, 6, 6, 6)
    assert lungs.shape == (5, 1, 6, 6, 6)
    seed(12)
    again, _ = watch_patches(reader, "h0", (6, 6, 6), 5)
    assert torch.equal(images, again)
    assert len({tuple(image[:, 0, 0, 0].tolist()) for image in images}) == 5


def test_a_watched_volume_is_centred_on_its_lungs(reader: VolumeReader) -> None:
    images, lungs = watch_patches(reader, "d1", (20, 24, 32), 1)
    box = CASES["d1"][1]
    assert images[0, :, 10, 12, 16].tolist() == [(low + high) / 2 for low, high in box]
    assert int(lungs.sum()) == math.prod(BOX_SIZE)
    assert images[0, :, 0, 0, 0].tolist() == list(LOW)


def test_the_whole_volume_may_take_the_place_of_the_lungs(reader: VolumeReader) -> None:
    shape = CASES["d0"][0]
    box: Box = ((0, shape[0]), (0, shape[1]), (0, shape[2]))
    whole = VolumeReader(reader.dataset, OrganMasks(None, {"d0": box}, {"d0": shape}), LOW)
    images, lungs = watch_patches(whole, "d0", (24, 34, 44), 1)
    assert int(lungs.sum()) == math.prod(shape)
    assert torch.equal(lungs[0, 0] > 0, (images[0] != whole.low).all(0))


def test_mirroring_is_nnunets() -> None:
    transforms = nnunets((8, 8, 8), mirror=(2,))
    pair = PairTransform(transforms, torch.zeros(1, 1, 1, 1))
    assert [t.allowed_axes for t in pair.geometry if isinstance(t, MirrorTransform)] == [(2,)]
    assert len(PairTransform(nnunets((8, 8, 8), mirror=()), torch.zeros(1, 1, 1, 1)).geometry) == 1


def test_transforms_that_pairs_do_without_are_named() -> None:
    low = torch.zeros(1, 1, 1, 1)
    assert PairTransform(nnunets((8, 8, 8)), low).left_out == []
    masked = ComposeTransforms([*nnunets((8, 8, 8)).transforms, MaskImageTransform([0])])
    assert PairTransform(masked, low).left_out == ["MaskImageTransform"]


# Labelled lesions in healthy volumes ----------------------------------------------------------------------------------


@pytest.fixture
def labelled(reader: VolumeReader, tmp_path: Path) -> VolumeReader:
    """The same cases, with a lesion of label 1 and a voxel to be ignored in each diseased one."""
    for case in CASES:
        data, seg, *_ = reader.dataset.load_case(case)
        seg = np.array(seg)
        if case.startswith("d"):
            (z, _), (y, _), (x, _) = CASES[case][1]
            seg[0, z + 6 : z + 10, y + 6 : y + 12, x + 8 : x + 16] = 1
            seg[0, z + 1, y + 1, x + 1] = 2
            seg[0, 0, 0, 0] = -1
        shape = CASES[case][0]
        nnUNetDatasetBlosc2.save_case(
            np.array(data), seg, {}, str(tmp_path / case), chunks=(1, *shape), blocks=(1, *shape)
        )
    return VolumeReader(nnUNetDatasetBlosc2(str(tmp_path)), reader.masks, LOW)


def pasted(reader: VolumeReader, transforms: ComposeTransforms, **options: Any) -> PastedLoader:
    return PastedLoader(
        reader,
        ["d0", "d1"],
        ["h0", "h1"],
        batch_size=3,
        read_size=BOX_SIZE,
        patch_size=BOX_SIZE,
        transform=PairTransform(transforms, reader.low),
        jitter=0.0,
        **{"strength": (1.0, 1.0), "lesions": [1], **options},
    )


def test_a_labelled_lesion_lies_in_healthy_lungs_under_its_own_mask(labelled: VolumeReader) -> None:
    seed(0)
    stream = pasted(labelled, still(BOX_SIZE))
    batch = stream.generate_train_batch()
    assert set(batch["target"].unique().tolist()) == {0, 1}
    lesion = batch["target"].float()
    assert lesion.sum() == 3 * 4 * 6 * 8  # nothing of it is lost, and the ignored voxel is healthy tissue here
    # In the middle of the lesion lies the diseased case, far from it the healthy one: other coordinates of their own.
    seed(0)
    pair = PairLoader.generate_train_batch(stream)
    inside = 1 - soft_border(1 - lesion)
    core, far = inside == 1, soft_border(lesion) == 0
    torch.testing.assert_close(batch["data"] * core, pair["diseased"] * core)
    torch.testing.assert_close(batch["data"] * far, pair["healthy"] * far)


def test_a_fainter_lesion_lets_the_healthy_tissue_shine_through(labelled: VolumeReader) -> None:
    seed(0)
    stream = pasted(labelled, still(BOX_SIZE), strength=(0.5, 0.5))
    batch = stream.generate_train_batch()
    seed(0)
    pair = PairLoader.generate_train_batch(stream)
    core = (1 - soft_border(1 - batch["target"].float())) == 1
    torch.testing.assert_close(batch["data"] * core, (pair["diseased"] + pair["healthy"]) / 2 * core)


def test_pasted_targets_have_the_form_of_nnunets_own(labelled: VolumeReader) -> None:
    transforms = nnUNetTrainer.get_training_transforms(
        BOX_SIZE, (-0.2, 0.2), [[1.0] * 3, [0.5] * 3], (2,), False, foreground_labels=[1], regions=[(1,), (1, 2)]
    )
    batch = pasted(labelled, transforms).generate_train_batch()
    shapes = [tuple(level.shape) for level in batch["target"]]
    assert shapes == [(3, 2, *BOX_SIZE), (3, 2, *(n // 2 for n in BOX_SIZE))]
    assert batch["data"].shape == (3, 3, *BOX_SIZE)
