"""Lung masks of a raw dataset, written to `nnUNet_raw/<dataset>/lungsTr`, where they win over computed ones.

Three ways: by this package's own thresholding, by the network of the package lungmask, or made elsewhere.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.cohort import abbreviate, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.lungs import Mask, bounding_box, segment_lungs
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.raw_dataset import Dataset
from gasnet_nnunet.volumes import (
    HIGHEST_AIR,
    Grid,
    as_image,
    grid_difference,
    read_grid,
    read_volume,
    volume_name,
    write_volume,
)

METHODS = ("threshold", "lungmask", "folder")
LOBES = (
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
)
"""TotalSegmentator's files of the lungs, in a folder for each case."""
WRITABLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
"""Formats that keep a volume's grid."""
NOTES = (".csv", ".json", ".log", ".md", ".txt", ".xlsx", ".xml", ".yaml")
MOST_LABELS = 6
"""Five lobes and the airways. A file with more values shows other organs as well, or is an image."""
USUAL_ML = (1000.0, 10000.0)
"""Both lungs of an adult, with room for what lesions take away."""


@dataclass(frozen=True)
class LungMask:
    """The lung mask of a case.

    Args:
        case: Its name.
        ml: Volume in ml.
        box_mm: Size (Z, Y, X) of its bounding box in mm.
        made: Whether it was written now; `False` where it was there before.
    """

    case: str
    ml: float
    box_mm: tuple[float, float, float]
    made: bool

    @property
    def oddity(self) -> str:
        """What is unusual about it, a few words; empty if nothing is."""
        if self.ml == 0:
            return "no lungs found, nothing written"
        if self.ml < USUAL_ML[0]:
            return f"less than {USUAL_ML[0] / 1000:g} l"
        return f"more than {USUAL_ML[1] / 1000:g} l" if self.ml > USUAL_ML[1] else ""


