"""What a run of a study consists of: its steps, what was done of them, and whether that is still what is asked for.

A run is a chain of steps, each with a fingerprint of all that it depends on: trainer, plans, cases, the step before. A
step counts as done if its record holds this fingerprint and its files are there.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from gasnet_nnunet.checkpoints import CHECKPOINTS
from gasnet_nnunet.files import read_json, write_json, write_text
from gasnet_nnunet.parallel import cores
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings
from gasnet_nnunet.study.definition import OUR_TRAINERS
from gasnet_nnunet.study.workspace import Run, TestSet, Workspace, fingerprint, link, superseded

EPOCH_TIME = re.compile(r"Epoch time: ([0-9.]+) s")
EPOCH = re.compile(r": Epoch (\d+)\s*$")
VANILLA_UPDATES = 250
"""Updates of an epoch of nnU-Net's own trainers."""
VANILLA_SETTINGS = ("num_epochs", "iterations_per_epoch", "validation_iterations_per_epoch", "seed")
"""Settings that VanillaTrainer takes its length and its seed from."""
FEW_CORES = 4
"""With so many, nnU-Net's prediction is quicker without worker processes, each of which imports torch."""
Call = Callable[[Sequence[str], Mapping[str, str]], None]
"""Runs a command with environment variables of its own."""


class WaitingError(Exception):
    """A run needs the time of another one, which is not there."""


@dataclass(frozen=True)
class Step:
    """A part of a run.

    Args:
        name: Its name in records and logs.
        kind: What its time counts as.
        fingerprint: Of all that it depends on.
        made: Files and folders that are there when it is done.
        work: Does it; takes what runs a command.
        old: Folders with what a run of another fingerprint left.
        model: Folder of the fold that a training fills.
        epochs: Epochs of a training.
        commands: What is run, to be shown.
    """

    name: str
    kind: str
    fingerprint: str
    made: tuple[Path, ...]
    work: Callable[[Call], None]
    old: tuple[Path, ...]
    commands: tuple[tuple[str, ...], ...]
    model: Path | None = None
    epochs: int = 0


