"""DICOM segmentations, read back by highdicom and compared voxel by voxel and slice by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from gasnet_nnunet.dataset_conversion.dicom_series import DicomVolume, scan
from test_dicom import GRID, SHAPE, ct, lesion, write_series

from gasnet_nnunet import __version__
from gasnet_nnunet.dicom_seg import label_names, write_dicom_seg
from gasnet_nnunet.volumes import Grid

UPSIDE_DOWN = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)
"""Slices stored from above: the reader turns the rows of such a series."""


def series(folder: Path, direction: tuple[float, ...] = GRID.direction) -> DicomVolume:
    write_series(folder, ct(1), grid=Grid(GRID.size, GRID.spacing, GRID.origin, direction))
    found, _ = scan(folder)
    return found[0].volume("case")


def write(path: Path, mask: np.ndarray[Any, Any], volume: DicomVolume, **labels: int) -> Any:
    write_dicom_seg(path, mask, volume, label_names({"background": 0, **labels}), model="GASNetTrainer__x__3d_fullres")
    return highdicom.seg.segread(path)


@pytest.mark.parametrize("direction", [GRID.direction, UPSIDE_DOWN], ids=["from below", "from above"])
def test_voxels_lie_where_the_ct_has_them(tmp_path: Path, direction: tuple[float, ...]) -> None:
    volume = series(tmp_path / "in", direction)
    assert volume.flipped == (direction == UPSIDE_DOWN)
    segmentation = write(tmp_path / "seg.dcm", lesion(), volume, lesion=1)
    # highdicom's own way back into space: an affine in LPS and the voxels, whatever the frames' order.
    read = segmentation.get_volume(combine_segments=True)
    marked = {tuple(np.round((read.affine @ [*index, 1])[:3], 2)) for index in np.argwhere(read.array)}
    rotation = np.reshape(volume.grid.direction, (3, 3)) * np.array(volume.grid.spacing)
    expected = {tuple(np.round(rotation @ index[::-1] + volume.grid.origin, 2)) for index in np.argwhere(lesion())}
    assert marked == expected
    assert len(marked) == lesion().sum()


def test_frames_name_their_slices(tmp_path: Path) -> None:
    volume = series(tmp_path / "in")
    segmentation = write(tmp_path / "seg.dcm", lesion([3, 9]), volume, lesion=1)
    frames = segmentation.PerFrameFunctionalGroupsSequence
    assert len(frames) == 2, "empty frames are left out"
    heights = [float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in frames]
    assert sorted(heights) == pytest.approx([GRID.origin[2] + z * GRID.spacing[2] for z in (3, 9)])
    by_instance = segmentation.get_pixels_by_source_instance(
        [f"1.2.3.1.2.{z + 1}" for z in range(SHAPE[0])],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(by_instance, lesion([3, 9]))


def test_what_a_pacs_reads(tmp_path: Path) -> None:
    volume = series(tmp_path / "in")
    segmentation = write(tmp_path / "seg.dcm", lesion() * 2, volume, **{"ground glass": 1, "consolidation": 2})
    assert (segmentation.PatientID, segmentation.StudyInstanceUID) == ("MRN-0815-1", "1.2.3.1")
    assert segmentation.FrameOfReferenceUID == "1.2.3.1.99"
    assert segmentation.SeriesInstanceUID != "1.2.3.1.2"
    assert segmentation.Modality == "SEG"
    assert segmentation.SegmentationType == "BINARY"
    assert segmentation.number_of_segments == 2
    assert list(segmentation.get_segment_numbers(segment_label="consolidation")) == [2]
    description = segmentation.get_segment_description(2)
    assert description.segmented_property_type == highdicom.sr.CodedConcept("52988006", "SCT", "Lesion")
    assert description.anatomic_regions[0].value == "39607008"
    assert description.algorithm_type.value == "AUTOMATIC"
    (algorithm,) = description.algorithm_identification
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("GASNetTrainer__x__3d_fullres", __version__)
    assert description.tracking_uid
    found = segmentation.get_pixels_by_source_instance(
        [f"1.2.3.1.2.{z + 1}" for z in range(SHAPE[0])], assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(found[..., 1], lesion())
    assert not found[..., 0].any()


def test_nothing_found_is_a_segmentation_too(tmp_path: Path) -> None:
    segmentation = write(tmp_path / "seg.dcm", np.zeros(SHAPE, np.uint8), series(tmp_path / "in"), lesion=1)
    assert not segmentation.pixel_array.any()
