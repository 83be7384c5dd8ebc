"""Cases named row by row in a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gasnet_nnunet.dataset_conversion.manifest import manifest_sources
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.cohort import Kind
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, read_volume, write_volume

SHAPE = (6, 9, 8)
GRID = Grid(SHAPE[::-1], (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
ROWS = [
    ["Image", "Kind", "mask", "lungs", "patient", "case", "Severity"],
    ["p1.nii.gz", "labelled", "m1.nii.gz", "", "pa", "", "CT-2"],
    ["p2.nii.gz", "Diseased", "m1.nii.gz", "m1.nii.gz", "pb", "second", ""],
    ["", "", "", "", "", "", ""],
    ["p3.nii.gz", "healthy", "", "", "", "", ""],
    ["p 4.nii.gz", "test", "m1.nii.gz", "", "", "", ""],
]


def ct(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)


@pytest.fixture
def base(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images and the mask that the table names, in the folder `in`; the working folder is another one."""
    folder = nnunet_folders / "in"
    folder.mkdir()
    monkeypatch.chdir(nnunet_folders)
    for number, name in enumerate(("p1", "p2", "p3", "p 4", "q/h7")):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_volume(path, ct(number), GRID)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 3:6, 3:6] = 1
    write_volume(folder / "m1.nii.gz", mask, GRID)
    return folder


def write(path: Path, rows: list[list[str]] = ROWS, delimiter: str = ",") -> Path:
    if path.suffix == ".xlsx":
        pd.DataFrame(rows).to_excel(path, header=False, index=False)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def changed(row: int, column: str, cell: str) -> list[list[str]]:
    """The rows with another cell; `row` as spreadsheets count."""
    rows = [list(cells) for cells in ROWS]
    rows[row - 1][ROWS[0].index(column)] = cell
    return rows


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.xlsx", "")])
def test_rows_become_cases(base: Path, name: str, delimiter: str) -> None:
    sources = {source.case: source for source in manifest_sources(write(base / name, delimiter=delimiter))}
    kinds = {case: source.kind for case, source in sources.items()}
    assert kinds == {"p1": Kind.LABELLED, "second": Kind.DISEASED, "p3": Kind.HEALTHY, "p_4": None}
    assert sources["p1"].images == (base / "p1.nii.gz",)
    assert sources["second"].mask == sources["second"].lungs == base / "m1.nii.gz"
    assert sources["second"].patient == "pb"
    assert sources["p1"].details == {"Severity": "CT-2", "patient": "pa"}
    assert sources["p3"].details == {}
    assert [source.named_by for source in sources.values()] == [f"{name} row {number}" for number in (2, 3, 5, 6)]


def test_numbers_stay_as_they_are_written(base: Path) -> None:
    rows = changed(2, "Severity", "007")
    rows[4][rows[0].index("case")] = "12"
    for name in ("a.csv", "a.xlsx"):
        sources = {source.case: source for source in manifest_sources(write(base / name, rows))}
        assert sources["p1"].details["Severity"] == "007"
        assert "12" in sources


def test_nnunet_names_lose_their_channel(base: Path) -> None:
    rows = [ROWS[0][:2], ["p1_0000.nii.gz", "healthy"]]
    (base / "p1.nii.gz").rename(base / "p1_0000.nii.gz")
    assert [source.case for source in manifest_sources(write(base / "a.csv", rows))] == ["p1"]
    rows.append(["p2.nii.gz", "healthy"])
    assert [source.case for source in manifest_sources(write(base / "a.csv", rows))] == ["p1_0000", "p2"]


