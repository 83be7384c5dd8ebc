from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from gasnet_nnunet.lungs import segment_lungs
from gasnet_nnunet.phantom import Phantom, make_phantom, write_phantoms

SIZE = (32, 84, 84)
SPACING = (6.25, 4.0, 4.0)


def patient(seed: int, kind: str) -> Phantom:
    return make_phantom(np.random.default_rng(seed), kind, SIZE, SPACING)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["labelled", "diseased", "healthy"])
def test_patient_is_a_chest(kind: str) -> None:
    phantom = patient(3, kind)
    assert phantom.ct.shape == phantom.lesion.shape == phantom.lung.shape == SIZE
    assert (phantom.ct.dtype, phantom.lesion.dtype, phantom.lung.dtype) == (np.int16, np.uint8, np.uint8)
    litres = phantom.lung.sum() * np.prod(SPACING) / 1e6
    assert 1.5 < litres < 4.5
    assert phantom.lung[:, :, : SIZE[2] // 2].any()
    assert phantom.lung[:, :, SIZE[2] // 2 :].any()
    assert not phantom.lung[:, :, SIZE[2] // 2].any(), "the mediastinum parts the lungs"
    assert np.median(phantom.ct[phantom.lung == 1]) < -700
    assert phantom.ct[0, 0, 0] < -900
    assert (phantom.ct > 200).mean() > 0.003, "there is bone"
    assert not (phantom.lesion & ~phantom.lung).any()
    assert phantom.lesion.any() == (kind != "healthy")


def test_same_seed_same_patient_other_seed_another() -> None:
    assert np.array_equal(patient(5, "diseased").ct, patient(5, "diseased").ct)
    assert not np.array_equal(patient(5, "diseased").lung, patient(6, "diseased").lung)


def test_labelled_patients_show_middling_density_only_and_others_all_there_is() -> None:
    def median_in_lesions(kind: str) -> np.ndarray:
        medians = []
        for seed in range(6):
            phantom = patient(seed, kind)
            components, number = ndimage.label(phantom.lesion)
            inner = ndimage.binary_erosion(phantom.lesion) * components
            medians += [
                np.median(phantom.ct[inner == label]) for label in range(1, number + 1) if (inner == label).any()
            ]
        return np.array(medians)

    labelled, others = median_in_lesions("labelled"), median_in_lesions("diseased")
    assert labelled.max() < -50
    assert labelled.min() > -650
    assert (others > 0).any(), "consolidation"
    assert (others < -450).any(), "ground glass"


def test_lesions_are_denser_than_the_lung_but_density_alone_does_not_find_them() -> None:
    phantom = patient(2, "diseased")
    lesion, lung = phantom.lesion == 1, (phantom.lung == 1) & (phantom.lesion == 0)
    assert np.median(phantom.ct[lesion]) > np.median(phantom.ct[lung]) + 200
    best = max(
        2 * (lesion & found).sum() / (lesion.sum() + found.sum())
        for found in ((phantom.ct > threshold) & (lesion | lung) for threshold in range(-800, 0, 50))
    )
    assert best < 0.9


@pytest.mark.parametrize("kind", ["diseased", "healthy"])
def test_lungs_are_found_by_thresholding(kind: str) -> None:
    phantom = patient(1, kind)
    found = segment_lungs(phantom.ct, SPACING)
    dice = 2 * (found & (phantom.lung == 1)).sum() / (found.sum() + phantom.lung.sum())
    assert dice > 0.9


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="labelled, diseased or healthy"):
        patient(0, "ill")


def test_folders_hold_what_conversion_takes(tmp_path: Path) -> None:
    write = partial(write_phantoms, seed=4, size=(10, 28, 28), spacing=(20, 12, 12))
    write(tmp_path, labelled=1, diseased=2, healthy=1, test_diseased=1, test_healthy=1)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.nii.gz"))
    assert files == [
        "diseased/ct/diseased_000.nii.gz",
        "diseased/ct/diseased_001.nii.gz",
        "healthy/ct/healthy_000.nii.gz",
        "labelled/ct/labelled_000.nii.gz",
        "labelled/mask/labelled_000.nii.gz",
        *(f"test/{name}/test_{kind}_000.nii.gz" for name in ("ct", "lung", "mask") for kind in ("diseased", "healthy")),
    ]
    image = sitk.ReadImage(str(tmp_path / "test/ct/test_diseased_000.nii.gz"))
    assert image.GetSize() == (28, 28, 10)
    assert image.GetSpacing() == (12, 12, 20)
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "test/mask/test_diseased_000.nii.gz"))).any()
    assert not sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "test/mask/test_healthy_000.nii.gz"))).any()
    first = sitk.GetArrayFromImage(image)
    write(tmp_path / "more", labelled=3, diseased=0, healthy=0, test_diseased=1, test_healthy=0)
    assert np.array_equal(
        first, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "more/test/ct/test_diseased_000.nii.gz")))
    )
