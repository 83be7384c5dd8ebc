"""DICOM archives become nnU-Net datasets, without patient data; what is no volume is refused."""

from __future__ import annotations

import csv
import gzip
import json
import math
import pickle
import random
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from gasnet_nnunet.dataset_conversion.conversion import Converted
from gasnet_nnunet.dataset_conversion.dicom import kernel_kind
from gasnet_nnunet.dataset_conversion.dicom_series import scan
from gasnet_nnunet.dataset_conversion.sources import Source, read_image
from highdicom.sr import CodedConcept
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, RTStructureSetStorage, generate_uid
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.cohort import Kind
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, grid_difference, read_grid, read_volume, write_volume

SHAPE = (32, 9, 11)
SPACING = (0.8, 0.7, 5.0)
UNIT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
GRID = Grid(SHAPE[::-1], SPACING, (-10.0, 20.0, -30.0), UNIT)
SECRETS = ("Sürname", "MRN-0815", "19500101")
"""Name, number and birthday of every patient in these tests; the number is followed by one of its own."""


def ct(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)


def lesion(slices: Sequence[int] = (3, 4, 9)) -> np.ndarray[Any, Any]:
    mask = np.zeros(SHAPE, np.uint8)
    mask[list(slices), 2:6, 3:9] = 1
    mask[3, 4, 5] = 0
    return mask


def write_series(
    folder: Path,
    values: np.ndarray[Any, Any],
    *,
    patient: int = 1,
    grid: Grid = GRID,
    thickness: float = 5.0,
    number: int = 2,
    change: Callable[[Dataset, int], None] | None = None,
    **tags: Any,
) -> list[Path]:
    """Write one file a slice, named in no order, `InstanceNumber` against the order of positions.

    Args:
        folder: Where; other series may lie there.
        values: HU (Z, Y, X).
        patient: Number of the patient, the study and, with `number`, the series.
        grid: Where it lies; the slices' normal is the third column of its direction.
        thickness: SliceThickness.
        number: SeriesNumber.
        change: Called for each slice with its dataset and its number from below.
        tags: Further elements of all slices.

    Returns:
        The files from below.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"IM{number}{index:04d}" for index in range(len(values))]
    random.Random(patient * 100 + number).shuffle(names)
    direction = np.reshape(grid.direction, (3, 3))
    paths = []
    for z, plane in enumerate(values):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = f"1.2.3.{patient}.{number}.{z + 1}"
        dataset.PatientName, dataset.PatientID = "Sürname^Given", f"MRN-0815-{patient}"
        dataset.PatientBirthDate, dataset.PatientSex = "19500101", "F"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"1.2.3.{patient}", f"1.2.3.{patient}.{number}"
        dataset.FrameOfReferenceUID = f"1.2.3.{patient}.99"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20200301", "120000", "", "77"
        dataset.ReferringPhysicianName, dataset.Manufacturer, dataset.SpecificCharacterSet = "", "SIEMENS", "ISO_IR 192"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SeriesNumber, dataset.InstanceNumber = number, len(values) - z
        dataset.ConvolutionKernel, dataset.SliceThickness = "B31f", thickness
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelSpacing = [grid.spacing[1], grid.spacing[0]]
        dataset.ImageOrientationPatient = [*direction[:, 0], *direction[:, 1]]
        dataset.ImagePositionPatient = [*np.round(np.array(grid.origin) + z * grid.spacing[2] * direction[:, 2], 4)]
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 1
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit = 15
        dataset.PixelData = (plane + 1024).astype(np.int16).tobytes()
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        if change:
            change(dataset, z)
        paths.append(folder / names[z])
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


@pytest.fixture
def archive(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four patients: 1 labelled, 2 diseased, 3 healthy, 4 of the test, and a manifest that says so."""
    base = nnunet_folders
    monkeypatch.chdir(base)
    for patient in (1, 2, 3, 4):
        write_series(base / "in" / f"Sürname{patient}", ct(patient), patient=patient)
    write_volume(base / "in" / "mask1.nii.gz", lesion(), GRID)
    (base / "in" / "readme.txt").write_text("no DICOM")
    manifest(base)
    return base


