"""The same work on many files, in several processes and with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

STARTING_SECONDS = 5.0
"""What it takes to start processes, each of which imports SimpleITK, scipy and perhaps torch."""
TIMED_JOBS = 2
"""Jobs after which the rest is estimated; the first one may have to import something."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    num_processes: int,
    description: str | None = None,
    starting_seconds: float | None = None,
) -> list[Result]:
    """Call a function for each job.

    This process does the first jobs, and all of them where the others would be done before processes have started.

    Args:
        function: A function at the top of a module, so that another process can import it.
        jobs: Its arguments.
        num_processes: Processes at work.
        description: Title of the progress bar; none is shown where it is `None` or there is nothing to do.
        starting_seconds: What it takes to start processes, with all that they import; `STARTING_SECONDS` if `None`.

    Returns:
        The results in the order of the jobs.
    """
    results = _results(
        function, jobs, num_processes, STARTING_SECONDS if starting_seconds is None else starting_seconds
    )
    if description is None or not jobs:
        return list(results)
    from rich.console import Console
    from rich.progress import track

    # Beside what a command says, which may go into a file.
    return list(track(results, description, total=len(jobs), console=Console(stderr=True)))


def _results(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int, starting_seconds: float
) -> Iterator[Result]:
    seconds = 0.0
    for job in jobs[:TIMED_JOBS]:
        start = time.monotonic()
        result = function(job)
        seconds = time.monotonic() - start
        yield result
    rest = jobs[TIMED_JOBS:]
    if num_processes <= 1 or seconds * len(rest) <= starting_seconds:
        yield from map(function, rest)
        return
    # Spawn, because a fork of a process that has used CUDA or threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(rest)), mp_context=context) as executor:
        yield from executor.map(function, rest)
