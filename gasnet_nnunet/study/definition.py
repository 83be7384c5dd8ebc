"""A comparison written down: what a study trains, on which cases.

A study is arms (trainer, settings, plans) x numbers of masks x choices of those masks x folds on one dataset. It comes
from a YAML file or is one of those that come with the package. `runner.py` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gasnet_nnunet.settings import GASNetSettings

OUR_TRAINERS = ("GASNetTrainer", "SupervisedBaselineTrainer", "VanillaTrainer")
"""Trainers that take their length and all else from the plans."""

OWN = ("title", "like", "equal_time_with", "init_from")
"""What an arm does not take from the one that it is like."""

Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """An entry of a study with entries of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PseudoLabels(Part):
    """Iterative pseudo-labels: train on the masks, predict the diseased volumes, train on both.

    Args:
        rounds: How often it trains on predictions, after the first training on the masks alone.
        updates: Whether all trainings together have the arm's updates of S (`total`) or each of them (`each`).
    """

    rounds: Annotated[int, Field(ge=1, le=20)] = 1
    updates: Literal["total", "each"] = "total"


class Arm(Part):
    """What is compared.

    Args:
        title: Name in tables and figures; the arm's key if left out.
        like: Another arm, of which this one takes everything that it does not say itself.
        trainer: nnU-Net's `-tr`. `VanillaTrainer` is nnU-Net's own with the length of the study's settings;
            `nnUNetTrainer` itself takes nnU-Net's 1000 epochs.
        plans: Plans to start from, if they are not the study's.
        segmenter: Network in place of the planned one, a name of `gasnet_nnunet.segmenters`.
        settings: GASNet's settings, over those of the study and of the plans.
        pseudo_labels: Iterative pseudo-labels; `None` for one training.
        equal_time_with: Arm whose measured training time this one gets, in updates at the speed of the arm that it is
            `like`.
        init_from: Arm whose model on the same cases the training goes on from, with S, G and D.
        volumes: Patterns of the volume-level cases that it learns from; those of the study if left out.
        masks: Numbers of masks, if it is not run with all of the study's.
    """

    title: str | None = None
    like: str | None = None
    trainer: str = "GASNetTrainer"
    plans: str | None = None
    segmenter: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    pseudo_labels: PseudoLabels | None = None
    equal_time_with: str | None = None
    init_from: str | None = None
    volumes: tuple[str, ...] | None = None
    masks: tuple[Count, ...] | None = None


class Plan(Part):
    """What `gasnet-nnunet plan` is run with where the study's plans do not exist yet.

    Args:
        preset: Its `--preset`.
        patch: Its `--patch`, (Z, Y, X).
        features: Its `--features`.
        settings: Its `--set`: `batch_size`, `hu_window` and `max_features`, and settings of GASNet.
        init_from: Its `--init-from`: a checkpoint of ours that every arm goes on from, unless it says
            `settings: {init_from: null}`; its plans take the place of a preset.
    """

    preset: str = "default"
    patch: tuple[int, int, int] | None = None
    features: tuple[int, ...] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    init_from: Path | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Plan:
        if self.init_from is not None and self.model_fields_set & {"preset", "patch", "features"}:
            raise ValueError("init_from takes patch and network of that model, so leave out preset, patch and features")
        return self


class Phantoms(Part):
    """Phantom patients that the study draws for itself, as `gasnet_nnunet.phantom.write_phantoms` takes them."""

    labelled: Count = 4
    diseased: Count = 12
    healthy: Count = 12
    test_diseased: Count = 8
    test_healthy: Count = 3
    seed: int = 1
    size: tuple[Count, Count, Count] = (26, 68, 68)
    spacing: tuple[float, float, float] = (7.7, 5.0, 5.0)


class Groups(Part):
    """Which cases have to stay on one side of every split, beside those of one patient.

    Args:
        file: JSON file with an entry for each case, or CSV file with a column `case`.
        key: Name of the entry or column that holds the group; not needed where a JSON file maps cases to groups.
    """

    file: Path
    key: str | None = None


class Slurm(Part):
    """Options of the cluster's jobs; every name that submitit's `AutoExecutor` knows.

    Args:
        job: A job for all runs of an arm, or one for each run.
        options: Passed on to `update_parameters`, e.g. `slurm_partition`, `gpus_per_node`, `timeout_min`, `mem_gb`.
        prepare: Over the options, for the job that plans and preprocesses, which needs no GPU.
    """

    job: Literal["arm", "run"] = "arm"
    options: dict[str, Any] = Field(default_factory=dict)
    prepare: dict[str, Any] = Field(default_factory=dict)