def manifest(base: Path, **cells: dict[int, str]) -> None:
    """Write `cases.csv`, with further columns: the cell of each patient."""
    diagnoses = {1: "labelled", 2: "diseased", 3: "healthy", 4: "test", **cells.pop("diagnosis", {})}
    columns = {"mask": {1: "mask1.nii.gz"}, **cells}
    rows = [["Patient ID", "Diagnosis", *columns]]
    for patient, diagnosis in diagnoses.items():
        rows.append([f"MRN-0815-{patient}", diagnosis, *(cells.get(patient, "") for cells in columns.values())])
    with (base / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)


def convert(*words: str) -> str:
    """Run the command; what it refuses is raised as by `main`."""
    command = ["convert", "dicom", "--id", "7", "--name", "Lungs", "--in", "in", "--manifest", "cases.csv", *words]
    result = CliRunner().invoke(app, command)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Source]]:
    """Runs the command as far as the cases are listed, without reading, writing and reporting them."""
    sources: list[Source] = []

    def keep(found: Sequence[Source], **_: Any) -> Converted:
        sources[:] = found
        return Converted(Path("dataset"), {}, (), Path("report"))

    def run(*words: str) -> dict[str, Source]:
        monkeypatch.setattr("gasnet_nnunet.dataset_conversion.dicom.convert", keep)
        convert(*words)
        return {source.case: source for source in sources}

    return run


Listed = Callable[..., dict[str, Source]]


def image(source: Source) -> np.ndarray[Any, Any]:
    """The values that would be converted."""
    return read_image(source.images[0])[0]


def mask_of(source: Source) -> np.ndarray[Any, Any]:
    """The mask that would be converted."""
    assert source.mask is not None
    values, grid = read_image(source.mask)
    assert grid_difference(grid, read_image(source.images[0])[1]) is None
    return values


def raw(base: Path) -> Path:
    return base / "raw" / "Dataset007_Lungs"


def stored(base: Path, case: int, folder: str = "imagesTr") -> np.ndarray[Any, Any]:
    channel = "_0000" if folder.startswith("images") else ""
    return read_volume(raw(base) / folder / f"case_{case:04d}{channel}.nii.gz")[0]


def test_an_archive_becomes_a_dataset(archive: Path) -> None:
    output = convert()
    assert "1 labelled, 1 diseased, 1 healthy, 1 test" in output
    for patient in (1, 2, 3):
        np.testing.assert_array_equal(stored(archive, patient), ct(patient))
    np.testing.assert_array_equal(stored(archive, 4, "imagesTs"), ct(4))
    np.testing.assert_array_equal(stored(archive, 1, "labelsTr"), lesion())
    assert grid_difference(read_grid(raw(archive) / "imagesTr" / "case_0001_0000.nii.gz"), GRID) is None
    assert stored(archive, 1).dtype == np.int16
    cases = json.loads((raw(archive) / "dataset.json").read_text(encoding="utf-8"))["gasnet"]["cases"]
    assert cases["case_0002"] == {
        "patient": "patient_0002",
        "slice_thickness": 5.0,
        "kernel": "B31F",
        "manufacturer": "SIEMENS",
    }


def test_the_rule_is_told(archive: Path) -> None:
    output = " ".join(convert("--kernel", "lung").split())
    assert "at least 20 slices over at least 150 mm, each at most 5 mm thick" in output
    assert "a lung kernel" in output
    assert "2 files are no DICOM files" in output
    remarks = json.loads((raw(archive) / "conversion_report.json").read_text(encoding="utf-8"))["remarks"]
    assert any("at least 20 slices" in remark for remark in remarks)


def test_nothing_of_the_patients_is_carried_over(archive: Path) -> None:
    convert("--link-table", "who.csv")
    for path in [*raw(archive).rglob("*")]:
        content = b"" if path.is_dir() else path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")
        for secret in (*SECRETS, "1.2.3.", "cases.csv"):
            assert secret not in str(path.relative_to(archive)), secret
            assert secret not in text, (path, secret)
    with (archive / "who.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "case": "case_0002",
        "patient": "patient_0002",
        "PatientID": "MRN-0815-2",
        "StudyInstanceUID": "1.2.3.2",
        "SeriesInstanceUID": "1.2.3.2.2",
        "manifest": "cases.csv row 3",
    }
    assert stat.S_IMODE((archive / "who.csv").stat().st_mode) == 0o600


