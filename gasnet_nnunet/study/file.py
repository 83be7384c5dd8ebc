"""A study's file: read, with what the command line changes of it, and checked as a whole before anything starts."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gasnet_nnunet.errors import UserError, hint
from gasnet_nnunet.settings import GASNetSettings, plans_folder, preset_names
from gasnet_nnunet.study.definition import (
    OUR_TRAINERS,
    OWN,
    Arm,
    Groups,
    Part,
    Phantoms,
    Plan,
    PseudoLabels,
    Slurm,
    Study,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
TAKEN = ("dataset", "dataset_fingerprint", "gasnet_cohort", "gasnet_preprocessed", "splits_final")
"""Files beside an arm's plans."""
NOT_ASSIGNED = ("settings", "arms", "seed")
"""Entries of a study that are not assigned by name: `seed` alone is that of the trainings, a setting."""
PARTS: dict[tuple[str, ...], type[Part]] = {
    (): Study,
    ("phantoms",): Phantoms,
    ("plan",): Plan,
    ("groups",): Groups,
    ("slurm",): Slurm,
    ("arms", "*"): Arm,
    ("arms", "*", "pseudo_labels"): PseudoLabels,
}


def assignable() -> tuple[str, ...]:
    """Entries of a study that a command line may assign as it does settings."""
    return tuple(name for name in Study.model_fields if name not in NOT_ASSIGNED)


def study_names() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in (plans_folder() / "studies").glob("*.yaml"))


def load_study(name_or_file: str, changes: Mapping[str, Any] | None = None) -> Study:
    """Read and check a study.

    Args:
        name_or_file: A YAML file, or the name of a study that comes with the package.
        changes: Top-level entries that replace the file's, and an arm is not run with other `masks` then; `settings`
            are added to the file's.

    Raises:
        UserError: There is no such study, or something in it is misspelt, missing or impossible: all of it is listed,
            with its line.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if name_or_file not in study_names():
            raise UserError(
                f"There is no study '{name_or_file}'.{hint(name_or_file, study_names())} Name a YAML file or one of "
                f"{', '.join(study_names())}."
            )
        path = plans_folder() / "studies" / f"{name_or_file}.yaml"
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no study; expected at least 'dataset' and 'arms'.")
    changes = _from_here(changes or {})
    settings = changes.pop("settings", {})
    problems = _Problems(
        path, root, assigned={*((name,) for name in changes), *(("settings", name) for name in settings)}
    )
    problems.find_twins(root, ())
    content = {**content, **changes}
    if settings:
        # What is no mapping is refused below, with its line.
        old = content.get("settings") or {}
        content["settings"] = {**old, **settings} if isinstance(old, dict) else old
    content = _inherit(content, problems)
    problems.raise_them()
    if "masks" in changes:
        _narrow(content, changes["masks"])
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        for problem in error.errors():
            problems.add_pydantic(problem)
        problems.raise_them()
        raise
    _check(study, problems)
    problems.raise_them()
    return _absolute(study, path.parent)


def trainer_names() -> list[str]:
    """Trainers that nnU-Net would find, read from its files and those of `nnUNet_extTrainer` without importing them."""
    others = [Path(place) for place in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if place]
    return sorted({*OUR_TRAINERS, *_classes_in(_modules_in([*_trainers_folders(), *others]))})


def _trainers_folders() -> list[Path]:
    """Where nnU-Net has its trainers."""
    spec = importlib.util.find_spec("nnunetv2")
    return [Path(place) / "training" / "nnUNetTrainer" for place in (spec and spec.submodule_search_locations) or ()]


@cache
def trainers_of_nnunet() -> frozenset[str]:
    """nnU-Net's own trainers, which know none of our settings."""
    texts = _modules_in(_trainers_folders())
    # Users put theirs there, too; one that goes on from ours imports it.
    return _classes_in(text for text in texts if "gasnet_nnunet" not in text)


def _modules_in(folders: Sequence[Path]) -> Iterator[str]:
    for folder in folders:
        for file in folder.rglob("*.py"):
            yield file.read_text(encoding="utf-8", errors="ignore")


def _classes_in(modules: Iterable[str]) -> frozenset[str]:
    return frozenset(name for text in modules for name in re.findall(r"^class (\w+)", text, re.MULTILINE))