class Study(Part):
    """A study.

    Args:
        title: Heading of its summary.
        dataset: Id or name of the dataset; the phantom study makes its own.
        phantoms: Phantom patients to make the dataset of.
        plans: Plans that the arms start from.
        plan: How to make them if they do not exist.
        configuration: nnU-Net's configuration.
        masks: Numbers of masks to learn from.
        repeats: Choices of those masks.
        folds: Folds of a cross-validation in which each case with a mask is tested once; 1 for one set of test cases.
        test: Test cases where there is one set: a number of patients with masks, or patterns of cases or groups, of
            which `imagesTs` is one and `hidden` another: the cases whose masks were put aside. `rest` takes every mask
            that a run does not learn from, as the paper's Table III. `auto` takes imagesTs where labelsTs has masks of
            it, else a third of the patients.
        truth: Folder of masks for test cases whose label file does not hold one.
        lungs: Folder of lung masks of the test cases; those of the dataset, or computed ones, if left out.
        labelled: Patterns of cases whose masks may be learnt from; all that are not tested if left out.
        volumes: Patterns of the volume-level cases that the arms learn from, unless they say so themselves; all that
            are not tested if left out.
        groups: Cases to be kept together.
        subsets: Patterns of test cases that the tables show apart, by name.
        reference: Arm that the others are compared with, case by case; the first if left out.
        settings: GASNet's settings for all arms.
        arms: The arms by their keys, which name their plans.
        checkpoint: Which one predicts.
        mirroring: Test-time mirroring.
        device: nnU-Net's `-device`; cuda where there is one if left out.
        seed: Seed of the choices of masks and test cases.
        slurm: The cluster.
    """

    title: str = "Study"
    dataset: int | str | None = None
    phantoms: Phantoms | None = None
    plans: str = "GASNetPlans"
    plan: Plan | None = None
    configuration: str = "3d_fullres"
    masks: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    repeats: Count = 3
    folds: Count = 1
    test: Annotated[int, Field(ge=1)] | str | tuple[str, ...] = "auto"
    truth: Path | None = None
    lungs: Path | None = None
    labelled: tuple[str, ...] | None = None
    volumes: tuple[str, ...] | None = None
    groups: Groups | None = None
    subsets: dict[str, str] = Field(default_factory=dict)
    reference: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    checkpoint: Literal["final", "best"] = "final"
    mirroring: bool = True
    device: Literal["cpu", "cuda", "mps"] | None = None
    seed: int = 12345
    slurm: Slurm = Slurm()

    @field_validator("masks")
    @classmethod
    def _sorted(cls, masks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(masks)))

    @model_validator(mode="after")
    def _whole(self) -> Study:
        if (self.dataset is None) == (self.phantoms is None):
            raise ValueError("name a dataset (dataset: 501, or -d 501), or phantoms, and not both")
        if self.folds > 1 and self.test != "auto":
            raise ValueError("test names one set of test cases, and with folds above 1 all are tested: give either")
        return self

    def title_of(self, arm: str) -> str:
        """An arm's name in tables and figures."""
        return self.arms[arm].title or arm

    def masks_of(self, arm: str) -> tuple[int, ...]:
        """Numbers of masks that an arm is run with."""
        return self.arms[arm].masks or self.masks

    def volumes_of(self, arm: str) -> tuple[str, ...] | None:
        """Patterns of the volume-level cases that an arm learns from; `None` for all of the fold."""
        return self.volumes if self.arms[arm].volumes is None else self.arms[arm].volumes

    def settings_of(self, arm: str, base: Mapping[str, Any]) -> GASNetSettings:
        """Settings of an arm.

        Args:
            arm: Its key.
            base: Settings in the plans that it starts from.

        Raises:
            UserError: A setting is misspelt or impossible.
        """
        merged = {**base, **self.settings, **self.arms[arm].settings}
        return GASNetSettings.from_dict(merged, source=f"the settings of the arm '{arm}'")

    def ordered_arms(self) -> list[str]:
        """Keys of the arms, each after those whose time it is to equal."""
        order: list[str] = []
        waiting = list(self.arms)
        while waiting:
            ready = [key for key in waiting if set(self.needs(key)) <= set(order)]
            if not ready:
                break
            order += ready
            waiting = [key for key in waiting if key not in ready]
        return order

    def needs(self, arm: str) -> tuple[str, ...]:
        """Arms whose runs an arm waits for, for their time or their model."""
        this = self.arms[arm]
        waited = [this.init_from, *((this.equal_time_with, this.like) if this.equal_time_with else ())]
        return tuple(dict.fromkeys(other for other in waited if other is not None))

    def dump(self) -> str:
        """The study as YAML, which `load_study` reads again."""
        # What an arm sets back to a default, over what the arm that it is `like` says, has to be said again.
        content = self.model_dump(mode="json", exclude_unset=True)
        # What it takes from there is left out, so that an edit of that arm reaches both.
        content["arms"] = {
            key: _its_own(arm, content["arms"].get(arm.get("like"))) for key, arm in content["arms"].items()
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _its_own(arm: Mapping[str, Any], like: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an arm says beside what it takes from another one."""
    if like is None:
        return dict(arm)
    taken = {name: value for name, value in like.items() if name not in OWN}
    own = {name: value for name, value in arm.items() if name not in taken or value != taken[name]}
    if "settings" in own and "settings" in taken:
        theirs = taken["settings"]
        mine = own["settings"].items()
        own["settings"] = {name: value for name, value in mine if name not in theirs or value != theirs[name]}
    return own
