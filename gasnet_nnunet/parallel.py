"""The same work on many files, in several processes and with a progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, num_processes: int, description: str | None = None
) -> list[Result]:
    """Call a function for each job.

    Args:
        function: A function at the top of a module, so that another process can import it.
        jobs: Its arguments.
        num_processes: Processes at work; with few jobs for each, this process does them all.
        description: Title of the progress bar; none is shown where it is `None` or there is nothing to do.

    Returns:
        The results in the order of the jobs.
    """

    def shown(results: Iterable[Result]) -> list[Result]:
        if description is None or not jobs:
            return list(results)
        from rich.progress import track

        return list(track(results, description, total=len(jobs)))

    # Starting a process takes as long as reading several volumes.
    if num_processes <= 1 or len(jobs) <= 4 * num_processes:
        return shown(map(function, jobs))
    # Spawn, because a fork of a process that has used CUDA or threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as executor:
        return shown(executor.map(function, jobs))
