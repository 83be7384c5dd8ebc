"""Streams of diseased and healthy patches laid over each other, lung on lung.

Voxel-labelled patches come from nnU-Net's own data loader. The pairs below reuse nnU-Net's augmentation: its spatial
part is drawn once for (I_d, I_h, M_lung) and shared, its intensity part is drawn per image from one distribution, so
that D cannot tell the pools apart by how they were augmented.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from gasnet_nnunet.lungs import Box
from gasnet_nnunet.organ_masks import OrganMasks
from gasnet_nnunet.synthesis import paste_lesions, soft_border

GEOMETRY = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)


def spread_positions(count: int, rng: np.random.Generator) -> np.ndarray:
    """Relative positions in a box, spread over it by Latin-hypercube sampling.

    Returns:
        (count, 3) in [0, 1): along each axis, every one of `count` equal strata holds one position.
    """
    strata = np.stack([rng.permutation(count) for _ in range(3)], axis=1)
    return (strata + rng.random((count, 3))) / count


def patch_start(
    box: Box, position: Sequence[float], cover: Sequence[int], size: Sequence[int], jitter: Sequence[float] = (0, 0, 0)
) -> list[int]:
    """First voxel of a patch at a place relative to a box.

    Along an axis where the patch is shorter than the box, position 0 to 1 moves it from the box's start to its end;
    where it is longer, it is centred on the box.

    Args:
        box: Lung box in voxels, half-open, (Z, Y, X).
        position: Relative position, each 0 to 1.
        cover: Patch size that has to lie inside the box where it can.
        size: Size of what is read around the same centre (larger than `cover` where a rotation needs it).
        jitter: Shift in shares of `cover`.
    """
    start = []
    for (low, high), relative, wanted, read, shift in zip(box, position, cover, size, jitter, strict=True):
        centre = (low + high) / 2 + (relative - 0.5) * max(0, high - low - wanted) + shift * wanted
        # Not round(), which rounds halves to even: boxes an odd number of voxels apart would not be laid alike.
        start.append(math.floor(centre - read / 2 + 0.5))
    return start


def read_patch(array: Any, start: Sequence[int], size: Sequence[int], offset: Tensor | None = None) -> Tensor:
    """Read a patch of a stored volume, zeros where it lies outside.

    Args:
        array: (Z, Y, X) or (C, Z, Y, X), of numpy or blosc2.
        start: First voxel in (Z, Y, X); may be negative.
        size: Size in (Z, Y, X).
        offset: Subtracted before the padding, so that what pads stands for this value.

    Shape: -> (*size) or (C, *size) float32
    """
    bounds = list(zip(start, size, array.shape[-3:], strict=True))
    inside = tuple(slice(min(max(s, 0), n), max(min(s + p, n), 0)) for s, p, n in bounds)
    leading = (slice(None),) * (len(array.shape) - 3)
    # A copy, because nnU-Net's memory maps are read-only.
    patch = torch.from_numpy(np.array(array[leading + inside], dtype=np.float32))
    if offset is not None:
        patch = patch - offset
    pads: list[int] = []
    for axis in (2, 1, 0):
        before = max(0, min(-start[axis], size[axis]))
        pads += [before, size[axis] - patch.shape[axis - 3] - before]
    return functional.pad(patch, pads)


class VolumeReader:
    """Reads patches of preprocessed cases and of their lung masks, padded with the window's lower bound.

    nnU-Net pads with 0, which is the mean HU: a cue for D that tanh cannot follow.

    Args:
        dataset: nnU-Net's access to the preprocessed cases.
        masks: Lung masks in the same grid.
        low: Lower end of each channel's window, nnU-Net-normalised.
    """

    def __init__(self, dataset: nnUNetBaseDataset, masks: OrganMasks, low: Sequence[float]) -> None:
        self.dataset = dataset
        self.masks = masks
        self.low = torch.tensor(low, dtype=torch.float32)[:, None, None, None]

    def image(self, case: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A patch of the image, nnU-Net-normalised *minus* the window's lower bound, so that 0 is what pads it.

        Shape: -> (C, *size) float32
        """
        return read_patch(self.dataset.load_case(case)[0], start, size, self.low)

    def label(self, case: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A patch of the label map of a voxel-labelled case; what nnU-Net crops away counts as background.

        Shape: -> (1, *size) float32, label values
        """
        return read_patch(self.dataset.load_case(case)[1], start, size)[:1].clamp(min=0)

    def mask(self, case: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A patch of the lung mask.

        Shape: -> (1, *size) float32, 0 or 1
        """
        return read_patch(self.masks.open(case), start, size)[None]

    def near(self, case: str, start: Sequence[int], size: Sequence[int], margin: Sequence[int]) -> Tensor:
        """A patch of the lung mask grown by a margin, by lungs that lie just outside of the patch too.

        Args:
            case: Name of the case.
            start: First voxel in (Z, Y, X).
            size: Size in (Z, Y, X).
            margin: Voxels by which the mask grows to both sides, (Z, Y, X).

        Shape: -> (1, *size) float32, 0 or 1
        """
        first = [s - m for s, m in zip(start, margin, strict=True)]
        wider = [n + 2 * m for n, m in zip(size, margin, strict=True)]
        near = read_patch(self.masks.open(case), first, wider) > 0
        for axis, voxels in enumerate(margin):
            # One axis after the other in steps that double: the box of a margin of some voxels holds thousands of them.
            window, reach = 2 * voxels + 1, 1
            while reach < window:
                step = min(reach, window - reach)
                length = near.shape[axis] - step
                near = near.narrow(axis, 0, length) | near.narrow(axis, step, length)
                reach += step
        return near[None].float()


class PairTransform:
    """nnU-Net's training augmentation for a pair: one spatial transform for both, an intensity transform for each.

    Args:
        transforms: What `nnUNetTrainer.get_training_transforms` returns.
        low: As in `VolumeReader`.

    Attributes:
        targets: Transforms that make the targets of nnU-Net's loss out of a label map.
        left_out: Names of transforms that neither move a patch nor change its intensities alone; pairs do without them.
    """

    def __init__(self, transforms: ComposeTransforms, low: Tensor) -> None:
        self.geometry: list[BasicTransform] = [t for t in transforms.transforms if isinstance(t, GEOMETRY)]
        self.targets: list[BasicTransform] = [t for t in transforms.transforms if isinstance(t, SegOnlyTransform)]
        self.intensity: list[BasicTransform] = [t for t in transforms.transforms if _changes_image_only(t)]
        self.left_out = [
            type(t).__name__
            for t in transforms.transforms
            if not (isinstance(t, (*GEOMETRY, SegOnlyTransform)) or _changes_image_only(t))
        ]
        self.low = low

    def __call__(
        self, images: list[Tensor], masks: list[Tensor], zone: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Augment images (offset by `low`, as `VolumeReader.image` gives them) and their masks.

        Args:
            images: (C, *size) each.
            masks: (1, *size) each, label values.
            zone: One more mask, (1, *size), 0 or 1, which need not be exact to the voxel.

        Returns:
            The images, nnU-Net-normalised, and the masks, `zone` last (label values; 0 where nnU-Net pads).
        """
        # Not among the masks, which take nnU-Net longer, as it resamples them label by label.
        carried = images if zone is None else [*images, zone]
        data: dict[str, Any] = {"image": torch.cat(carried), "segmentation": torch.cat(masks).to(torch.int16)}
        for transform in self.geometry:
            data = transform(**data)
        parts = data["image"].split([len(part) for part in carried])
        moved = [image + self.low for image in parts[: len(images)]]
        for transform in self.intensity:
            moved = [transform(image=image)["image"] for image in moved]
        zones = [(part > 0.5).float() for part in parts[len(images) :]]
        return moved, [*data["segmentation"].clamp(min=0).float().split(1), *zones]


class PairLoader(SlimDataLoaderBase):
    """Endless stream of (I_d, I_h, M_lung of I_h), laid over each other by their lung boxes.

    Where a patch holds the lungs, every item of a batch is another pair of patients. Where it does not, a batch is a
    bag: patches spread over the lungs of one diseased patient, with those at the same relative places of a healthy one.

    Args:
        reader: Access to the cases.
        diseased: Cases to draw I_d from.
        healthy: Cases to draw I_h from.
        batch_size: Pairs in a batch (the bag size where it is a bag).
        read_size: Patch size before the spatial augmentation.
        patch_size: Patch size after it.
        transform: The augmentation.
        bag: Whether a batch is a bag.
        jitter: Largest random shift of a pair, in shares of the patch size.
        with_diseased_mask: Also give the lung mask of I_d.
        margin: Also give what is near the lungs of I_d, up to so many voxels in (Z, Y, X) beside them; `None` for no.

    A batch holds "diseased" and "healthy" (B, C, Z, Y, X), nnU-Net-normalised; "lungs" (B, 1, Z, Y, X), the healthy
    volume's mask; "lungs_diseased" and "near_diseased" where asked for; and "keys", pairs of case names.
    """

    def __init__(
        self,
        reader: VolumeReader,
        diseased: Sequence[str],
        healthy: Sequence[str],
        *,
        batch_size: int,
        read_size: Sequence[int],
        patch_size: Sequence[int],
        transform: PairTransform,
        bag: bool,
        jitter: float,
        with_diseased_mask: bool,
        margin: Sequence[int] | None,
    ) -> None:
        super().__init__(reader, batch_size)
        self.diseased = list(diseased)
        self.healthy = list(healthy)
        self.read_size = [int(n) for n in read_size]
        self.patch_size = [int(n) for n in patch_size]
        self.transform = transform
        self.bag = bag
        self.jitter = jitter
        self.with_diseased_mask = with_diseased_mask
        self.margin = margin
        self.names = ["diseased", "healthy", "lungs"]
        self.names += ["lungs_diseased"] * with_diseased_mask + ["near_diseased"] * (margin is not None)

    def generate_train_batch(self) -> dict[str, Any]:
        """Draw a batch."""
        # nnU-Net's workers seed numpy's global generator each in its own way; ours follows it.
        rng = np.random.default_rng(np.random.randint(2**31))
        count = self.batch_size
        patients = 1 if self.bag else count
        cases_d = np.resize(rng.choice(self.diseased, patients, replace=len(self.diseased) < patients), count)
        cases_h = np.resize(rng.choice(self.healthy, patients, replace=len(self.healthy) < patients), count)
        positions = spread_positions(count, rng).tolist()
        shifts = rng.uniform(-self.jitter, self.jitter, (count, 3)).tolist()
        items: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for case_d, case_h, position, shift in zip(cases_d, cases_h, positions, shifts, strict=True):
                items.append(self._pair(str(case_d), str(case_h), position, shift))
        batch: dict[str, Any] = {
            name: torch.stack(tensors) for name, tensors in zip(self.names, zip(*items, strict=True), strict=True)
        }
        batch["keys"] = [(str(d), str(h)) for d, h in zip(cases_d, cases_h, strict=True)]
        return batch

    def _starts(
        self, case_d: str, case_h: str, position: Sequence[float], shift: Sequence[float]
    ) -> tuple[list[int], list[int]]:
        """Where the patches of a pair begin, so that their lungs lie on each other."""
        boxes = [self._data.masks.box(case) for case in (case_d, case_h)]
        start_d, start_h = (patch_start(box, position, self.patch_size, self.read_size, shift) for box in boxes)
        return start_d, start_h

    def _pair(self, case_d: str, case_h: str, position: Sequence[float], shift: Sequence[float]) -> tuple[Tensor, ...]:
        reader: VolumeReader = self._data
        start_d, start_h = self._starts(case_d, case_h, position, shift)
        images = [reader.image(case_d, start_d, self.read_size), reader.image(case_h, start_h, self.read_size)]
        masks = [reader.mask(case_h, start_h, self.read_size)]
        if self.with_diseased_mask:
            masks.append(reader.mask(case_d, start_d, self.read_size))
        # Grown before the augmentation, which leaves nothing beside the patch to grow from.
        near = None if self.margin is None else reader.near(case_d, start_d, self.read_size, self.margin)
        moved, masks = self.transform(images, masks, near)
        return (*moved, *masks)


class PastedLoader(PairLoader):
    """Endless stream of labelled lesions in healthy volumes: I_ps of the voxel-labelled cases, whose mask is known.

    The labelled patient and the healthy one are augmented each in its own way, so that a lesion comes to lie in many
    places of many lungs. A batch holds "data" (B, C, Z, Y, X), nnU-Net-normalised, and "target" as nnU-Net's own loader
    gives it, regions and deep-supervision levels included.

    Args:
        strength: Range of the share of the lesion in the sum of lesion and healthy tissue; see
            `synthesis.paste_lesions`.
        lesions: Label values that are lesion.
        **options: As in `PairLoader`; `diseased` are the voxel-labelled cases.
    """

    def __init__(self, *args: Any, strength: tuple[float, float], lesions: Sequence[int], **options: Any) -> None:
        super().__init__(*args, bag=False, with_diseased_mask=False, margin=None, **options)
        self.names = ["diseased", "healthy", "lungs", "labels"]
        self.strength = strength
        self.lesions = torch.tensor(list(lesions), dtype=torch.float32)

    def generate_train_batch(self) -> dict[str, Any]:
        """Draw a batch."""
        batch = super().generate_train_batch()
        labels = batch["labels"] * batch["lungs"]
        lesions = torch.isin(labels, self.lesions).float()
        strengths = np.random.uniform(*self.strength, size=len(lesions)).tolist()
        mask = soft_border(lesions) * batch["lungs"] * torch.tensor(strengths)[:, None, None, None, None]
        targets: list[Any] = []
        for label in labels * lesions:
            data: dict[str, Any] = {"segmentation": label.to(torch.int16)}
            for transform in self.transform.targets:
                data = transform(**data)
            targets.append(data["segmentation"])
        stacked = (
            [torch.stack(level) for level in zip(*targets, strict=True)]
            if isinstance(targets[0], list)
            else torch.stack(targets)
        )
        return {"data": paste_lesions(batch["diseased"], batch["healthy"], mask), "target": stacked}

    def _pair(self, case_d: str, case_h: str, position: Sequence[float], shift: Sequence[float]) -> tuple[Tensor, ...]:
        reader: VolumeReader = self._data
        start_d, start_h = self._starts(case_d, case_h, position, shift)
        diseased, labels = self.transform(
            [reader.image(case_d, start_d, self.read_size)], [reader.label(case_d, start_d, self.read_size)]
        )
        healthy, lungs = self.transform(
            [reader.image(case_h, start_h, self.read_size)], [reader.mask(case_h, start_h, self.read_size)]
        )
        return (*diseased, *healthy, *lungs, *labels)


def watch_patches(reader: VolumeReader, case: str, patch_size: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """The patches on which M^ of a held-out volume is watched: always the same, without augmentation.

    Args:
        reader: Access to the cases.
        case: Name of the case.
        patch_size: (Z, Y, X)
        count: Patches spread over the lungs; 1 where a patch holds them.

    Returns:
        Images (count, C, Z, Y, X), nnU-Net-normalised, and lung masks (count, 1, Z, Y, X), 0 or 1.
    """
    positions = spread_positions(count, np.random.default_rng(0)) if count > 1 else np.full((1, 3), 0.5)
    size = [int(n) for n in patch_size]
    starts = [patch_start(reader.masks.box(case), position, size, size) for position in positions]
    images = torch.stack([reader.image(case, start, size) + reader.low for start in starts])
    return images, torch.stack([reader.mask(case, start, size) for start in starts])


def _changes_image_only(transform: BasicTransform) -> bool:
    inner = transform.transform if isinstance(transform, RandomTransform) else transform
    return isinstance(inner, ImageOnlyTransform)
