"""The public COVID-19 datasets, in small trees of their published names, become nnU-Net datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from gasnet_nnunet.dataset_conversion.public import Roles, assign_roles
from gasnet_nnunet.dataset_conversion.sources import Source
from numpy.typing import NDArray
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.cohort import Kind
from gasnet_nnunet.dataset_conversion import covid19_ct_seg
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import read_volume

SHAPE = (6, 9, 8)
RADIOPAEDIA = (
    *("10_85902_1", "10_85902_3", "14_85914_0", "27_86410_0", "29_86490_1"),
    *("29_86491_1", "36_86526_0", "40_86625_0", "4_85506_1", "7_85703_0"),
)
CASES = [f"coronacases_{number:03d}" for number in range(1, 11)] + [f"radiopaedia_{name}" for name in RADIOPAEDIA]


def ct(seed: int, low: int = -1000, high: int = 400) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(low, high, SHAPE).astype(np.int16)


def mask(*labels: int) -> NDArray[np.uint8]:
    """Each label in a slice of its own."""
    array = np.zeros(SHAPE, np.uint8)
    for number, label in enumerate(labels):
        array[number, 2:4, 2:4] = label
    return array


def save(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 2.0))
    sitk.WriteImage(image, str(path), path.name.endswith("gz"))


def run(*words: str) -> str:
    """Run the command; what it refuses is raised as by `main`."""
    result = CliRunner().invoke(app, [*words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """Empty nnUNet_raw."""
    return nnunet_folders / "raw"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the tests make a published tree."""
    return tmp_path / "download"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def values(path: Path) -> NDArray[Any]:
    return read_volume(path)[0]