@dataclass(frozen=True)
class LungMasks:
    """What `make_lung_masks` did.

    Args:
        folder: The dataset's folder of lung masks.
        masks: Those that could be made or were there already.
        problems: Why the others could not be made, one sentence each.
        remarks: What the user should know besides, one sentence each.
    """

    folder: Path
    masks: tuple[LungMask, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """A mask to be made, or to be measured where there is no method."""

    case: str
    image: Path
    target: Path
    method: str | None
    files: tuple[Path, ...] = ()


def make_lung_masks(
    dataset: Dataset,
    method: str,
    *,
    masks: Path | None = None,
    overwrite: bool = False,
    num_processes: int = 2,
    progress: bool = False,
) -> LungMasks:
    """Write the lung masks of all training cases, on the grids of their CTs.

    Masks that are there already are kept and measured, so a run that was interrupted goes on where it was. A case in
    which no lungs are found gets no mask.

    Args:
        dataset: The dataset.
        method: "threshold" (`segment_lungs`), "lungmask" (the network R231 of the package of that name) or "folder".
        masks: With "folder", the folder: a file a case, every value above 0 being lung, or a folder a case with
            TotalSegmentator's lobes in it.
        overwrite: Replace masks that are there already.
        num_processes: Cases worked on at a time, one with "lungmask".
        progress: Show progress bars.

    Raises:
        UserError: The method cannot be used with this dataset, or the folder's masks do not fit it; found out before
            anything is written.
    """
    ending = str(dataset.dataset_json["file_ending"])
    _check_method(dataset, method, masks, ending)
    folder = dataset.raw / "lungsTr"
    existing = _existing(folder, dataset, ending)
    files: Mapping[str, tuple[Path, ...]] = {}
    remarks: tuple[str, ...] = ()
    if masks is not None:
        files, remarks = _find_masks(masks, dataset, existing)
    wanted = files if masks is not None else dataset.files
    jobs = []
    for case, entry in dataset.files.items():
        new = case in wanted and (overwrite or case not in existing)
        if new or case in existing:
            target = folder / f"{case}{ending}"
            jobs.append(
                _Job(
                    case, Path(entry["images"][0]), target, method if new else None, files.get(case, ()) if new else ()
                )
            )
    grids = run_jobs(
        _grid_problem, jobs, num_processes=num_processes, description="Comparing grids" if progress else None
    )
    raise_problems([problem for problem in grids if problem], "the lung masks; nothing was written")
    if method == "lungmask" and any(job.method for job in jobs):
        _network()
    folder.mkdir(exist_ok=True)
    results = run_jobs(
        _make,
        jobs,
        # The network takes all cores or the one GPU by itself.
        num_processes=1 if method == "lungmask" else num_processes,
        description="Lung masks" if progress else None,
    )
    return LungMasks(
        folder,
        tuple(result for result in results if isinstance(result, LungMask)),
        tuple(result for result in results if isinstance(result, str)),
        remarks,
    )


def _check_method(dataset: Dataset, method: str, masks: Path | None, ending: str) -> None:
    if method not in METHODS:
        raise UserError(f"--method is '{method}'; expected {', '.join(METHODS)}.")
    if (method == "folder") != (masks is not None):
        raise UserError("--masks FOLDER and --method folder belong together: give both or neither.")
    if ending not in WRITABLE:
        raise UserError(f"{dataset.name} consists of {ending} files; lung masks are written as {', '.join(WRITABLE)}.")
    if method != "folder" and 0 not in dataset.ct_channels:
        name = next(iter(dataset.dataset_json["channel_names"].values()))
        raise UserError(
            f"Lungs are found in CTs by their HU, but channel 0 of {dataset.name} is named '{name}'. Make the masks "
            "elsewhere and add them with --method folder, or correct channel_names in dataset.json."
        )


def _existing(folder: Path, dataset: Dataset, ending: str) -> set[str]:
    """Cases that have a mask already."""
    found = set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        case = volume_name(path)
        if path.name.startswith(".") or case not in dataset.files:
            continue
        if path.name != f"{case}{ending}":
            raise UserError(
                f"{path} should be named {case}{ending}, as all files of {dataset.name}: convert or move it."
            )
        found.add(case)
    return found


def _find_masks(
    folder: Path, dataset: Dataset, existing: set[str]
) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    """The files of each case's mask, and what to tell the user about those that do not match."""
    if not folder.is_dir():
        raise UserError(f"--masks: {folder} is no folder." if folder.exists() else f"--masks: there is no {folder}.")
    files: dict[str, tuple[Path, ...]] = {}
    strangers, problems = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower().endswith(NOTES):
            continue
        name = volume_name(path)
        # Masks are often made of imagesTr, whose files bear the number of the channel.
        case = name if name in dataset.files else name.removesuffix("_0000")
        if case not in dataset.files:
            strangers.append(path.name)
        elif case in files:
            problems.append(f"--masks: {folder} holds two masks of {case}: {path.name} and {files[case][0]}.")
        elif path.is_dir():
            lobes = {volume_name(file): file for file in sorted(path.iterdir())}
            missing = [lobe for lobe in LOBES if lobe not in lobes]
            files[case] = tuple(lobes[lobe] for lobe in LOBES if lobe in lobes)
            if missing:
                problems.append(
                    f"--masks: {path} lacks {', '.join(missing)}; expected TotalSegmentator's five lobes there."
                )
        else:
            files[case] = (path,)
    raise_problems(problems, f"the masks in {folder}; nothing was written")
    missing = sorted(set(dataset.files) - set(files) - existing)
    unknown = f"{folder} holds {abbreviate(strangers)}, which is no training case of {dataset.name}"
    without = f"there is no mask of {abbreviate(missing)}"
    if not files or (strangers and missing):
        found = unknown if strangers else f"{folder} holds no masks"
        lacking = f", and {without}" if missing else ""
        raise UserError(f"--masks: {found}{lacking}. A mask is named like its case, e.g. {min(dataset.files)}.")
    remarks = [f"{without} in {folder}; planning computes theirs."] if missing else []
    return files, (*remarks, *([f"{unknown}; not used."] if strangers else []))


def _grid_problem(job: _Job) -> str:
    try:
        expected = read_grid(job.image)
        for path in job.files if job.method else (job.target,):
            difference = grid_difference(read_grid(path), expected)
            if difference:
                return (
                    f"{job.case}: {path} does not lie on the grid of its CT: {difference}. Resample it to that grid, "
                    "with nearest-neighbour interpolation."
                )
    except UserError as error:
        return f"{job.case}: {error}"
    return ""


def _make(job: _Job) -> LungMask | str:
    """Make and measure a mask, or say why that is impossible: one broken file of many is no traceback."""
    try:
        if job.method is None:
            mask, grid = _read_mask(job.target)
            if not mask.any():
                raise UserError(f"{job.target} marks no voxel. Take it away or add --overwrite.")
        elif job.method == "folder":
            mask, grid = _merged(job)
        else:
            ct, grid = read_volume(job.image)
            if ct.min() > HIGHEST_AIR:
                raise UserError(
                    f"{job.image} runs from {ct.min():g} to {ct.max():g}. Hounsfield units are expected, with air near "
                    "-1000: convert it with --rescale LO HI HU_LO HU_HI, or add a mask with --method folder."
                )
            find = _segment_by_network if job.method == "lungmask" else _segment_by_threshold
            mask = find(job.case, ct, grid)
        box = bounding_box(mask)
        if box is not None and job.method:
            _write(job.target, mask.astype(np.uint8), grid)
    except UserError as error:
        return f"{job.case}: {error}"
    spacing = grid.spacing[::-1]
    z, y, x = ((stop - start) * edge for (start, stop), edge in zip(box or [(0, 0)] * 3, spacing, strict=True))
    return LungMask(
        job.case, float(mask.sum() * np.prod(spacing)) / 1000, (z, y, x), box is not None and bool(job.method)
    )


def _read_mask(path: Path) -> tuple[Mask, Grid]:
    values, grid = read_volume(path)
    labels = np.unique(values[values > 0])
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"{path} holds {len(labels)} values above 0, up to {labels[-1]:g}. Expected lungs or their lobes and "
            "nothing else: 0 and 1, or a few labels."
        )
    return values > 0, grid