def test_a_failed_conversion_leaves_no_patient_data_either(archive: Path) -> None:
    path = next(path for path in (archive / "in" / "Sürname2").iterdir() if dcmread(path).InstanceNumber == 5)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"row 3: .*{path.name} cannot be read"):
        convert()
    left = list((archive / "raw").rglob("*.json"))
    assert left, "what was sound is kept"
    assert not any(secret in path.read_text(encoding="utf-8") for path in left for secret in SECRETS)


def test_the_linking_table_stays_away_from_the_data(archive: Path, listed: Listed) -> None:
    with pytest.raises(UserError, match="be passed on with the data"):
        convert("--link-table", "raw/who.csv")
    with pytest.raises(UserError, match="there is no folder nowhere"):
        convert("--link-table", "nowhere/who.csv")
    (archive / "who.csv").write_text("mine")
    with pytest.raises(UserError, match=r"who.csv exists already"):
        convert("--link-table", "who.csv")
    assert (archive / "who.csv").read_text(encoding="utf-8") == "mine"
    assert list((archive / "raw").iterdir()) == []
    listed()
    assert sorted(path.name for path in archive.glob("*.csv")) == ["cases.csv", "who.csv"]


def test_a_seed_draws_the_numbers(archive: Path, listed: Listed) -> None:
    orders = []
    for seed in ("1", "1", "2"):
        sources = listed("--seed", seed).values()
        orders.append([str(next(iter(source.files())).parent) for source in sources])
        assert [source.patient for source in sources] == [f"patient_000{number}" for number in (1, 2, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_an_excel_sheet_is_read(archive: Path, listed: Listed) -> None:
    table = pd.read_csv(archive / "cases.csv", sep=";", dtype=str)
    table.insert(0, "series", [2, None, None, None])
    table.to_excel(archive / "cases.xlsx", index=False)
    cases = listed("--manifest", "cases.xlsx")
    np.testing.assert_array_equal(image(cases["case_0001"]), ct(1))


@pytest.mark.parametrize("cell", ["Sürname2", "{file}", "."])
def test_a_path_tells_a_scan(archive: Path, listed: Listed, cell: str) -> None:
    file = next((archive / "in" / "Sürname2").iterdir()).relative_to(archive / "in")
    manifest(archive, path={2: cell.format(file=file)})
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), ct(2))