def details(dataset: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["gasnet"][
        "cases"
    ]
    return content


# COVID-19-CT-Seg


def covid_arrays(number: int, case: str) -> dict[str, NDArray[Any]]:
    image = ct(number) if case.startswith("corona") else ct(number, 0, 256).astype(np.uint8)
    return {"ct": image, "infection": mask(0, 1), "lung": mask(1, 2, 1), "both": mask(1, 3, 2)}


def zenodo(root: Path, cases: list[str] | None = None) -> Path:
    folders = {"ct": "COVID-19-CT-Seg_20cases", "infection": "Infection_Mask", "lung": "Lung_Mask"}
    folders["both"] = "Lung_and_Infection_Mask"
    for number, case in enumerate(cases or CASES):
        for what, array in covid_arrays(number, case).items():
            save(root / folders[what] / f"{case}.nii.gz", array)
    return root


def kaggle(root: Path) -> Path:
    folders = {"ct": "ct_scans", "infection": "infection_mask", "lung": "lung_mask", "both": "lung_and_infection_mask"}
    for number, case in enumerate(CASES):
        for what, array in covid_arrays(number, case).items():
            name = case
            if what == "ct":
                name = name.replace("coronacases_", "coronacases_org_")
                # Two are named in their own way.
                name = name.replace("_007", "_case007").replace("_010", "_case010")
                if name.startswith("radio"):
                    name = name.replace("radiopaedia_", "radiopaedia_org_covid-19-pneumonia-") + "-dcm"
            # Downloaded one by one, each file arrives in a folder of its name.
            folder = root / folders[what] / f"{name}.nii" if number == 3 else root / folders[what]
            save(folder / f"{name}.nii", array)
    (root / "metadata.csv").write_text("ct_scan,lung_mask\n")
    (root / "ct_scans" / "._coronacases_org_001.nii").write_text("left by macOS")
    return root


@pytest.mark.parametrize("published", [zenodo, kaggle])
def test_covid19_ct_seg_as_published(raw: Path, root: Path, published: Any) -> None:
    published(root)
    words = ["--labelled", "coronacases_001", "radiopaedia_4_85506_1", "--test", "radiopaedia_7_85703_0"]
    output = run("convert", "covid19-ct-seg", "--id", "501", "--name", "A", "--in", str(root), *words)
    assert "2 labelled, 17 diseased, 0 healthy, 1 test" in output
    assert "10 radiopaedia cases (subset 2) are published in grey levels and were mapped from 0..255" in output
    assert "gasnet-nnunet extend -d 501 --healthy FOLDER" in output
    assert "the published dataset has" not in output
    dataset = raw / "Dataset501_A"
    assert names(dataset / "imagesTr") == sorted(f"{case}_0000.nii.gz" for case in CASES[:-1])
    assert len(names(dataset / "hiddenTr")) == 17
    for number in (0, 3, 18):
        image = values(dataset / "imagesTr" / f"{CASES[number]}_0000.nii.gz")
        expected = covid_arrays(number, CASES[number])["ct"].astype(float)
        np.testing.assert_allclose(image, expected / 255 * 1500 - 1250 if number == 18 else expected, atol=1e-3)
    np.testing.assert_array_equal(values(dataset / "labelsTr" / "coronacases_001.nii.gz"), mask(0, 1))
    np.testing.assert_array_equal(values(dataset / "labelsTr" / "coronacases_002.nii.gz"), np.full(SHAPE, 2))
    np.testing.assert_array_equal(values(dataset / "hiddenTr" / "coronacases_002.nii.gz"), mask(0, 1))
    np.testing.assert_array_equal(values(dataset / "lungsTr" / "coronacases_002.nii.gz"), mask(1, 1, 1))
    np.testing.assert_array_equal(values(dataset / "labelsTs" / "radiopaedia_7_85703_0.nii.gz"), mask(0, 1))
    assert details(dataset)["coronacases_010"] == {"subset": 1, "patient": "coronacases_010"}
    assert details(dataset)["radiopaedia_7_85703_0"] == {"subset": 2, "patient": "radiopaedia_7"}
    assert details(dataset).keys() == set(CASES)
    report = json.loads((dataset / "conversion_report.json").read_text(encoding="utf-8"))
    assert any("mapped from 0..255" in remark for remark in report["remarks"])


def test_infection_is_read_from_the_masks_of_both_if_there_are_no_others(raw: Path, root: Path) -> None:
    zenodo(root, ["coronacases_001", "coronacases_002"])
    shutil.rmtree(root / "Infection_Mask")
    shutil.rmtree(root / "Lung_Mask")
    output = run("convert", "covid19-ct-seg", "--id", "501", "--name", "A", "--in", str(root))
    assert "the published dataset has 20 cases; here are 2." in output
    np.testing.assert_array_equal(values(raw / "Dataset501_A" / "labelsTr" / "coronacases_001.nii.gz"), mask(0, 1))
    np.testing.assert_array_equal(values(raw / "Dataset501_A" / "lungsTr" / "coronacases_001.nii.gz"), mask(1, 1, 1))


def test_scans_of_one_patient_are_not_torn_apart(raw: Path, root: Path) -> None:
    zenodo(root)
    with pytest.raises(UserError, match="The patient 'radiopaedia_10' is both in training"):
        run(
            "convert",
            "covid19-ct-seg",
            "--id",
            "1",
            "--name",
            "A",
            "--in",
            str(root),
            "--test",
            "radiopaedia_10_85902_3",
        )
    assert names(raw) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("grey", r"radiopaedia_7_85703_0.nii.gz holds values from -?\d+ to \d+, outside the 0 to 255"),
        ("stranger", r"notes.nii.gz is none of the dataset's files; expected coronacases_001"),
        ("twice", r"coronacases_001.nii and .*coronacases_001.nii.gz are both the case coronacases_001"),
        ("mask", r"image without a mask: coronacases_002"),
        ("image", r"mask without an image: coronacases_002"),
        ("folder", r"has no folder COVID-19-CT-Seg_20cases or ct_scans; it holds Infection_Mask"),
        ("archive", r"there is no .*nowhere"),
    ],
)
def test_covid19_ct_seg_refuses(raw: Path, root: Path, spoil: str, message: str) -> None:
    zenodo(root, ["coronacases_001", "coronacases_002", "radiopaedia_7_85703_0"])
    images, masks = root / "COVID-19-CT-Seg_20cases", root / "Infection_Mask"
    match spoil:
        case "grey":
            save(images / "radiopaedia_7_85703_0.nii.gz", ct(7))
        case "stranger":
            save(images / "notes.nii.gz", ct(7))
        case "twice":
            save(images / "coronacases_001.nii", ct(7))
        case "mask":
            (masks / "coronacases_002.nii.gz").unlink()
        case "image":
            (images / "coronacases_002.nii.gz").unlink()
        case "folder":
            shutil.rmtree(images)
        case "archive":
            root = root / "nowhere"
    with pytest.raises(UserError, match=message):
        run("convert", "covid19-ct-seg", "--id", "501", "--name", "A", "--in", str(root))
    assert not (raw / "Dataset501_A").exists()


