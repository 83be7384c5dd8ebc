"""Phantom patients: a procedural chest CT with or without ground-glass and consolidated lesions.

They let anyone see the whole method at work without data and without a GPU. Anatomy is a handful of smoothly warped
ellipsoids in mm; what makes the task a task is kept: vessels, airways, dependent density, the blur of a breathing
diaphragm and of the heart beside the lesions, and voxel-labelled patients who show only one sort of lesion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from rich.progress import track
from scipy import ndimage
from scipy.special import expit

Array = NDArray[np.float32]
Kind = Literal["labelled", "diseased", "healthy"]

DENSITIES: dict[str, tuple[tuple[float, float], ...]] = {
    "labelled": ((0.3, 0.6),),
    "diseased": ((0.0, 0.4), (0.6, 1.0), (0.0, 1.0)),
    "healthy": (),
}
"""Ranges of lesion density that a patient may have, from ground glass (0, +300 HU) to consolidation (1, +900 HU)."""


@dataclass(frozen=True)
class Phantom:
    """A phantom patient.

    Args:
        ct: HU (Z, Y, X), int16; Z runs to the head, Y to the back, X to the patient's left, as in LPS.
        lesion: 1 in a lesion (Z, Y, X), uint8; all zero in a healthy patient.
        lung: 1 in a lung, its lesions included (Z, Y, X), uint8.
        spacing: Voxel size in mm (Z, Y, X).
    """

    ct: NDArray[np.int16]
    lesion: NDArray[np.uint8]
    lung: NDArray[np.uint8]
    spacing: tuple[float, float, float]


def make_phantom(
    rng: np.random.Generator,
    kind: Kind,
    size: tuple[int, int, int] = (40, 112, 112),
    spacing: tuple[float, float, float] = (5.0, 3.0, 3.0),
) -> Phantom:
    """Draw one patient; the same state of `rng` draws the same patient.

    Args:
        rng: Source of everything that differs between patients.
        kind: "diseased" patients have 2 to 8 lesions, from faint ground glass to consolidation; those of "labelled"
            ones are all of middling density, so that one mask does not show all that is to be found; "healthy"
            patients have none.
        size: Voxels (Z, Y, X).
        spacing: Voxel size in mm (Z, Y, X).

    Raises:
        ValueError: An unknown kind.

    Examples:
        >>> patient = make_phantom(np.random.default_rng(0), "diseased", size=(20, 56, 56), spacing=(10.0, 6.0, 6.0))
        >>> patient.ct.shape, bool(patient.lesion.any())
        ((20, 56, 56), True)
    """
    if kind not in DENSITIES:
        raise ValueError(f"A phantom is labelled, diseased or healthy, not {kind!r}")
    noise = _NoiseSource(rng, size, spacing)
    ct, lung, coordinates = _draw_anatomy(rng, noise)
    vessels = _draw_vessels(rng, size, spacing) * lung
    ct += vessels * (45 - ct)
    lesion = np.zeros(size, dtype=bool)
    if DENSITIES[kind]:
        lesion = _add_lesions(rng, noise, ct, lung, coordinates, DENSITIES[kind])

    in_plane = (0.0, 0.6, 0.6)
    ct = ndimage.gaussian_filter(ct, in_plane)
    grain = ndimage.gaussian_filter(rng.standard_normal(size, dtype=np.float32), in_plane)
    ct += grain * (rng.uniform(12, 30) / grain.std())
    return Phantom(
        ct=np.clip(np.rint(ct), -1024, 1500).astype(np.int16),
        lesion=lesion.astype(np.uint8),
        lung=lung.astype(np.uint8),
        spacing=spacing,
    )


def write_phantoms(
    out: Path,
    *,
    labelled: int,
    diseased: int,
    healthy: int,
    test_diseased: int,
    test_healthy: int,
    seed: int,
    size: tuple[int, int, int] = (40, 112, 112),
    spacing: tuple[float, float, float] = (5.0, 3.0, 3.0),
    progress: bool = False,
) -> None:
    """Write patients as NIfTI files, in the folders that `gasnet-nnunet convert folders` takes.

    Made are labelled/ct and labelled/mask, diseased/ct, healthy/ct, and test/ct, test/mask and test/lung with patients
    of both kinds. A patient depends on the seed, its kind and its number alone: asking for more adds to the same ones.

    Args:
        out: Folder in which the others are made.
        labelled: Number of voxel-labelled patients.
        diseased: Number of diseased patients without a mask.
        healthy: Number of healthy patients.
        test_diseased: Number of unseen diseased patients.
        test_healthy: Number of unseen healthy patients.
        seed: Seed of all patients.
        size: Voxels (Z, Y, X).
        spacing: Voxel size in mm (Z, Y, X).
        progress: Show a progress bar.
    """
    groups: list[tuple[str, str, Kind, int, tuple[str, ...]]] = [
        ("labelled", "labelled", "labelled", labelled, ("mask",)),
        ("diseased", "diseased", "diseased", diseased, ()),
        ("healthy", "healthy", "healthy", healthy, ()),
        ("test", "test_diseased", "diseased", test_diseased, ("mask", "lung")),
        ("test", "test_healthy", "healthy", test_healthy, ("mask", "lung")),
    ]
    patients = [(stream, *group, index) for stream, group in enumerate(groups) for index in range(group[3])]
    for stream, folder, prefix, kind, _, truths, index in track(
        patients, "Drawing phantom patients", disable=not progress
    ):
        phantom = make_phantom(np.random.default_rng((seed, stream, index)), kind, size, spacing)
        for name, array in (("ct", phantom.ct), ("mask", phantom.lesion), ("lung", phantom.lung)):
            if name == "ct" or name in truths:
                path = out / folder / name / f"{prefix}_{index:03d}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = sitk.GetImageFromArray(array)
                image.SetSpacing(spacing[::-1])
                sitk.WriteImage(image, path)


class _NoiseSource:
    """Smooth random fields of unit variance on one grid."""

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int, int], spacing: tuple[float, float, float]
    ) -> None:
        self.rng = rng
        # Voxel positions in mm from the centre of the field of view, an axis each.
        self.axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, spacing, strict=True)]

    def draw(self, scale: float) -> Array:
        """Gaussian noise (Z, Y, X) with details of `scale` mm, cut at two standard deviations."""
        weights = []
        for axis in self.axes:
            nodes = np.arange(axis[0] - 2 * scale, axis[-1] + 2 * scale, scale)
            bumps = np.exp(-(((axis[:, None] - nodes) / scale) ** 2))
            weights.append(bumps / np.linalg.norm(bumps, axis=1, keepdims=True))
        coarse = self.rng.standard_normal([w.shape[1] for w in weights])
        field = np.einsum("abc,za,yb,xc->zyx", coarse, *weights, optimize=True)
        return np.clip(field, -2, 2).astype(np.float32)


def _draw_anatomy(rng: np.random.Generator, noise: _NoiseSource) -> tuple[Array, NDArray[np.bool_], Sequence[Array]]:
    """CT in HU without vessels and noise, lung mask, and the coordinates z, y, x in mm; all (Z, Y, X)."""
    z, y, x = np.meshgrid(*(axis.astype(np.float32) for axis in noise.axes), indexing="ij")
    straight = (z, y, x)
    chest = rng.uniform(0.9, 1.03, size=3)
    z, y, x = (
        (coordinate + 4 * noise.draw(45) - offset) / factor
        for coordinate, factor, offset in zip(straight, chest, rng.uniform(-8, 8, size=3), strict=True)
    )
    tilt = np.deg2rad(rng.uniform(-5, 5))
    y, x = y * np.cos(tilt) - x * np.sin(tilt), y * np.sin(tilt) + x * np.cos(tilt)
    side = np.abs(x)

    def rounded(depth: float, width: float, shift: float = 0.0) -> Array:
        """Distance from the axis of the body, 1 on a rounded box of half `depth` (Y) and half `width` (X)."""
        return (np.abs((y - shift) / depth) ** 2.5 + (side / width) ** 2.5) ** (1 / 2.5)

    def cylinder(at_y: float, at_x: float, radius: float) -> NDArray[np.bool_]:
        return (y - at_y) ** 2 + (x - at_x) ** 2 < radius**2

    fat = rng.uniform(6, 22)
    cage = rounded(86, 122)
    ct = np.full(z.shape, -1000, dtype=np.float32)
    table = np.abs(straight[1] + 0.0008 * straight[2] ** 2 - 138) < 3
    ct[table] = -250
    muscle = rounded(100, 134)
    body = rounded(100 + fat, 134 + fat) < 1
    ct[body] = -100
    ct[muscle < 1] = 50
    ct[body & (rounded(97 + fat, 131 + fat) > 1)] = 10
    ct[cage < 1] = 20 + 15 * noise.draw(15)[cage < 1]

    # The right dome of the diaphragm stands higher; a patient who breathes during the scan blurs it over the lung.
    dome_shape = 1 - ((side - 64) / 55) ** 2 - (y / 80) ** 2
    dome = -88 + rng.uniform(35, 55) * dome_shape + 8 * (x < 0)
    breathing = rng.uniform(2, 9)
    heart = ((z + 38) / 52) ** 2 + ((y + 28) / 48) ** 2 + ((x - 18) / 60) ** 2
    beating = rng.uniform(0.03, 0.12)
    ellipsoid = (
        np.abs((z + 22) / 100) ** 2.5 + np.abs(y / 78) ** 2.5 + np.abs((side - 65) / 51) ** 2.5
    )  # One formula for both lungs: `side` mirrors it.
    spine = (y - 70) ** 2 + x**2
    lung = (ellipsoid < 1) & (z > dome) & (heart > 1) & (spine > 26**2) & (side > 15) & (cage < 0.97)

    abdomen = (cage < 1) & (z <= dome)
    ct[abdomen] = 60 + 10 * noise.draw(12)[abdomen]
    ct[(heart <= 1) & (cage < 1)] = 45

    dependent = rng.uniform(20, 90) + rng.choice([0, 160], p=[0.6, 0.4]) * expit((y - 55) / 6)
    air = rng.uniform(-890, -830) + dependent * expit(y / 35) + 14 * noise.draw(25) + 18 * noise.draw(6)
    blur = np.clip(expit(-(z - dome) / breathing) + expit(-(heart - 1) / beating) * (np.abs(z + 38) < 40), 0, 1)
    ct[lung] = (air + (30 - air) * 0.9 * np.clip(blur, 0, 0.6))[lung]

    aorta = cylinder(48, 22, rng.uniform(11, 15)) & (z < 45)
    ct[aorta & ~lung & (cage < 1)] = 55
    trachea = cylinder(18, 0, 8.5) & (z > 18)
    bronchi = ((y - 18) ** 2 + (z - 18 + 0.7 * side) ** 2 < 6.5**2) & (side < 32)
    ct[(trachea | bronchi) & body] = -980

    vertebra = np.abs((z + 7) % 24 - 12) < 9
    ct[spine < 19**2] = np.where(vertebra, 260, 90)[spine < 19**2]
    ct[((y - 92) ** 2 / 16**2 + x**2 / 5**2 < 1) & vertebra & body] = 350
    ct[((y - 72) ** 2 / 9**2 + x**2 / 9**2) < 1] = 30
    ribs = (cage > 1) & (cage < 1.075) & (np.abs((z + 0.45 * y + 300) % 27 - 13) < 5.5) & (side > 8)
    sternum = ((y + 89) / 7) ** 2 + (x / 16) ** 2 < 1
    ct[(ribs | sternum) & body] = 380
    return ct, lung, straight


def _draw_vessels(rng: np.random.Generator, size: tuple[int, int, int], spacing: tuple[float, float, float]) -> Array:
    """Share of each voxel (Z, Y, X) that is filled by the two branching trees of lung vessels, 0 to 1."""
    points, radii = [], []
    for left in (-1, 1):
        hilum = np.array([-5.0, 15.0, 30.0 * left]) + rng.uniform(-5, 5, size=3)
        for _ in range(10):
            outwards = rng.standard_normal(3) * (1.0, 0.8, 0.3) + (0, 0, 0.7 * left)
            branches = [(hilum, outwards / np.linalg.norm(outwards), rng.uniform(3.0, 4.5))]
            while branches:
                start, direction, radius = branches.pop()
                length = rng.uniform(5, 8) * radius + 5
                steps = np.arange(0, length, 2.0)
                points.append(start + steps[:, None] * direction)
                radii.append(np.linspace(radius, 0.8 * radius, len(steps)))
                if radius > 0.7:
                    for share in rng.uniform(0.65, 0.9, size=2):
                        turned = direction + 0.55 * rng.standard_normal(3)
                        branches.append((points[-1][-1], turned / np.linalg.norm(turned), radius * share))

    step = np.asarray(spacing)
    centres = np.concatenate(points) / step + (np.asarray(size) - 1) / 2
    thickness = np.concatenate(radii)[:, None]
    reach = np.ceil(5.0 / step).astype(int)
    offsets = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    voxels = np.rint(centres).astype(int)[:, None] + offsets
    distance = np.linalg.norm((voxels - centres[:, None]) * step, axis=-1)
    pixel = float(step[1:].mean())
    # A vessel thinner than a pixel fills a part of it only.
    filled = np.clip((thickness - distance) / pixel + 0.5, 0, 1) * np.minimum(1, 2 * thickness / pixel)
    inside = ((voxels >= 0) & (voxels < size)).all(axis=-1)
    share = np.zeros(size, dtype=np.float32)
    np.maximum.at(share, tuple(voxels[inside].T), filled[inside].astype(np.float32))
    return share


def _add_lesions(
    rng: np.random.Generator,
    noise: _NoiseSource,
    ct: Array,
    lung: NDArray[np.bool_],
    coordinates: Sequence[Array],
    densities: Sequence[tuple[float, float]],
) -> NDArray[np.bool_]:
    """Draw lesions into `ct` (in place) and return their mask."""
    step = [float(axis[1] - axis[0]) for axis in noise.axes]
    depth = ndimage.distance_transform_edt(lung, sampling=step)[lung]
    # COVID-19 prefers the periphery and the back of the lungs.
    weight = np.exp(-depth / 10) * (1.5 + coordinates[1][lung] / 80)
    number = rng.integers(2, 9)
    centres = np.argwhere(lung)[rng.choice(len(weight), size=number, p=weight / weight.sum())]
    shape = 0.25 * noise.draw(12) + 0.1 * noise.draw(5)
    texture = 0.7 * noise.draw(10) + 0.7 * noise.draw(4)
    mask = np.zeros(lung.shape, dtype=bool)
    # Some patients show ground glass alone, some consolidation alone: to recognise the disease is to know both.
    thinnest, densest = densities[int(rng.integers(len(densities)))]
    for centre in centres:
        middle = [axis[index] for axis, index in zip(noise.axes, centre, strict=True)]
        radii = rng.uniform(14, 32) * rng.uniform(0.75, 1.3, size=3)
        distance = np.sqrt(
            sum(((axis - at) / radius) ** 2 for axis, at, radius in zip(coordinates, middle, radii, strict=True))
        )
        density = rng.uniform(thinnest, densest)
        profile = expit((1 - distance - shape) / (0.14 - 0.1 * density)) * lung
        opacity = profile * (300 + 600 * density) * (1 + 0.15 * texture)
        # Vessels stay visible through ground glass, which is what tells it from consolidation.
        np.copyto(ct, np.maximum(ct, np.minimum(ct + opacity, 20 + 60 * density + 20 * texture)))
        mask |= profile > 0.5
    return mask
