"""Kinds of cases from label files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from gasnet_nnunet.cohort import Cohort, Kind, read_cohort
from gasnet_nnunet.errors import UserError

DATASET = {"labels": {"background": 0, "lesion": 1, "ignore": 2}, "file_ending": ".nii.gz"}


def write(
    folder: Path, name: str, fill: float = 0, *, lesion: int = 0, ignored: int = 0, dtype: Any = np.uint8
) -> None:
    """Write a 4 x 5 x 6 label file with a few lesion and ignored voxels."""
    array = np.full(4 * 5 * 6, fill, dtype)
    array[:lesion] = 1
    array[lesion : lesion + ignored] = 2
    sitk.WriteImage(sitk.GetImageFromArray(array.reshape(4, 5, 6)), str(folder / f"{name}.nii.gz"))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A folder with one case of each kind and a partly ignored mask."""
    folder = tmp_path / "labelsTr"
    folder.mkdir()
    write(folder, "mask", lesion=12)
    write(folder, "partly", lesion=12, ignored=60)
    write(folder, "ill", 2)
    write(folder, "well")
    return folder


def overruled(**cohort: str) -> dict[str, Any]:
    return {**DATASET, "gasnet": {"cohort": cohort}}


def test_kinds_come_from_the_labels(labels: Path) -> None:
    cohort = read_cohort(labels, DATASET)
    assert cohort.labelled == ["mask", "partly"]
    assert cohort.diseased == ["ill"]
    assert cohort.healthy == ["well"]
    assert cohort.cases["partly"].lesion_voxels == 12
    assert cohort.cases["partly"].ignored_fraction == pytest.approx(0.5)
    assert not any(case.overruled for case in cohort.cases.values())


def test_regions_and_several_classes_count_as_lesion(labels: Path) -> None:
    write(labels, "classes", 3)
    write(labels, "some", lesion=3, ignored=2)
    dataset = {**DATASET, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}}
    cohort = read_cohort(labels, dataset, identifiers=["classes", "some", "well"])
    assert cohort.diseased == ["classes"]
    assert cohort.cases["some"].lesion_voxels == 5


def test_dataset_json_overrules(labels: Path) -> None:
    cohort = read_cohort(labels, overruled(partly="diseased", ill="healthy"))
    assert cohort.diseased == ["partly"]
    assert cohort.healthy == ["ill", "well"]
    assert cohort.cases["partly"].overruled
    assert "mask of 12 lesion voxels is hidden" in cohort.report()