# Every orientation in which scanners store axial slices: the patient lies on back or belly, head or feet first.
@pytest.mark.parametrize("direction", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
def test_slices_are_put_in_order_of_position(archive: Path, listed: Listed, direction: tuple[int, int, int]) -> None:
    grid = Grid(GRID.size, SPACING, (5.0, 6.0, 7.0), tuple(np.diag(np.array(direction, float)).ravel()))
    write_series(archive / "in" / "Sürname2", ct(2), patient=2, grid=grid)
    values, found = read_image(listed()["case_0002"].images[0])
    assert found.direction[8] == 1, "Z up"
    assert np.linalg.det(np.reshape(found.direction, (3, 3))) == pytest.approx(1)
    volume = sitk.GetImageFromArray(ct(2))
    volume.SetSpacing(grid.spacing)
    volume.SetOrigin(grid.origin)
    volume.SetDirection(grid.direction)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(found.direction)
    expected = sitk.DICOMOrient(volume, code)
    np.testing.assert_array_equal(values, sitk.GetArrayFromImage(expected))
    assert grid_difference(found, Grid.of(expected)) is None


def test_each_slice_has_its_own_rescaling(archive: Path, listed: Listed) -> None:
    def change(dataset: Dataset, z: int) -> None:
        if z == 3:
            stored = np.full(SHAPE[1:], 100, np.uint16)
            dataset.PixelData, dataset.RescaleSlope, dataset.RescaleIntercept = stored.tobytes(), 2.5, -1000.0

    write_series(archive / "in" / "Sürname2", ct(2), patient=2, change=change)
    cases = listed()
    expected = ct(2)
    expected[3] = -750
    np.testing.assert_array_equal(image(cases["case_0002"]), expected)


def drop(path: Path, *instances: int) -> None:
    for file in list(path.iterdir()):
        if dcmread(file).InstanceNumber in instances:
            file.unlink()


def shear(dataset: Dataset, z: int) -> None:
    dataset.ImagePositionPatient = [GRID.origin[0], GRID.origin[1] + z, GRID.origin[2] + 5 * z]


def tilt(dataset: Dataset, z: int) -> None:
    """Slices tilted by 15 degrees, while the table moves along the body."""
    dataset.ImageOrientationPatient = [1, 0, 0, 0, round(math.cos(math.pi / 12), 6), round(math.sin(math.pi / 12), 6)]
    dataset.ImagePositionPatient = [*GRID.origin[:2], GRID.origin[2] + 5 * z]


def crowd(dataset: Dataset, z: int) -> None:
    dataset.ImagePositionPatient = [*GRID.origin[:2], 4.6 * z if z < 16 else 73.6 + 5.2 * (z - 16)]


def only(number: int, **tags: Any) -> Callable[[Dataset, int], None]:
    """Give one slice other elements."""

    def change(dataset: Dataset, z: int) -> None:
        if z == number:
            for tag, value in tags.items():
                setattr(dataset, tag, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shear, r"gantry was tilted: its slices are shifted against each other by 31 mm in all \(11.3 degrees\)"),
        (tilt, r"gantry was tilted: .* \(15.0 degrees\)"),
        (crowd, r"4.6 to 5.2 mm apart"),
        (only(4, ImagePositionPatient=[-10, 20, -15]), r"1 of its positions occur twice, e.g. in .*IM\d+ and .*IM\d+"),
        (only(4, Rows=8, PixelData=bytes(2 * 8 * 11)), r"several sizes \(11 x 8 and 11 x 9\)"),
        (only(4, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), r"differ in orientation .* localizer"),
        (only(4, PixelSpacing=[0.9, 0.9]), r"differ in orientation or pixel spacing"),
        (only(4, ImagePositionPatient=None), r"ImagePositionPatient, .* is missing"),
        (only(4, PatientID="other"), r"several patients"),
        (only(4, RescaleSlope=None), r"not in Hounsfield units"),
    ],
)
def test_what_is_no_volume_is_refused(archive: Path, change: Callable[[Dataset, int], None], message: str) -> None:
    write_series(archive / "in" / "Sürname2", ct(2), patient=2, change=change)
    manifest(archive, series={2: "2"})
    with pytest.raises(UserError, match=rf"cases.csv row 3: study 1.2.3.2, series 1.2.3.2.2 \(number 2\): .*{message}"):
        convert()
    assert list((archive / "raw").iterdir()) == []


def test_missing_slices_are_refused(archive: Path) -> None:
    write_series(archive / "in" / "Sürname2", ct(2), patient=2, number=5)
    drop(archive / "in" / "Sürname2", 10, 11, 20)
    manifest(archive, series={2: "2"})
    with pytest.raises(UserError) as caught:
        convert()
    message = str(caught.value)
    assert "series 1.2.3.2.2 (number 2): slices are missing (about 3): there is none" in message
    assert "between z = 25.00 and 35.00 mm (the first of 2 gaps), elsewhere they are 5 mm apart" in message
    assert "The rule may also take 5 (a chest CT)" in message


def test_rounded_positions_are_no_gaps(archive: Path, listed: Listed) -> None:
    grid = Grid((11, 9, 260), (0.8, 0.7, 0.625), GRID.origin, UNIT)

    def change(dataset: Dataset, z: int) -> None:
        dataset.ImagePositionPatient = [*GRID.origin[:2], round(-30 + 0.625 * z, 1)]

    values = np.random.default_rng(2).integers(-1000, 400, (260, 9, 11))
    write_series(archive / "in" / "Sürname2", values, patient=2, grid=grid, number=1, thickness=1, change=change)
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), values)


def sagittal(dataset: Dataset, z: int) -> None:
    dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    dataset.ImagePositionPatient = [5 * z, 0, 0]


