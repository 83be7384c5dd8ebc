"""What all tests share; what one file needs stands in that file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# A process a core (pyproject.toml). nnU-Net's commands ask for as many threads as there are cores, whatever the first
# variable says: by the second, threads that wait for each other leave the cores to those that work. A limit of threads
# (OMP_THREAD_LIMIT) would have them wait for ever. Before anything imports torch, which reads both once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import tiny_dataset
import tiny_study

# A first call warms caches of torch, and machines are shared: a slow example is no failure.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

LONGEST = (
    *("test_study_runner.py", "test_trainers.py", "test_study_slurm.py", "test_packaging.py", "test_planning.py"),
    *("test_variants.py", "test_commands.py", "test_interruptions.py"),
)
"""Files that take minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a process that is given one at the end works on while the other has nothing left to do."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty `raw`, `preprocessed` and `results` folders, set for nnU-Net, and data loading in this process."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return tmp_path


@pytest.fixture(scope="session")
def trained_fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a fold that GASNetTrainer trained and validated, in folders of nnU-Net's; not to be changed."""
    from gasnet_nnunet.trainers import GASNetTrainer

    few = {"num_epochs": 2, "iterations_per_epoch": 1, "gallery_every_epochs": 1}
    return tiny_dataset.train(tmp_path_factory.mktemp("trained"), GASNetTrainer, **few)


@pytest.fixture(scope="module")
def study_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's folders, set, with a preprocessed dataset of tiny patients to run studies on."""
    with tiny_study.study_folders(tmp_path_factory.mktemp("study")) as root:
        yield root
