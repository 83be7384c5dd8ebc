"""Folders of CTs, or a table that names them, made into an nnU-Net dataset that holds the three kinds of case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gasnet_nnunet.cohort import Kind, raise_problems
from gasnet_nnunet.errors import UserError

from .conversion import Converted, check_target, convert
from .manifest import manifest_sources, missing_kinds
from .sources import Rescaling, Source, find_volumes, pair


def convert_folders(
    *,
    dataset_id: int,
    name: str,
    labelled: tuple[Path, Path] | None = None,
    healthy: Path | None = None,
    diseased: Path | None = None,
    test: Path | None = None,
    test_masks: Path | None = None,
    lungs: Path | None = None,
    manifest: Path | None = None,
    rescaling: Rescaling | None = None,
    overwrite: bool = False,
    num_processes: int = 2,
    progress: bool = False,
) -> Converted:
    """Make `nnUNet_raw/DatasetNNN_NAME` out of folders of CTs.

    Args:
        dataset_id: nnU-Net's dataset id, 1 to 999.
        name: Name behind the id: letters, digits, `_` and `-`.
        labelled: Folder of images, folder of their lesion masks (same names).
        healthy: Folder of CTs without lesions.
        diseased: Folder of CTs with lesions but without masks.
        test: Folder of CTs to test on.
        test_masks: Folder of their lesion masks.
        lungs: Folder of lung masks for some or all training cases, to be used instead of computed ones.
        manifest: Table of further cases, see `manifest_sources`; with it no folder is needed.
        rescaling: Map of the images' values to HU.
        overwrite: Replace a dataset of the same id and name.
        num_processes: Cases read and written at a time.
        progress: Show progress bars.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or files cannot be used; all of them are named.
    """
    check_target(dataset_id, name, overwrite)
    if test_masks and not test:
        raise UserError(f"{test_masks} holds test masks, but there is no --test IMAGES.")
    if not manifest and not (labelled and healthy):
        raise UserError(
            "Name the cases: --labelled IMAGES MASKS and --healthy IMAGES, or --manifest FILE, or both folders and a "
            "manifest."
        )
    sources, problems = _collect(labelled, diseased, healthy, test, test_masks, lungs)
    raise_problems(problems, "the folders")
    if manifest:
        sources += manifest_sources(manifest)
    return convert(
        [replace(source, rescaling=rescaling) for source in sources],
        dataset_id=dataset_id,
        name=name,
        remarks=missing_kinds(sources),
        overwrite=overwrite,
        num_processes=num_processes,
        progress=progress,
    )


def _collect(
    labelled: tuple[Path, Path] | None,
    diseased: Path | None,
    healthy: Path | None,
    test: Path | None,
    test_masks: Path | None,
    lungs: Path | None,
) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    problems: list[str] = []
    lung_masks = find_volumes(lungs, "--lungs") if lungs else {}
    groups: list[tuple[Kind | None, Path | None, Path | None]] = [
        (Kind.LABELLED, *(labelled or (None, None))),
        (Kind.DISEASED, diseased, None),
        (Kind.HEALTHY, healthy, None),
        (None, test, test_masks),
    ]
    for kind, image_folder, mask_folder in groups:
        if image_folder is None:
            continue
        option = f"--{kind.value}" if kind else "--test"
        try:
            images = find_volumes(image_folder, option)
            masks = find_volumes(mask_folder, option) if mask_folder else {}
        except UserError as error:
            problems.append(str(error))
            continue
        if mask_folder:
            problems += pair(images, masks, option)
        for case, path in images.items():
            lung_mask = lung_masks.get(case) if kind else None
            sources.append(Source(case, kind, (path,), masks.get(case), lung_mask))
    strangers = sorted(set(lung_masks) - {source.case for source in sources})
    if strangers:
        problems.append(f"--lungs: no image is named like {', '.join(strangers[:8])} in {lungs}.")
    return sources, problems