def segmenter_names() -> list[str]:
    """Names that an arm's `segmenter` may have."""
    from gasnet_nnunet.segmenters import SEGMENTERS

    return list(SEGMENTERS)


class _Problems:
    """What is wrong with a study file, each with the line where it stands, or as part of the command line.

    Args:
        path: The file.
        root: What it holds.
        assigned: Paths of keys that the command line has replaced.
    """

    def __init__(self, path: Path, root: yaml.Node | None, assigned: Collection[tuple[str, ...]] = ()) -> None:
        self.path, self.root, self.assigned = path, root, assigned
        self.found: list[str] = []

    def add(self, place: Sequence[Any], text: str) -> None:
        """Add a sentence about the entry at a path of keys."""
        key = ".".join(map(str, place))
        line = self._line(place)
        where = f"{key} (line {line})" if key and line else key or "the file"
        if any(tuple(place[: len(path)]) == path for path in self.assigned):
            where = f"{key} (of the command line)"
        self.found.append(f"{where}: {text}")

    def add_pydantic(self, problem: Any) -> None:
        """Add what pydantic found; of an unknown key, the close one."""
        place = [part for part in problem["loc"] if not _is_branch(part)]
        if problem["type"] == "extra_forbidden":
            valid = list(_part_at(place[:-1]).model_fields)
            self.add(place, f"there is no such entry.{hint(str(place[-1]), valid)} Valid here: {', '.join(valid)}.")
            return
        message = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
        value = problem.get("input")
        found = f" (found {value!r})" if isinstance(value, str | int | float | bool | list) else ""
        self.add(place, f"{message}{found}.")

    def find_twins(self, node: yaml.Node | None, place: tuple[str, ...]) -> None:
        """Keys that stand twice in one mapping, of which YAML silently keeps the last."""
        if not isinstance(node, yaml.MappingNode):
            return
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                self.found.append(f"{'.'.join([*place, key.value])} (line {key.start_mark.line + 1}): is there twice.")
            seen.add(key.value)
            self.find_twins(value, (*place, key.value))

    def raise_them(self) -> None:
        """Raise one UserError for all of them.

        Raises:
            UserError: There is at least one.
        """
        if self.found:
            found = list(dict.fromkeys(self.found))
            listed = f" {found[0]}" if len(found) == 1 else "".join(f"\n  - {text}" for text in found)
            raise UserError(f"{self.path} cannot be run:{listed}")

    def _line(self, place: Sequence[Any]) -> int | None:
        node, line = self.root, None
        for part in place:
            if not isinstance(node, yaml.MappingNode):
                break
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line + 1
                    break
            else:
                break
        return line


def _is_branch(part: Any) -> bool:
    """pydantic names the branch of a union in the path of a problem."""
    return isinstance(part, str) and (part in ("int", "str") or "[" in part or "constrained" in part)


def _part_at(place: Sequence[Any]) -> type[Part]:
    for pattern, part in PARTS.items():
        if len(pattern) == len(place) and all(a in ("*", b) for a, b in zip(pattern, place, strict=True)):
            return part
    return Study


def _inherit(content: dict[str, Any], problems: _Problems) -> dict[str, Any]:
    """Give each arm what the arm that it is `like` says."""
    arms = content.get("arms")
    if not isinstance(arms, dict) or not all(isinstance(arm, dict | None) for arm in arms.values()):
        return content

    def resolve(key: Any, chain: tuple[Any, ...]) -> dict[str, Any]:
        arm = dict(arms[key] or {})
        like = arm.get("like")
        if like is None or not isinstance(like, str | int):
            return arm
        if like not in arms:
            problems.add(("arms", key, "like"), f"there is no arm '{like}'.{hint(str(like), list(map(str, arms)))}")
            return arm
        if like in (*chain, key):
            problems.add(("arms", key, "like"), "arms are like each other in a circle.")
            return arm
        model = {name: value for name, value in resolve(like, (*chain, key)).items() if name not in OWN}
        parts = [each.get("settings") or {} for each in (model, arm)]
        if not all(isinstance(part, dict) for part in parts):
            return {**model, **arm}  # refused with its line, once it is read as a study
        settings = {name: value for part in parts for name, value in part.items()}
        return {**model, **arm, **({"settings": settings} if settings else {})}

    return {**content, "arms": {key: resolve(key, ()) for key in arms}}


