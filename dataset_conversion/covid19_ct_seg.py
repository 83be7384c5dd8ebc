"""COVID-19-CT-Seg (Zenodo 3757476), the paper's Dataset-A: 20 CTs with masks of lungs and infection.

Ten are from coronacases.org, in HU. Ten are from Radiopaedia, published in grey levels 0..255 that stand for the lung
window of -1250 to 250 HU (README of github.com/JunMa11/COVID-19-CT-Seg-Benchmark).
"""

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
from .sources import Rescaling, Source

IMAGES = ("COVID-19-CT-Seg_20cases", "ct_scans")
INFECTION = ("Infection_Mask", "infection_mask")
LUNGS = ("Lung_Mask", "lung_mask")
BOTH = ("Lung_and_Infection_Mask", "lung_and_infection_mask")
"""The folders as on Zenodo, and as in the copy on Kaggle."""
BOTH_INFECTION = 3
"""The infection's value in the masks of both, in which 1 and 2 are the lungs."""
CASES = 20
LUNG_WINDOW = Rescaling(0, 255, -1250, 250)
CORONACASES, RADIOPAEDIA = 1, 2
"""The two subsets."""


def case_name(path: Path) -> str | None:
    """Name of a file's case as on Zenodo, whose copy on Kaggle names the CTs like their sources.

    Examples:
        >>> case_name(Path("radiopaedia_org_covid-19-pneumonia-10_85902_1-dcm.nii"))
        'radiopaedia_10_85902_1'
        >>> case_name(Path("coronacases_org_001.nii")), case_name(Path("notes.nii"))
        ('coronacases_001', None)
    """
    if match := re.fullmatch(r"coronacases_(?:org_)?(?:case)?(\d{1,3})", stem(path)):
        return f"coronacases_{int(match[1]):03d}"
    if match := re.fullmatch(r"radiopaedia_(?:org_covid-19-pneumonia-)?(\d+_\d+_\d+)(?:-dcm)?", stem(path)):
        return f"radiopaedia_{match[1]}"
    return None


def find_cases(root: Path) -> tuple[list[Source], list[str]]:
    """All cases, each with its mask, and what to tell about them.

    Args:
        root: The folder that holds the unpacked archives.

    Raises:
        UserError: A folder is missing or has files that are not of the dataset, or images and masks do not pair.
    """
    expected = "coronacases_001 to _010 and radiopaedia_<case>_<study>_<series>"

    def files(folder: Path) -> dict[str, Path]:
        paths = find_files(folder)
        return by_case(paths, {path: case_name(path) for path in paths}, expected)

    images = files(need_folder(root, *IMAGES))
    infection, both, lungs = find_folder(root, *INFECTION), find_folder(root, *BOTH), find_folder(root, *LUNGS)
    masks = files(infection or both or need_folder(root, INFECTION[0], BOTH[0]))
    classes = {1: 1} if infection else {1: 0, 2: 0, BOTH_INFECTION: 1}
    lung_masks = files(folder) if (folder := lungs or both) else {}
    raise_problems([*unpaired(images, masks)], "the files")
    sources = []
    for case, image in images.items():
        grey = case.startswith("radiopaedia")
        # Named by Radiopaedia's case, of which some are there with two scans.
        patient = "_".join(case.split("_")[:2])
        sources.append(
            Source(
                case,
                Kind.LABELLED,
                (image,),
                masks[case],
                lung_masks.get(case),
                LUNG_WINDOW if grey else None,
                classes,
                patient,
                {"subset": RADIOPAEDIA if grey else CORONACASES},
                OPTION,
            )
        )
    remarks = [*incomplete(len(sources), CASES, "cases")]
    mapped = sum(source.rescaling is not None for source in sources)
    if mapped:
        remarks.append(
            f"the {mapped} radiopaedia cases (subset {RADIOPAEDIA}) are published in grey levels and were mapped from "
            "0..255 to -1250..250 HU; what was denser or thinner had been cut off. The coronacases (subset "
            f"{CORONACASES}) are in HU."
        )
    if without := len(sources) - len(set(lung_masks) & set(images)):
        remarks.append(f"{without} cases have no lung mask; theirs will be computed.")
    return sources, remarks


def convert_covid19_ct_seg(root: Path, output: Output, roles: Roles) -> Converted:
    """Make a dataset of COVID-19-CT-Seg.

    Args:
        root: The folder that holds the unpacked archives.
        output: The dataset to be made.
        roles: Whose masks are kept.

    Raises:
        UserError: The layout is another one, or as in `convert_public`.
    """
    sources, remarks = find_cases(root)
    return convert_public(sources, roles, output, class_names=["lesion"], remarks=remarks)