@pytest.mark.parametrize(
    ("tags", "better"),
    [
        ({"Modality": "PT"}, False),
        ({"RescaleType": "MGML"}, False),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, False),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, False),
        ({"SeriesDescription": "Thorax mip 10/2"}, False),
        ({"change": sagittal}, False),
        ({"thickness": 6}, False),
        ({"grid": Grid(GRID.size, (0.8, 0.7, 6.0), GRID.origin, UNIT), "thickness": 1}, False),
        ({"grid": Grid(GRID.size, (0.8, 0.7, 4.0), GRID.origin, UNIT), "thickness": 1}, False),
        ({"ConvolutionKernel": "B70f"}, False),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"], "thickness": 2}, False),
        ({"thickness": 2}, True),
        ({"thickness": 0.6, "ConvolutionKernel": "B70f"}, True),
        ({"BodyPartExamined": "CHEST", "ConvolutionKernel": "B70f"}, True),
    ],
)
def test_the_rule_chooses_a_series(archive: Path, listed: Listed, tags: dict[str, Any], better: bool) -> None:
    write_series(archive / "in" / "Sürname2", ct(20), **{"patient": 2, "number": 1, **tags})
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), ct(20) if better else ct(2))
    manifest(archive, series={2: "2" if better else "1.2.3.2.2"})
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), ct(2))


def test_most_slices_decide_at_last(archive: Path, listed: Listed) -> None:
    values = np.concatenate([ct(20), ct(21)[:1]])
    write_series(archive / "in" / "Sürname2", values, patient=2, number=9)
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), values)


def test_the_kernel_can_be_chosen(archive: Path, listed: Listed) -> None:
    write_series(archive / "in" / "Sürname2", ct(20), patient=2, number=1, ConvolutionKernel="B70f")
    cases = listed("--kernel", "lung")
    np.testing.assert_array_equal(image(cases["case_0002"]), ct(20))
    with pytest.raises(UserError, match="expected soft or lung"):
        listed("--kernel", "sharp", "--overwrite")


def test_kernels_that_nobody_knows_come_last_but_one() -> None:
    assert kernel_kind("SOMETHING") is None
    assert kernel_kind("") is None


def refuse(archive: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert()
    assert list((archive / "raw").iterdir()) == []


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"diagnosis": {2: "ill"}}, r"cases.csv row 3: diagnosis is 'ill'; expected labelled, diseased, healthy, test"),
        ({"mask": {}}, r"row 2: a labelled case needs a mask"),
        ({"mask": {1: "nowhere.nii"}}, r"row 2: there is no mask file nowhere.nii"),
        ({"mask": {1: "readme.txt"}}, r"row 2: .*readme.txt cannot be read as an image"),
        ({"diagnosis": {9: "healthy"}}, r"row 6: no DICOM series under in has the PatientID MRN-0815-9.*leading zeros"),
        ({"structures": {1: "Lung"}}, r"row 2: .*mask1.nii.gz is no DICOM file, so it has no structures"),
        ({"path": {2: "Sürname3"}}, r"row 3: no DICOM series under in has the PatientID MRN-0815-2"),
        ({"path": {2: "Nobody"}}, r"row 3: no DICOM series under in has the path Nobody"),
        ({"series": {2: "8"}}, r"row 3: 0 series of the scan have the number or UID 8 .* there are 2 \(a chest CT\)"),
    ],
)
def test_mistakes_in_the_manifest_are_named(archive: Path, cells: dict[str, dict[int, str]], message: str) -> None:
    manifest(archive, **cells)
    refuse(archive, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"cases.csv"),
        ("PatientID,diagnosis\n", r"no rows"),
        ("PatientID,kind\n1,healthy\n", r"has no column 'diagnosis'; its first row holds PatientID, kind"),
        ("PatientID,patient_id,diagnosis\n1,1,healthy\n", r"the column 'PatientID' twice"),
        ("diagnosis\nhealthy\n", r"tells no scan"),
        ("PatientID,diagnosis\nMRN-0815-1,healthy\n,healthy\n", r"row 3 tells no scan"),
        (
            "PatientID,diagnosis\nMRN-0815-1,healthy\nMRN-0815-1,diseased\n",
            r"row 2 and cases.csv row 3 take the same scan",
        ),
        ("path,diagnosis\n.,healthy\n", r"row 2 fits scans of several patients"),
        ("PatientID,diagnosis\nM\xfcller,healthy\n", r"not UTF-8"),
    ],
)
def test_bad_manifests_are_refused(archive: Path, text: str, message: str) -> None:
    (archive / "cases.csv").write_bytes(text.encode("latin-1"))
    refuse(archive, message)


