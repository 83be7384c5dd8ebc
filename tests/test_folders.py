"""Folders of CTs become nnU-Net datasets, and datasets are extended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from test_volumes import write_dicom
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.cohort import read_cohort
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, read_grid, read_volume

SHAPE = (6, 9, 8)
UNIT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def ct(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)


def mask(*labels: int) -> np.ndarray[Any, Any]:
    array = np.zeros(SHAPE, np.uint8)
    for number, label in enumerate(labels):
        array[number, 2:4, 2:4] = label
    return array


def save(
    path: Path,
    array: np.ndarray[Any, Any],
    spacing: tuple[float, ...] = (1, 1, 2),
    shift: float = 0,
    direction: tuple[float, ...] = UNIT,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((shift, 0, 0))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path), True)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Input folders with one labelled, two diseased, two healthy cases and a test case, and nnU-Net's folders."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    base = tmp_path / "in"
    save(base / "lab" / "p1.nii.gz", ct(1))
    save(base / "mask" / "p1.nii.gz", mask(1))
    for number in (2, 3):
        save(base / "ill" / f"p{number}.nii.gz", ct(number))
        save(base / "well" / f"h{number}.nii.gz", ct(10 + number))
    save(base / "test" / "t1.nii.gz", ct(20))
    save(base / "testmask" / "t1.nii.gz", mask())
    monkeypatch.chdir(base)
    return base


BASIC = ["--labelled", "lab", "mask", "--diseased", "ill", "--healthy", "well"]


def run(*words: str) -> str:
    """Run the command; what it refuses is raised as by `main`."""
    result = CliRunner().invoke(app, [*words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def convert(*words: str) -> str:
    return run("convert", "folders", "--id", "7", "--name", "Lungs", *words)


def raw(base: Path) -> Path:
    return base.parent / "nnUNet_raw" / "Dataset007_Lungs"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_makes_a_dataset_that_nnunet_accepts(folders: Path) -> None:
    output = convert(*BASIC, "--test", "test", "testmask")
    assert "1 labelled, 2 diseased, 2 healthy, 1 test" in output
    assert "gasnet-nnunet plan -d 7" in output
    dataset = json.loads((raw(folders) / "dataset.json").read_text(encoding="utf-8"))
    assert dataset == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1, "ignore": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    cases = ["h2", "h3", "p1", "p2", "p3"]
    assert listing(raw(folders)) == sorted(
        [
            "dataset.json",
            "conversion_report.html",
            "conversion_report.json",
            *(f"imagesTr/{case}_0000.nii.gz" for case in cases),
            *(f"labelsTr/{case}.nii.gz" for case in cases),
            "imagesTs/t1_0000.nii.gz",
            "labelsTs/t1.nii.gz",
        ]
    )
    verify_dataset_integrity(str(raw(folders)), num_processes=1)
    cohort = read_cohort(raw(folders) / "labelsTr", dataset)
    assert (cohort.labelled, cohort.diseased, cohort.healthy) == (["p1"], ["p2", "p3"], ["h2", "h3"])
    values, grid = read_volume(raw(folders) / "imagesTr" / "p2_0000.nii.gz")
    np.testing.assert_array_equal(values, ct(2))
    assert values.dtype == np.int16
    assert grid.spacing == (1.0, 1.0, 2.0)


def test_report_shows_every_case_and_what_is_odd(folders: Path) -> None:
    save(folders / "well" / "h2.nii.gz", ct(9).clip(0, 255).astype(np.uint8))
    padded = ct(2)
    padded[0] = -2048
    save(folders / "ill" / "p2.nii.gz", padded, direction=(1, 0, 0, 0, 1, 0, 0, 0, -1))
    output = convert(*BASIC, "--test", "test", "testmask")
    assert "conversion_report.html" in output
    report = json.loads((raw(folders) / "conversion_report.json").read_text(encoding="utf-8"))
    assert report["counts"] == {"diseased": 2, "healthy": 2, "labelled": 1, "test": 1}
    cases = {case["case"]: case for case in report["cases"]}
    assert cases["p1"]["spacing"] == [2.0, 1.0, 1.0]
    assert cases["p1"]["size"] == list(SHAPE)
    assert cases["p1"]["lesion_ml"] == {"1": pytest.approx(4 * 2 / 1000)}
    few = "6 slices only"
    assert cases["h3"]["oddities"] == [few]
    assert cases["h2"]["oddities"] == ["8-bit intensities (0 to 255)", few]
    assert cases["p2"]["oddities"] == [
        "z runs downwards (orientation LPI)",
        "padding of -2048 (17% of the voxels)",
        few,
    ]
    page = (raw(folders) / "conversion_report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 + len(cases)
    assert "://" not in page
    assert all(case in page for case in cases)


@pytest.mark.parametrize("words", [["--test", "test"], ["--test", "test", "testmask"]])
def test_test_takes_one_or_two_folders_anywhere(folders: Path, words: list[str]) -> None:
    convert(*words, *BASIC)
    assert (raw(folders) / "imagesTs" / "t1_0000.nii.gz").is_file()
    assert (raw(folders) / "labelsTs").exists() == (len(words) == 3)


def test_test_refuses_three_folders(folders: Path) -> None:
    with pytest.raises(UserError, match="--test takes"):
        convert(*BASIC, "--test", "test", "testmask", "well")


def test_diseased_may_be_left_out(folders: Path) -> None:
    convert("--labelled", "lab", "mask", "--healthy", "well")
    assert json.loads((raw(folders) / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 3


def test_other_formats_names_and_companions(folders: Path) -> None:
    save(folders / "ill" / "Prüfung, 4.nrrd", ct(4))
    save(folders / "ill" / "p5.mhd", ct(5))
    (folders / "ill" / "notes.txt").write_text("nothing")
    (folders / "ill" / ".DS_Store").write_text("nothing")
    write_dicom(folders / "ill" / "p6", ct(6), Grid(SHAPE[::-1], (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), UNIT))
    convert(*BASIC)
    for case, seed in (("Pr_fung_4", 4), ("p5", 5), ("p6", 6)):
        np.testing.assert_array_equal(read_volume(raw(folders) / "imagesTr" / f"{case}_0000.nii.gz")[0], ct(seed))


def test_nnunet_names_lose_their_channel(folders: Path) -> None:
    (folders / "lab" / "p1.nii.gz").rename(folders / "lab" / "p1_0000.nii.gz")
    save(folders / "ill" / "p_0000.nii.gz", ct(4))
    convert(*BASIC)
    names = listing(raw(folders) / "imagesTr")
    assert "p1_0000.nii.gz" in names
    assert "p_0000_0000.nii.gz" in names, "a number of a case, because the other files have none"


def test_rescale_maps_to_hounsfield_units(folders: Path) -> None:
    rng = np.random.default_rng(0)
    for path in [*folders.glob("lab/*"), *folders.glob("ill/*"), *folders.glob("well/*")]:
        save(path, rng.integers(0, 256, SHAPE).astype(np.uint8))
    path = folders / "ill" / "p2.nii.gz"
    expected = read_volume(path)[0] / 255 * 1500 - 1250
    convert(*BASIC, "--rescale", "0", "255", "-1250", "250")
    stored = read_volume(raw(folders) / "imagesTr" / "p2_0000.nii.gz")[0]
    np.testing.assert_allclose(stored, expected, atol=1e-3)
    save(path, ct(2))
    with pytest.raises(UserError, match=r"p2.nii.gz holds values from -?\d+ to \d+, outside the 0 to 255"):
        run("convert", "folders", "--id", "8", "--name", "X", *BASIC, "--rescale", "0", "255", "-1250", "250")


def test_values_that_are_no_hounsfield_units_are_remarked(folders: Path) -> None:
    save(folders / "ill" / "p2.nii.gz", np.abs(ct(2)))
    output = convert(*BASIC)
    assert "1 of 5 images are hardly in Hounsfield units" in output
    assert "p2" in output


def test_fractions_are_kept(folders: Path) -> None:
    save(folders / "ill" / "p2.nii.gz", ct(2) + np.float64(0.25))
    convert(*BASIC)
    values = read_volume(raw(folders) / "imagesTr" / "p2_0000.nii.gz")[0]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, ct(2) + 0.25)


def test_several_classes_are_kept(folders: Path) -> None:
    save(folders / "mask" / "p1.nii.gz", mask(1, 2))
    convert(*BASIC)
    labels = json.loads((raw(folders) / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert labels == {"background": 0, "lesion_1": 1, "lesion_2": 2, "ignore": 3}
    assert read_volume(raw(folders) / "labelsTr" / "p2.nii.gz")[0].max() == 3


def test_a_single_other_value_becomes_one(folders: Path) -> None:
    save(folders / "mask" / "p1.nii.gz", mask(255))
    assert "value 255 was stored as label 1" in convert(*BASIC)
    np.testing.assert_array_equal(read_volume(raw(folders) / "labelsTr" / "p1.nii.gz")[0], mask(1))


def test_lung_masks_are_taken_along(folders: Path) -> None:
    save(folders / "lungs" / "p2.nii.gz", mask(1, 2))
    convert(*BASIC, "--lungs", "lungs")
    np.testing.assert_array_equal(read_volume(raw(folders) / "lungsTr" / "p2.nii.gz")[0], mask(1, 1))
    save(folders / "lungs" / "who.nii.gz", mask(1))
    with pytest.raises(UserError, match="no image is named like who"):
        convert(*BASIC, "--lungs", "lungs", "--overwrite")


def test_labels_take_over_the_images_grid(folders: Path) -> None:
    save(folders / "mask" / "p1.nii.gz", mask(1), spacing=(1.00001, 1, 2), shift=1e-4)
    convert(*BASIC)
    folder = raw(folders)
    assert read_grid(folder / "labelsTr" / "p1.nii.gz") == read_grid(folder / "imagesTr" / "p1_0000.nii.gz")


def spoil_truncated(base: Path) -> None:
    path = base / "ill" / "p2.nii.gz"
    path.write_bytes(path.read_bytes()[:300])


def spoil_nan(base: Path) -> None:
    values = ct(2).astype(np.float32)
    values[0, 0, 0] = np.nan
    save(base / "ill" / "p2.nii.gz", values)


def spoil_half(base: Path) -> None:
    save(base / "mask" / "p1.nii.gz", mask(1) * np.float32(0.5))


def spoil_two_names(base: Path) -> None:
    save(base / "well" / "p2.nii.gz", ct(30))


def spoil_copy(base: Path) -> None:
    save(base / "well" / "h9.nii.gz", ct(2).astype(np.float32))


def spoil_two_files(base: Path) -> None:
    save(base / "ill" / "p2.nrrd", ct(31))


def spoil_empty_folder(base: Path) -> None:
    for path in (base / "well").iterdir():
        path.unlink()


def spoil_loose_slices(base: Path) -> None:
    write_dicom(base / "x", ct(3), Grid(SHAPE[::-1], (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), UNIT))
    for path in (base / "x").iterdir():
        path.rename(base / "well" / path.name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncated, r"--diseased: .*p2.nii.gz is damaged or incomplete"),
        (lambda base: (base / "ill" / "p2.nii.gz").write_text("text"), r"p2.nii.gz cannot be read as an image"),
        (lambda base: (base / "ill" / "p2.jpeg").write_text("text"), r"both the case 'p2'"),
        (lambda base: (base / "ill" / "folder").mkdir(), r"folder holds no DICOM series"),
        (spoil_nan, r"p2.nii.gz has 1 voxels that are NaN"),
        (lambda base: save(base / "ill" / "p2.nii.gz", np.full(SHAPE, -1000, np.int16)), r"-1000 throughout"),
        (lambda base: save(base / "ill" / "p2.nii.gz", ct(2)[:1]), r"a volume of three dimensions"),
        (lambda base: save(base / "mask" / "p1.nii.gz", mask(1)[:5]), r"size 8 x 9 x 5 instead of 8 x 9 x 6"),
        (lambda base: save(base / "mask" / "p1.nii.gz", mask(1), spacing=(1, 1, 3)), r"spacing 1 x 1 x 3 instead of"),
        (lambda base: save(base / "mask" / "p1.nii.gz", mask(1), shift=5), r"5 mm apart"),
        (lambda base: save(base / "mask" / "p1.nii.gz", mask()), r"mask/p1.nii.gz is empty"),
        (lambda base: save(base / "mask" / "p1.nii.gz", mask() + 1), r"covers every voxel"),
        (spoil_half, r"holds the value 0.5"),
        (lambda base: save(base / "mask" / "p1.nii.gz", mask(1, 3)), r"lesion values 1 \(e.g. in .*\), 3"),
        (lambda base: save(base / "mask" / "p1.nii.gz", ct(1).astype(np.int16)), r"mask .*p1.nii.gz holds the value -"),
        (lambda base: save(base / "mask" / "p9.nii.gz", mask(1)), r"--labelled: mask without an image: p9"),
        (lambda base: save(base / "lab" / "p9.nii.gz", ct(9)), r"--labelled: image without a mask: p9"),
        (spoil_two_names, r"'p2' is both under --diseased .* and under --healthy"),
        (spoil_copy, r"p2.nii.gz \(--diseased\) and .*h9.nii.gz \(--healthy\) are the same scan"),
        (spoil_two_files, r"p2.nii.gz and p2.nrrd in .* are both the case 'p2'"),
        (spoil_empty_folder, r"--healthy: well holds no images"),
        (spoil_loose_slices, r"well holds DICOM slices"),
    ],
)
def test_bad_input_is_refused_and_no_dataset_is_made(folders: Path, spoil: Any, message: str) -> None:
    spoil(folders)
    with pytest.raises(UserError, match=message):
        convert(*BASIC)
    assert not list((folders.parent / "nnUNet_raw").glob("Dataset*"))


def test_conversion_that_stopped_half_way_goes_on_and_ends_the_same(folders: Path) -> None:
    convert(*BASIC, "--num-processes", "1")
    undisturbed = {name: (raw(folders) / name).read_bytes() for name in listing(raw(folders))}
    shutil.rmtree(raw(folders))
    spoil_truncated(folders)
    save(folders / "well" / "h9.nii.gz", ct(90))
    with pytest.raises(UserError, match="damaged"):
        convert(*BASIC, "--num-processes", "1")
    unfinished = raw(folders).with_name(".Dataset007_Lungs.unfinished")
    kept = unfinished / "imagesTr" / "h2_0000.nii.gz"
    written = kept.stat().st_mtime_ns
    (folders / "well" / "h9.nii.gz").unlink()
    save(folders / "ill" / "p2.nii.gz", ct(2))
    convert(*BASIC, "--num-processes", "1")
    assert (raw(folders) / "imagesTr" / "h2_0000.nii.gz").stat().st_mtime_ns == written, "not written again"
    assert not unfinished.exists()
    assert {name: (raw(folders) / name).read_bytes() for name in listing(raw(folders))} == undisturbed


def test_what_an_earlier_try_wrote_and_this_one_does_not_is_gone(folders: Path) -> None:
    save(folders / "lungs" / "p3.nii.gz", mask(1, 2))
    spoil_truncated(folders)
    with pytest.raises(UserError, match="damaged"):
        convert(*BASIC, "--lungs", "lungs", "--test", "test", "testmask")
    save(folders / "ill" / "p2.nii.gz", ct(2))
    convert(*BASIC, "--test", "test")
    assert not (raw(folders) / "lungsTr").exists()
    assert not (raw(folders) / "labelsTs").exists()


def test_lost_file_of_an_earlier_try_is_made_again(folders: Path) -> None:
    spoil_truncated(folders)
    with pytest.raises(UserError, match="damaged"):
        convert(*BASIC)
    (raw(folders).with_name(".Dataset007_Lungs.unfinished") / "imagesTr" / "h2_0000.nii.gz").unlink()
    save(folders / "ill" / "p2.nii.gz", ct(2))
    convert(*BASIC)
    assert (raw(folders) / "imagesTr" / "h2_0000.nii.gz").is_file()


def test_dataset_is_not_replaced_by_what_lies_in_it(folders: Path) -> None:
    convert(*BASIC)
    before = listing(raw(folders))
    images, labels = (str(raw(folders) / name) for name in ("imagesTr", "labelsTr"))
    with pytest.raises(UserError, match=r"lies in .*Dataset007_Lungs, which would be replaced"):
        convert("--labelled", images, labels, "--healthy", "well", "--overwrite")
    assert listing(raw(folders)) == before


def test_changed_file_is_converted_again_when_going_on(folders: Path) -> None:
    spoil_truncated(folders)
    with pytest.raises(UserError, match="damaged"):
        convert(*BASIC)
    save(folders / "ill" / "p2.nii.gz", ct(2))
    save(folders / "well" / "h2.nii.gz", ct(77))
    convert(*BASIC)
    np.testing.assert_array_equal(read_volume(raw(folders) / "imagesTr" / "h2_0000.nii.gz")[0], ct(77))


def test_problems_are_told_all_at_once(folders: Path) -> None:
    spoil_truncated(folders)
    save(folders / "mask" / "p1.nii.gz", mask())
    (folders / "well" / "h2.nii.gz").write_text("text")
    with pytest.raises(UserError, match="3 problems") as caught:
        convert(*BASIC)
    for name in ("ill/p2.nii.gz", "mask/p1.nii.gz", "well/h2.nii.gz"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labelled", "lab", "nowhere", "--healthy", "well"], "there is no nowhere"),
        (["--labelled", "lab", "mask", "--healthy", "well/h2.nii.gz"], "is no folder"),
        ([*BASIC, "--rescale", "255", "0", "-1250", "250"], "both ranges rising"),
        ([*BASIC, "--id", "1000"], "from 1 to 999"),
        ([*BASIC, "--name", "a b"], "letters, digits"),
    ],
)
def test_bad_options_are_refused(folders: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(*words)


def test_unset_folder_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        convert(*BASIC)


def test_existing_datasets_are_kept_unless_told_otherwise(folders: Path) -> None:
    convert(*BASIC)
    before = listing(raw(folders))
    with pytest.raises(UserError, match="Dataset007_Lungs exists already"):
        convert(*BASIC)
    with pytest.raises(UserError, match="The id 7 belongs to Dataset007_Lungs"):
        run("convert", "folders", "--id", "7", "--name", "Other", *BASIC, "--overwrite")
    spoil_truncated(folders)
    with pytest.raises(UserError, match="damaged"):
        convert(*BASIC, "--overwrite")
    assert listing(raw(folders)) == before
    (folders / "ill" / "p2.nii.gz").unlink()
    (folders.parent / "nnUNet_preprocessed" / "Dataset007_Lungs").mkdir()
    output = convert(*BASIC, "--overwrite")
    assert "was made from the old data" in output
    assert "imagesTr/p2_0000.nii.gz" not in listing(raw(folders))
    assert [path.name for path in raw(folders).parent.iterdir()] == ["Dataset007_Lungs"]


@pytest.mark.parametrize("command", ["convert", "extend"])
def test_a_full_disk_loses_nothing(folders: Path, command: str) -> None:
    convert(*BASIC)
    before = {name: (raw(folders) / name).read_bytes() for name in listing(raw(folders))}
    save(folders / "new" / "n1.nii.gz", ct(40))
    words = {
        "convert": ["convert", "folders", "--id", "7", "--name", "Lungs", *BASIC, "--overwrite"],
        "extend": ["extend", "-d", "7", "--diseased", "new"],
    }[command]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); "
        "from gasnet_nnunet.cli import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 1
    assert "Is the disk full?" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {name: (raw(folders) / name).read_bytes() for name in listing(raw(folders))} == before
    assert [path.name for path in raw(folders).parent.glob("[!.]*")] == ["Dataset007_Lungs"]


@pytest.fixture
def plain(folders: Path) -> Path:
    """An nnU-Net dataset of masks alone, in another file format."""
    dataset = raw(folders)
    for case, seed in (("a", 50), ("b", 51)):
        save(dataset / "imagesTr" / f"{case}_0000.nrrd", ct(seed))
        save(dataset / "labelsTr" / f"{case}.nrrd", mask(1, 2))
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
        "regions_class_order": [1, 2],
        "numTraining": 2,
        "file_ending": ".nrrd",
        "licence": "mine",
    }
    (dataset / "dataset.json").write_text(json.dumps(content))
    return dataset


def test_extend_adds_cases_and_the_ignore_label(plain: Path) -> None:
    output = run("extend", "-d", "7", "--diseased", "ill", "--healthy", "well")
    assert "Added 2 diseased and 2 healthy cases" in output
    assert "the label 'ignore' (3) was added" in output
    assert "gasnet-nnunet plan -d 7" in output
    dataset = json.loads((plain / "dataset.json").read_text(encoding="utf-8"))
    assert dataset["labels"] == {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    assert dataset["numTraining"] == 6
    assert dataset["licence"] == "mine"
    assert dataset["regions_class_order"] == [1, 2]
    verify_dataset_integrity(str(plain), num_processes=1)
    cohort = read_cohort(plain / "labelsTr", dataset)
    assert (cohort.labelled, cohort.diseased, cohort.healthy) == (["a", "b"], ["p2", "p3"], ["h2", "h3"])
    assert {path.name for path in plain.iterdir()} == {"imagesTr", "labelsTr", "dataset.json"}


def test_extend_with_healthy_cases_needs_no_ignore_label(plain: Path) -> None:
    run("extend", "-d", "Dataset007_Lungs", "--healthy", "well")
    assert "ignore" not in json.loads((plain / "dataset.json").read_text(encoding="utf-8"))["labels"]


def test_extend_tells_what_is_stale(plain: Path) -> None:
    (plain.parents[1] / "nnUNet_preprocessed" / plain.name).mkdir()
    assert "does not have the new cases yet" in run("extend", "-d", "7", "--healthy", "well")


def test_extend_takes_several_channels(plain: Path, folders: Path) -> None:
    dataset = json.loads((plain / "dataset.json").read_text(encoding="utf-8"))
    dataset["channel_names"] = {"0": "T1", "1": "T2"}
    (plain / "dataset.json").write_text(json.dumps(dataset))
    for case in ("a", "b"):
        save(plain / "imagesTr" / f"{case}_0001.nrrd", ct(60))
    save(folders / "two" / "n_0000.nii.gz", ct(61))
    with pytest.raises(UserError, match="n in two has the channels _0000; the dataset has 2"):
        run("extend", "-d", "7", "--healthy", "two")
    save(folders / "two" / "n_0001.nii.gz", ct(62), spacing=(1, 1, 4))
    with pytest.raises(UserError, match=r"n_0001.nii.gz does not lie on .*n_0000.nii.gz: spacing"):
        run("extend", "-d", "7", "--healthy", "two")
    save(folders / "two" / "n_0001.nii.gz", ct(62))
    run("extend", "-d", "7", "--healthy", "two")
    np.testing.assert_array_equal(read_volume(plain / "imagesTr" / "n_0001.nrrd")[0], ct(62))


def test_extend_keeps_explicit_file_lists(plain: Path) -> None:
    dataset = json.loads((plain / "dataset.json").read_text(encoding="utf-8"))
    dataset["dataset"] = {
        case: {"images": [f"imagesTr/{case}_0000.nrrd"], "label": f"labelsTr/{case}.nrrd"} for case in ("a", "b")
    }
    (plain / "dataset.json").write_text(json.dumps(dataset))
    run("extend", "-d", "7", "--healthy", "well")
    after = json.loads((plain / "dataset.json").read_text(encoding="utf-8"))
    assert after["dataset"]["a"] == dataset["dataset"]["a"]
    assert after["dataset"]["h2"] == {"images": ["imagesTr/h2_0000.nrrd"], "label": "labelsTr/h2.nrrd"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to add"),
        (["--healthy", "well", "--diseased", "well"], "'h2' is both under --diseased"),
        (["--healthy", "lab2"], "has cases of these names already: a"),
        (["--healthy", "broken"], "damaged"),
        (["--healthy", "stray"], "has cases of these names already: s"),
    ],
)
def test_extend_refuses_and_changes_nothing(plain: Path, folders: Path, words: list[str], message: str) -> None:
    save(folders / "lab2" / "a.nii.gz", ct(70))
    save(folders / "stray" / "s.nii.gz", ct(71))
    save(plain / "labelsTr" / "s.nrrd", mask(1))
    save(folders / "broken" / "x.nii.gz", ct(72))
    (folders / "broken" / "x.nii.gz").write_bytes((folders / "broken" / "x.nii.gz").read_bytes()[:300])
    before = {name: (plain / name).read_bytes() for name in listing(plain)}
    with pytest.raises(UserError, match=message):
        run("extend", "-d", "7", *words)
    assert {name: (plain / name).read_bytes() for name in listing(plain)} == before


def test_extend_rescales_and_refuses_other_formats(plain: Path, folders: Path) -> None:
    save(folders / "grey" / "g.nii.gz", ct(80).clip(0, 255).astype(np.uint8))
    run("extend", "-d", "7", "--healthy", "grey", "--rescale", "0", "255", "-1250", "250")
    assert read_volume(plain / "imagesTr" / "g_0000.nrrd")[0].min() == -1250
    dataset = {
        **json.loads((plain / "dataset.json").read_text(encoding="utf-8")),
        "file_ending": ".tif",
        "numTraining": 1,
    }
    (plain / "imagesTr" / "z_0000.tif").write_text("")
    (plain / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=r"consists of .tif files"):
        run("extend", "-d", "7", "--healthy", "well")