# Whose masks are kept


def sources() -> list[Source]:
    """Eight cases with masks, of which d and e are one patient's, and one healthy case."""
    cases = [Source(name, Kind.LABELLED, (Path(name),), Path("mask")) for name in "abcfgh"]
    cases += [Source(name, Kind.LABELLED, (Path(name),), Path("mask"), patient="p") for name in "de"]
    return [*cases, Source("well", Kind.HEALTHY, (Path("well"),))]


def chosen(roles: Roles) -> tuple[set[str], set[str]]:
    """Labelled and test cases."""
    assigned = assign_roles(sources(), roles)
    assert all((source.kind is Kind.HEALTHY) == (source.case == "well") for source in assigned)
    labelled = {source.case for source in assigned if source.kind is Kind.LABELLED}
    return labelled, {source.case for source in assigned if source.kind is None}


def test_all_masks_are_kept_unless_told_otherwise() -> None:
    assert chosen(Roles()) == (set("abcdefgh"), set())
    assert chosen(Roles(test=("a",))) == (set("bcdefgh"), {"a"})
    assert chosen(Roles(labelled=("a", "b"), test=("c",))) == ({"a", "b"}, {"c"})


def test_drawn_cases_follow_the_seed_and_fewer_are_among_more() -> None:
    draws = {frozenset(chosen(Roles(labelled=2, seed=seed))[0]) for seed in range(10)}
    assert len(draws) > 3
    for seed in range(5):
        one, _ = chosen(Roles(labelled=1, seed=seed))
        three, test = chosen(Roles(labelled=3, test=2, seed=seed))
        assert one == chosen(Roles(labelled=1, seed=seed))[0]
        assert (len(one), len(three), len(test)) == (1, 3, 2)
        assert not three & test
        assert one <= chosen(Roles(labelled=3, seed=seed))[0]
        assert ("d" in test) == ("e" in test), "scans of one patient"
        assert chosen(Roles(labelled=("d",), test=2, seed=seed))[0] == {"d"}
        assert not chosen(Roles(labelled=("d",), test=2, seed=seed))[1] & set("de")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (Roles(labelled=9), "--labelled 9: there are 8 cases with masks"),
        (Roles(labelled=0), "at least one must be labelled"),
        (Roles(labelled=("x",)), "--labelled: there is no case with a mask named x; there are a, b, c"),
        (Roles(labelled=("well",)), "there is no case with a mask named well"),
        (Roles(test=("x",)), "--test: there is no case named x"),
        (Roles(labelled=("a",), test=("a",)), "a is named both with --labelled and with --test"),
        (Roles(labelled=("a",), test=8), "--test 8: only 7 cases"),
        (Roles(test=tuple("abcdefgh")), "No case would keep its mask"),
    ],
)
def test_impossible_roles_are_refused(roles: Roles, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assign_roles(sources(), roles)


def test_parsing_tells_numbers_from_cases() -> None:
    assert Roles.parse(None, None, 3) == Roles(None, (), 3)
    assert Roles.parse(["4"], ["2"], 0) == Roles(4, 2)
    assert Roles.parse(["medseg_4"], ["study_0255", "study_0256"], 0) == Roles(
        ("medseg_4",), ("study_0255", "study_0256")
    )


# MedSeg


def medseg(root: Path, *labels: int) -> Path:
    for number in range(1, 10):
        save(root / "rp_im" / f"{number}.nii.gz", ct(number))
        save(root / "rp_msk" / f"{number}.nii.gz", mask(*labels))
        save(root / "rp_lung_msk" / f"{number}.nii.gz", mask(1, 2))
    return root


def test_medseg_makes_one_class_of_ground_glass_and_consolidation(raw: Path, root: Path) -> None:
    medseg(root, 1, 2, 3)
    output = run("convert", "medseg", "--id", "502", "--name", "B", "--in", str(root), "--labelled", "2", "--test", "3")
    assert "2 labelled, 4 diseased, 0 healthy, 3 test" in output
    assert "ground glass and consolidation became one lesion class, effusion background." in output
    assert "there is no healthy case" in output
    dataset = raw / "Dataset502_B"
    assert json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["labels"] == {
        "background": 0,
        "lesion": 1,
        "ignore": 2,
    }
    for folder, number in (("hiddenTr", 4), ("labelsTs", 3)):
        assert len(names(dataset / folder)) == number
        for name in names(dataset / folder):
            np.testing.assert_array_equal(values(dataset / folder / name), mask(1, 1, 0))


def test_medseg_classes_apart_are_declared_even_if_one_does_not_occur(raw: Path, root: Path) -> None:
    medseg(root, 2, 1)
    run(
        "convert",
        "medseg",
        "--id",
        "502",
        "--name",
        "B",
        "--in",
        str(root),
        "--labelled",
        "medseg_9",
        "--classes-apart",
    )
    dataset = raw / "Dataset502_B"
    labels = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert labels == {"background": 0, "ground_glass": 1, "consolidation": 2, "effusion": 3, "ignore": 4}
    np.testing.assert_array_equal(values(dataset / "labelsTr" / "medseg_9.nii.gz"), mask(2, 1))
    np.testing.assert_array_equal(values(dataset / "labelsTr" / "medseg_1.nii.gz"), np.full(SHAPE, 4))


def test_medseg_refuses_values_it_does_not_know(raw: Path, root: Path) -> None:
    save(medseg(root, 1) / "rp_msk" / "4.nii.gz", mask(1, 4))
    with pytest.raises(UserError, match=r"rp_msk/4.nii.gz holds the value 4; its source has 0, 1, 2, 3"):
        run("convert", "medseg", "--id", "502", "--name", "B", "--in", str(root))
    assert not (raw / "Dataset502_B").exists()


# MosMedData


def mosmed(root: Path) -> Path:
    severities = {1: 0, 2: 0, 3: 0, 255: 1, 256: 1, 257: 1, 305: 1, 939: 2, 1064: 3, 1109: 4}
    for number, severity in severities.items():
        save(root / "studies" / f"CT-{severity}" / f"study_{number:04d}.nii.gz", ct(number))
    for number in (255, 256, 257):
        save(root / "masks" / f"study_{number:04d}_mask.nii.gz", mask(0, 1))
    return root


def test_mosmed_as_published(raw: Path, root: Path) -> None:
    mosmed(root)
    padded = ct(939)
    padded[:, 0] = -2048
    save(root / "studies" / "CT-2" / "study_0939.nii.gz", padded)
    output = run(
        "convert", "mosmed", "--id", "503", "--name", "CD", "--in", str(root), "--labelled", "1", "--test", "1"
    )
    assert "1 labelled, 5 diseased, 3 healthy, 1 test" in output
    assert "the published dataset has 254 healthy cases (CT-0); here are 3." in output
    assert "the published dataset has 856 diseased cases (CT-1 to CT-4); here are 7." in output
    assert "the published dataset has 50 masks; here are 3." in output
    assert "no healthy case" not in output
    dataset = raw / "Dataset503_CD"
    assert len(names(dataset / "hiddenTr")) == 1
    assert not values(dataset / "labelsTr" / "study_0001.nii.gz").any()
    np.testing.assert_array_equal(values(dataset / "labelsTr" / "study_1109.nii.gz"), np.full(SHAPE, 2))
    found = {case: known["severity"] for case, known in details(dataset).items()}
    assert [found[f"study_{number:04d}"] for number in (1, 255, 939, 1064, 1109)] == [f"CT-{n}" for n in range(5)]
    report = json.loads((dataset / "conversion_report.json").read_text(encoding="utf-8"))
    assert [oddity for oddity in report["oddities"] if oddity.startswith("padding of -2048")]


def test_mosmed_takes_cases_without_masks_for_testing(raw: Path, root: Path) -> None:
    words = ["--labelled", "study_0256", "--test", "study_0001", "study_1109"]
    assert "1 labelled, 5 diseased, 2 healthy, 2 test" in run(
        "convert", "mosmed", "--id", "503", "--name", "CD", "--in", str(mosmed(root)), *words
    )
    assert names(raw / "Dataset503_CD" / "labelsTs") == []


def test_mosmed_without_masks_is_volume_level_data(raw: Path, root: Path) -> None:
    shutil.rmtree(mosmed(root) / "masks")
    output = run("convert", "mosmed", "--id", "503", "--name", "CD", "--in", str(root))
    assert "0 labelled, 7 diseased, 3 healthy, 0 test" in output
    assert "no case has a mask, and training needs one. Join a dataset that has some" in output
    labels = json.loads((raw / "Dataset503_CD" / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert labels == {"background": 0, "lesion": 1, "ignore": 2}, "those of the datasets it is to be merged with"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("zeros", r"study_1064.nii.gz is 0 throughout; it shows nothing"),
        ("healthy", r"mask without a CT of CT-1 to CT-4: study_0001"),
        ("lost", r"mask without a CT of CT-1 to CT-4: study_0300"),
        ("loose", r"study_0305.nii.gz lies in none of the folders CT-0 to CT-4"),
        ("twice", r"study_0305.nii.gz and .*study_0305.nii.gz are both the case study_0305"),
        ("studies", r"has no folder studies; it holds masks"),
        ("unmasked", r"there is no case with a mask named study_0305; there are study_0255, study_0256, study_0257"),
    ],
)
def test_mosmed_refuses(raw: Path, root: Path, spoil: str, message: str) -> None:
    studies = mosmed(root) / "studies"
    match spoil:
        case "zeros":
            save(studies / "CT-3" / "study_1064.nii.gz", np.zeros(SHAPE, np.int16))
        case "healthy":
            save(root / "masks" / "study_0001_mask.nii.gz", mask(1))
        case "lost":
            save(root / "masks" / "study_0300_mask.nii.gz", mask(1))
        case "loose":
            (studies / "CT-1" / "study_0305.nii.gz").rename(studies / "study_0305.nii.gz")
        case "twice":
            save(studies / "CT-2" / "study_0305.nii.gz", ct(1))
        case "studies":
            shutil.rmtree(studies)
    words = ["--labelled", "study_0305"] if spoil == "unmasked" else []
    with pytest.raises(UserError, match=message):
        run("convert", "mosmed", "--id", "503", "--name", "CD", "--in", str(root), *words)
    assert not (raw / "Dataset503_CD").exists()


def test_an_existing_dataset_is_kept_unless_told_otherwise(raw: Path, root: Path) -> None:
    words = ["convert", "covid19-ct-seg", "--id", "501", "--name", "A", "--in", str(zenodo(root, CASES[:2]))]
    run(*words)
    first = (raw / "Dataset501_A" / "dataset.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="Dataset501_A exists already"):
        run(*words, "--labelled", "1")
    assert (raw / "Dataset501_A" / "dataset.json").read_text(encoding="utf-8") == first
    assert "1 labelled, 1 diseased" in run(*words, "--labelled", "1", "--overwrite")


def test_names_of_other_files_are_none() -> None:
    for name in ("coronacases_1234.nii", "radiopaedia_10.nii", "radiopaedia_org_10_85902_1.nii", "case.nii.gz"):
        assert covid19_ct_seg.case_name(Path(name)) is None