def test_bad_places_are_refused(archive: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file gone\.csv"):
        convert("--manifest", "gone.csv")
    (archive / "cases.txt").write_text("")
    with pytest.raises(UserError, match=r"ends in '.txt'; a .csv or .xlsx file is expected"):
        convert("--manifest", "cases.txt")
    (archive / "cases.xlsx").write_text("no sheet")
    with pytest.raises(UserError, match=r"cases.xlsx cannot be read as a table"):
        convert("--manifest", "cases.xlsx")
    (archive / "empty").mkdir()
    for place, message in (("gone", "there is no gone"), ("cases.csv", "is no folder"), ("empty", "no DICOM files")):
        with pytest.raises(UserError, match=f"--in: .*{message}"):
            convert("--in", place)


def test_all_mistakes_are_told_at_once(archive: Path) -> None:
    drop(archive / "in" / "Sürname2", 10)
    drop(archive / "in" / "Sürname3", 10)
    refuse(archive, r"2 problems with the series:(.|\n)*row 3(.|\n)*row 4")
    manifest(archive, diagnosis={2: "ill", 3: "well"})
    refuse(archive, r"2 problems with cases.csv:(.|\n)*row 3(.|\n)*row 4")


def test_a_patient_is_on_one_side(archive: Path, listed: Listed) -> None:
    write_series(archive / "in" / "again", ct(50), patient=5, PatientID="MRN-0815-2")
    (archive / "cases.csv").write_text("StudyInstanceUID,diagnosis\n1.2.3.2,healthy\n1.2.3.5,test\n")
    refuse(archive, "cases\\.csv row 2 and cases\\.csv row 3 are scans of one patient, one for training")
    (archive / "cases.csv").write_text("StudyInstanceUID,diagnosis\n1.2.3.2,healthy\n1.2.3.5,diseased\n")
    assert {source.patient for source in listed().values()} == {"patient_0001"}


def test_several_studies_are_not_guessed_between(archive: Path, listed: Listed) -> None:
    write_series(archive / "in" / "again", ct(50), patient=5, PatientID="MRN-0815-2")
    refuse(archive, r"row 3 fits 2 studies with a chest CT: 1.2.3.2, 1.2.3.5. Tell which one")
    manifest(archive, StudyInstanceUID={2: "1.2.3.5"})
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), ct(50))


