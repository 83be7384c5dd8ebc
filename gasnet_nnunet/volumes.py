"""Reading and writing volumes so that a fault is found where it lies.

ITK's NIfTI reader, which nnU-Net uses, fills what a truncated file lacks with zeros and turns NaN into 0, and its
writer does not notice a full disk. NIfTI files are therefore read by nibabel wherever they are checked.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.errors import UserError

NIFTI_ENDINGS = (".nii.gz", ".nii")
HIGHEST_AIR = -500.0
"""A chest CT in HU has air, near -1000, in and around the patient."""
SPACING_TOLERANCE = 1e-3
"""Relative difference of spacings that is rounding."""
DIRECTION_TOLERANCE = 1e-3
"""Difference of direction cosines that is rounding."""
ORIGIN_TOLERANCE = 0.1
"""Difference of origins, in voxels, that is rounding."""


@dataclass(frozen=True)
class Grid:
    """Where a volume lies, in ITK's order (X, Y, Z).

    Args:
        size: Voxels along each axis.
        spacing: Edges of a voxel in mm.
        origin: Centre of the first voxel in mm (LPS).
        direction: Direction cosines, row by row.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: Any) -> Grid:
        """The grid of a SimpleITK image or of a SimpleITK reader that has read the header."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def grid_difference(found: Grid, expected: Grid) -> str | None:
    """Say in which respect two grids differ and by how much; `None` where they agree up to rounding.

    Examples:
        >>> grid = Grid((4, 4, 4), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        >>> grid_difference(Grid((4, 4, 3), grid.spacing, grid.origin, grid.direction), grid)
        'size 4 x 4 x 3 instead of 4 x 4 x 4 voxels'
    """
    if found.size != expected.size:
        return f"size {_by(found.size)} instead of {_by(expected.size)} voxels"
    if any(abs(a / b - 1) > SPACING_TOLERANCE for a, b in zip(found.spacing, expected.spacing, strict=True)):
        return f"spacing {_by(found.spacing)} instead of {_by(expected.spacing)} mm"
    turned = max(abs(a - b) for a, b in zip(found.direction, expected.direction, strict=True))
    if turned > DIRECTION_TOLERANCE:
        return f"direction {_list(found.direction)} instead of {_list(expected.direction)} (by up to {turned:.3g})"
    shift = math.dist(found.origin, expected.origin)
    if shift > ORIGIN_TOLERANCE * min(expected.spacing):
        return f"origin {_list(found.origin)} instead of {_list(expected.origin)} mm ({shift:.3g} mm apart)"
    return None


def read_grid(path: Path) -> Grid:
    """Read where a volume lies, without its values where the format allows.

    Raises:
        UserError: The file is no image.
    """
    import SimpleITK as sitk

    if path.is_dir():
        return Grid.of(_read_series(path))
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as an image: {_reason(error)}") from None
    return Grid.of(reader)


def read_volume(path: Path) -> tuple[NDArray[Any], Grid]:
    """Read a volume of one finite number a voxel, whole or not at all.

    Args:
        path: An image file, or a folder that holds one DICOM series.

    Returns:
        Values (Z, Y, X) in the type they are stored in, and the grid.

    Raises:
        UserError: The file is no image, truncated, not three-dimensional, has several numbers a voxel, NaN or
            infinity.
    """
    if path.name.endswith(NIFTI_ENDINGS):
        grid = read_grid(path)
        array = read_nifti_values(path)
    else:
        array, grid = _read_itk(path)
    if array.dtype.kind not in "iufb":
        raise UserError(f"{path} has {array.dtype} voxels; one real number a voxel is expected.")
    if array.ndim != 3 or 1 in array.shape:
        raise UserError(f"{path} is {_by(array.shape[::-1])} voxels; a volume of three dimensions is expected.")
    if array.dtype.kind == "f":
        broken = array.size - int(np.count_nonzero(np.isfinite(array)))
        if broken:
            raise UserError(f"{path} has {broken} voxels that are NaN or infinite. Replace them, e.g. by -1024 HU.")
    return array, grid


def read_nifti_values(path: Path) -> NDArray[Any]:
    """Values (Z, Y, X) of a NIfTI file, all of them or an error.

    Raises:
        UserError: The file is no NIfTI file, truncated or damaged.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        kind: Any = type(nibabel.load(path))
        # To the end of the stream, because the checksum stands there.
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            array = np.asanyarray(kind.from_bytes(stream.read()).dataobj)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise UserError(f"{path} is damaged or incomplete: {_reason(error)}") from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.T


def write_volume(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a volume, compressed, and make sure that all of it reached the disk.

    Args:
        path: File to write.
        array: Values (Z, Y, X).
        grid: Where it lies.

    Raises:
        UserError: The file could not be written whole, for instance because the disk is full.
    """
    import SimpleITK as sitk

    try:
        sitk.WriteImage(as_image(array, grid), str(path), True)
        written, _ = read_volume(path)
    except (RuntimeError, UserError) as error:
        raise UserError(f"{path} could not be written. Is the disk full? {_reason(error)}") from None
    if not np.array_equal(written, array):
        raise UserError(f"{path} could not be written: what was read back differs. Is the disk full?")


def as_image(array: NDArray[Any], grid: Grid) -> Any:
    """Values (Z, Y, X) on a grid, as a SimpleITK image."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def volume_name(path: Path) -> str:
    """Name of a volume: its file name without the ending, or the name of a DICOM series' folder.

    Examples:
        >>> volume_name(Path("scans/case.7.nii.gz"))
        'case.7'
    """
    if path.is_dir():
        return path.name
    stem = path.name.removesuffix(".gz")
    return stem[: -len(Path(stem).suffix)] if Path(stem).suffix else stem


def _read_itk(path: Path) -> tuple[NDArray[Any], Grid]:
    import SimpleITK as sitk

    if path.is_dir():
        image = _read_series(path)
    else:
        try:
            image = sitk.ReadImage(str(path))
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read as an image: {_reason(error)}") from None
    return sitk.GetArrayFromImage(image), Grid.of(image)


def _read_series(folder: Path) -> Any:
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"{len(series)} DICOM series" if series else "no DICOM series"
        raise UserError(f"{folder} holds {found}; a folder for each case with one series in it is expected.")
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series[0]))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"The DICOM series in {folder} cannot be read: {_reason(error)}") from None
    # ITK lays the slices evenly and leaves it at a warning.
    if image.HasMetaDataKey("ITK_non_uniform_sampling_deviation"):
        raise UserError(
            f"The slices of the DICOM series in {folder} are not evenly spaced: some are missing, or several series "
            "are mixed. Export the series again."
        )
    return image


def _reason(error: BaseException) -> str:
    """The last line of an error, where ITK and zlib say what the matter is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].removeprefix("ITK ERROR: ").removeprefix("sitk::ERROR: ")


def _by(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)


def _list(numbers: tuple[float, ...]) -> str:
    return f"({', '.join(f'{number:.5g}' for number in numbers)})"