def test_a_manifest_adds_to_folders(base: Path) -> None:
    write(base / "a.csv")
    command = ["convert", "folders", "--id", "7", "--name", "Mixed", "--manifest", "in/a.csv", "--diseased", "in/q"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "1 labelled, 2 diseased, 1 healthy, 1 test" in result.output
    raw = base.parent / "raw" / "Dataset007_Mixed"
    np.testing.assert_array_equal(read_volume(raw / "imagesTr" / "second_0000.nii.gz")[0], ct(1))
    np.testing.assert_array_equal(read_volume(raw / "imagesTr" / "h7_0000.nii.gz")[0], ct(4))
    assert (raw / "hiddenTr" / "second.nii.gz").is_file(), "kept aside for scoring"
    assert (raw / "labelsTs" / "p_4.nii.gz").is_file()
    cases = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["gasnet"]["cases"]
    assert cases == {"p1": {"Severity": "CT-2", "patient": "pa"}, "second": {"patient": "pb"}}
    # JSON knows no NaN, which pandas makes of what one case has and another has not.
    report = json.loads((raw / "conversion_report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert ["Severity" in case for case in report["cases"] if case["case"] in ("p1", "second")] == [True, False]


def convert(*words: str) -> str:
    result = CliRunner().invoke(app, ["convert", "folders", "--id", "7", "--name", "Mixed", *words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_name_in_training_and_test_is_refused_where_something_is_known_of_both(base: Path) -> None:
    rows = changed(6, "case", "p1")
    write(base / "a.csv", rows)
    convert("--manifest", "in/a.csv")
    rows[5][ROWS[0].index("patient")] = "pz"
    write(base / "a.csv", rows)
    with pytest.raises(UserError, match="The case 'p1' is both under"):
        convert("--manifest", "in/a.csv", "--overwrite")


def test_missing_kinds_are_remarked(base: Path) -> None:
    write(base / "a.csv", [ROWS[0], ROWS[2]])
    assert "there is no labelled and no healthy case" in convert("--manifest", "in/a.csv")


def test_without_a_manifest_the_folders_are_needed(base: Path) -> None:
    for words in ([], ["--healthy", "in"], ["--labelled", "in", "in"], ["--diseased", "in"]):
        with pytest.raises(UserError, match="--labelled IMAGES MASKS and --healthy IMAGES, or --manifest FILE"):
            convert(*words)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(1, "Kind", "group"), r"a.csv has no column 'kind'; its first row holds Image, group, mask"),
        (changed(1, "Severity", "IMAGE"), r"a.csv has the column 'image' twice"),
        (changed(2, "Kind", "ill"), r"a.csv row 2: kind is 'ill'; expected labelled, diseased, healthy, test"),
        (changed(2, "Kind", ""), r"a.csv row 2: the cell 'kind' is empty"),
        (changed(5, "Image", ""), r"a.csv row 5: the cell 'image' is empty"),
        (changed(2, "Image", "x.nii"), r"a.csv row 2: there is no image x.nii \(relative paths start at .*in\)"),
        (changed(3, "mask", "x.nii"), r"a.csv row 3: there is no mask x.nii"),
        (changed(3, "lungs", "x.nii"), r"a.csv row 3: there is no lungs x.nii"),
        (changed(5, "Image", "p1.nii.gz"), r"a.csv row 5: .*p1.nii.gz stands in a.csv row 2 already"),
        (changed(5, "Image", "q/../p1.nii.gz"), r"a.csv row 5: .*p1.nii.gz stands in a.csv row 2 already"),
        (changed(2, "mask", ""), r"a.csv row 2: a labelled case needs a mask"),
        (changed(2, "case", "a/b"), r"a.csv row 2: case is 'a/b'; expected letters, digits"),
        (changed(5, "case", "p1"), r"'p1' is both under a.csv row 2 \(.*\) and under a.csv row 5"),
        (changed(6, "patient", "pa"), r"The patient 'pa' is both in training \(p1\) and in the test set \(p_4\)"),
        (ROWS[:1], r"a.csv has no rows"),
        ([], r"a.csv cannot be read as a table: No columns"),
    ],
)
def test_mistakes_are_named_with_file_and_row(base: Path, rows: list[list[str]], message: str) -> None:
    write(base / "a.csv", rows)
    with pytest.raises(UserError, match=message):
        convert("--manifest", "in/a.csv")
    assert list((base.parent / "raw").iterdir()) == []


def test_mistakes_are_told_all_at_once(base: Path) -> None:
    rows = changed(2, "Kind", "ill")
    rows[4][0] = "x.nii"
    with pytest.raises(UserError, match=r"2 problems with .*a.csv:\n.*row 2.*\n.*row 5"):
        manifest_sources(write(base / "a.csv", rows))