def test_a_study_without_a_chest_ct_tells_what_it_has(archive: Path, listed: Listed) -> None:
    for path in (archive / "in" / "Sürname2").iterdir():
        path.unlink()
    write_series(
        archive / "in" / "Sürname2", ct(2)[:1], patient=2, number=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    write_series(archive / "in" / "Sürname2", ct(2)[:12], patient=2)
    refuse(
        archive, r"row 3: no series is a chest CT by the rule: 1 \(a localizer or a projection\), 2 \(12 slices only\)"
    )
    manifest(archive, series={2: "2"})
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0002"]), ct(2)[:12])


def test_compressed_pixels_need_their_decoder(archive: Path) -> None:
    # No decoder of it comes with pydicom's or our own requirements; a package that happens to be there must not matter.
    for path in (archive / "in" / "Sürname2").iterdir():
        dataset = dcmread(path)
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        dataset.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\x02\0\0\0\xff\xd8\xfe\xff\xdd\xe0\0\0\0\0"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
        refuse(archive, r"row 3: .*series 1.2.3.2.2 .*compressed \(JPEG Lossless.*pylibjpeg-libjpeg.*pip install")


def test_multi_frame_objects_are_refused(archive: Path) -> None:
    write_series(archive / "in" / "Sürname2", ct(2), patient=2, NumberOfFrames=2)
    refuse(archive, r"series 1.2.3.2.2 .*enhanced \(multi-frame\) object")


def test_only_headers_are_read_while_scanning(archive: Path) -> None:
    for path in (archive / "in").rglob("IM*"):
        path.write_bytes(path.read_bytes()[:-150])
    found, others = scan(archive / "in")
    assert [len(series.slices) for series in found] == [32] * 4
    assert others == 2
    volume = found[0].volume("case_0001")
    assert str(volume) == "case_0001 (DICOM series)"
    assert pickle.loads(pickle.dumps(volume)) == volume, "workers get it"


def sources(archive: Path, patient: int = 1) -> list[Dataset]:
    return sorted(
        (dcmread(path) for path in (archive / "in" / f"Sürname{patient}").iterdir()),
        key=lambda dataset: dataset.ImagePositionPatient[2],
    )


def write_seg(archive: Path, masks: dict[str, np.ndarray[Any, Any]], kind: str = "BINARY", patient: int = 1) -> None:
    code = CodedConcept("49755003", "SCT", "Morphologically abnormal structure")
    algorithm = highdicom.AlgorithmIdentificationSequence("hand", code, "1")
    descriptions = [
        highdicom.seg.SegmentDescription(
            number,
            name,
            code,
            code,
            "AUTOMATIC",
            algorithm_identification=algorithm,
            tracking_uid=generate_uid(),
            tracking_id=name,
        )
        for number, name in enumerate(masks, start=1)
    ]
    pixels = np.stack(list(masks.values()), axis=-1)
    segmentation = highdicom.seg.Segmentation(
        sources(archive, patient),
        pixels * 0.75 if kind == "FRACTIONAL" else pixels,
        kind,
        descriptions,
        generate_uid(),
        300,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "1",
    )
    segmentation.save_as(archive / "in" / "mask.dcm")


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_a_segmentation_is_put_on_its_slices(archive: Path, listed: Listed, kind: str) -> None:
    write_seg(archive, {"Lesion": lesion()}, kind)
    manifest(archive, mask={1: "mask.dcm"})
    cases = listed()
    np.testing.assert_array_equal(mask_of(cases["case_0001"]), lesion())


def test_a_mask_belongs_to_its_series(archive: Path, listed: Listed) -> None:
    write_seg(archive, {"Lesion": lesion()})
    write_series(archive / "in" / "Sürname1", ct(10), patient=1, number=1, thickness=1)
    manifest(archive, mask={1: "mask.dcm"})
    cases = listed()
    np.testing.assert_array_equal(image(cases["case_0001"]), ct(1))
    manifest(archive, mask={1: "mask.dcm"}, series={1: "1"})
    with pytest.raises(UserError, match=r"row 2: .*mask.dcm was drawn on the series 1.2.3.1.2; taken is .*1.2.3.1.1"):
        listed()
    manifest(archive, mask={2: "mask.dcm"}, diagnosis={1: "diseased"})
    with pytest.raises(UserError, match=r"row 3: .*was drawn on the series 1.2.3.1.2; taken is study 1.2.3.2"):
        listed()


def test_structures_are_named_where_there_are_several(archive: Path, listed: Listed) -> None:
    write_seg(archive, {"Lung": 1 - lesion(), "Ground glass": lesion([3]), "Consolidation": lesion([4, 9])})
    manifest(archive, mask={1: "mask.dcm"})
    refuse(archive, r"row 2: .*mask.dcm holds 3 structures \(Lung, Ground glass, Consolidation\). Name those")
    manifest(archive, mask={1: "mask.dcm"}, structures={1: "Glass"})
    refuse(archive, r"row 2: .*mask.dcm has no structure 'Glass'; it has Lung, Ground glass, Consolidation")
    manifest(archive, mask={1: "mask.dcm"}, structures={1: "ground glass; Consolidation"})
    cases = listed()
    np.testing.assert_array_equal(mask_of(cases["case_0001"]), lesion([3]) | lesion([4, 9]))


def item(**elements: Any) -> Dataset:
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, DicomSequence(value) if isinstance(value, list) and name.endswith("Sequence") else value)
    return dataset


