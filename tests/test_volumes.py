"""Volumes are read whole or not at all."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, grid_difference, read_grid, read_volume, volume_name, write_volume

GRID = Grid((12, 11, 10), (1.5, 1.5, 4.0), (3.0, -7.0, 20.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


@pytest.fixture
def ct() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(-500, 300, GRID.size[::-1]).astype(np.int16)


def test_series_with_a_missing_slice_is_refused(tmp_path: Path) -> None:
    array = np.arange(8 * 9 * 7, dtype=np.int16).reshape(8, 9, 7)
    write_dicom(tmp_path / "scan", array, Grid((7, 9, 8), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), GRID.direction))
    assert read_volume(tmp_path / "scan")[0].shape == (8, 9, 7)
    sorted((tmp_path / "scan").iterdir())[3].unlink()
    with pytest.raises(UserError, match=r"scan are not evenly spaced: some are missing"):
        read_volume(tmp_path / "scan")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_written_volumes_are_read_back(tmp_path: Path, ct: np.ndarray[Any, Any], ending: str) -> None:
    path = tmp_path / f"case{ending}"
    write_volume(path, ct, GRID)
    values, grid = read_volume(path)
    assert values.dtype == np.int16
    np.testing.assert_array_equal(values, ct)
    np.testing.assert_array_equal(values, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    assert grid_difference(grid, GRID) is None
    assert grid_difference(read_grid(path), GRID) is None


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, ct: np.ndarray[Any, Any], ending: str, share: float) -> None:
    path = tmp_path / f"case{ending}"
    write_volume(path, ct, GRID)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=rf"case{ending}"):
        read_volume(path)


def test_a_damaged_byte_is_noticed(tmp_path: Path, ct: np.ndarray[Any, Any]) -> None:
    path = tmp_path / "case.nii.gz"
    write_volume(path, ct, GRID)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"case\.nii\.gz"):
        read_volume(path)


@pytest.mark.parametrize("content", [b"", b"no image", gzip.compress(b"no image", mtime=0)])
@pytest.mark.parametrize("name", ["case.nii.gz", "case.nii", "case.nrrd", "case.foo", "case"])
def test_files_that_are_no_images_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="case"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_nan_and_infinity_are_refused(tmp_path: Path, ct: np.ndarray[Any, Any], ending: str) -> None:
    values = ct.astype(np.float32)
    values[1, 2, 3], values[4, 5, 6] = np.nan, np.inf
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / f"case{ending}"))
    with pytest.raises(UserError, match="has 2 voxels that are NaN or infinite"):
        read_volume(tmp_path / f"case{ending}")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((8, 8), np.int16, "a volume of three dimensions"),
        ((8, 8, 1), np.int16, "a volume of three dimensions"),
        ((8, 8, 8, 3), np.int16, "8 x 8 x 8 x 3 voxels"),
        ((8, 8, 8), np.complex64, "one real number"),
    ],
)
def test_other_shapes_and_types_are_refused(tmp_path: Path, shape: tuple[int, ...], dtype: Any, message: str) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones(shape, dtype), np.eye(4)), tmp_path / "case.nii.gz")
    with pytest.raises(UserError, match=message):
        read_volume(tmp_path / "case.nii.gz")


def test_colours_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6, 3), np.uint8), isVector=True), str(tmp_path / "c.nrrd"))
    with pytest.raises(UserError, match="three dimensions"):
        read_volume(tmp_path / "c.nrrd")


def test_scaled_values_and_a_fourth_axis_of_one_are_understood(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.float64).reshape(3, 4, 5, 1) * 0.5 - 7, np.eye(4))
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "case.nii")
    values, grid = read_volume(tmp_path / "case.nii")
    assert grid.size == (3, 4, 5)
    assert values[4, 3, 2] == pytest.approx(59 * 0.5 - 7, abs=1e-3)


def test_a_dicom_series_is_a_volume(tmp_path: Path, ct: np.ndarray[Any, Any]) -> None:
    write_dicom(tmp_path / "patient", ct, GRID)
    values, grid = read_volume(tmp_path / "patient")
    np.testing.assert_array_equal(values, ct)
    assert grid_difference(grid, GRID) is None
    with pytest.raises(UserError, match="no DICOM series"):
        read_volume(tmp_path)


def write_dicom(folder: Path, ct: np.ndarray[Any, Any], grid: Grid) -> None:
    """Write one file a slice."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(ct):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing(grid.spacing)
        position = "\\".join(str(value) for value in (*grid.origin[:2], grid.origin[2] + z * grid.spacing[2]))
        for tag, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.3.4.{z + 1}",
            "0008|0060": "CT",
            "0020|000e": "1.2.3.5",
            "0020|000d": "1.2.3.6",
            "0020|0013": str(z),
            "0020|0032": position,
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        writer.Execute(image)


def test_a_full_disk_is_noticed(tmp_path: Path, ct: np.ndarray[Any, Any]) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="Is the disk full"):
            write_volume(tmp_path / "case.nii.gz", ct, GRID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (12, 11, 9)}, "size 12 x 11 x 9 instead of 12 x 11 x 10 voxels"),
        ({"spacing": (1.5, 1.5, 5.0)}, "spacing 1.5 x 1.5 x 5 instead of 1.5 x 1.5 x 4 mm"),
        ({"origin": (3.0, -7.0, 22.0)}, "2 mm apart"),
        ({"direction": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, "by up to 2"),
        ({"origin": (3.0001, -7.0, 20.0), "spacing": (1.50001, 1.5, 4.0)}, None),
    ],
)
def test_grids_differ_by_more_than_rounding(change: dict[str, Any], message: str | None) -> None:
    difference = grid_difference(Grid(**{**vars(GRID), **change}), GRID)
    assert message == difference if message is None else message in str(difference)


@pytest.mark.parametrize(
    ("name", "expected"), [("a.nii.gz", "a"), ("a.b.nrrd", "a.b"), ("a", "a"), ("a.gipl.gz", "a"), ("a.mhd", "a")]
)
def test_names_lose_their_endings(name: str, expected: str) -> None:
    assert volume_name(Path(name)) == expected
