"""How a study is run: nnU-Net's own commands one after the other, what is done skipped, what was cut off resumed.

`steps.py` says what a run consists of and what of it is done. Results that were made for something else are moved
to OUT/superseded, never overwritten.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, write_json, write_text
from gasnet_nnunet.study.steps import (
    RunRecord,
    Step,
    WaitingError,
    epoch_seconds,
    is_done,
    needs_redo,
    record_of,
    scores_of,
    steps_of,
    updates_of,
)
from gasnet_nnunet.study.workspace import Run, Workspace, superseded

SESSIONS = "time.json"
LAST_LINES = 12
SECONDS_BETWEEN_LOOKS = 0.5
CUT_OFF = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Signals by which a cluster or a user ends what has done nothing wrong."""
Watcher = Callable[[str], None]


class RunError(Exception):
    """A command of a run ended with a status other than 0; the message is what the tables show."""


class CutOffError(Exception):
    """A command was ended from outside; the same command again goes on with its run."""


@dataclass
class Clock:
    """Where the time of a study goes, in seconds.

    Args:
        training: In nnUNetv2_train.
        prediction: In nnUNetv2_predict.
        other: In nnUNetv2_preprocess, for pseudo-labels.
        total: All of it.
    """

    training: float = 0.0
    prediction: float = 0.0
    other: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def add(self, kind: str, seconds: float) -> None:
        """Count the time of a command."""
        name = {"train": "training", "predict": "prediction"}.get(kind, "other")
        setattr(self, name, getattr(self, name) + seconds)

    @property
    def total(self) -> float:
        """Seconds since the clock was started."""
        return time.monotonic() - self.started


class Runner:
    """Runs the steps of runs on this machine.

    Args:
        workspace: The study.
        device: nnU-Net's `-device`.
        started: When the session began, by `time.monotonic`: before the study was prepared, whose time is part of it.
        watcher: Hears each line that a command says, and what goes on.
        redo: Make runs again that were made for something else than the study asks for now; else they are left alone.
    """

    def __init__(
        self,
        workspace: Workspace,
        device: str,
        *,
        started: float,
        watcher: Watcher | None = None,
        redo: bool = True,
    ) -> None:
        self.workspace, self.device, self.redo = workspace, device, redo
        self.watcher = watcher or (lambda line: None)
        self.clock = Clock(started=started)
        self._locks: tuple[int, ...] = ()

    def run(self, run: Run) -> str:
        """Do what is missing of a run, and score it.

        Returns:
            "done", "failed" where a command of it crashed, or "unfinished" where one was ended from outside; the record
            says why. "changed" where it is left alone. "running elsewhere" where another process is at it, or a command
            that has outlived its study.
        """
        record = record_of(self.workspace, run)
        record.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(record.path.with_suffix(".lock"), timeout=0) as lock:
                self._locks = _descriptors(lock)
                record = record_of(self.workspace, run)
                return self._run(run, record)
        except Timeout:
            return "running elsewhere"
        finally:
            self._locks = ()

    def _run(self, run: Run, record: RunRecord) -> str:
        record.note(arm=run.arm, number=run.number, reason="", **_numbers(run))
        try:
            steps = steps_of(self.workspace, run, self.device)
            # The file of a study may be edited while a job waits in the queue.
            if not self.redo and needs_redo(self.workspace, run, self.device):
                record.note(reason="made with other settings, plans or cases; --redo makes it again")
                return "changed"
            record.note(state="unfinished")
            for step in steps:
                if not is_done(step, record):
                    self._do(run, step, record)
            self._finish(run, steps, record)
        except (RunError, UserError) as problem:
            record.note(state="failed", reason=str(problem))
            return "failed"
        except CutOffError as problem:
            record.note(state="unfinished", reason=str(problem))
            return "unfinished"
        except WaitingError as problem:
            record.note(state="waiting", reason=str(problem))
            return "waiting"
        except Exception as problem:  # whatever one run meets, the others go on
            log = self.workspace.out / "logs" / run.arm / run.deal.name / "fault.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            write_text(log, traceback.format_exc())
            record.note(state="failed", reason=f"{type(problem).__name__}: {problem}; where: {log}")
            return "failed"
        record.note(state="done")
        return "done"

    def _do(self, run: Run, step: Step, record: RunRecord) -> None:
        entry = record.step(step.name)
        if entry.get("fingerprint") != step.fingerprint:
            self._supersede(run, step)
            entry = {}
            record.content["steps"].pop(step.name, None)
        attempts = int(entry.get("attempts", 0)) + 1
        record.note(step.name, fingerprint=step.fingerprint, done=False, attempts=attempts, kind=step.kind)
        if step.model is not None:
            record.note(step.name, model=step.model.relative_to(self.workspace.out).as_posix())
        log = self.workspace.out / "logs" / run.arm / run.deal.name / f"{step.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        start, seconds = time.monotonic(), float(entry.get("seconds", 0.0))
        try:
            step.work(lambda command, environment: self.call(command, environment, log, step.kind))
        finally:
            record.note(step.name, seconds=seconds + time.monotonic() - start)
        missing = [path for path in step.made if not path.exists()]
        if missing:
            raise RunError(f"{step.name} ended without {missing[0]}; all it said is in {log}")
        if step.model is not None:
            # By what was run: trainers that are not ours do not take their length from the plans.
            times = epoch_seconds(step.model)
            record.note(step.name, training_seconds=sum(times.values()), epochs=len(times))
        record.note(step.name, done=True)

    def _supersede(self, run: Run, step: Step) -> None:
        """Move away what a run with other settings has left."""
        for old in step.old:
            if old.exists():
                name = f"{run.arm}_{run.deal.name}_{step.name}_{old.name}"
                shutil.move(old, superseded(self.workspace.out, name))

    def _finish(self, run: Run, steps: Sequence[Step], record: RunRecord) -> None:
        """Note what a run took, and score its predictions."""
        noted = [record.step(step.name) for step in steps]
        training = [entry for entry, step in zip(noted, steps, strict=True) if step.kind == "train"]
        # Between the first training and the last one a run with pseudo-labels predicts: that belongs to its training.
        between = sum(float(entry["seconds"]) for entry in noted[:-1] if entry["kind"] != "train")
        epochs = sum(int(entry["epochs"]) for entry in training)
        record.note(
            epochs=epochs,
            updates=updates_of(self.workspace, run, epochs),
            training_seconds=sum(float(entry["training_seconds"]) for entry in training) + between,
            seconds=sum(float(entry["seconds"]) for entry in noted),
            predict_seconds=float(noted[-1]["seconds"]),
        )
        scores_of(self.workspace, run, steps, record)

    def note_time(self) -> None:
        """Note where the time since the last note went; `report.py` adds the sessions up."""
        made = self.workspace.preparation_seconds
        spent = {
            "training": self.clock.training,
            "prediction": self.clock.prediction,
            "preprocessing of pseudo-labels": self.clock.other,
            "data and plans": made,
        }
        spent["the study itself"] = self.clock.total - sum(spent.values())
        path = self.workspace.out / SESSIONS
        with FileLock(path.with_suffix(".lock")):
            sessions = list(read_json(path)["sessions"]) if path.is_file() else []
            write_json(path, {"sessions": [*sessions, spent]})
        self.clock = Clock()
        self.workspace.preparation_seconds = 0.0

    def call(self, command: Sequence[str], environment: Mapping[str, str], log: Path, kind: str) -> None:
        """Run a command with its output in a log file.

        Raises:
            RunError: It ended with a status other than 0.
            CutOffError: Somebody ended it.
        """
        start = time.monotonic()
        last: deque[str] = deque(maxlen=LAST_LINES)
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"$ {variables} {shlex.join(command)}\n")
        program = [find_script(command[0]), *command[1:]]
        try:
            with log.open("a", encoding="utf-8") as out, log.open(encoding="utf-8", errors="replace") as said:
                said.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    program,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **environment},
                    start_new_session=os.name != "nt",
                    # Where this process is killed, the run stays locked until its command has ended.
                    pass_fds=self._locks,
                )
                with _ended(process):
                    running = True
                    while running:
                        try:
                            process.wait(SECONDS_BETWEEN_LOOKS)
                            running = False
                        except subprocess.TimeoutExpired:
                            pass
                        for line in said.read().splitlines():
                            if line.strip():
                                last.append(line.strip())
                                self.watcher(line.strip())
        finally:
            self.clock.add(kind, time.monotonic() - start)
        if process.returncode != 0:
            status = f"status {process.returncode}"
            if process.returncode < 0:
                name = signal.Signals(-process.returncode).name
                status = f"signal {-process.returncode} ({name})"
                if name in CUT_OFF:
                    raise CutOffError(f"{command[0]} was ended by {status}; log: {log}")
            raise RunError(f"{command[0]} ended with {status}; log: {log}; last lines:\n" + "\n".join(last))


