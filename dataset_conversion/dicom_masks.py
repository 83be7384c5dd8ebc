"""Lesion masks of DICOM series: label volumes such as NIfTI, DICOM segmentations and radiotherapy structure sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import Grid, read_volume

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""SOP classes of segmentations: one plane a segment, or one of labels."""
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
OFF_GRID = 0.2
"""Distance in voxels by which a segmentation's frames may lie off the series' voxels: rounding."""
OFF_SLICE = 0.4
"""Distance in slices by which a contour may lie off its slice; half-way it would belong to none."""
CONTOURS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


@dataclass(frozen=True)
class VolumeMask:
    """A mask in an image file, known by a pseudonym, turned to the axes of its series where that takes flips only.

    Args:
        case: The name of its case.
        file: NIfTI or anything else that `read_volume` reads.
        grid: The grid of its series.
    """

    case: str
    file: Path
    grid: Grid

    def __str__(self) -> str:
        return f"{self.case} (mask)"

    def files(self) -> Sequence[Path]:
        """The file."""
        return (self.file,)

    def read(self) -> tuple[NDArray[Any], Grid]:
        """Values (Z, Y, X) and grid.

        Raises:
            UserError: The file cannot be read, see `read_volume`.
        """
        import SimpleITK as sitk

        values, found = read_volume(self.file)
        image = sitk.GetImageFromArray(values.astype(np.uint8) if values.dtype == bool else values)
        image.SetSpacing(found.spacing)
        image.SetOrigin(found.origin)
        image.SetDirection(found.direction)
        # Tools that turn DICOM into NIfTI store the rows of a slice from behind to the front.
        wanted = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.grid.direction)
        image = sitk.DICOMOrient(image, wanted)
        return sitk.GetArrayFromImage(image), Grid.of(image)


@dataclass(frozen=True)
class MaskHeader:
    """What a DICOM mask says about itself.

    Args:
        series: SeriesInstanceUIDs it refers to.
        frame_of_reference: FrameOfReferenceUIDs it is told in.
        structures: Names of its segments or regions of interest by their numbers.
    """

    series: tuple[str, ...]
    frame_of_reference: tuple[str, ...]
    structures: dict[int, str]


