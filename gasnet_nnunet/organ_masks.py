"""Lung masks in the grid of nnU-Net's preprocessed cases, computed once and kept beside them.

nnU-Net takes every file of its data folder for a case of its own, so the masks lie one level above:
`nnUNet_preprocessed/<dataset>/gasnet_organ_masks/<data identifier>/<organ>/<case>.b2nd`. Each file carries its bounding
box and a stamp of what it was made from, so that it is made again when that changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.intensity import normalised_to_hu
from gasnet_nnunet.lungs import Box, Mask, bounding_box, segment_organ
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.volumes import NIFTI_ENDINGS, read_nifti_values, volume_name

VERSION = 5
"""Part of every stamp: raise it when `lungs.py` finds other lungs than before."""

LISTED_CASES = 8


class OrganMasks:
    """The masks of a dataset.

    Args:
        folder: Folder of the masks; `None` where the organ is the whole volume.
        boxes: Bounding box of each case.
        shapes: Shape (Z, Y, X) of each case.
    """

    def __init__(self, folder: Path | None, boxes: Mapping[str, Box], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self._boxes = dict(boxes)
        self._shapes = dict(shapes)

    def box(self, case: str) -> Box:
        """Bounding box of a case, half-open, in voxels of the preprocessed case."""
        return self._boxes[case]

    def open(self, case: str) -> Any:
        """The mask of a case for reading patches of it: numpy or blosc2, (Z, Y, X) uint8, 0 or 1."""
        if self.folder is None:
            return np.broadcast_to(np.uint8(1), self._shapes[case])
        return blosc2.open(str(self.folder / f"{case}.b2nd"), mode="r", dparams={"nthreads": 1})

    def load(self, case: str) -> Mask:
        """The whole mask of a case, (Z, Y, X)."""
        return np.asarray(self.open(case)[:]).astype(bool)

    def __repr__(self) -> str:
        return f"OrganMasks({len(self._boxes)} cases)"


@dataclass(frozen=True)
class _Job:
    """A mask to be made: everything that another process needs."""

    case: str
    target: Path
    data_folder: Path
    user_mask: Path | None
    raw_image: Path | None
    organ: str
    plans: dict[str, Any]
    configuration: str
    stamp: list[Any]


def ensure_organ_masks(
    preprocessed_folder: Path,
    plans: dict[str, Any],
    configuration: str,
    cases: Sequence[str],
    *,
    organ: str,
    raw_folder: Path | None,
    num_processes: int,
    progress: bool,
) -> OrganMasks:
    """Make the masks that are missing or out of date.

    Args:
        preprocessed_folder: The dataset's folder in nnUNet_preprocessed.
        plans: The plans.
        configuration: Name of the configuration.
        cases: Cases to have masks of.
        organ: "lungs", "body" or "volume".
        raw_folder: The dataset's folder in nnUNet_raw. Its `lungsTr/<case><file_ending>` wins over computed masks, and
            these are computed on its CTs; `None` where it is not at hand: they are then computed on the preprocessed
            data, whose voxels may be coarse.
        num_processes: Cases worked on at a time.
        progress: Show a progress bar.

    Raises:
        UserError: No lungs were found in some cases (all of them are named), a mask of the user's does not fit its CT,
            or the organ cannot be found in images that are no CT.
    """
    manager = PlansManager(plans).get_configuration(configuration)
    data_folder = preprocessed_folder / manager.data_identifier
    if organ == "volume":
        dataset = infer_dataset_class(str(data_folder))(str(data_folder))
        shapes = {case: tuple(dataset.load_case(case)[0].shape[1:]) for case in cases}
        return OrganMasks(None, {case: _whole(shape) for case, shape in shapes.items()}, shapes)
    if manager.normalization_schemes[0] != "CTNormalization":
        raise UserError(
            f"The {organ} are found by HU, but channel 0 of {plans['plans_name']} is normalised by "
            f"{manager.normalization_schemes[0]}. For images that are no CT plan with --set organ=volume; if they are "
            'CTs, name the channel "CT" in dataset.json and plan again.'
        )
    folder = preprocessed_folder / "gasnet_organ_masks" / manager.data_identifier / organ
    folder.mkdir(parents=True, exist_ok=True)
    user_masks = _user_masks(raw_folder)
    known: dict[str, Any] = {}
    jobs = []
    for case in cases:
        user_mask = user_masks.get(case)
        data_file = _data_file(data_folder, case)
        # Not the time, which a copy to another machine may change.
        stamp = [VERSION, [data_file.name, data_file.stat().st_size], None if user_mask is None else _stamp(user_mask)]
        entry = _read_entry(folder / f"{case}.b2nd")
        # Without nnUNet_raw, nobody can tell what has become of the user's masks: those made from them stay.
        parts = slice(None) if raw_folder is not None else slice(2)
        if entry is not None and entry["stamp"][parts] == stamp[parts]:
            known[case] = entry
        else:
            target = folder / f"{case}.b2nd"
            raw_image = _raw_image(raw_folder, case)
            jobs.append(_Job(case, target, data_folder, user_mask, raw_image, organ, plans, configuration, stamp))
    made = run_jobs(_make, jobs, num_processes=num_processes, description=f"Finding the {organ}" if progress else None)
    problems = [result for result in made if isinstance(result, str)]
    if problems:
        raise UserError("\n".join(problems))
    known.update({job.case: entry for job, entry in zip(jobs, made, strict=True)})
    without = [case for case in cases if known[case]["box"] is None]
    if without:
        shown = ", ".join(without[:LISTED_CASES]) + (f" and {len(without) - LISTED_CASES} more" * (len(without) > 8))
        raise UserError(
            f"No {organ} were found in {shown}. Put a mask (any value above 0 is {organ}) into "
            f"nnUNet_raw/{plans['dataset_name']}/lungsTr/{without[0]}.nii.gz, take the case out of the dataset, or, "
            "for other organs, plan with --set organ=body or organ=volume."
        )
    boxes = {case: tuple((int(a), int(b)) for a, b in known[case]["box"]) for case in cases}
    return OrganMasks(folder, boxes, {})  # type: ignore[arg-type]


def _make(job: _Job) -> dict[str, Any] | str:
    """Make one mask; its entry, or what is wrong with the user's mask."""
    dataset = infer_dataset_class(str(job.data_folder))(str(job.data_folder), [job.case])
    data, _, _, properties = dataset.load_case(job.case)
    manager = PlansManager(job.plans)
    try:
        if job.user_mask is not None:
            mask = _resampled_user_mask(job.user_mask, properties, data.shape[1:], manager, job.configuration)
        elif job.raw_image is not None:
            image, found = manager.image_reader_writer_class().read_images([str(job.raw_image)])
            organ = segment_organ(image[0], found["spacing"], job.organ)
            mask = _resampled(organ, properties, data.shape[1:], manager, job.configuration)
        else:
            ct = normalised_to_hu(np.asarray(data[:1])[0], job.plans)
            # Lungs are looked for in axial slices; the plans may have turned the axes.
            spacing = np.asarray(manager.get_configuration(job.configuration).spacing)[manager.transpose_backward]
            organ = segment_organ(ct.transpose(manager.transpose_backward), spacing.tolist(), job.organ)
            mask = organ.transpose(manager.transpose_forward)
    except UserError as problem:
        return str(problem)
    box = bounding_box(mask)
    entry = {"stamp": job.stamp, "box": box}
    temporary = job.target.with_name(f".{job.target.name}.{os.getpid()}.tmp.b2nd")
    try:
        stored = blosc2.asarray(np.ascontiguousarray(mask, dtype=np.uint8), urlpath=str(temporary), mode="w")
        chunks = stored.schunk
        chunks.vlmeta["gasnet"] = entry
        del chunks, stored
        os.replace(temporary, job.target)
    finally:
        temporary.unlink(missing_ok=True)
    return entry


