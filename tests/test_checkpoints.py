"""Checkpoints under a kill, a full disk and truncation, every fault a real one; and which of a model predict."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from gasnet_nnunet.checkpoints import (
    checkpoint_file,
    named_folds,
    predicting_folds,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from gasnet_nnunet.errors import UserError

STATE = {"network_weights": {"weight": torch.arange(100.0)}, "current_epoch": 3, "trainer_name": "GASNetTrainer"}


def save(state: dict[str, Any] = STATE) -> Any:
    """What nnU-Net's `save_checkpoint` does."""
    return lambda filename: torch.save(state, filename)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_our_keys_join_nnunets(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint(path, save(), {"gasnet": {"d": torch.ones(2)}})
    found = read_checkpoint(path)
    assert found.keys() == {*STATE, "gasnet"}
    assert torch.equal(found["network_weights"]["weight"], STATE["network_weights"]["weight"])  # type: ignore[index]
    assert torch.equal(found["gasnet"]["d"], torch.ones(2))
    assert names(tmp_path) == ["checkpoint_latest.pth"]


def test_a_newer_checkpoint_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    for epoch in (1, 2):
        write_checkpoint(path, save({**STATE, "current_epoch": epoch}), {})
    assert read_checkpoint(path)["current_epoch"] == 2


# The first limit stops nnU-Net's own saving, the second the writing of ours.
@pytest.mark.parametrize("room", [500, 20_000])
def test_a_full_disk_leaves_the_old_checkpoint_bit_for_bit(tmp_path: Path, room: int) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint(path, save(), {})
    before = path.read_bytes()
    assert 500 < len(before) < 20_000
    with room_for(room), pytest.raises(UserError) as error:
        write_checkpoint(path, save({**STATE, "current_epoch": 4}), {"gasnet": torch.ones(100_000)})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["checkpoint_latest.pth"]
    message = str(error.value)
    assert str(path) in message
    assert "untouched" in message
    assert "--c" in message


def test_a_full_disk_at_the_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with room_for(500), pytest.raises(UserError, match="Start again"):
        write_checkpoint(tmp_path / "checkpoint_best.pth", save(), {})
    assert names(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fold_0"):
        write_checkpoint(tmp_path / "fold_0" / "checkpoint_best.pth", save(), {})


def test_a_folder_in_the_place_of_the_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.mkdir()
    with pytest.raises(UserError, match=f"{path} could not be written"):
        write_checkpoint(path, save(), {})
    assert names(tmp_path) == ["checkpoint_best.pth"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from gasnet_nnunet.checkpoints import write_checkpoint

path, moment = Path(sys.argv[1]), sys.argv[2]

class Kill:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

def save(name):
    torch.save({"network_weights": {}}, name)
    if moment == "in nnU-Net's part":
        with open(name, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)

write_checkpoint(path, save, {"first": torch.ones(10_000), "gasnet": Kill()})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("moment", ["in nnU-Net's part", "in ours"])
def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint(path, save(), {})
    before = path.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert names(tmp_path) == [".checkpoint_latest.pth.tmp", "checkpoint_latest.pth"]
    assert read_checkpoint(path)["current_epoch"] == 3

    # What it left behind is in nobody's way and can be cleared.
    (tmp_path / "progress.png").touch()
    write_checkpoint(path, save({**STATE, "current_epoch": 4}), {})
    assert read_checkpoint(path)["current_epoch"] == 4
    (tmp_path / ".checkpoint_latest.pth.tmp").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint_latest.pth", "progress.png"]


def test_a_fault_in_between_is_not_hidden(tmp_path: Path) -> None:
    def fail(filename: str) -> None:
        torch.save(STATE, filename)
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError, match="a fault of ours"):
        write_checkpoint(tmp_path / "checkpoint_best.pth", fail, {})
    assert names(tmp_path) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint_best.pth"
    write_checkpoint(path, save(), {"gasnet": {"adversary": {}}})
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=f"^The checkpoint {path} cannot be read .*truncated"):
        read_checkpoint(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(path)


# Each of these makes pickle raise something else than an UnpicklingError.
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404 Not Found</html>",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"\x82\x05.",
    ],
)
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(path)


def test_a_missing_checkpoint_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "checkpoint_best.pth", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}])
def test_what_is_no_nnunet_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "model.pth"
    with path.open("wb") as file:
        torch.save(content, file)
    with pytest.raises(UserError, match=r"model\.pth is no nnU-Net checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"model\.pth"):
        read_checkpoint(path)


def model_with(folder: Path, **folds: list[str]) -> Path:
    """A model's folder with folds that hold these checkpoints."""
    folder.mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (folder / name).write_text("{}")
    for fold, names in folds.items():
        (folder / fold).mkdir()
        for name in names:
            (folder / fold / f"checkpoint_{name}.pth").touch()
    return folder


def test_folds_that_predict_are_those_of_nnunet(tmp_path: Path) -> None:
    model = model_with(
        tmp_path / "m", fold_0=["final", "best"], fold_1=["latest"], fold_3=["final"], fold_all=["final"]
    )
    theirs = nnUNetPredictor.auto_detect_available_folds(str(model), "checkpoint_final.pth")
    assert predicting_folds(model, None, "checkpoint_final.pth") == [str(fold) for fold in theirs] == ["0", "3"]
    assert predicting_folds(model, ["all", 0, "0"], "checkpoint_final.pth") == ["all", "0"]
    assert predicting_folds(model, None, checkpoint_file("best")) == ["0"]
    assert named_folds(model) == ["0", "1", "3", "all"]
    aside = model_with(tmp_path / "aside", fold_10=["final"], fold_2=["final"], fold_2_old=["final"])
    assert predicting_folds(aside, None, "checkpoint_final.pth", unfinished=True) == ["2", "10"]
    alone = model_with(tmp_path / "alone", fold_1=[], fold_all=["final"])
    assert predicting_folds(alone, [], "checkpoint_final.pth") == ["all"]
    with pytest.raises(UserError, match=r"fold_1 has no checkpoint_final\.pth; it has no checkpoint at all\. Let its"):
        predicting_folds(alone, None, "checkpoint_final.pth", unfinished=True)


@pytest.mark.parametrize(
    ("folds", "wanted", "message"),
    [
        ({}, None, "nothing was trained there yet"),
        ({}, [0], "has no fold_0; it has no fold at all. Name folds with -f"),
        ({"fold_0": ["final"]}, [0, 2], "has no fold_2; it has fold_0"),
        ({"fold_0": ["final"], "fold_1": ["latest"]}, [0, 1], r"fold_1 has no .*; it has checkpoint_latest\.pth"),
        ({"fold_0": ["latest"], "fold_all": ["best"]}, None, r"fold_0 has no .*; it has checkpoint_latest\.pth"),
    ],
)
def test_folds_that_cannot_predict(
    folds: dict[str, list[str]], wanted: list[int] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        predicting_folds(model_with(tmp_path / "model", **folds), wanted, "checkpoint_final.pth")
    with pytest.raises(UserError, match=r"has no plans\.json"):
        predicting_folds(tmp_path, wanted, "checkpoint_final.pth")
