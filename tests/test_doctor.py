"""`gasnet-nnunet doctor` in a good state and in each bad one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from gasnet_nnunet.cli import doctor

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def run_doctor(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command with our scripts on PATH and only the given variables of nnU-Net's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    command = [str(Path(sysconfig.get_path("scripts")) / "gasnet-nnunet"), "doctor"]
    variables = {**kept, "PATH": path, "COLUMNS": "300", **variables}
    return subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", check=False)


def test_good_state_ends_with_status_zero(nnunet_folders: Path) -> None:
    ended = run_doctor(**{name: os.environ[name] for name in FOLDERS})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert os.path.join("gasnet_nnunet", "trainers.py") in ended.stdout
    assert "A training can start" in ended.stdout


def test_every_problem_comes_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("def __getattr__(name):\n    raise ImportError('libforgotten.so is missing')\n")
    ended = run_doctor(nnUNet_extTrainer=str(tmp_path), nnUNet_results=str(tmp_path / "nowhere"))
    assert ended.returncode == 1
    assert "libforgotten.so is missing" in ended.stdout
    assert "export nnUNet_preprocessed=" in ended.stdout
    assert f"mkdir -p '{tmp_path / 'nowhere'}'" in ended.stdout
    assert "could not start: see GASNetTrainer, nnUNet_preprocessed, nnUNet_results" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_another_class_of_the_same_name_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_copy.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class GASNetTrainer(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    finding = doctor.check_trainer(doctor.probe()["trainer"])
    assert finding.state == "warning"
    assert "old_copy.py" in finding.found


def test_unknown_trainer_asks_for_a_reinstall() -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with pytest.raises(RuntimeError) as raised:
        recursive_find_trainer_class_by_name("NobodysTrainer")
    finding = doctor.check_trainer({"error": f"RuntimeError: {raised.value}"})
    assert finding.state == "problem"
    assert "pip install" in finding.advice


def test_dying_look_up_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "import os, sys; print('out of luck', file=sys.stderr); os.abort()")
    answers = doctor.probe()
    for finding in (doctor.check_trainer(answers["trainer"]), doctor.check_device(answers["device"])):
        assert finding.state == "problem"
        assert "out of luck" in finding.found


def test_missing_search_folder_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}{tmp_path / 'gone'}")
    assert doctor.check_search_path().state == "warning"
    assert doctor.check_search_path().found.endswith("gone")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert doctor.check_search_path().state == "ok"


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.4.1+cu121", "ok"), ("2.10.0a0+git", "ok"), ("2.2.0", "problem"), ("2.9.1", "warning"), (None, "problem")],
)
def test_versions_are_held_against_our_bounds(version: str | None, state: str) -> None:
    finding = doctor.check_requirement(Requirement("torch>=2.3,!=2.9.*"), version)
    assert finding.state == state
    assert ("pip install 'torch" in finding.advice) == (state != "ok")


def test_all_our_requirements_are_met_here() -> None:
    findings = list(doctor.check_versions())
    assert [finding for finding in findings if finding.state == "problem"] == []
    assert {"Python", "gasnet-nnunet", "nnunetv2", "torch"} <= {finding.name for finding in findings}


@pytest.mark.parametrize("written", [True, False])
def test_folders(written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(value: Path | str, needed: int = 0) -> str:
        monkeypatch.setenv("nnUNet_results", str(value))
        return doctor.check_folder("nnUNet_results", written=written, needed=needed).state

    bad = "problem" if written else "warning"
    (tmp_path / "file").touch()
    assert state(tmp_path) == "ok"
    assert state("") == bad
    assert state(tmp_path / "nowhere") == bad
    assert state(tmp_path / "file") == bad
    assert state(tmp_path, needed=2**60) == ("warning" if written else "ok")
    if Path("/proc").is_dir():  # not even root writes there
        assert state("/proc") == bad


def test_command_must_belong_to_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", sysconfig.get_path("scripts"))
    assert doctor.check_command().state == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not on PATH" in doctor.check_command().found
    stranger = tmp_path / "nnUNetv2_train"
    stranger.write_text("#!/bin/sh\n")
    stranger.chmod(0o755)
    finding = doctor.check_command()
    assert finding.state == "problem"
    assert "another environment" in finding.found
    assert sys.executable in finding.advice


@pytest.mark.parametrize(
    ("device", "state", "words"),
    [
        ({"error": "OSError: libcudart.so.12: cannot open shared object file"}, "problem", "libcudart"),
        ({"kind": "mps", "name": "Apple GPU"}, "ok", "mps"),
        ({"kind": "cpu", "built_for_cuda": None}, "ok", "cpu"),
    ],
)
def test_device(
    device: dict[str, Any], state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.check_device(device)
    assert finding.state == state
    assert words in finding.found
    assert finding.advice


def test_gpu_without_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    gpu = {"kind": "cuda", "name": "GPU", "free": 2**34, "total": 2**35}
    assert doctor.check_device(gpu).state == "warning"
    for tool in ("gcc", "nvidia-smi"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    finding = doctor.check_device(gpu)
    assert finding.state == "ok"
    assert "16.0 of 32.0 GiB free" in finding.found
    unusable = doctor.check_device({"kind": "cpu", "built_for_cuda": "13.0"})
    assert unusable.state == "warning"
    assert "CUDA 13.0, newer than the driver" in unusable.found


def test_little_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert [finding.state for finding in doctor.check_shared_memory(tmp_path, needed=2**60)] == ["warning"]
    assert [finding.state for finding in doctor.check_shared_memory(tmp_path, needed=1)] == ["ok"]
    assert list(doctor.check_shared_memory(tmp_path / "no /dev/shm here")) == []