def _descriptors(lock: FileLock) -> tuple[int, ...]:
    """What holds a lock, for a command to hold it too."""
    descriptor = lock._context.lock_file_fd
    return () if os.name == "nt" or descriptor is None else (descriptor,)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and a terminal that is closed end this process as Ctrl-C does, so that no command goes on alone.

    Those that it forks are simply killed.
    """
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _hold_sigterm() -> None:
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_sigterm_through() -> None:
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _die_of_sigterm() -> None:
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


if hasattr(os, "register_at_fork"):
    # nnU-Net's pools fork, and end their workers by SIGTERM. Python forgets what arrives before a forked process is
    # set up, so the worker would live, and its pool wait, for ever: the signal is held back until it kills.
    os.register_at_fork(before=_hold_sigterm, after_in_parent=_let_sigterm_through, after_in_child=_die_of_sigterm)


@contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """End a command with all that it started, whatever happens here."""
    try:
        yield
    finally:
        if process.poll() is None:
            for name in ("SIGTERM", "SIGKILL"):
                try:
                    if os.name == "nt":
                        process.terminate()
                    else:
                        os.killpg(process.pid, getattr(signal, name))
                    process.wait(10)
                    break
                except subprocess.TimeoutExpired:
                    continue
                except ProcessLookupError:
                    break
        if os.name != "nt":
            # Workers of a command that was killed itself wait for it for ever, and hold what it held.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def find_script(name: str) -> str:
    """The program of this Python environment by that name.

    Raises:
        UserError: It is not installed.
    """
    folder = sysconfig.get_path("scripts")
    found = shutil.which(name, path=os.pathsep.join([folder, str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise UserError(f"The command {name} is not installed; install the package and nnunetv2 first: pip install .")
    return found


def _numbers(run: Run) -> dict[str, Any]:
    deal = run.deal
    return {"masks": deal.masks, "repeat": deal.repeat, "fold": deal.fold, "train": list(deal.train)}
