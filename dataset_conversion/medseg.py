"""MedSeg's nine CTs from Radiopaedia, the paper's Dataset-B, with masks of three findings and of the lungs."""

from __future__ import annotations

import re
from pathlib import Path

from gasnet_nnunet.cohort import Kind, raise_problems

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
    unpaired,
)
from .sources import Source

IMAGES, MASKS, LUNGS = "rp_im", "rp_msk", "rp_lung_msk"
CASES = 9
EFFUSION = "effusion"
FINDINGS = {1: "ground_glass", 2: "consolidation", 3: EFFUSION}
"""The masks' values."""
LESIONS = (1, 2)
"""Those that are lesions of the lung: an effusion lies beside it."""


def case_name(path: Path) -> str | None:
    """Name of a file's case: the published names are mere numbers, which would be anybody's.

    Examples:
        >>> case_name(Path("rp_im/1.nii.gz"))
        'medseg_1'
    """
    match = re.fullmatch(r"\d+", stem(path))
    return f"medseg_{int(match[0])}" if match else None


def find_cases(root: Path, *, classes_apart: bool = False) -> tuple[list[Source], list[str]]:
    """All cases, each with its mask, and what to tell about them.

    Args:
        root: The folder that holds the unpacked archives.
        classes_apart: Keep ground glass, consolidation and effusion as labels 1, 2 and 3.

    Raises:
        UserError: A folder is missing or has files that are not of the dataset, or images and masks do not pair.
    """

    def files(folder: Path) -> dict[str, Path]:
        paths = find_files(folder)
        return by_case(paths, {path: case_name(path) for path in paths}, f"1.nii.gz to {CASES}.nii.gz")

    images, masks = files(need_folder(root, IMAGES)), files(need_folder(root, MASKS))
    lungs = files(folder) if (folder := find_folder(root, LUNGS)) else {}
    raise_problems([*unpaired(images, masks)], "the files")
    classes = {value: value if classes_apart else int(value in LESIONS) for value in FINDINGS}
    sources = [
        Source(case, Kind.LABELLED, (image,), masks[case], lungs.get(case), classes=classes, named_by=OPTION)
        for case, image in images.items()
    ]
    remarks = [*incomplete(len(sources), CASES, "cases")]
    if not classes_apart:
        remarks.append("ground glass and consolidation became one lesion class, effusion background.")
    return sources, remarks


def convert_medseg(root: Path, output: Output, roles: Roles, *, classes_apart: bool = False) -> Converted:
    """Make a dataset of MedSeg's nine volumes.

    Args:
        root: The folder that holds the unpacked archives.
        output: The dataset to be made.
        roles: Whose masks are kept.
        classes_apart: Keep ground glass, consolidation and effusion as labels 1, 2 and 3.

    Raises:
        UserError: The layout is another one, or as in `convert_public`.
    """
    sources, remarks = find_cases(root, classes_apart=classes_apart)
    names = list(FINDINGS.values()) if classes_apart else ["lesion"]
    return convert_public(sources, roles, output, class_names=names, remarks=remarks)