def _merged(job: _Job) -> tuple[Mask, Grid]:
    """The union of all files of a case, on the CT's own grid, of which they may differ by rounding."""
    parts = [_read_mask(path)[0] for path in job.files]
    return functools.reduce(np.logical_or, parts), read_grid(job.image)


def _segment_by_threshold(case: str, ct: NDArray[Any], grid: Grid) -> Mask:
    return segment_lungs(ct, grid.spacing[::-1])


def _segment_by_network(case: str, ct: NDArray[Any], grid: Grid) -> Mask:
    try:
        labels = np.asarray(_network().apply(as_image(ct, grid)))
    # Another package's network on an unknown scan and device: whatever it raises concerns this case alone.
    except Exception as error:
        raise UserError(f"lungmask could not segment it: {_sentence(error)}") from error
    if labels.shape != ct.shape:
        raise UserError(f"lungmask returned {labels.shape} voxels for a CT of {ct.shape}.")
    return labels > 0


@functools.cache
def _network() -> Any:
    """The network R231 of Hofmanninger et al. (2020), loaded once; its weights are fetched when first used."""
    try:
        import lungmask
    except ImportError as error:
        raise UserError(
            f"--method lungmask needs the package lungmask ({error}): pip install 'gasnet-nnunet[lungmask]'"
        ) from None
    try:
        return lungmask.LMInferer(modelname="R231", tqdm_disable=True)
    # torch raises what urllib, zip files and file systems raise; without the weights there is nothing to go on with.
    except Exception as error:
        raise UserError(
            f"lungmask could not load its network R231: {_sentence(error)}. It fetches the weights from github.com at "
            "the first use: check the connection, or copy unet_r231-d5d2fc3d.pth into torch's folder hub/checkpoints "
            "(TORCH_HOME). Nothing was written."
        ) from error


def _sentence(error: Exception) -> str:
    lines: Sequence[str] = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}".rstrip(". :")


def _write(target: Path, mask: NDArray[np.uint8], grid: Grid) -> None:
    """Whole or not at all; the hidden name is passed over by everything that reads the folder."""
    ending = target.name[len(volume_name(target)) :]
    temporary = target.with_name(f".{volume_name(target)}.unfinished{ending}")
    try:
        write_volume(temporary, mask, grid)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
