"""Several datasets become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from numpy.typing import NDArray
from test_public_datasets import SHAPE, ct, details, mask, names, run, save, values

from gasnet_nnunet.cohort import read_cohort
from gasnet_nnunet.errors import UserError

LESION = {"background": 0, "lesion": 1, "ignore": 2}


def dataset(folder: Path, labels: dict[str, Any], cases: dict[str, NDArray[Any]], **more: Any) -> Path:
    """A dataset as anybody may have made it; the digits of a case's name and the folder's are its scan's seed."""
    ending = more.pop("file_ending", ".nii.gz")
    seed = int(folder.name[7:10])
    for case, label in cases.items():
        save(folder / "imagesTr" / f"{case}_0000{ending}", ct(1000 * seed + int(case[-1])))
        save(folder / "labelsTr" / f"{case}{ending}", label)
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(cases), "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """Empty nnUNet_raw."""
    return nnunet_folders / "raw"


@pytest.fixture
def two(raw: Path) -> Path:
    """501: two masks and no `ignore`. 502: of each kind one, with all that a conversion leaves. Both have a case c1."""
    dataset(raw / "Dataset501_A", {"background": 0, "lesion": 1}, {"c1": mask(1), "c2": mask(0, 1)})
    full = np.full(SHAPE, 2, np.uint8)
    known = {"c1": {"severity": "CT-1"}, "t1": {"severity": "CT-2", "patient": "p1"}}
    cases = {"c1": mask(0, 0, 1), "d2": full, "h3": mask()}
    folder = dataset(raw / "Dataset502_D", LESION, cases, gasnet={"cases": known})
    save(folder / "hiddenTr" / "d2.nii.gz", mask(1, 1))
    save(folder / "lungsTr" / "h3.nii.gz", mask(1, 1, 1))
    save(folder / "imagesTs" / "t1_0000.nii.gz", ct(77))
    save(folder / "labelsTs" / "t1.nii.gz", mask(0, 0, 0, 1))
    return raw


def merge(*words: str) -> str:
    return run("convert", "merge", "--id", "600", "--name", "All", *words)


def kinds(raw: Path) -> tuple[list[str], list[str], list[str]]:
    folder = raw / "Dataset600_All"
    cohort = read_cohort(folder / "labelsTr", json.loads((folder / "dataset.json").read_text(encoding="utf-8")))
    return cohort.labelled, cohort.diseased, cohort.healthy


def test_everything_is_taken_along(two: Path) -> None:
    output = merge("-d", "501", "502")
    assert "3 labelled, 1 diseased, 1 healthy, 1 test" in output
    assert "1 names of cases occur in several datasets" in output
    merged = two / "Dataset600_All"
    assert kinds(two) == (["501_A_c1", "502_D_c1", "c2"], ["d2"], ["h3"])
    assert json.loads((merged / "dataset.json").read_text(encoding="utf-8"))["labels"] == LESION
    verify_dataset_integrity(str(merged), num_processes=1)
    for folder, case, name in (
        ("Dataset501_A", "c1", "501_A_c1"),
        ("Dataset502_D", "c1", "502_D_c1"),
        ("Dataset502_D", "d2", "d2"),
        ("Dataset502_D", "h3", "h3"),
    ):
        for split, old, new in (("images", f"{case}_0000", f"{name}_0000"), ("labels", case, name)):
            expected = values(two / folder / f"{split}Tr" / f"{old}.nii.gz")
            np.testing.assert_array_equal(values(merged / f"{split}Tr" / f"{new}.nii.gz"), expected)
    np.testing.assert_array_equal(values(merged / "hiddenTr" / "d2.nii.gz"), mask(1, 1))
    np.testing.assert_array_equal(values(merged / "lungsTr" / "h3.nii.gz"), mask(1, 1, 1))
    np.testing.assert_array_equal(values(merged / "imagesTs" / "t1_0000.nii.gz"), ct(77))
    np.testing.assert_array_equal(values(merged / "labelsTs" / "t1.nii.gz"), mask(0, 0, 0, 1))
    assert details(merged)["502_D_c1"] == {"dataset": "Dataset502_D", "severity": "CT-1"}
    assert details(merged)["c2"] == {"dataset": "Dataset501_A"}
    assert details(merged)["t1"] == {"dataset": "Dataset502_D", "severity": "CT-2", "patient": "Dataset502_D: p1"}


def test_volume_level_data_gives_up_its_masks(two: Path) -> None:
    assert "2 labelled, 2 diseased, 1 healthy, 1 test" in merge("-d", "501", "-d", "502", "--as-volume-level", "502")
    assert kinds(two) == (["501_A_c1", "c2"], ["502_D_c1", "d2"], ["h3"])
    np.testing.assert_array_equal(values(two / "Dataset600_All" / "hiddenTr" / "502_D_c1.nii.gz"), mask(0, 0, 1))


def test_what_dataset_json_says_of_a_case_counts(two: Path) -> None:
    path = two / "Dataset501_A" / "dataset.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "gasnet": {"cohort": {"c2": "diseased"}}})
    )
    merge("-d", "501", "502")
    assert kinds(two) == (["501_A_c1", "502_D_c1"], ["c2", "d2"], ["h3"])
    np.testing.assert_array_equal(values(two / "Dataset600_All" / "hiddenTr" / "c2.nii.gz"), mask(0, 1))


def test_labels_that_differ_are_refused_or_joined(two: Path) -> None:
    labels = {"background": 0, "consolidation": 2, "ground_glass": 1, "effusion": 3, "ignore": 4}
    # A partly ignored mask: the fourth slice is ignored.
    dataset(two / "Dataset503_B", labels, {"b1": mask(1, 2, 3, 4)}, file_ending=".nrrd")
    with pytest.raises(
        UserError, match=r"(?s)not have the same labels.*Dataset503_B: consolidation = 2.*--lesion-classes 1"
    ):
        merge("-d", "501", "503")
    assert "no healthy case" in merge("-d", "501", "503", "--lesion-classes", "1")
    merged = two / "Dataset600_All"
    assert json.loads((merged / "dataset.json").read_text(encoding="utf-8"))["labels"] == LESION
    np.testing.assert_array_equal(values(merged / "labelsTr" / "b1.nii.gz"), mask(1, 1, 0, 2))


def test_several_classes_stay_apart_where_all_datasets_have_them(raw: Path) -> None:
    labels = {"background": 0, "ground_glass": 1, "consolidation": 2}
    dataset(raw / "Dataset501_A", labels, {"a1": mask(1), "h2": mask()})
    dataset(raw / "Dataset502_B", {**labels, "ignore": 3}, {"b1": mask(0, 1, 3), "d2": np.full(SHAPE, 3, np.uint8)})
    merge("-d", "501", "502")
    merged = raw / "Dataset600_All"
    # No mask holds a 2: the datasets declare it all the same.
    assert json.loads((merged / "dataset.json").read_text(encoding="utf-8"))["labels"] == {**labels, "ignore": 3}
    np.testing.assert_array_equal(values(merged / "labelsTr" / "b1.nii.gz"), mask(0, 1, 3))
    np.testing.assert_array_equal(values(merged / "labelsTr" / "d2.nii.gz"), np.full(SHAPE, 3))


def test_regions_become_one_class_or_are_refused(two: Path) -> None:
    for number, folder in ((3, "Dataset503_R"), (4, "Dataset504_R")):
        dataset(two / folder, {"background": 0, "all": [1, 2], "core": 2}, {f"r{number}": mask(1, 2)})
    with pytest.raises(UserError, match=r"all = \[1, 2\], core = 2 are not the values 1, 2, ..."):
        merge("-d", "503", "504")
    merge("-d", "503", "504", "--lesion-classes", "1")
    np.testing.assert_array_equal(values(two / "Dataset600_All" / "labelsTr" / "r3.nii.gz"), mask(1, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-d", "501"], "-d names Dataset501_A; expected two or more"),
        (["-d", "501", "501"], "-d names Dataset501_A 2 times"),
        (["-d", "501", "502", "--as-volume-level", "503"], "--as-volume-level names Dataset503_C, which is not to be"),
        (["-d", "501", "503"], "Dataset503_C has the channels CT, PET; merge joins datasets of one channel, CT"),
        (["-d", "501", "504"], r"Dataset501_A/imagesTr/c1_0000.nii.gz .* are the same scan"),
        (["-d", "501", "502", "--as-volume-level", "501", "502"], "None of the merged cases would be labelled"),
        (["-d", "501", "505"], "Expected one dataset of id 505, found none"),
        (["-d", "501", "506"], r"d1: every voxel of its label file is 2.*no label 'ignore'"),
    ],
)
def test_refuses(two: Path, words: list[str], message: str) -> None:
    dataset(two / "Dataset503_C", LESION, {"p1": mask(1)}, channel_names={"0": "CT", "1": "PET"})
    save(two / "Dataset503_C" / "imagesTr" / "p1_0001.nii.gz", ct(5))
    copied = dataset(two / "Dataset504_S", LESION, {"s1": mask(1)})
    save(copied / "imagesTr" / "s1_0000.nii.gz", ct(501001))
    plain = {"background": 0, "lesion": 1}
    dataset(two / "Dataset506_X", plain, {"d1": np.full(SHAPE, 2, np.uint8), "x2": mask(1)})
    with pytest.raises(UserError, match=message):
        merge(*words)
    assert "Dataset600_All" not in names(two)


def test_a_dataset_is_not_merged_into_itself(two: Path) -> None:
    with pytest.raises(UserError, match="--id 502 is Dataset502_D, which is to be merged"):
        run("convert", "merge", "--id", "502", "--name", "D", "-d", "501", "502", "--overwrite")
    assert names(two / "Dataset502_D" / "imagesTr") == ["c1_0000.nii.gz", "d2_0000.nii.gz", "h3_0000.nii.gz"]


def test_a_patient_is_not_trained_and_tested_on(two: Path) -> None:
    path = two / "Dataset502_D" / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["gasnet"]["cases"]["d2"] = {"patient": "p1"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="The patient 'Dataset502_D: p1' is both in training"):
        merge("-d", "501", "502")
