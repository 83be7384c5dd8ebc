"""Label-aware `splits_final.json`: nnU-Net's own file with four more lists a fold.

nnU-Net's default split deals all cases out alike and may leave a fold without a mask to train on. Ours deals out the
masks; nnU-Net reads `train` and `val` and GASNetTrainer the rest:

    {"train": masks to learn from, "val": masks to validate on, "diseased": ..., "healthy": ...,
     "val_diseased": ..., "val_healthy": volumes held out to watch false positives and the separation of the kinds}
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import random
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gasnet_nnunet.cohort import Cohort, Kind, abbreviate
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json

MAX_FOLDS = 5
MAX_HELD_OUT = 20
WATCHED_BY_FOLD_ALL = 10


@dataclass(frozen=True)
class Fold:
    """The cases of one training.

    Args:
        train: Voxel-labelled cases to learn from.
        val: Voxel-labelled cases to validate on.
        diseased: Cases used without their mask, whatever lies on disk.
        healthy: Healthy cases.
        val_diseased: Diseased cases that are watched but not learnt from.
        val_healthy: Healthy cases that are watched but not learnt from.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    diseased: tuple[str, ...]
    healthy: tuple[str, ...]
    val_diseased: tuple[str, ...]
    val_healthy: tuple[str, ...]

    @property
    def validates_on_training_cases(self) -> bool:
        """Whether a validation case is learnt from as well, as with a single mask or with fold `all`."""
        return bool(set(self.train) & set(self.val))


VAL_IS_LEARNT = "val_is_learnt"
"""Entry of a fold that says, if true, that the masks in `val` are meant to be in `train` too."""
KEYS = tuple(field.name for field in dataclasses.fields(Fold))


