"""A mask as a DICOM segmentation of the series it was found in, so that a PACS shows it on the CT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gasnet_nnunet import __version__
from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from gasnet_nnunet.dataset_conversion.dicom_series import DicomVolume

MANUFACTURER = "gasnet_nnunet"
SERIES_NUMBER = 9000
"""Added to the number of the CT's series, far from those of the scanner."""
LESION = ("52988006", "SCT", "Lesion")
ABNORMAL_STRUCTURE = ("49755003", "SCT", "Morphologically abnormal structure")
LUNG = ("39607008", "SCT", "Lung")
ARTIFICIAL_INTELLIGENCE = ("123110", "DCM", "Artificial Intelligence")
RED_LAB = (53.0, 80.0, 67.0)
"""Recommended colour of lesions, CIELab."""


def label_names(labels: Mapping[str, Any]) -> dict[int, str]:
    """Name of each label value above 0 that a mask can hold, out of `labels` of a dataset.json.

    A value of several regions takes the name of the smallest.

    Examples:
        >>> label_names({"background": 0, "lesion": [1, 2], "consolidation": 2, "ignore": 3})
        {1: 'lesion', 2: 'consolidation'}
    """
    sizes: dict[int, tuple[int, str]] = {}
    for name, values in labels.items():
        values = values if isinstance(values, (list, tuple)) else [values]
        for value in values:
            if name != "ignore" and value > 0 and len(values) < sizes.get(int(value), (1 << 30, ""))[0]:
                sizes[int(value)] = (len(values), name)
    return {value: name for value, (_, name) in sorted(sizes.items())}


def write_dicom_seg(
    path: Path,
    mask: NDArray[Any],
    series: DicomVolume,
    names: Mapping[int, str],
    *,
    model: str,
    lungs: bool = True,
) -> None:
    """Write a mask as a DICOM SEG object: one binary segment a label, its frames on the slices of the series.

    Patient, study and frame of reference are those of the series. Frames without a voxel are left out, as usual.

    Args:
        path: File to write.
        mask: Labels (Z, Y, X) on the grid of the series.
        series: The series that was read.
        names: Name of each label value.
        model: Name of the model, which identifies the algorithm.
        lungs: Whether the lesions are the lungs'.

    Raises:
        UserError: The series lacks what a segmentation has to repeat of it.
    """
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    sources = [dcmread(file, stop_before_pixels=True) for file in series.slices]
    # The volume's rows may run against the stored ones, see DicomSeries.volume.
    stored = mask[:, :, ::-1] if series.flipped else mask
    numbers = np.zeros(int(max(names)) + 1, np.uint8)
    numbers[list(names)] = np.arange(1, len(names) + 1)
    algorithm = AlgorithmIdentificationSequence(
        name=model, family=CodedConcept(*ARTIFICIAL_INTELLIGENCE), version=__version__, source=MANUFACTURER
    )
    segments = [
        SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=CodedConcept(*ABNORMAL_STRUCTURE),
            segmented_property_type=CodedConcept(*LESION),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=generate_uid(),
            tracking_id=f"{MANUFACTURER} {name}"[:64],
            anatomic_regions=[CodedConcept(*LUNG)] if lungs else None,
            display_color=CIELabColor(*RED_LAB) if number == 1 else None,
        )
        for number, name in enumerate(names.values(), start=1)
    ]
    try:
        segmentation = Segmentation(
            source_images=sources,
            pixel_array=numbers[stored],
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER + int(sources[0].get("SeriesNumber") or 0),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=model[:64],
            software_versions=__version__,
            device_serial_number="0",
            content_label="LESIONS",
            content_description="Lesions found by GASNet"[:64],
        )
    except (AttributeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{series}: no DICOM segmentation can be made of its headers: {reason}") from None
    segmentation.SeriesDescription = f"{model} lesions"[:64]
    segmentation.save_as(path)
