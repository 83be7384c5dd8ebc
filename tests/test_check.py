"""`gasnet-nnunet check` finds what would stop a training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.cohort import read_cohort
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.splits import make_splits, write_splits


def save(path: Path, array: np.ndarray[Any, Any], spacing: tuple[float, float, float] = (1.0, 1.0, 2.0)) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of two masks, three diseased and three healthy cases."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    folder = tmp_path / "nnUNet_raw" / "Dataset007_Lungs"
    mask = np.zeros((6, 9, 8), np.uint8)
    mask[2, 2:6, 2:6] = 1
    labels = {"m1": mask, "m2": mask, **{f"d{n}": mask * 0 + 2 for n in "123"}, **{f"h{n}": mask * 0 for n in "123"}}
    for number, (case, label) in enumerate(labels.items()):
        image = np.random.default_rng(number).integers(-1000, 400, mask.shape).astype(np.int16)
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", image)
        save(folder / "labelsTr" / f"{case}.nii.gz", label)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1, "ignore": 2},
        "numTraining": 8,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def check(*words: str) -> str:
    result = CliRunner().invoke(app, ["check", "-d", "7", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        result.exception.add_note(result.output) if hasattr(result.exception, "add_note") else None
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def splits_of(dataset: Path) -> Path:
    folder = dataset.parents[1] / "nnUNet_preprocessed" / dataset.name
    folder.mkdir(exist_ok=True)
    return folder / "splits_final.json"


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_a_sound_dataset_passes(dataset: Path, words: list[str]) -> None:
    output = check(*words)
    assert "2 voxel-labelled (a mask with lesion): m1, m2" in output
    assert "8 x 9 x 6" in output
    assert "no splits_final.json yet" in output
    assert "No problems found" in output


def shorten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(0.9 * len(content))])


def rewrite(dataset: Path, **change: Any) -> None:
    path = dataset / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shorten(d / "imagesTr" / "h1_0000.nii.gz"), r"h1_0000.nii.gz is damaged or incomplete"),
        (lambda d: shorten(d / "labelsTr" / "d2.nii.gz"), r"d2.nii.gz is damaged or incomplete"),
        (lambda d: (d / "labelsTr" / "h1.nii.gz").unlink(), "No label file for h1"),
        (lambda d: rewrite(d, labels={"background": 0, "lesion": 1}), "no label 'ignore'"),
        (lambda d: rewrite(d, numTraining=9), "numTraining 9, but there are 8 cases"),
        (lambda d: rewrite(d, gasnet={"cohort": {"h1": "labelled"}}), "h1: dataset.json calls it labelled"),
        (lambda d: save(d / "labelsTr" / "m1.nii.gz", np.ones((6, 9, 7), np.uint8)), "size 7 x 9 x 6 instead of"),
        (lambda d: save(d / "imagesTr" / "h1_0000.nii.gz", np.zeros((6, 9, 8), np.int16)), "0 throughout"),
        (lambda d: shutil.rmtree(d), "Expected one dataset of id 7, found none"),
    ],
)
def test_problems_end_with_an_error(dataset: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(dataset)
    with pytest.raises(UserError, match=message):
        check()


def test_problems_of_all_kinds_are_told_together(dataset: Path) -> None:
    shorten(dataset / "imagesTr" / "h1_0000.nii.gz")
    shorten(dataset / "labelsTr" / "d2.nii.gz")
    splits_of(dataset).write_text("[]")
    with pytest.raises(UserError, match="2 problems") as caught:
        check()
    assert "h1_0000" in str(caught.value)
    assert "d2.nii.gz" in str(caught.value)


def test_splits_are_checked(dataset: Path) -> None:
    path = splits_of(dataset)
    content = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    write_splits(path, make_splits(read_cohort(dataset / "labelsTr", content)))
    assert "2 folds, all fit to train" in check("--quick")
    path.write_text(json.dumps([{"train": ["d1", "h1"], "val": ["m1"]}]))
    with pytest.raises(UserError, match="no case with a mask in 'train'"):
        check("--quick")


def test_oddities_are_remarked_without_failing(dataset: Path) -> None:
    for case in ("h1", "h2", "h3"):
        label = np.zeros((6, 9, 8), np.uint8)
        image = np.random.default_rng(ord(case[1])).integers(-1000, 400, label.shape).astype(np.int16)
        save(dataset / "imagesTr" / f"{case}_0000.nii.gz", image, (1, 1, 5))
        save(dataset / "labelsTr" / f"{case}.nii.gz", label, (1, 1, 5))
    shutil.copy(dataset / "labelsTr" / "h1.nii.gz", dataset / "labelsTr" / "nobody.nii.gz")
    splits_of(dataset).with_name("dataset.json").write_text("{}")
    output = check()
    assert "the slice distance differs between diseased (2 mm) and healthy scans (5 mm" in output
    assert "labels without an image in imagesTr, not used: nobody.nii.gz" in output
    assert "differs from the one in nnUNet_raw" in output
    assert "No problems found" in output


def test_preprocessed_data_are_enough(dataset: Path) -> None:
    preprocessed = splits_of(dataset).parent
    shutil.copytree(dataset / "labelsTr", preprocessed / "gt_segmentations")
    shutil.copy(dataset / "dataset.json", preprocessed)
    shutil.rmtree(dataset)
    output = check()
    assert "only what was preprocessed is checked" in output
    assert "3 healthy" in output
    shorten(preprocessed / "gt_segmentations" / "m1.nii.gz")
    with pytest.raises(UserError, match=r"m1.nii.gz is damaged"):
        check()