def _from_here(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Paths among the changes are relative to where the command is run, not to the study file."""
    here = dict(changes)
    for name in ("truth", "lungs"):
        if isinstance(here.get(name), str):
            here[name] = str(_resolved(Path.cwd(), here[name]))
    for name, entry in (("groups", "file"), ("plan", "init_from")):
        part = here.get(name)
        if isinstance(part, dict) and isinstance(part.get(entry), str):
            here[name] = {**part, entry: str(_resolved(Path.cwd(), part[entry]))}
    if isinstance(here.get("settings"), dict):
        here["settings"] = _start_from(here["settings"], Path.cwd())
    return here


def _start_from(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings whose `init_from` does not depend on where a training is started."""
    checkpoint = settings.get("init_from")
    if not isinstance(checkpoint, str):
        return settings
    return {**settings, "init_from": str(_resolved(folder, checkpoint))}


def _resolved(folder: Path, path: str | Path) -> Path:
    """A path as it was written down in a folder, perhaps beginning with `~`."""
    return (folder / Path(path).expanduser()).resolve()


def _narrow(content: Mapping[str, Any], masks: Any) -> None:
    """Leave arms no numbers of masks but these; one that would have none is refused like any misspelt number."""
    arms = content.get("arms")
    for arm in arms.values() if isinstance(arms, dict) and isinstance(masks, list) else ():
        if isinstance(arm, dict) and isinstance(arm.get("masks"), list):
            arm["masks"] = [number for number in arm["masks"] if number in masks] or arm["masks"]


def _check(study: Study, problems: _Problems) -> None:
    """What one entry says about another."""
    if study.reference is not None and study.reference not in study.arms:
        arms = list(study.arms)
        problems.add(
            ("reference",),
            f"there is no arm '{study.reference}'.{hint(study.reference, arms)} Arms: {', '.join(arms)}.",
        )
    titles = [study.title_of(key) for key in study.arms]
    for key, title in zip(study.arms, titles, strict=True):
        if titles.count(title) > 1:
            problems.add(("arms", key, "title"), f"more than one arm is called '{title}' in tables and figures.")
    trainers: list[str] = []
    for key, arm in study.arms.items():
        place = ("arms", key)
        if not NAME.fullmatch(key) or "__" in key:
            problems.add(place, "an arm's key names its plans: letters, digits, '-' and '_' only, and no '__'.")
        if key in TAKEN or _is_part_of_another(key, study):
            problems.add(place, "the study itself makes files of that name; call the arm otherwise.")
        trainers = trainers or trainer_names()
        if arm.trainer not in trainers and not _importable(arm.trainer):
            problems.add((*place, "trainer"), f"nnU-Net has no trainer '{arm.trainer}'.{hint(arm.trainer, trainers)}")
        for settings, where in ((study.settings, ("settings",)), (arm.settings, (*place, "settings"))):
            for name in settings:
                if name not in GASNetSettings.names():
                    valid = GASNetSettings.names()
                    problems.add((*where, name), f"there is no such setting.{hint(str(name), valid)}")
        if not problems.found:
            try:
                study.settings_of(key, {})
            except UserError as error:
                problems.add((*place, "settings"), str(error))
        if arm.segmenter is not None and arm.segmenter not in segmenter_names():
            names = segmenter_names()
            problems.add(
                (*place, "segmenter"),
                f"there is no segmenter '{arm.segmenter}'.{hint(arm.segmenter, names)} Valid: {', '.join(names)}.",
            )
        for number in arm.masks or ():
            if number not in study.masks:
                problems.add((*place, "masks"), f"{number} is none of the study's numbers {list(study.masks)}.")
        _check_needs(study, key, problems)
    if study.plan is not None and study.plan.preset not in preset_names():
        preset = study.plan.preset
        problems.add(("plan", "preset"), f"there is no preset '{preset}'.{hint(preset, preset_names())}")


def _is_part_of_another(key: str, study: Study) -> bool:
    """Whether another arm has plans of this name, for one of its folds or of its rounds of pseudo-labels."""
    found = re.fullmatch(r"(.+?)(-fold\d+)?(-round\d+)?", key)
    other = study.arms.get(found[1]) if found and found[1] != key else None
    if found is None or other is None:
        return False
    by_fold = bool(other.equal_time_with or other.init_from)
    return by_fold == bool(found[2]) and (found[3] is None or other.pseudo_labels is not None)


def _check_needs(study: Study, key: str, problems: _Problems) -> None:
    """The arms that an arm waits for exist, come first, and are run with as many masks."""
    arm, place = study.arms[key], ("arms", key)
    for entry in ("equal_time_with", "init_from"):
        other = getattr(arm, entry)
        if other is not None and other not in study.arms:
            valid = list(study.arms)
            problems.add((*place, entry), f"there is no arm '{other}'.{hint(other, valid)} Arms: {', '.join(valid)}.")
            return
    if arm.trainer == "VanillaTrainer" or arm.trainer in trainers_of_nnunet():
        for entry, origin in (("init_from", arm.init_from), ("settings", arm.settings.get("init_from"))):
            if origin is not None:
                problems.add((*place, entry), f"{arm.trainer} knows no init_from and would train from scratch.")
    if arm.pseudo_labels is not None and arm.pseudo_labels.updates == "total" and arm.trainer not in OUR_TRAINERS:
        problems.add(
            (*place, "pseudo_labels"),
            f"{arm.trainer} does not take its length from the plans, so its updates cannot be shared out: say "
            f"`updates: each`, or take one of {', '.join(OUR_TRAINERS)}.",
        )
    if arm.equal_time_with is not None:
        if arm.like is None:
            problems.add(
                (*place, "equal_time_with"),
                "such an arm has to be `like` another one, whose speed says how many updates fit into the time.",
            )
        if arm.trainer not in OUR_TRAINERS:
            problems.add(
                (*place, "trainer"),
                f"{arm.trainer} does not take its length from the plans; of equal time are {', '.join(OUR_TRAINERS)}.",
            )
    for other in study.needs(key):
        if key not in study.ordered_arms():
            problems.add(place, f"it waits for '{other}', which waits for it.")
        missing = sorted(set(study.masks_of(key)) - set(study.masks_of(other)))
        if missing:
            problems.add(place, f"it waits for '{other}', which is not run with {missing} masks.")


def _importable(trainer: str) -> bool:
    """Whether nnU-Net's own search finds it: somebody's module may make its names when asked."""
    if not os.environ.get("nnUNet_extTrainer"):
        return False
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        # nnU-Net prints where it searches.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recursive_find_trainer_class_by_name(trainer)
    except RuntimeError:
        return False
    return True


def _absolute(study: Study, folder: Path) -> Study:
    """Paths in a study file are relative to it."""
    changes: dict[str, Any] = {}
    for name in ("truth", "lungs"):
        path = getattr(study, name)
        if path is not None:
            changes[name] = _resolved(folder, path)
            if not changes[name].is_dir():
                raise UserError(f"{name} of the study is {changes[name]}, and there is no such folder.")
    if study.groups is not None:
        file = _resolved(folder, study.groups.file)
        if not file.is_file():
            raise UserError(f"groups.file of the study is {file}, and there is no such file.")
        changes["groups"] = study.groups.model_copy(update={"file": file})
    if study.plan is not None and study.plan.init_from is not None:
        checkpoint = _resolved(folder, study.plan.init_from)
        if not checkpoint.is_file():
            raise UserError(f"plan.init_from of the study is {checkpoint}, and there is no such file.")
        changes["plan"] = study.plan.model_copy(update={"init_from": checkpoint})
    changes["settings"] = _start_from(study.settings, folder)
    changes["arms"] = {
        key: arm.model_copy(update={"settings": _start_from(arm.settings, folder)}) for key, arm in study.arms.items()
    }
    for settings in (changes["settings"], *(arm.settings for arm in changes["arms"].values())):
        checkpoint = settings.get("init_from")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise UserError(
                f"init_from among the study's settings is {checkpoint}, and there is no such file. Name a checkpoint "
                "of a trained model, such as .../fold_0/checkpoint_final.pth, or give an arm init_from: ARM."
            )
    return study.model_copy(update=changes)