def _resampled_user_mask(
    path: Path, properties: Mapping[str, Any], shape: Sequence[int], manager: PlansManager, configuration: str
) -> NDArray[np.uint8]:
    """A mask of the user's in the grid of the preprocessed case."""
    if path.name.endswith(NIFTI_ENDINGS):
        read_nifti_values(path)  # nnU-Net's reader fills what a truncated file lacks with zeros
    seg, found = manager.image_reader_writer_class().read_seg(str(path))
    expected = tuple(int(properties["shape_before_cropping"][axis]) for axis in manager.transpose_backward)
    if seg.shape[1:] != expected or not np.allclose(found["spacing"], properties["spacing"], rtol=1e-3):
        raise UserError(
            f"{path} has shape {seg.shape[1:]} and spacing {_short(found['spacing'])}, but its CT has {expected} and "
            f"{_short(properties['spacing'])} (Z, Y, X). Make the mask on the CT's own grid."
        )
    if not (seg > 0).any():
        raise UserError(f"{path} marks no voxel. Mark the organ in it or take the file away.")
    return _resampled(seg[0] > 0, properties, shape, manager, configuration)


def _resampled(
    mask: Mask, properties: Mapping[str, Any], shape: Sequence[int], manager: PlansManager, configuration: str
) -> NDArray[np.uint8]:
    """A mask on the CT's own grid in that of the preprocessed case, the way nnU-Net puts a segmentation there."""
    seg = mask[None].astype(np.int8).transpose([0, *(axis + 1 for axis in manager.transpose_forward)])
    crop = (slice(None), *(slice(start, stop) for start, stop in properties["bbox_used_for_cropping"]))
    old_spacing = [properties["spacing"][axis] for axis in manager.transpose_forward]
    settings = manager.get_configuration(configuration)
    resampled = settings.resampling_fn_seg(seg[crop], tuple(shape), old_spacing, settings.spacing)
    return np.asarray(resampled)[0].astype(np.uint8)


def _raw_image(raw_folder: Path | None, case: str) -> Path | None:
    """The first channel of a case in nnUNet_raw, if it is there."""
    if raw_folder is None:
        return None
    description = raw_folder / "dataset.json"
    listed = json.loads(description.read_text(encoding="utf-8")).get("dataset", {}) if description.is_file() else {}
    found = [raw_folder / listed[case]["images"][0]] if case in listed else []
    found += sorted((raw_folder / "imagesTr").glob(f"{case}_0000.*"))
    return next((path for path in found if path.is_file()), None)


def _user_masks(raw_folder: Path | None) -> dict[str, Path]:
    """The user's masks by case, whatever they end in."""
    folder = None if raw_folder is None else raw_folder / "lungsTr"
    if folder is None or not folder.is_dir():
        return {}
    return {volume_name(path): path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def _read_entry(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    # Each of the three keeps the next alive only as long as it lives itself.
    stored = blosc2.open(str(path), mode="r")
    chunks = stored.schunk
    return dict(chunks.vlmeta["gasnet"])


def _data_file(folder: Path, case: str) -> Path:
    """The file of a preprocessed case, in either of nnU-Net's formats."""
    stored = folder / f"{case}.b2nd"
    return stored if stored.exists() else folder / f"{case}.npz"


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _whole(shape: Sequence[int]) -> Box:
    z, y, x = (int(n) for n in shape)
    return (0, z), (0, y), (0, x)


def _short(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
