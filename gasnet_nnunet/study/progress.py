"""How long a study will still take, by what its runs have taken so far."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gasnet_nnunet.study.steps import (
    EPOCH,
    EPOCH_TIME,
    WaitingError,
    follows_plans,
    is_done,
    record_of,
    steps_of,
    updates_of,
)
from gasnet_nnunet.study.workspace import Run, Workspace


class Estimate:
    """What remains of a study.

    Args:
        workspace: The study.
        pending: Runs that are still to be made.
    """

    def __init__(self, workspace: Workspace, pending: Sequence[Run]) -> None:
        self.workspace = workspace
        self.pending = list(pending)
        self.current: Run | None = None
        self._started = 0.0
        self._epochs_before = 0
        self._epochs_done = 0
        self._epoch_seconds = 0.0
        self._next_epoch = 0
        self._lengths: dict[str, int] = {}

    def start(self, run: Run) -> None:
        """A run begins."""
        self.current, self._started = run, time.monotonic()
        self._epochs_done, self._epoch_seconds, self._next_epoch = 0, 0.0, 0
        self._epochs_before = self._done_before(run)
        self.pending = [other for other in self.pending if other.name != run.name]

    def hear(self, line: str) -> None:
        """Take note of a line of nnU-Net's log."""
        if found := EPOCH.search(line):
            # A training that goes on from a checkpoint; the next one of the same run begins at 0 again.
            self._epochs_before += max(0, int(found[1]) - self._next_epoch)
            self._next_epoch = int(found[1]) + 1
        elif found := EPOCH_TIME.search(line):
            self._epoch_seconds += float(found[1])
            self._epochs_done += 1

    @property
    def doing(self) -> str:
        """How far the current run is."""
        if self.current is None:
            return ""
        total = self._length(self.current)
        epochs = self._epochs_before + self._epochs_done
        of = "" if total is None else f" of {total}"
        return f"{self.current.name}{f', epoch {epochs}{of}' if epochs else ''}"

    def seconds(self) -> float | None:
        """Seconds that remain, `None` while nothing is known to tell them by."""
        known = self._known()
        speed = self._speed(known)
        remaining = 0.0
        for run in self.pending:
            expected = self._expected(run, known, speed)
            if expected is None:
                return None
            remaining += expected
        if self.current is not None:
            expected = self._expected(self.current, known, speed)
            if expected is None:
                return None
            remaining += max(0.0, expected - (time.monotonic() - self._started))
        return remaining

    def text(self) -> str:
        """The same in words."""
        seconds = self.seconds()
        return "time left not known yet" if seconds is None else f"about {duration(seconds)} left"

    def _known(self) -> dict[str, list[tuple[float, int]]]:
        """Seconds and updates of the runs of each arm that are done."""
        known: dict[str, list[tuple[float, int]]] = {}
        for run in self.workspace.runs:
            content = record_of(self.workspace, run).content
            if content["state"] == "done":
                known.setdefault(run.arm, []).append((float(content["seconds"]), int(content["updates"])))
        return known

    def _speed(self, known: dict[str, list[tuple[float, int]]]) -> float | None:
        """Seconds of an update, where an arm has no run yet."""
        runs = [run for arm in known.values() for run in arm]
        if self.current is not None and self._epochs_done:
            updates = updates_of(self.workspace, self.current, self._epochs_done)
            runs = [*runs, (self._epoch_seconds, updates)]
        return _seconds_of_update(runs)

    def _expected(self, run: Run, known: dict[str, list[tuple[float, int]]], speed: float | None) -> float | None:
        length = self._length(run)
        if length is None:
            return None
        # What this session has to do of it.
        left = length - (self._epochs_before if run is self.current else 0)
        if run is self.current and self._epochs_done:
            return self._epoch_seconds / self._epochs_done * left
        # An arm of equal time takes what the other one takes, whatever its own length in the plans.
        other = self.workspace.study.arms[run.arm].equal_time_with
        if run.arm not in known and other in known:
            return sum(seconds for seconds, _ in known[other]) / len(known[other]) * left / length
        # Runs that are known may be of another length, before the study was changed.
        speed = _seconds_of_update(known.get(run.arm, [])) or speed
        return None if speed is None else speed * updates_of(self.workspace, run, left)

    def _done_before(self, run: Run) -> int:
        """Epochs of the trainings of a run that were whole before this session."""
        try:
            steps = steps_of(self.workspace, run, "cpu")
        except WaitingError:
            return 0
        record = record_of(self.workspace, run)
        return sum(int(record.step(step.name).get("epochs", 0)) for step in steps if is_done(step, record))

    def _length(self, run: Run) -> int | None:
        """Epochs of all trainings of a run; of one of equal time that waits, those in its plans.

        A trainer that does not follow the plans has as many as in another run of its arm; `None` before there is one.
        """
        if not follows_plans(self.workspace, run):
            records = [
                record_of(self.workspace, other).content for other in self.workspace.runs if other.arm == run.arm
            ]
            lengths = [int(content["epochs"]) for content in records if content["state"] == "done"]
            return lengths[-1] if lengths else None
        if run.name not in self._lengths:
            try:
                epochs = sum(step.epochs for step in steps_of(self.workspace, run, "cpu"))
            except WaitingError:
                return int(self.workspace.settings(run.arm)["num_epochs"])
            self._lengths[run.name] = epochs
        return self._lengths[run.name]


def _seconds_of_update(runs: Sequence[tuple[float, int]]) -> float | None:
    total = sum(updates for _, updates in runs)
    return sum(seconds for seconds, _ in runs) / total if total else None


def duration(seconds: float) -> str:
    """Seconds in words.

    Examples:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