def write_structures(archive: Path, contours: list[list[list[float]]], series: str = "1.2.3.1.2") -> None:
    """A structure set with one structure, of contours in mm."""
    referenced = item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=series)])
    dataset = item(
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID="1.2.3.1.77",
        Modality="RTSTRUCT",
        ReferencedFrameOfReferenceSequence=[
            item(FrameOfReferenceUID="1.2.3.1.99", RTReferencedStudySequence=[referenced])
        ],
        StructureSetROISequence=[item(ROINumber=4, ROIName="GTV")],
        ROIContourSequence=[
            item(
                ReferencedROINumber=4,
                ContourSequence=[
                    item(
                        ContourGeometricType="CLOSED_PLANAR",
                        NumberOfContourPoints=len(contour),
                        ContourData=[round(number, 3) for point in contour for number in point],
                    )
                    for contour in contours
                ],
            )
        ],
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(archive / "in" / "mask.dcm", enforce_file_format=True)


def rectangle(z: float, rows: tuple[float, float], columns: tuple[float, float]) -> list[list[float]]:
    """A contour around voxels: slice, first and last row, first and last column, not by whole voxels."""
    corners = [(rows[0], columns[0]), (rows[0], columns[1]), (rows[1], columns[1]), (rows[1], columns[0])]
    return [
        [origin + index * spacing for origin, index, spacing in zip(GRID.origin, (x, y, z), SPACING, strict=True)]
        for y, x in corners
    ]


def test_contours_are_filled(archive: Path, listed: Listed) -> None:
    contours = [rectangle(z, (1.6, 5.4), (2.6, 8.4)) for z in (3, 4, 9)]
    contours.append(rectangle(3, (3.6, 4.4), (4.6, 5.4)))
    write_structures(archive, contours)
    manifest(archive, mask={1: "mask.dcm"})
    cases = listed()
    np.testing.assert_array_equal(mask_of(cases["case_0001"]), lesion())


@pytest.mark.parametrize(
    ("z", "series", "message"),
    [
        (3.5, "1.2.3.1.2", r"mask.dcm has a contour that lies on no slice of its series \(slice 3.50"),
        (40, "1.2.3.1.2", r"lies on no slice"),
        (3, "1.2.3.1.8", r"was drawn on the series 1.2.3.1.8; taken is"),
    ],
)
def test_contours_of_other_scans_are_refused(
    archive: Path, listed: Listed, z: float, series: str, message: str
) -> None:
    write_structures(archive, [rectangle(z, (1.6, 5.4), (2.6, 8.4))], series)
    manifest(archive, mask={1: "mask.dcm"})
    with pytest.raises(UserError, match=message):
        mask_of(listed()["case_0001"])


def test_segmentations_off_the_voxels_are_refused(archive: Path, listed: Listed) -> None:
    write_seg(archive, {"Lesion": lesion()})
    dataset = dcmread(archive / "in" / "mask.dcm")
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        position = groups.PlanePositionSequence[0]
        position.ImagePositionPatient = [*position.ImagePositionPatient[:2], position.ImagePositionPatient[2] + 2]
    dataset.save_as(archive / "in" / "mask.dcm")
    manifest(archive, mask={1: "mask.dcm"})
    with pytest.raises(UserError, match=r"mask.dcm does not lie on the voxels of its series"):
        mask_of(listed()["case_0001"])


def test_a_ct_is_no_mask(archive: Path) -> None:
    path = next((archive / "in" / "Sürname2").iterdir())
    manifest(archive, mask={1: f"Sürname2/{path.name}"})
    refuse(archive, r"row 2: .*is a DICOM file of another kind \(Modality CT\)")


def test_masks_of_flipped_rows_are_turned(archive: Path, listed: Listed) -> None:
    grid = Grid(GRID.size, SPACING, (-10.0, 20.0 + 8 * 0.7, -30.0), (1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    write_volume(archive / "in" / "mask1.nii.gz", np.ascontiguousarray(lesion()[:, ::-1]), grid)
    cases = listed()
    np.testing.assert_array_equal(mask_of(cases["case_0001"]), lesion())


def test_a_diseased_case_with_a_mask_is_labelled(archive: Path, listed: Listed) -> None:
    manifest(archive, diagnosis={1: "Diseased"})
    assert listed()["case_0001"].kind is Kind.LABELLED


def test_an_interrupted_conversion_goes_on(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gasnet_nnunet.dataset_conversion import conversion, dicom_series

    read = dicom_series.DicomVolume.read
    seen: list[str] = []

    def spy(self: dicom_series.DicomVolume) -> tuple[np.ndarray[Any, Any], Grid]:
        seen.append(self.case)
        if self.case == "case_0003" and seen.count("case_0003") == 1:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(dicom_series.DicomVolume, "read", spy)
    assert conversion.read_volume  # the module that the command uses
    command = ["convert", "dicom", "--id", "7", "--name", "Lungs", "--in", "in", "--manifest", "cases.csv"]
    assert CliRunner().invoke(app, command).exit_code == 130
    convert()
    assert seen == ["case_0001", "case_0002", "case_0003", "case_0003", "case_0004"]
    np.testing.assert_array_equal(stored(archive, 3), ct(3))