def trainer_attributes(folder: Path) -> dict[str, str]:
    """The attributes of a trainer as nnU-Net wrote them into `debug.json` when the training started; empty without.

    Args:
        folder: What nnU-Net trained into, e.g. `fold_0`.
    """
    try:
        content = json.loads((folder / "debug.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recorded_cases(folder: Path) -> Fold | None:
    """The cases of a training, if it was one of `GASNetTrainer` or its baseline.

    Args:
        folder: What nnU-Net trained into, e.g. `fold_0`.
    """
    try:
        # The trainer's own representation, `Fold(train=('a',), ...)`, read as literals.
        call = ast.parse(trainer_attributes(folder).get("_cases", ""), mode="eval").body
        assert isinstance(call, ast.Call)
        lists = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return Fold(**{key: tuple(lists[key]) for key in KEYS})
    except (AssertionError, KeyError, SyntaxError, TypeError, ValueError):
        return None


def make_splits(cohort: Cohort, *, folds: int | None = None, seed: int = 12345) -> list[dict[str, list[str]]]:
    """Deal the cases out to folds; all cases of a patient lie on one side of each fold.

    As many folds as there are patients with masks, at most 5; each mask is validated on in one of them. With masks of a
    single patient they are training and validation cases of the only fold. Of the diseased and of the healthy cases a
    fold holds out a fifth, at most 20 of each and at least one where there are three patients; they are not in
    nnU-Net's `val`, which would score them NaN or 0. Where the patient is not known, a case is a patient of its own.

    Args:
        cohort: The cases.
        folds: How many folds to make, at least 2; by the rule above if `None`.
        seed: Seed of the dealing.

    Raises:
        UserError: More folds than patients with masks, or one that would have no healthy case to learn from.

    Examples:
        >>> from gasnet_nnunet.cohort import Case
        >>> cases = {"a": Case("a", Kind.LABELLED, 9, 0.0), "b": Case("b", Kind.HEALTHY, 0, 0.0)}
        >>> make_splits(Cohort(cases))[0]["val"]
        ['a']
    """
    masked = _shuffled(_by_patient(cohort, cohort.labelled), seed)
    count = folds or min(MAX_FOLDS, len(masked))
    if folds and not 2 <= folds <= len(masked):
        raise UserError(
            f"{folds} folds were asked for, but {_patients_with_masks(masked)}: each fold needs another one to "
            "validate on, and masks of others to learn from. Ask for fewer folds, or train fold 'all' on everything."
        )
    parts: list[list[str]] = [[] for _ in range(count)]
    for cases in masked:
        min(parts, key=len).extend(cases)
    return [
        _deal(
            cohort,
            fold,
            train=[case for part in parts if part is not val or count == 1 for case in part],
            val=val,
            strides=max(count, MAX_FOLDS),
            seed=seed,
        )
        for fold, val in enumerate(parts)
    ]


def make_repeats(cohort: Cohort, *, labelled: int, repeats: int, seed: int = 12345) -> list[dict[str, list[str]]]:
    """Folds that differ in nothing but which masks are learnt from.

    Half of the patients with masks, at most 20, are validated on, the same ones in each fold, fewer where the others
    would not give `repeats` choices. Of the other masks a fold learns from `labelled`; the rest are hidden: those cases
    stand under `diseased`. As far as there are enough, no mask is chosen twice.

    Args:
        cohort: The cases.
        labelled: Masks that each fold learns from.
        repeats: How many folds to make.
        seed: Seed of all choices.

    Raises:
        UserError: Too few masks, or no healthy case would be left to learn from.
    """
    masked = _shuffled(_by_patient(cohort, cohort.labelled), seed)
    for validated in range(min(len(masked) // 2, MAX_HELD_OUT), 0, -1):
        val = [case for cases in masked[:validated] for case in cases]
        pool = [case for cases in masked[validated:] for case in cases]
        if math.comb(len(pool), labelled) >= repeats:
            break
    else:
        raise UserError(
            f"{repeats} choices of {labelled} masks, and others to validate on, were asked for, but "
            f"{_patients_with_masks(masked)}. Ask for fewer with --labelled or --repeats."
        )
    return [
        _deal(cohort, 0, train=train, val=val, hidden=set(pool) - set(train), strides=MAX_FOLDS, seed=seed)
        for train in _choices(pool, labelled, repeats, seed)
    ]


def _choices(pool: Sequence[str], size: int, count: int, seed: int) -> list[list[str]]:
    """Different selections from the pool, without a case in common as long as there are cases left."""
    generator = random.Random(seed)
    chosen: list[list[str]] = []
    left: list[str] = []
    while len(chosen) < count:
        if len(left) < size:
            left = generator.sample(pool, len(pool))
        selection, left = sorted(left[:size]), left[size:]
        if selection not in chosen:
            chosen.append(selection)
    return chosen


def _deal(
    cohort: Cohort,
    fold: int,
    *,
    train: Sequence[str],
    val: Sequence[str],
    hidden: Collection[str] = (),
    strides: int,
    seed: int,
) -> dict[str, list[str]]:
    """A fold of these masks: the volumes are dealt out so that no patient lies on both sides of it."""
    only_watched = _by_patient(cohort, val, every_case=True) if set(train) != set(val) else []
    with_masks = {case for cases in _by_patient(cohort, cohort.labelled, every_case=True) for case in cases}
    free = [cases for cases in _by_patient(cohort, cohort.cases) if not with_masks.intersection(cases)]
    held_out = {case for cases in only_watched for case in cases}
    diseased = [cases for cases in free if any(cohort.cases[case].kind is Kind.DISEASED for case in cases)]
    # Two seeds, so that the two kinds are dealt out independently.
    for number, groups in enumerate((diseased, [cases for cases in free if cases not in diseased]), start=1):
        held_out |= _hold_out(groups, fold, strides, seed + number)
    lists = {
        "train": sorted(train),
        "val": sorted(val),
        "diseased": sorted([*(case for case in cohort.diseased if case not in held_out), *hidden]),
        "healthy": [case for case in cohort.healthy if case not in held_out],
        "val_diseased": [case for case in cohort.diseased if case in held_out],
        "val_healthy": [case for case in cohort.healthy if case in held_out],
    }
    if not lists["healthy"]:
        raise UserError(
            f"Fold {fold} would have no healthy case to learn from: all are of patients whose masks it validates on "
            f"({abbreviate(sorted(val))}). Add healthy cases, or try another --seed."
        )
    return lists


def write_splits(path: Path, splits: Sequence[Mapping[str, Sequence[str]]]) -> bool:
    """Write `splits_final.json`, unless there is one already.

    An existing file may be the user's own or edited, so it is never overwritten.

    Args:
        path: `splits_final.json` in the dataset's folder in nnUNet_preprocessed.
        splits: What `make_splits` returns.

    Returns:
        Whether the file holds these splits now; False where another one was found and left alone.
    """
    if path.exists():
        return _holds(path, splits)
    write_json(path, _content(splits))
    return True


def replace_splits(
    path: Path, splits: Sequence[Mapping[str, Sequence[str]]], *, trained: Sequence[Path] = (), overwrite: bool = False
) -> Path | None:
    """Write `splits_final.json` where the user says so; what was there is kept beside it.

    Args:
        path: `splits_final.json` in the dataset's folder in nnUNet_preprocessed.
        splits: What `make_splits` or `make_repeats` returns.
        trained: Folders of folds that were trained on the split as it is.
        overwrite: Replace another split.

    Returns:
        Where the old file is now, if one was replaced.

    Raises:
        UserError: There is another split or models trained on one, and `overwrite` is not set.
    """
    if path.exists() and _holds(path, splits):
        return None
    if trained and not overwrite:
        raise UserError(
            f"{abbreviate([str(folder) for folder in trained], 3)} were trained on another split, and with a new one "
            "they would validate on cases they have learnt from: move them away, or add --overwrite."
        )
    if not path.exists():
        write_json(path, _content(splits))
        return None
    if not overwrite:
        raise UserError(f"{path} exists already and is another split. Add --overwrite to replace it; a copy is kept.")
    old = path.with_name(f"{path.name}.old")
    number = 1
    while old.exists():
        number += 1
        old = path.with_name(f"{path.name}.old.{number}")
    shutil.copy2(path, old)
    write_json(path, _content(splits))
    return old


def _content(splits: Sequence[Mapping[str, Sequence[str]]]) -> list[dict[str, list[str]]]:
    return [{key: list(cases) for key, cases in fold.items()} for fold in splits]


def _holds(path: Path, splits: Sequence[Mapping[str, Sequence[str]]]) -> bool:
    try:
        return bool(_load(path) == _content(splits))
    except UserError:
        return False


def check_splits(splits_file: Path, cohort: Cohort) -> int:
    """Check that GASNetTrainer can train every fold of a split file.

    Returns:
        The number of folds.

    Raises:
        UserError: As `read_fold`, for the first fold that has a fault.
    """
    folds = len(_load(splits_file))
    for fold in range(folds):
        read_fold(splits_file, fold, cohort)
    return folds


def read_fold(splits_file: Path, fold: int | str, cohort: Cohort) -> Fold:
    """Read the cases of one fold and check them against the cohort.

    Understands files by `write_splits` and plain nnU-Net ones with `train` and `val` only. From a plain one the
    diseased and healthy cases in `train` are taken; where it names none at all (a split of the masks), all those that
    are not in `val` are. Fold `all` needs no file: it trains and validates on every mask.

    Args:
        splits_file: `splits_final.json`.
        fold: Number of the fold, or `all`.
        cohort: The cases.

    Raises:
        UserError: The file is missing or no split file, has too few folds, names an unknown case, or its fold has no
            mask to train or to validate on, no healthy case, or a case in training and held out.
    """
    if fold == "all":
        labelled, diseased, healthy = tuple(cohort.labelled), tuple(cohort.diseased), tuple(cohort.healthy)
        watched = slice(WATCHED_BY_FOLD_ALL)
        return Fold(labelled, labelled, diseased, healthy, diseased[watched], healthy[watched])
    folds = _load(splits_file)
    number = int(fold)
    if not 0 <= number < len(folds):
        raise UserError(
            f"Fold {number} was asked for, but {splits_file} has {len(folds)} fold{'s' if len(folds) > 1 else ''} "
            f"(0{f' to {len(folds) - 1}' if len(folds) > 1 else ''}). nnU-Net would make a random 80:20 split instead, "
            "which may hold no mask. Name one of these folds, or 'all'."
        )
    where = f"fold {number} of {splits_file}"
    entry = folds[number]
    for key in KEYS:
        unknown = [case for case in entry.get(key, ()) if case not in cohort.cases]
        if unknown:
            raise UserError(f"{where}: '{key}' names {abbreviate(unknown)}, which the dataset does not have.")
    read = _read_ours if "diseased" in entry or "healthy" in entry else _read_plain
    result = read(entry, cohort, where)
    _check(result, where, cohort, val_is_learnt=entry.get(VAL_IS_LEARNT) is True)
    return result


def _read_ours(entry: Mapping[str, list[str]], cohort: Cohort, where: str) -> Fold:
    for key, kind in (
        ("train", Kind.LABELLED),
        ("val", Kind.LABELLED),
        ("healthy", Kind.HEALTHY),
        ("val_healthy", Kind.HEALTHY),
    ):
        wrong = [case for case in entry.get(key, ()) if cohort.cases[case].kind is not kind]
        if wrong:
            raise UserError(
                f"{where}: '{key}' takes {kind.value} cases, but names {wrong[0]}, which is "
                f"{cohort.cases[wrong[0]].kind.value}. Correct the file, or delete it to have a new one made."
            )
    lists = {key: tuple(entry.get(key, ())) for key in KEYS}
    return Fold(**lists)


def _read_plain(entry: Mapping[str, list[str]], cohort: Cohort, where: str) -> Fold:
    def of_kind(cases: Sequence[str], kind: Kind) -> tuple[str, ...]:
        return tuple(case for case in cases if cohort.cases[case].kind is kind)

    train, val = entry["train"], entry["val"]
    volumes = train
    if not of_kind(train, Kind.DISEASED) and not of_kind(train, Kind.HEALTHY):
        volumes = [case for case in sorted(cohort.cases) if case not in val]
    return Fold(
        train=of_kind(train, Kind.LABELLED),
        val=of_kind(val, Kind.LABELLED),
        diseased=of_kind(volumes, Kind.DISEASED),
        healthy=of_kind(volumes, Kind.HEALTHY),
        val_diseased=of_kind(val, Kind.DISEASED),
        val_healthy=of_kind(val, Kind.HEALTHY),
    )


def _check(fold: Fold, where: str, cohort: Cohort, *, val_is_learnt: bool) -> None:
    delete = "Correct the file, or delete it to have a new one made."
    if not fold.train:
        raise UserError(f"{where} has no case with a mask in 'train', so there is nothing to learn from. {delete}")
    if not fold.val:
        raise UserError(f"{where} has no case with a mask in 'val'. {delete}")
    if not fold.healthy:
        raise UserError(f"{where} has no healthy case to train on. {delete}")
    learnt = [*fold.train, *fold.diseased, *fold.healthy]
    twice = sorted({case for case in learnt if learnt.count(case) > 1})
    if twice:
        raise UserError(f"{where} names {abbreviate(twice)} in two training lists at once. {delete}")
    # The masks of an only patient may be trained and validated on, and what a split says is; nothing else may.
    held_out = {*fold.val_diseased, *fold.val_healthy}
    if val_is_learnt:
        held_out |= set(fold.val) - set(fold.train)
    elif not (set(fold.train) == set(fold.val) and len(_by_patient(cohort, fold.train)) == 1):
        held_out |= set(fold.val)
    both = sorted(held_out.intersection(learnt))
    if both:
        raise UserError(f"{where} both trains on and holds out {abbreviate(both)}. {delete}")


def _load(path: Path) -> list[dict[str, list[str]]]:
    if not path.is_file():
        raise UserError(f"There is no split file {path}.")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no readable JSON ({error}). Correct it, or delete it to have a new one made."
        ) from None
    shape = 'expected a list of folds like {"train": ["case_1"], "val": ["case_2"]}'
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} holds no folds; {shape}.")
    for number, fold in enumerate(content):
        if not isinstance(fold, dict) or "train" not in fold or "val" not in fold:
            raise UserError(f"Fold {number} of {path} lacks 'train' or 'val'; {shape}.")
        for key in KEYS:
            cases = fold.get(key, [])
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise UserError(f"Fold {number} of {path}: '{key}' is no list of case names; {shape}.")
    return content


def _by_patient(cohort: Cohort, cases: Iterable[str], *, every_case: bool = False) -> list[tuple[str, ...]]:
    """The cases of each patient, sorted; on demand with those of their cases that were not named.

    The order is that of the names, so that where each case is a patient of its own this is the list of cases.
    """

    def patient(case: str) -> tuple[bool, str]:
        known = cohort.cases[case].patient
        return known is not None, known or case

    groups: dict[tuple[bool, str], list[str]] = {patient(case): [] for case in sorted(cases)}
    for case in sorted(cohort.cases if every_case else cases):
        if patient(case) in groups:
            groups[patient(case)].append(case)
    return sorted(tuple(group) for group in groups.values())


def _patients_with_masks(masked: Sequence[Sequence[str]]) -> str:
    masks = sum(map(len, masked))
    patients = f"{len(masked)} patient{'s' if len(masked) > 1 else ''}"
    return f"there are {masks} masks of {patients}" if masks > 1 else "there is one mask"


def _shuffled(groups: Sequence[tuple[str, ...]], seed: int) -> list[tuple[str, ...]]:
    shuffled = sorted(groups)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _hold_out(groups: Sequence[tuple[str, ...]], fold: int, strides: int, seed: int) -> set[str]:
    """The cases of those patients of one kind that are held out in this fold."""
    if len(groups) < 3:
        return set()
    shuffled = _shuffled(groups, seed)
    # With fewer patients than folds the strides would leave some folds empty; one may be held out in two folds.
    held_out = shuffled[fold::strides] or [shuffled[fold % len(shuffled)]]
    cases = list(held_out[0])
    for group in held_out[1:]:
        if len(cases) + len(group) <= MAX_HELD_OUT:
            cases += group
    return set(cases)
