"""`gasnet-nnunet restore` on folders of CTs: what it writes, keeps, refuses and survives."""

from __future__ import annotations

import csv
import gzip
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import SimpleITK as sitk
import tiny_dataset
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from test_dicom import write_series
from test_inference import use_folders
from typer.testing import CliRunner

from gasnet_nnunet.cli import app
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.new_cts import Case, find_cases
from gasnet_nnunet.restoration import burden_csv
from gasnet_nnunet.volumes import Grid

VOLUMES = ("probability", "restored", "generated", "difference")
UNIT = tuple(np.eye(3).ravel().tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as environment:
        return tiny_dataset.write_model(use_folders(environment, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two CTs, in the folder `out` beside the CTs in `in`."""
    folder = tmp_path_factory.mktemp("done")
    write_ct(folder / "in" / "diseased_7_0000.nii.gz")
    write_ct(folder / "in" / "healthy_7.nrrd", "healthy_7")
    assert run("-i", folder / "in", "-o", folder / "out", "-m", model)[0] == ""
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "done"))


def write_ct(path: Path, name: str = "diseased_7", values: np.ndarray[Any, Any] | None = None) -> None:
    tiny_dataset.write_image(tiny_dataset.patient(name).ct if values is None else values, path)


def run(*words: object) -> tuple[str, str]:
    """The error's message, empty if there is none, and what was printed."""
    result = CliRunner().invoke(app, ["restore", *map(str, words), "-device", "cpu"], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, UserError):
        raise result.exception
    return str(result.exception or ""), result.output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files_of(case: str) -> set[str]:
    return {f"{case}.nii.gz", f"{case}_report.html", *(f"{case}_{volume}.nii.gz" for volume in VOLUMES)}


def read(path: Path) -> np.ndarray[Any, Any]:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


def test_everything_of_a_case_is_written(done: Path) -> None:
    out = done / "out"
    assert names(out) == {"burden.csv", "burden.json", "report.html", *files_of("diseased_7"), *files_of("healthy_7")}
    ct = sitk.ReadImage(done / "in" / "diseased_7_0000.nii.gz")
    for volume in ("", *(f"_{name}" for name in VOLUMES)):
        image = sitk.ReadImage(out / f"diseased_7{volume}.nii.gz")
        assert (image.GetSize(), image.GetSpacing(), image.GetDirection()) == (
            ct.GetSize(),
            ct.GetSpacing(),
            ct.GetDirection(),
        )
    values, restored = sitk.GetArrayFromImage(ct), read(out / "diseased_7_restored.nii.gz")
    probability = read(out / "diseased_7_probability.nii.gz")
    np.testing.assert_array_equal(read(out / "diseased_7_difference.nii.gz"), values - restored)
    sure = np.abs(probability - 0.6) > 1e-3
    np.testing.assert_array_equal((read(out / "diseased_7.nii.gz") > 0)[sure], (probability > 0.6)[sure])
    content = json.loads((out / "burden.json").read_text(encoding="utf-8"))
    assert content["model"]["Model"] == "GASNetTrainer__nnUNetPlans__3d_fullres"
    burden = content["cases"]["diseased_7"]
    voxel_ml = np.prod(tiny_dataset.SPACING) / 1000
    assert burden["lesion_ml"] == pytest.approx((read(out / "diseased_7.nii.gz") > 0).sum() * voxel_ml)
    lung = tiny_dataset.patient("diseased_7").lung > 0
    assert 0.8 * lung.sum() * voxel_ml < burden["lung_ml"] <= (lung.size * voxel_ml)
    assert any("lie outside the lungs" in warning for warning in burden["warnings"]), "it learnt nothing"
    with (out / "burden.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["diseased_7", "healthy_7"]
    assert float(rows[0]["lesion_ml"]) == pytest.approx(burden["lesion_ml"], abs=1e-4)
    assert "diseased_7_report.html" in (out / "report.html").read_text(encoding="utf-8")
    page = (out / "diseased_7_report.html").read_text(encoding="utf-8")
    for name, value in {**content["model"], "Restored from M^": "0.05"}.items():
        assert f'<th scope="row">{name}</th><td class="left">{value}</td>' in page


def test_what_is_there_is_kept(copied: Path, model: Path) -> None:
    out = copied / "out"
    (out / "healthy_7_restored.nii.gz").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    problem, printed = run("-i", copied / "in", "-o", out, "-m", model)
    assert problem == ""
    assert "1 done, 1 kept, 0 failed." in printed
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {
        *files_of("healthy_7"),
        "burden.json",
        "burden.csv",
        "report.html",
    }


def test_results_of_another_model_are_not_mixed(copied: Path, model: Path) -> None:
    command = ("-i", copied / "in" / "diseased_7_0000.nii.gz", "-o", copied / "out", "-m", model, "--no-report")
    assert "results of another model (Restored from M^: 0.05 then, 0.9 now)" in run(*command, "--threshold", 0.9)[0]
    before = read(copied / "out" / "diseased_7_restored.nii.gz")
    assert run(*command, "--threshold", 0.9, "--overwrite")[0] == ""
    assert (before != read(copied / "out" / "diseased_7_restored.nii.gz")).any()


def test_masks_alone_are_not_mixed_either(copied: Path, model: Path, tmp_path: Path) -> None:
    """A training under the same name is another model, and its checkpoint tells."""
    out, masks, case = copied / "out", tmp_path / "masks", copied / "in" / "healthy_7.nrrd"
    again = shutil.copytree(model, tmp_path / "again" / model.name)
    content = torch.load(again / "fold_0" / "checkpoint_final.pth", weights_only=False)
    torch.save({**content, "current_epoch": 7}, again / "fold_0" / "checkpoint_final.pth")
    assert "1 kept" in run("-i", case, "-o", out, "-m", model, "--mask-only")[1]
    before = (out / "healthy_7.nii.gz").stat().st_mtime_ns
    for words in ((), ("--mask-only",), ("--mask-only", "--overwrite")):
        assert "results of another model (Checksum: sha256" in run("-i", case, "-o", out, "-m", again, *words)[0]
    assert (out / "healthy_7.nii.gz").stat().st_mtime_ns == before
    for state in ("1 done", "0 done, 1 kept"):
        assert state in run("-i", case, "-o", masks, "-m", model, "--mask-only")[1]
    assert "another model" in run("-i", case, "-o", masks, "-m", again, "--mask-only")[0]
    assert "1 done" in run("-i", case, "-o", masks, "-m", again, "--mask-only", "--overwrite")[1]


def test_index_lists_what_was_done_before_and_a_lost_one_is_told(copied: Path, model: Path) -> None:
    out = copied / "out"
    command = ("-i", copied / "in" / "healthy_7.nrrd", "-o", out, "-m", model)
    assert run(*command)[0] == ""
    assert all(
        f"{case}_report.html" in (out / "report.html").read_text(encoding="utf-8")
        for case in ("diseased_7", "healthy_7")
    )
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    problem, printed = run(*command)
    assert "report.html cannot be written: Is a directory" in problem
    assert "0 done, 1 kept, 0 failed." in printed


def test_what_breaks_nnunet_does_not_stop_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ct(tmp_path / "in" / "odd.nii.gz", values=tiny_dataset.patient("diseased_7").ct[:5])
    write_ct(tmp_path / "in" / "ok.nii.gz")
    preprocess = DefaultPreprocessor.run_case_npy

    def break_down(self: Any, data: Any, *arguments: Any) -> Any:
        return 1 / 0 if data.shape[1] == 5 else preprocess(self, data, *arguments)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", break_down)
    problem, printed = run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--mask-only")
    assert problem == "odd: ZeroDivisionError: division by zero"
    assert "1 done, 0 kept, 1 failed (odd)." in printed
    assert names(tmp_path / "out") == {"ok.nii.gz", "masks.json"}


def test_broken_cts_do_not_stop_the_others(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    ct = tiny_dataset.patient("diseased_7").ct
    write_ct(folder / "a.nii.gz")
    whole = gzip.decompress((folder / "a.nii.gz").read_bytes())
    (folder / "a.nii.gz").write_bytes(gzip.compress(whole[: len(whole) // 2]))
    holes = ct.astype(np.float32)
    holes[3, 4:6, 5] = np.nan
    write_ct(folder / "b_0000.nii.gz", values=holes)
    write_ct(folder / "c_0000.nii.gz")
    write_ct(folder / "c_0001.nii.gz")
    write_ct(folder / "d.mha", values=np.zeros_like(ct))
    write_ct(folder / "ok_2024.nii")
    problem, printed = run("-i", folder, "-o", out, "-m", model)
    assert "4 problems" in problem
    assert "c: the model takes 1 channel, found 2: c_0000.nii.gz, c_0001.nii.gz" in problem
    assert "a: " in problem
    assert "a.nii.gz is damaged or incomplete" in problem
    assert "b_0000.nii.gz has 2 voxels that are NaN or infinite" in problem
    assert "d: The CT is 0 throughout" in problem
    assert "1 done, 0 kept, 3 failed (a, b, d)." in printed
    assert names(out) == {"burden.csv", "burden.json", "report.html", *files_of("ok_2024")}
    assert "damaged or incomplete" in (out / "report.html").read_text(encoding="utf-8")


def test_ct_without_lungs_is_told_of_every_time(model: Path, tmp_path: Path) -> None:
    values = np.full(tiny_dataset.SIZE, -1000, np.int16)
    values[:, 10:-10, 10:-10] = 40
    write_ct(tmp_path / "knee.nii.gz", values=values)
    for state in ("done", "kept"):
        problem, printed = run("-i", tmp_path / "knee.nii.gz", "-o", tmp_path / "out", "-m", model)
        assert problem.startswith("knee: no lungs were found in it")
        assert f"1 {state}" in printed
    burden = json.loads((tmp_path / "out" / "burden.json").read_text(encoding="utf-8"))["cases"]["knee"]
    assert burden["lesion_percent"] is None
    assert burden["lesion_ml"] > 0


def test_lung_masks_of_the_user_win(model: Path, tmp_path: Path) -> None:
    write_ct(tmp_path / "ct.nii.gz")
    mask = np.zeros(tiny_dataset.SIZE, np.uint8)
    mask[4:8, 10:20, 10:20] = 2
    tiny_dataset.write_image(mask, tmp_path / "lungs" / "ct.nii.gz")
    command = ("-i", tmp_path / "ct.nii.gz", "-o", tmp_path / "out", "-m", model, "--no-report", "--lungs")
    assert run(*command, tmp_path / "lungs")[0] == ""
    assert names(tmp_path / "out") == {"burden.csv", "burden.json", *files_of("ct")} - {"ct_report.html"}
    found = read(tmp_path / "out" / "ct.nii.gz") > 0
    burden = json.loads((tmp_path / "out" / "burden.json").read_text(encoding="utf-8"))["cases"]["ct"]
    lung_ml = np.array([(mask > 0).sum(), ((mask > 0) | found).sum()]) * np.prod(tiny_dataset.SPACING) / 1000
    assert lung_ml[0] <= burden["lung_ml"] <= lung_ml[1]
    assert "none named like a case" not in run(*command, tmp_path / "lungs")[0]
    (tmp_path / "empty").mkdir()
    assert "holds no mask named like a case, e.g. ct.nii.gz" in run(*command, tmp_path / "empty")[0]
    tiny_dataset.write_image(mask[:-1], tmp_path / "lungs" / "ct.nii.gz")
    assert "does not lie on the grid of its CT: size" in run(*command, tmp_path / "lungs", "--overwrite")[0]


def test_masks_alone(model: Path, done: Path, tmp_path: Path) -> None:
    assert run("-i", done / "in", "-o", tmp_path / "out", "-m", model, "--mask-only")[0] == ""
    assert names(tmp_path / "out") == {"diseased_7.nii.gz", "healthy_7.nii.gz", "masks.json"}
    np.testing.assert_array_equal(read(tmp_path / "out" / "healthy_7.nii.gz"), read(done / "out" / "healthy_7.nii.gz"))


def test_model_without_g_gives_mask_and_burden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = use_folders(monkeypatch, tmp_path)
    tiny_dataset.write_model(root, "SupervisedBaselineTrainer")
    write_ct(tmp_path / "ct.nii.gz")
    command = ("-i", tmp_path / "ct.nii.gz", "-o", tmp_path / "out", "-d", 501, "-p", "nnUNetPlans")
    command += ("-tr", "SupervisedBaselineTrainer", "--no-report")
    problem, _ = run(*command)
    assert "Nothing was restored: " in problem
    assert "holds the segmenter alone" in problem
    assert names(tmp_path / "out") == {"burden.csv", "burden.json", "ct.nii.gz", "ct_probability.nii.gz"}
    problem, printed = run(*command, "--no-restored")
    assert problem == ""
    assert "1 kept" in printed


def test_full_disk_leaves_nothing_half_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stops a writer half-way, as a full disk does."""
    write_ct(tmp_path / "in" / "a.nii.gz")
    write_ct(tmp_path / "in" / "b.nii.gz")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        problem, _ = run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--no-report")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "2 problems with the CTs" in problem
    for case in ("a", "b"):
        assert f"{case}: " in problem
    assert "could not be written. Is the disk full?" in problem
    assert names(tmp_path / "out") == set()


def test_dicom_series_get_a_segmentation(model: Path, tmp_path: Path) -> None:
    ct = tiny_dataset.patient("diseased_7").ct
    grid = Grid(ct.shape[::-1], tiny_dataset.SPACING[::-1], (-5.0, 4.0, 100.0), (1.0, 0, 0, 0, -1.0, 0, 0, 0, -1.0))
    write_series(tmp_path / "in" / "patient", ct, grid=grid, thickness=12.5)
    write_series(tmp_path / "in" / "patient", ct[:, :4, :4], number=1, change=lambda d, z: setattr(d, "Modality", "SR"))
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--no-report")[0] == ""
    assert names(tmp_path / "out") == {
        "burden.csv",
        "burden.json",
        "patient_seg.dcm",
        *files_of("patient") - {"patient_report.html"},
    }
    mask = sitk.ReadImage(tmp_path / "out" / "patient.nii.gz")
    read_back = highdicom.seg.segread(tmp_path / "out" / "patient_seg.dcm").get_volume(combine_segments=True)
    # The same physical places in NIfTI and DICOM.
    marked = np.argwhere(read_back.array)
    places = (read_back.affine @ np.c_[marked, np.ones(len(marked))].T)[:3].T
    indices = [mask.TransformPhysicalPointToIndex(place.tolist()) for place in places[::97]]
    assert all(mask[index] for index in indices)
    assert len(marked) == (sitk.GetArrayFromImage(mask) > 0).sum()


def test_cts_are_found_by_any_name(tmp_path: Path) -> None:
    for name in ("ct.nii.gz", "p_0000.nii.gz", "p_0001.nii.gz", "scan_0007.nrrd", ".hidden.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    two, problems = find_cases(tmp_path, 2)
    assert two == [Case("p", (tmp_path / "p_0000.nii.gz", tmp_path / "p_0001.nii.gz"))]
    assert [problem.partition(":")[0] for problem in problems] == ["ct", "scan_0007"]
    assert "Expected ct_0000.nii.gz to ct_0001.nii.gz" in problems[0]
    one, problems = find_cases(tmp_path, 1)
    assert [case.name for case in one] == ["ct", "scan_0007"]
    assert len(problems) == 1
    assert find_cases(tmp_path / "p_0000.nii.gz", 2)[0] == two
    assert find_cases(tmp_path / "ct.nii.gz", 1)[0] == [Case("ct", (tmp_path / "ct.nii.gz",))]
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "holds no CTs"), (tmp_path / "no", "There is no ")):
        with pytest.raises(UserError, match=message):
            find_cases(path, 1)


def test_mistakes_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    write_ct(tmp_path / "in" / "a.nii.gz")
    write_ct(tmp_path / "in" / "a_restored.nii.gz")
    out = tmp_path / "out"
    assert "either by its dataset" in run("-i", tmp_path / "in", "-o", out)[0]
    assert "Choose another one" in run("-i", tmp_path / "in", "-o", tmp_path / "in", "-m", model)[0]
    assert "would both write a_restored.nii.gz" in run("-i", tmp_path / "in", "-o", out, "-m", model)[0]
    assert "has no fold_1, fold_2; it has fold_0" in run("-i", tmp_path / "in", "-o", out, "-m", model, "-f", 1, 2)[0]
    broken = shutil.copytree(model, tmp_path / "broken")
    checkpoint = broken / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert "may be truncated" in run("-i", tmp_path / "in", "-o", out, "-m", broken)[0]
    assert not out.exists() or not names(out)
    assert "a file; expected a folder" in run("-i", tmp_path / "in", "-o", tmp_path / "in/a.nii.gz", "-m", model)[0]


def test_unusual_cts_are_warned_of(model: Path, tmp_path: Path) -> None:
    lifted = tiny_dataset.patient("diseased_7").ct.astype(np.int32) + 1100
    image = sitk.GetImageFromArray(lifted.clip(0, 255))
    image.SetSpacing((1.0, 1.0, 1.5))
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image, tmp_path / "in" / "grey.nii.gz")
    _, printed = run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--no-report")
    assert "The values run from 76 to 255; HU are expected, with air near -1000." in printed
    assert "The voxels are 1.5 x 1 x 1 mm (Z x Y x X), unlike those of the training data" in printed


def test_table_has_every_column_of_every_case() -> None:
    table = burden_csv({"b": {"x": 1.0, "warnings": ["One, two.", "Three."]}, "a": {"x": None, "warnings": []}})
    assert table == 'case,x,warnings\na,,\nb,1.0,"One, two. Three."\n'


@pytest.mark.slow
def test_regions_and_classes_come_out_as_nnunets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of regions: the mask's labels, and a segment each in DICOM."""
    from test_inference import phantom, predicted

    import gasnet_nnunet

    labels = {"background": 0, "lesion": [1, 2], "consolidation": 2, "ignore": 3}
    dataset_json = {**tiny_dataset.DATASET_JSON, "labels": labels, "regions_class_order": [1, 2]}
    folder = tiny_dataset.write_model(use_folders(monkeypatch, tmp_path), dataset_json=dataset_json)
    torch.manual_seed(0)
    ct = phantom((14, 32, 38), tiny_dataset.SPACING)
    expected = predicted(folder, ct, tmp_path, (0,))
    assert set(np.unique(expected)) == {0, 1, 2}
    np.testing.assert_array_equal(gasnet_nnunet.load_model(folder, device="cpu").segment(ct).mask, expected)
