"""`gasnet-nnunet lungs`: masks in a raw dataset, by three methods, whole, kept and checked."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_dataset import SPACING, names, patient, write_image, write_raw
from typer.testing import CliRunner

from gasnet_nnunet import lung_masks
from gasnet_nnunet.cli import app
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.lung_masks import LOBES
from gasnet_nnunet.volumes import grid_difference, read_grid, read_volume

CASES = names(labelled=1, diseased=1, healthy=1)


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """A dataset of three phantoms; each CT's shape and spacing are the same."""
    folder = nnunet_folders / "raw" / "Dataset007_Tiny"
    write_raw(folder, CASES)
    return folder


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """The true lungs of the phantoms in a folder, one file a case."""
    for case in CASES:
        write_image(patient(case).lung, tmp_path / "masks" / f"{case}.nii.gz")
    return tmp_path / "masks"


def lungs(*words: str) -> str:
    """Run the command; what it refuses is raised as by `main`."""
    result = CliRunner().invoke(app, ["lungs", "-d", "7", "--num-processes", "1", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def from_folder(masks: Path, *words: str) -> str:
    return lungs("--method", "folder", "--masks", str(masks), *words)


def made(raw: Path, case: str) -> np.ndarray[Any, Any]:
    """A mask that was made, which lies on its CT."""
    path = raw / "lungsTr" / f"{case}.nii.gz"
    assert grid_difference(read_grid(path), read_grid(raw / "imagesTr" / f"{case}_0000.nii.gz")) is None
    return read_volume(path)[0]


def listing(raw: Path) -> list[str]:
    folder = raw / "lungsTr"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def dice(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum()))


def test_threshold_finds_the_lungs_of_every_case(raw: Path) -> None:
    output = lungs("--method", "threshold")
    assert listing(raw) == [f"{case}.nii.gz" for case in sorted(CASES)]
    for case in CASES:
        assert dice(made(raw, case), patient(case).lung) > 0.8
        ml = made(raw, case).sum() * np.prod(SPACING) / 1000
        assert f"{case} │ {ml:.0f} │" in output
    assert "3 masks made, 0 kept." in output
    assert "gasnet-nnunet plan -d 7" in output


def test_a_file_a_case_becomes_zeros_and_ones(raw: Path, masks: Path) -> None:
    lobes = patient(CASES[0]).lung.astype(np.uint8)
    lobes[: len(lobes) // 2] *= 5
    write_image(lobes, masks / f"{CASES[0]}_0000.nii.gz")
    (masks / f"{CASES[0]}.nii.gz").unlink()
    (masks / "notes.txt").write_text("made elsewhere")
    from_folder(masks)
    for case in CASES:
        np.testing.assert_array_equal(made(raw, case), patient(case).lung > 0)


def test_lobes_are_merged(raw: Path, tmp_path: Path) -> None:
    for case in CASES:
        slabs = np.arange(len(patient(case).lung)) % len(LOBES)
        for number, lobe in enumerate(LOBES):
            part = patient(case).lung * (slabs == number)[:, None, None]
            write_image(part.astype(np.uint8), tmp_path / "total" / case / f"{lobe}.nii.gz")
        write_image(np.ones_like(patient(case).lung), tmp_path / "total" / case / "heart.nii.gz")
    from_folder(tmp_path / "total")
    for case in CASES:
        np.testing.assert_array_equal(made(raw, case), patient(case).lung > 0)
    (tmp_path / "total" / CASES[1] / f"{LOBES[3]}.nii.gz").unlink()
    with pytest.raises(UserError, match=rf"{CASES[1]} lacks lung_middle_lobe_right"):
        from_folder(tmp_path / "total", "--overwrite")


def test_masks_that_are_there_are_kept_until_told_otherwise(raw: Path, masks: Path) -> None:
    mine = np.zeros_like(patient(CASES[0]).lung)
    mine[4:8, 10:20, 10:20] = 1
    write_image(mine, raw / "lungsTr" / f"{CASES[0]}.nii.gz")
    output = from_folder(masks)
    np.testing.assert_array_equal(made(raw, CASES[0]), mine)
    assert "2 masks made, 1 kept." in output
    assert "less than 1 l" in output
    assert "0 masks made, 3 kept." in from_folder(masks)
    assert "3 masks made, 0 kept." in from_folder(masks, "--overwrite")
    np.testing.assert_array_equal(made(raw, CASES[0]), patient(CASES[0]).lung > 0)


def test_an_interrupted_run_goes_on_where_it_was(raw: Path, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = lung_masks.write_volume
    written: list[Path] = []

    def interrupted(path: Path, *rest: Any) -> None:
        write(path, *rest)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lung_masks, "write_volume", interrupted)
    result = CliRunner().invoke(app, ["lungs", "-d", "7", "--method", "folder", "--masks", str(masks)])
    assert result.exit_code == 130
    assert len(listing(raw)) == 1, "the second file was not in place yet, and nothing of it is left"
    monkeypatch.setattr(lung_masks, "write_volume", write)
    assert "2 masks made, 1 kept." in from_folder(masks)
    np.testing.assert_array_equal(made(raw, CASES[2]), patient(CASES[2]).lung > 0)


@pytest.mark.parametrize("layout", ["mask", "kept mask"])
def test_another_grid_is_refused_before_anything_is_written(raw: Path, masks: Path, layout: str) -> None:
    image = sitk.GetImageFromArray(patient(CASES[1]).lung)
    image.SetSpacing((7.0, 7.0, 11.0))
    folder = masks if layout == "mask" else raw / "lungsTr"
    folder.mkdir(exist_ok=True)
    sitk.WriteImage(image, folder / f"{CASES[1]}.nii.gz")
    before = listing(raw)
    with pytest.raises(UserError, match=rf"{CASES[1]}: .*spacing 7 x 7 x 11 instead of 7 x 7 x 12.5 mm"):
        from_folder(masks)
    assert listing(raw) == before


def test_strangers_alone_or_missing_masks_alone_are_named(raw: Path, masks: Path) -> None:
    write_image(patient(CASES[0]).lung, masks / "test_9.nii.gz")
    assert "holds test_9.nii.gz, which is no training case" in from_folder(masks)
    (masks / "test_9.nii.gz").unlink()
    (masks / f"{CASES[2]}.nii.gz").unlink()
    (raw / "lungsTr" / f"{CASES[2]}.nii.gz").unlink()
    output = from_folder(masks)
    assert f"there is no mask of {CASES[2]} in" in output
    assert "2 kept" in output


def test_a_misspelt_mask_is_refused(raw: Path, masks: Path) -> None:
    (masks / f"{CASES[2]}.nii.gz").rename(masks / "Healthy0.nii.gz")
    with pytest.raises(UserError, match=rf"holds Healthy0\.nii\.gz, .* there is no mask of {CASES[2]}\."):
        from_folder(masks)
    assert listing(raw) == []


def test_one_broken_mask_does_not_stop_the_others(raw: Path, masks: Path) -> None:
    path = masks / f"{CASES[1]}.nii.gz"
    noise = np.random.default_rng(0).integers(0, 200, patient(CASES[1]).lung.shape)
    write_image(noise.astype(np.uint8), path)
    with pytest.raises(UserError, match=rf"{CASES[1]}: .* holds 199 values above 0"):
        from_folder(masks)
    assert listing(raw) == [f"{CASES[2]}.nii.gz", f"{CASES[0]}.nii.gz"]
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=rf"{CASES[1]}: .*damaged or incomplete"):
        from_folder(masks)


def test_an_empty_mask_is_never_written(raw: Path, masks: Path) -> None:
    write_image(np.zeros_like(patient(CASES[0]).lung), masks / f"{CASES[0]}.nii.gz")
    with pytest.raises(UserError, match=f"No lungs were found in {CASES[0]}"):
        from_folder(masks)
    assert len(listing(raw)) == 2
    write_image(np.zeros_like(patient(CASES[0]).lung), raw / "lungsTr" / f"{CASES[0]}.nii.gz")
    with pytest.raises(UserError, match=rf"lungsTr/{CASES[0]}\.nii\.gz marks no voxel"):
        from_folder(masks)


def test_values_that_are_not_hounsfield_units_are_refused(raw: Path) -> None:
    grey = np.clip((patient(CASES[0]).ct + 1250) / 6, 0, 255)
    write_image(grey.astype(np.uint8), raw / "imagesTr" / f"{CASES[0]}_0000.nii.gz")
    with pytest.raises(UserError, match=rf"{CASES[0]}: .* runs from .* Hounsfield units are expected"):
        lungs("--method", "threshold")
    assert len(listing(raw)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "magic"], "--method is 'magic'; expected threshold, lungmask, folder"),
        (["--method", "folder"], "belong together"),
        (["--method", "threshold", "--masks", "."], "belong together"),
        (["--method", "folder", "--masks", "nowhere"], "there is no nowhere"),
    ],
)
def test_options_that_do_not_fit_are_refused(raw: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lungs(*words)


def test_a_mask_in_another_format_is_named(raw: Path, masks: Path) -> None:
    write_image(patient(CASES[0]).lung, raw / "lungsTr" / f"{CASES[0]}.nrrd")
    with pytest.raises(UserError, match=rf"{CASES[0]}\.nrrd should be named {CASES[0]}\.nii\.gz"):
        from_folder(masks)


class Network:
    """In place of lungmask's: right and left half of what is dark, or a failure."""

    failure: Exception | None = None

    def __init__(self, modelname: str, tqdm_disable: bool) -> None:
        assert modelname == "R231"
        if isinstance(self.failure, OSError):
            raise self.failure

    def apply(self, image: sitk.Image) -> np.ndarray[Any, Any]:
        assert image.GetSpacing() == SPACING[::-1]
        if self.failure:
            raise self.failure
        return (sitk.GetArrayFromImage(image) < -500).astype(np.uint8) * 2


@pytest.fixture
def lungmask(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The package lungmask without its weights, which cannot be fetched in a test."""
    module = types.ModuleType("lungmask")
    module.LMInferer = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lungmask", module)
    monkeypatch.setattr(Network, "failure", None)
    lung_masks._network.cache_clear()
    return module


def test_the_network_gets_the_ct_with_its_geometry(raw: Path, lungmask: types.ModuleType) -> None:
    lungs("--method", "lungmask")
    for case in CASES:
        np.testing.assert_array_equal(made(raw, case), read_volume(raw / "imagesTr" / f"{case}_0000.nii.gz")[0] < -500)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError("<urlopen error no route to host>"), "could not load its network R231: OSError: <urlopen error no"),
        (RuntimeError("CUDA out of memory"), f"{CASES[0]}: lungmask could not segment it: RuntimeError: CUDA out of"),
    ],
)
def test_a_failing_network_is_one_sentence(
    raw: Path, lungmask: types.ModuleType, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    monkeypatch.setattr(Network, "failure", failure)
    with pytest.raises(UserError, match=message):
        lungs("--method", "lungmask")
    assert listing(raw) == []


def test_without_the_package_its_extra_is_named(
    raw: Path, lungmask: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lungmask", None)
    with pytest.raises(UserError, match=r"pip install 'gasnet-nnunet\[lungmask\]'"):
        lungs("--method", "lungmask")


def test_the_real_package_has_what_is_called() -> None:
    package = pytest.importorskip("lungmask")
    assert {"modelname", "tqdm_disable"} <= set(inspect.signature(package.LMInferer).parameters)
    assert list(inspect.signature(package.LMInferer.apply).parameters) == ["self", "image"]