class RunRecord:
    """What was done of a run, in a JSON file.

    Args:
        path: The file; made with the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = read_json(path) if path.is_file() else {"state": "new", "steps": {}}

    def step(self, name: str) -> dict[str, Any]:
        """What was noted of a step; empty if nothing was."""
        return dict(self.content["steps"].get(name, {}))

    def note(self, step: str | None = None, **values: Any) -> None:
        """Note something of the run or of a step, and write it."""
        target = self.content if step is None else self.content["steps"].setdefault(step, {})
        target.update(values)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def record_of(workspace: Workspace, run: Run) -> RunRecord:
    """The record of a run."""
    return RunRecord(workspace.out / "runs" / run.arm / f"{run.deal.name}.json")


def is_done(step: Step, record: RunRecord) -> bool:
    """Whether a step was done with these very settings and all that it made is still there."""
    entry = record.step(step.name)
    return (
        entry.get("fingerprint") == step.fingerprint
        and bool(entry.get("done"))
        and all(path.exists() for path in step.made)
    )


def state_of(workspace: Workspace, run: Run, device: str = "cpu") -> str:
    """'done', 'failed', 'unfinished', 'new' or 'changed': trained for something else than the study asks for now."""
    record = record_of(workspace, run)
    state = str(record.content["state"])
    try:
        steps = steps_of(workspace, run, device)
    except WaitingError:
        return "new" if state == "done" else state
    if all(is_done(step, record) for step in steps):
        return "done"
    if any(_is_of_something_else(step, record, workspace.out) for step in steps):
        return "changed"
    return "unfinished" if state == "done" else state


def needs_redo(workspace: Workspace, run: Run, device: str = "cpu") -> bool:
    """Whether a model of a run would be made again, because it or one that it waits for was made for something else."""
    if state_of(workspace, run, device) == "changed":
        return True
    noted = record_of(workspace, run).content["steps"].values()
    others = [other for other in workspace.runs if other.arm in workspace.study.needs(run.arm)]
    return any(entry.get("kind") == "train" and entry.get("done") for entry in noted) and any(
        needs_redo(workspace, other, device) for other in others if other.deal == run.deal
    )


def _is_of_something_else(step: Step, record: RunRecord, out: Path) -> bool:
    """Whether a training was done, or has come to a checkpoint, with another fingerprint."""
    entry = record.step(step.name)
    if step.model is None or entry.get("fingerprint") in (None, step.fingerprint):
        return False
    # Of other cases it has another folder.
    folder = out / entry["model"] if "model" in entry else step.model
    return bool(entry.get("done")) or any(folder.glob("checkpoint_*.pth"))


def epoch_seconds(fold_folder: Path) -> dict[int, float]:
    """Time of each epoch of a training by nnU-Net's logs; an epoch that was run again after an interruption once.

    Args:
        fold_folder: The folder that nnU-Net trained into.
    """
    seconds: dict[int, float] = {}
    for log in sorted(fold_folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime):
        epoch = -1
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := EPOCH.search(line):
                epoch = int(found[1])
            elif found := EPOCH_TIME.search(line):
                seconds[epoch] = float(found[1])
    return seconds


def follows_plans(workspace: Workspace, run: Run) -> bool:
    """Whether a training takes its length from the plans."""
    return workspace.study.arms[run.arm].trainer in OUR_TRAINERS


def updates_of(workspace: Workspace, run: Run, epochs: int) -> int:
    """Updates of S in so many epochs."""
    if follows_plans(workspace, run):
        return epochs * int(workspace.settings(run.arm)["iterations_per_epoch"])
    return epochs * VANILLA_UPDATES


def steps_of(workspace: Workspace, run: Run, device: str) -> list[Step]:
    """The steps of a run, in order.

    Args:
        workspace: The study.
        run: The run.
        device: nnU-Net's `-device`.

    Raises:
        WaitingError: The arm gets the time of another one, which is not known yet.
    """
    return _Chain(workspace, run, device).steps()


class _Chain:
    """Makes the steps of a run."""

    def __init__(self, workspace: Workspace, run: Run, device: str) -> None:
        self.workspace, self.run, self.device = workspace, run, device
        self.study = workspace.study
        self.arm = self.study.arms[run.arm]
        self.last = ""

    def steps(self) -> list[Step]:
        epochs = self._epochs()
        rounds = self.arm.pseudo_labels
        if rounds is None:
            model, train = self._train("train", self._plans_name(), epochs, self.workspace.environment)
            return [train, self._predict(model)]
        share = epochs if rounds.updates == "each" else max(1, epochs // (rounds.rounds + 1))
        model, train = self._train("train", self._plans_name(), share, self.workspace.environment)
        steps = [train]
        for number in range(1, rounds.rounds + 1):
            folder = self._folder("pseudo_labels") / f"round{number}"
            steps += [self._predict_diseased(model, folder, number), self._label(folder, number)]
            # What division leaves over goes to the last round.
            left = epochs - share * rounds.rounds
            length = left if rounds.updates == "total" and number == rounds.rounds and left > 0 else share
            environment = {**self.workspace.environment, "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed")}
            name = f"{self._plans_name()}-round{number}"
            model, train = self._train(f"round{number}_train", name, length, environment)
            steps.append(train)
        return [*steps, self._predict(model)]

    def _folder(self, kind: str) -> Path:
        return self.workspace.out / kind / self.run.arm / self.run.deal.name

    def _plans_name(self) -> str:
        # Their plans differ from fold to fold: in the number of epochs, or in the model to go on from.
        alone = self.arm.equal_time_with or self.arm.init_from
        return f"{self.run.arm}-fold{self.run.number}" if alone else self.run.arm

    def _other(self, arm: str) -> Run:
        """The run of another arm on the same cases, which this one waits for."""
        other = next(run for run in self.workspace.runs if run.arm == arm and run.deal == self.run.deal)
        if state_of(self.workspace, other, self.device) != "done":
            raise WaitingError(f"it waits for {other.name}, which is not done")
        return other

    def _epochs(self) -> int:
        epochs = int(self.workspace.settings(self.run.arm)["num_epochs"])
        if self.arm.equal_time_with is None:
            return epochs
        times = {}
        for arm in (self.arm.equal_time_with, str(self.arm.like)):
            content = record_of(self.workspace, self._other(arm)).content
            times[arm] = float(content["training_seconds"]), int(content["updates"])
        budget = times[str(self.arm.equal_time_with)][0]
        seconds, updates = times[str(self.arm.like)]
        return max(1, round(budget * updates / seconds / updates_of(self.workspace, self.run, 1)))

    def _train(self, name: str, plans_name: str, epochs: int, environment: Mapping[str, str]) -> tuple[Model, Step]:
        workspace, run = self.workspace, self.run
        folder = workspace.fold_folder(run, plans_name)
        plans = workspace.with_settings(run.arm, num_epochs=epochs, **(self._start() if name == "train" else {}))
        entry = run.deal.entry(self.study.volumes_of(run.arm))
        command = (
            *("nnUNetv2_train", workspace.dataset.name, self.study.configuration, str(run.number)),
            *("-tr", self.arm.trainer, "-p", plans_name, "-device", self.device),
        )
        self.last = fingerprint(
            self.last,
            self.arm.trainer,
            {**_decisive(plans, self.study.configuration, self.arm.trainer), "plans_name": plans_name},
            entry,
            workspace.data_fingerprint(run.arm, entry),
        )

        def work(call: Call) -> None:
            preprocessed = Path(environment["nnUNet_preprocessed"]) / workspace.dataset.name
            workspace.write_plans(preprocessed, plans, plans_name)
            # nnU-Net's own trainers write checkpoints in place: one that a kill cut off would end every resumption.
            for broken in [path for path in folder.glob("checkpoint_*.pth") if not is_zipfile(path)]:
                shutil.move(broken, superseded(workspace.out, f"{run.arm}_{run.deal.name}_{name}_{broken.name}"))
            resumed = any(folder.glob("checkpoint_*.pth"))
            call((*command, "--c") if resumed else command, environment)

        made = (folder / CHECKPOINTS[self.study.checkpoint], folder / CHECKPOINTS["final"])
        step = Step(name, "train", self.last, made, work, (folder,), (command,), model=folder, epochs=epochs)
        return Model(plans_name, folder), step

    def _start(self) -> dict[str, Any]:
        """Setting of an arm that goes on from the model of another one."""
        if self.arm.init_from is None:
            return {}
        other = self._other(self.arm.init_from)
        steps = steps_of(self.workspace, other, self.device)
        model, of_model = next((step.model, step.fingerprint) for step in reversed(steps) if step.model is not None)
        self.last = fingerprint(self.last, of_model)
        return {"init_from": str(model / CHECKPOINTS[self.study.checkpoint])}

    def _predict(self, model: Model) -> Step:
        tests = self.workspace.test_set(self.run.deal)
        out = self._folder("predictions")
        self.last = fingerprint(self.last, tests.scans, self.study.checkpoint, self.study.mirroring)
        return self._prediction("predict", model, tests.folder / "images", out, tests)

    def _predict_diseased(self, model: Model, folder: Path, number: int) -> Step:
        cases = self.run.deal.entry(self.study.volumes_of(self.run.arm))["diseased"]
        images = folder.parent / "images"

        def link_images() -> None:
            images.mkdir(parents=True, exist_ok=True)
            for case in cases:
                for channel, image in enumerate(self.workspace.raw_images(case)):
                    link(image, images / f"{case}_{channel:04d}{self.workspace.ending}")

        self.last = fingerprint(self.last, cases, self.study.checkpoint, self.study.mirroring)
        tests = TestSet(images, tuple(cases))
        return self._prediction(f"round{number}_predict", model, images, folder / "predicted", tests, link_images)

    def _prediction(
        self,
        name: str,
        model: Model,
        images: Path,
        out: Path,
        tests: TestSet,
        before: Callable[[], None] | None = None,
    ) -> Step:
        command = [
            *("nnUNetv2_predict", "-d", self.workspace.dataset.name, "-i", str(images), "-o", str(out)),
            *("-c", self.study.configuration, "-f", str(self.run.number), "-tr", self.arm.trainer),
            *("-p", model.plans_name, "-chk", CHECKPOINTS[self.study.checkpoint], "-device", self.device),
        ]
        if not self.study.mirroring:
            command.append("--disable_tta")
        if cores() <= FEW_CORES:
            command += ["-npp", "0", "-nps", "0"]

        def work(call: Call) -> None:
            if before is not None:
                before()
            # What an interrupted prediction left may be half a file.
            shutil.rmtree(out, ignore_errors=True)
            call(command, self.workspace.environment)

        made = tuple(out / f"{case}{self.workspace.ending}" for case in tests.cases)
        return Step(name, "predict", self.last, made, work, (out,), (tuple(command),))

    def _label(self, folder: Path, number: int) -> Step:
        from gasnet_nnunet.study.pseudo_labels import label_dataset, preprocess_command

        self.last = fingerprint(self.last)
        name = f"{self._plans_name()}-round{number}"
        command = preprocess_command(self.workspace, name, cores())

        def work(call: Call) -> None:
            label_dataset(self.workspace, self.run, folder, name, lambda environment: call(command, environment))

        preprocessed = folder / "nnUNet_preprocessed" / self.workspace.dataset.name
        made = (preprocessed / "splits_final.json",)
        old = (folder / "nnUNet_preprocessed", folder / "nnUNet_raw")
        return Step(f"round{number}_label", "label", self.last, made, work, old, (command,))


def _decisive(plans: Mapping[str, Any], configuration: str, trainer: str) -> dict[str, Any]:
    """Plans with those settings alone that a model of a trainer depends on: D's updates change no baseline."""
    decisive = copy.deepcopy(dict(plans))
    entry = decisive["configurations"][configuration]
    settings = GASNetSettings.from_dict(entry[PLANS_KEY])
    if trainer == "SupervisedBaselineTrainer":
        settings = settings.supervised()
    values = settings.decisive()
    if trainer == "VanillaTrainer":
        values = {name: value for name, value in values.items() if name in VANILLA_SETTINGS}
    entry[PLANS_KEY] = values
    return decisive


@dataclass(frozen=True)
class Model:
    """A trained model: the name of its plans and the folder of its fold."""

    plans_name: str
    folder: Path


def scores_of(workspace: Workspace, run: Run, steps: Sequence[Step], record: RunRecord) -> Path:
    """A CSV file with a row for each test case of a run that has predicted, scored anew where a mask has changed."""
    from gasnet_nnunet.comparison_inputs import lesion_classes
    from gasnet_nnunet.evaluation import evaluate_folder

    target, prediction = record.path.with_suffix(".csv"), steps[-1]
    tests = workspace.test_set(run.deal)
    scored = fingerprint(prediction.fingerprint, tests.stamp)
    if not target.is_file() or record.content.get("scored") != scored:
        frame = evaluate_folder(
            prediction.made[0].parent,
            tests.folder / "masks",
            lungs=tests.lungs,
            file_ending=workspace.ending,
            num_processes=cores(),
            ignore_label=workspace.ignore_label,
            classes=lesion_classes([workspace.dataset_json]),
        )
        write_text(target, frame.to_csv())
        record.note(scored=scored)
    return target
