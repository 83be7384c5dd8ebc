"""MosMedData (COVID19_1110), the paper's Datasets C and D: 1110 CTs by severity, 50 of them with lesion masks."""

from __future__ import annotations

import re
from pathlib import Path

from gasnet_nnunet.cohort import Kind, abbreviate
from gasnet_nnunet.errors import UserError

from .conversion import Converted
from .public import (
    OPTION,
    Output,
    Roles,
    by_case,
    convert_public,
    find_files,
    find_folder,
    incomplete,
    need_folder,
    stem,
)
from .sources import Source

IMAGES, MASKS = "studies", "masks"
HEALTHY = "CT-0"
"""Folder of those without findings of pneumonia; the higher the number of a folder, the more of the lung is ill."""
HEALTHY_CASES, DISEASED_CASES, MASKED_CASES = 254, 856, 50


def case_name(path: Path, ending: str = "") -> str | None:
    """Name of a file's case.

    Examples:
        >>> case_name(Path("masks/study_0255_mask.nii.gz"), "_mask")
        'study_0255'
    """
    match = re.fullmatch(rf"(study_\d+){ending}", stem(path))
    return match[1] if match else None


def find_cases(root: Path) -> tuple[list[Source], list[str]]:
    """All cases with their severities, and what to tell about them.

    Args:
        root: The folder that holds `studies` and, if there are to be masks, `masks`.

    Raises:
        UserError: `studies` is missing, a folder has files that are not of the dataset, or a mask has no CT of an ill
            patient.
    """
    studies = need_folder(root, IMAGES)
    paths = find_files(studies)
    images = by_case(paths, {path: case_name(path) for path in paths}, "study_0001.nii.gz, ...")
    severities = {case: _severity(path, studies) for case, path in images.items()}
    folder = find_folder(root, MASKS)
    paths = find_files(folder) if folder else []
    masks = by_case(paths, {path: case_name(path, "_mask") for path in paths}, "study_0255_mask.nii.gz, ...")
    ill = {case for case in images if severities[case] != HEALTHY}
    if alone := sorted(set(masks) - ill):
        raise UserError(
            f"{OPTION}: mask without a CT of CT-1 to CT-4: {abbreviate(alone)} (e.g. {masks[alone[0]]}). Complete the "
            "download."
        )
    sources = []
    for case, image in images.items():
        kind = Kind.HEALTHY if case not in ill else Kind.LABELLED if case in masks else Kind.DISEASED
        details = {"severity": severities[case]}
        mask = masks.get(case)
        sources.append(Source(case, kind, (image,), mask, classes={1: 1}, details=details, named_by=OPTION))
    remarks = [
        *incomplete(len(images) - len(ill), HEALTHY_CASES, f"healthy cases ({HEALTHY})"),
        *incomplete(len(ill), DISEASED_CASES, "diseased cases (CT-1 to CT-4)"),
        *incomplete(len(masks), MASKED_CASES, "masks"),
    ]
    return sources, remarks


def _severity(path: Path, studies: Path) -> str:
    folder = path.relative_to(studies).parts[0]
    if not re.fullmatch(r"CT-\d+", folder):
        raise UserError(f"{OPTION}: {path} lies in none of the folders CT-0 to CT-4 of {studies}. Move it to its own.")
    return folder


def convert_mosmed(root: Path, output: Output, roles: Roles) -> Converted:
    """Make a dataset of MosMedData.

    Args:
        root: The folder that holds `studies` and `masks`.
        output: The dataset to be made.
        roles: Whose masks are kept.

    Raises:
        UserError: The layout is another one, or as in `convert_public`.
    """
    sources, remarks = find_cases(root)
    return convert_public(sources, roles, output, class_names=["lesion"], remarks=remarks)