def read_mask_header(file: Path) -> MaskHeader | None:
    """What a DICOM mask says about itself; `None` for a file that is no DICOM file.

    Args:
        file: The file.

    Raises:
        UserError: It is a DICOM file of another kind, or lacks what it must have.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        dataset = dcmread(file, stop_before_pixels=True, defer_size="1 MB")
    except InvalidDicomError:
        return None
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Have it exported again.") from None
    sop_class = str(dataset.get("SOPClassUID"))
    try:
        if sop_class in SEGMENTATIONS:
            return MaskHeader(
                tuple(str(item.SeriesInstanceUID) for item in dataset.get("ReferencedSeriesSequence", ())),
                (str(dataset.FrameOfReferenceUID),) if "FrameOfReferenceUID" in dataset else (),
                # 0 is the background of a plane of labels.
                {
                    int(item.SegmentNumber): str(item.SegmentLabel).strip()
                    for item in dataset.SegmentSequence
                    if int(item.SegmentNumber)
                },
            )
        if sop_class == STRUCTURE_SET:
            frames = list(dataset.get("ReferencedFrameOfReferenceSequence", ()))
            studies = [study for frame in frames for study in frame.get("RTReferencedStudySequence", ())]
            return MaskHeader(
                tuple(
                    str(series.SeriesInstanceUID)
                    for study in studies
                    for series in study.get("RTReferencedSeriesSequence", ())
                ),
                tuple(str(frame.FrameOfReferenceUID) for frame in frames),
                {int(roi.ROINumber): str(roi.ROIName).strip() for roi in dataset.StructureSetROISequence},
            )
    except AttributeError as error:
        raise UserError(f"{file} is an incomplete DICOM file: {error}. Have it exported again.") from None
    raise UserError(
        f"{file} is a DICOM file of another kind (Modality {dataset.get('Modality', 'not told')}); a segmentation "
        "(SEG) or a structure set (RTSTRUCT) is expected."
    )


@dataclass(frozen=True)
class DicomMask:
    """Structures of a DICOM segmentation or structure set as one mask on the voxels of their series.

    Args:
        case: The name of its case.
        file: The DICOM file.
        grid: The grid of its series.
        structures: Numbers of the segments or regions of interest that are lesion.
    """

    case: str
    file: Path
    grid: Grid
    structures: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.case} (mask)"

    def files(self) -> Sequence[Path]:
        """The file."""
        return (self.file,)

    def read(self) -> tuple[NDArray[Any], Grid]:
        """1 in the structures (Z, Y, X), uint8, and the series' grid.

        Raises:
            UserError: The file cannot be read, or it does not lie on the voxels of its series.
        """
        from pydicom import dcmread

        mask = np.zeros(self.grid.size[::-1], bool)
        # What pydicom raises for files that are cut off, lack elements, or hold streams that their decoder refuses.
        try:
            dataset = dcmread(self.file)
            if str(dataset.SOPClassUID) in SEGMENTATIONS:
                self._draw_frames(dataset, mask)
            else:
                self._draw_contours(dataset, mask)
        except (OSError, EOFError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.file} cannot be read: {' '.join(str(error).split())}.") from None
        return mask.astype(np.uint8), self.grid

    def _indices(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Voxel indices (X, Y, Z), with fractions, of points in mm (LPS)."""
        direction = np.reshape(self.grid.direction, (3, 3))
        return (points - np.array(self.grid.origin)) @ np.linalg.inv(direction).T / np.array(self.grid.spacing)

    def _draw_frames(self, dataset: Any, mask: NDArray[np.bool_]) -> None:
        from pydicom.pixels import iter_pixels

        labels = dataset.SegmentationType == "LABELMAP"
        shared = dataset.SharedFunctionalGroupsSequence[0]
        wanted = [
            number
            for number, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence)
            if labels or int(_macro(groups, shared, "SegmentIdentification").ReferencedSegmentNumber) in self.structures
        ]
        threshold = 0.5 * int(dataset.get("MaximumFractionalValue", 1))
        frames: Iterator[NDArray[Any]]
        if dataset.BitsAllocated == 1 and dataset.Rows * dataset.Columns % 8:
            # iter_pixels of pydicom 3.0 takes frames to begin with a byte.
            every = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
            frames = (every[number] for number in wanted)
        else:
            frames = iter_pixels(dataset, indices=wanted) if wanted else iter(())
        for number, pixels in zip(wanted, frames, strict=True):
            groups = dataset.PerFrameFunctionalGroupsSequence[number]
            inside = np.isin(pixels, self.structures) if labels else pixels >= max(threshold, 0.5)
            if inside.any():
                z, rows, columns, frame = self._place(groups, shared, inside)
                mask[z, rows, columns] |= frame

    def _place(self, groups: Any, shared: Any, frame: NDArray[Any]) -> tuple[int, slice, slice, NDArray[Any]]:
        """Slice, rows and columns of the series on which a frame lies, and the frame turned to them."""
        origin = np.array(_macro(groups, shared, "PlanePosition").ImagePositionPatient, float)
        cosines = np.array(_macro(groups, shared, "PlaneOrientation").ImageOrientationPatient, float).reshape(2, 3)
        spacing = np.array(_macro(groups, shared, "PixelMeasures").PixelSpacing, float)
        along, down = (frame.shape[1] - 1) * spacing[1] * cosines[0], (frame.shape[0] - 1) * spacing[0] * cosines[1]
        exact = self._indices(np.stack([origin, origin + along + down, origin + along]))
        (x0, y0, z0), (x1, y1, z1), (x2, y2, _) = whole = np.rint(exact).astype(int)
        columns, rows, slices = self.grid.size
        if (
            np.abs(exact - whole).max() > OFF_GRID
            or z0 != z1
            or (abs(x1 - x0) + 1, abs(y1 - y0) + 1) != frame.shape[::-1]
            or (x2, y2) != (x1, y0)
            or whole.min() < 0
            or not (max(x0, x1) < columns and max(y0, y1) < rows and z0 < slices)
        ):
            raise UserError(
                f"{self.file} does not lie on the voxels of its series (a frame at {origin.tolist()} mm). Was it drawn "
                "on another series, or resampled?"
            )
        turned = frame[:: 1 if y1 >= y0 else -1, :: 1 if x1 >= x0 else -1]
        return int(z0), slice(min(y0, y1), max(y0, y1) + 1), slice(min(x0, x1), max(x0, x1) + 1), turned

    def _draw_contours(self, dataset: Any, mask: NDArray[np.bool_]) -> None:
        from skimage.draw import polygon

        for roi in dataset.ROIContourSequence:
            if int(roi.ReferencedROINumber) not in self.structures:
                continue
            drawn = np.zeros_like(mask)
            for contour in roi.get("ContourSequence", ()):
                if contour.ContourGeometricType not in CONTOURS:
                    continue
                points = self._indices(np.array(contour.ContourData, float).reshape(-1, 3))
                z = int(np.rint(points[:, 2].mean()))
                if np.abs(points[:, 2] - z).max() > OFF_SLICE or not 0 <= z < len(mask):
                    raise UserError(
                        f"{self.file} has a contour that lies on no slice of its series (slice "
                        f"{points[:, 2].min():.2f} to {points[:, 2].max():.2f} of 0 to {len(mask) - 1}). Was it drawn "
                        "on another series?"
                    )
                rows, columns = polygon(points[:, 1], points[:, 0], mask.shape[1:])
                # A contour inside another one is a hole.
                drawn[z, rows, columns] ^= True
            mask |= drawn


def _macro(groups: Any, shared: Any, name: str) -> Any:
    """A functional group of a frame, which may be told once for all frames."""
    sequence = f"{name}Sequence"
    return (groups if sequence in groups else shared)[sequence][0]