def test_an_overruling_that_changes_nothing_is_none(labels: Path) -> None:
    assert not read_cohort(labels, overruled(mask="labelled")).cases["mask"].overruled


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mask": "healthy"}, "mask: dataset.json calls it healthy, but its mask has 12 lesion voxels"),
        ({"well": "labelled"}, "well: dataset.json calls it labelled, but its mask has no lesion voxel"),
        ({"nobody": "healthy"}, "names the case 'nobody'"),
        ({"well": "fine"}, "the kinds are labelled, diseased, healthy"),
    ],
)
def test_impossible_overrulings_are_refused(labels: Path, entries: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_cohort(labels, overruled(**entries))


def test_overrulings_may_name_a_case_outside_the_subset(labels: Path) -> None:
    cohort = read_cohort(labels, overruled(ill="diseased"), identifiers=["mask", "well"])
    assert sorted(cohort.cases) == ["mask", "well"]


def test_partly_ignored_without_lesion_needs_a_word(labels: Path) -> None:
    write(labels, "vague", ignored=60)
    with pytest.raises(UserError, match=r"vague: its mask is partly ignored \(50.0 %\)"):
        read_cohort(labels, DATASET)
    assert "vague" in read_cohort(labels, overruled(vague="diseased")).diseased


def test_no_mask_and_no_healthy_case_are_refused(labels: Path) -> None:
    with pytest.raises(UserError, match="None of the 2 cases has a mask"):
        read_cohort(labels, DATASET, identifiers=["ill", "well"])
    with pytest.raises(UserError, match="None of the 2 cases is healthy"):
        read_cohort(labels, DATASET, identifiers=["ill", "mask"])


@pytest.mark.parametrize("value", [1, 2])
def test_ignored_throughout_without_an_ignore_label_is_refused(labels: Path, value: int) -> None:
    write(labels, "ill", value)
    dataset = {**DATASET, "labels": {"background": 0, "lesion": 1}}
    with pytest.raises(UserError, match=f"ill: every voxel of its label file is {value}.*no label 'ignore'"):
        read_cohort(labels, dataset, identifiers=["mask", "ill", "well"])


def test_a_hidden_mask_needs_no_ignore_label(labels: Path) -> None:
    write(labels, "second", lesion=30)
    dataset = {**overruled(second="diseased"), "labels": {"background": 0, "lesion": 1}}
    assert read_cohort(labels, dataset, identifiers=["mask", "second", "well"]).diseased == ["second"]


def test_undeclared_values_are_refused_by_case(labels: Path) -> None:
    write(labels, "odd", ignored=1)
    dataset = {**DATASET, "labels": {"background": 0, "lesion": 1}}
    with pytest.raises(UserError, match=r"odd: its label file holds \[2\]"):
        read_cohort(labels, dataset, identifiers=["mask", "odd", "well"])


@pytest.mark.parametrize(("fill", "shown"), [(0.5, "0.5"), (np.nan, "nan"), (-1, "-1"), (np.inf, "inf")])
def test_values_that_are_no_labels_are_refused(tmp_path: Path, fill: float, shown: str) -> None:
    # Not NIfTI, whose reader in ITK turns NaN and infinity into 0.
    image = sitk.GetImageFromArray(np.full((3, 4, 5), fill, np.float32))
    sitk.WriteImage(image, str(tmp_path / "mask.nrrd"))
    with pytest.raises(UserError, match=rf"mask.nrrd holds the value {shown}"):
        read_cohort(tmp_path, {**DATASET, "file_ending": ".nrrd"})


def test_an_image_in_place_of_a_label_is_refused(labels: Path) -> None:
    write(labels, "mask", 1_000_000, dtype=np.float32)
    with pytest.raises(UserError, match="Is this an image"):
        read_cohort(labels, DATASET)


def test_broken_files_are_named_all_at_once(labels: Path) -> None:
    (labels / "ill.nii.gz").write_bytes((labels / "ill.nii.gz").read_bytes()[:40])
    (labels / "well.nii.gz").write_text("not an image")
    with pytest.raises(UserError, match=r"2 problems") as caught:
        read_cohort(labels, DATASET)
    assert "ill.nii.gz is damaged or incomplete" in str(caught.value)
    assert "well.nii.gz is damaged or incomplete" in str(caught.value)


def test_missing_label_files_and_folders_are_named(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No label file for gone"):
        read_cohort(labels, DATASET, identifiers=["mask", "gone"])
    with pytest.raises(UserError, match="There is no folder"):
        read_cohort(tmp_path / "nowhere", DATASET)
    with pytest.raises(UserError, match=r"holds no file ending in '.nrrd'"):
        read_cohort(labels, {**DATASET, "file_ending": ".nrrd"})


@pytest.mark.parametrize("bad", [{}, {"labels": {"lesion": 1}}, {"labels": {"background": 0, "x": 3, "ignore": 2}}])
def test_bad_label_declarations_are_refused(labels: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"dataset\.json"):
        read_cohort(labels, {"file_ending": ".nii.gz", **bad})


def test_cache_is_used_and_notices_changed_files(labels: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cohort.json"
    read_cohort(labels, DATASET, cache=cache)
    content = json.loads(cache.read_text(encoding="utf-8"))
    content["mask"]["counts"]["1"] = 77
    cache.write_text(json.dumps(content))
    assert read_cohort(labels, DATASET, cache=cache).cases["mask"].lesion_voxels == 77
    os.utime(labels / "mask.nii.gz", ns=(1, 1))
    assert read_cohort(labels, DATASET, cache=cache).cases["mask"].lesion_voxels == 12


@pytest.mark.parametrize("content", ["{ torn", "[]", '{"mask": 3}'])
def test_a_broken_cache_is_made_anew(labels: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "cohort.json"
    cache.write_text(content)
    assert read_cohort(labels, DATASET, cache=cache) == read_cohort(labels, DATASET)
    assert "stamp" in json.loads(cache.read_text(encoding="utf-8"))["mask"]


def test_many_files_are_read_by_several_processes(labels: Path) -> None:
    for number in range(9):
        write(labels, f"well_{number}")
    assert len(read_cohort(labels, DATASET, num_processes=2, progress=True).healthy) == 10


def test_report_counts_names_and_says_what_is_odd(labels: Path) -> None:
    write(labels, "mask", lesion=3)
    for number in range(20):
        write(labels, f"ill_{number:02d}", 2)
    report = read_cohort(labels, DATASET, identifiers=["mask", "well", *(f"ill_{n:02d}" for n in range(20))]).report()
    assert "20 diseased" in report
    assert "ill_00" in report
    assert "ill_15" not in report
    assert "12 more" in report
    assert "ONLY ONE MASK: mask" in report
    assert "very few healthy cases (1)" in report
    assert "its mask is tiny (3 lesion voxels)" in report


def test_report_of_an_unremarkable_cohort_has_no_notes(labels: Path) -> None:
    for number in range(3):
        write(labels, f"ill_{number}", 2)
        write(labels, f"well_{number}")
    write(labels, "second", lesion=30)
    cohort = read_cohort(labels, DATASET)
    cohort = Cohort({name: case for name, case in cohort.cases.items() if name != "partly"})
    assert cohort.remarks() == []
    assert {case.kind for case in cohort.cases.values()} == set(Kind)
