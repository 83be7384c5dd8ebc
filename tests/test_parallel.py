"""Jobs in this process or in others: the results are the same, in order."""

from __future__ import annotations

import os
import time

import pytest

from gasnet_nnunet import parallel
from gasnet_nnunet.parallel import run_jobs


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse(number: int) -> int:
    if number == 3:
        raise ValueError("3 is refused")
    return number


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order(count: int) -> None:
    results = run_jobs(square, range(count), num_processes=2)
    assert [result for result, _ in results] == [number * number for number in range(count)]


def test_short_work_stays_in_this_process() -> None:
    assert {process for _, process in run_jobs(square, range(20), num_processes=2)} == {os.getpid()}


def test_long_work_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "STARTING_SECONDS", 0.0)
    results = run_jobs(square, range(6), num_processes=2)
    assert [result for result, _ in results] == [number * number for number in range(6)]
    assert all(process != os.getpid() for _, process in results[parallel.TIMED_JOBS :])


@pytest.mark.parametrize("starting", [0.0, 5.0])
def test_error_of_a_job_reaches_the_caller(starting: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "STARTING_SECONDS", starting)
    with pytest.raises(ValueError, match="3 is refused"):
        run_jobs(refuse, range(5), num_processes=2)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run_jobs(time.sleep, [0.0] * 3, num_processes=1, description="Sleeping")
    said = capsys.readouterr()
    assert "Sleeping" in said.err
    assert not said.out
