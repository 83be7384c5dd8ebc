"""Label-aware `splits_final.json`: nnU-Net's own file with four more lists a fold.

nnU-Net's default split deals all cases out alike and may leave a fold without a mask to train on. Ours deals out the
masks; nnU-Net reads `train` and `val` and GASNetTrainer the rest:

    {"train": masks to learn from, "val": masks to validate on, "diseased": ..., "healthy": ...,
     "val_diseased": ..., "val_healthy": volumes held out to watch false positives and the separation of the kinds}
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
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


KEYS = tuple(field.name for field in dataclasses.fields(Fold))


def make_splits(cohort: Cohort, *, seed: int = 12345) -> list[dict[str, list[str]]]:
    """Deal the cases out to folds.

    As many folds as there are masks, at most 5; each mask is validated on in one of them. With a single mask it is
    training and validation case of the only fold. Of the diseased and of the healthy cases a fold holds out a fifth,
    at most 20 of each and at least one where there are three; they are not in nnU-Net's `val`, which would score
    them NaN or 0.

    Args:
        cohort: The cases.
        seed: Seed of the dealing.

    Examples:
        >>> from gasnet_nnunet.cohort import Case
        >>> cases = {"a": Case("a", Kind.LABELLED, 9, 0.0), "b": Case("b", Kind.HEALTHY, 0, 0.0)}
        >>> make_splits(Cohort(cases))[0]["val"]
        ['a']
    """
    labelled = _shuffled(cohort.labelled, seed)
    count = min(MAX_FOLDS, len(labelled))
    splits = []
    for fold in range(count):
        val = sorted(labelled[fold::count])
        train = sorted(set(labelled) - set(val)) if count > 1 else val
        diseased, val_diseased = _hold_out(cohort.diseased, fold, seed + 1)
        healthy, val_healthy = _hold_out(cohort.healthy, fold, seed + 2)
        splits.append(
            {
                "train": train,
                "val": val,
                "diseased": diseased,
                "healthy": healthy,
                "val_diseased": val_diseased,
                "val_healthy": val_healthy,
            }
        )
    return splits


def write_splits(path: Path, splits: Sequence[Mapping[str, Sequence[str]]]) -> bool:
    """Write `splits_final.json`, unless there is one already.

    An existing file may be the user's own or edited, so it is never overwritten.

    Args:
        path: `splits_final.json` in the dataset's folder in nnUNet_preprocessed.
        splits: What `make_splits` returns.

    Returns:
        Whether the file holds these splits now; False where another one was found and left alone.
    """
    content = [{key: list(cases) for key, cases in fold.items()} for fold in splits]
    if path.exists():
        try:
            return bool(_load(path) == content)
        except UserError:
            return False
    write_json(path, content)
    return True


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
    _check(result, where)
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


def _check(fold: Fold, where: str) -> None:
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
    # The only mask may be trained and validated on; nothing else may.
    held_out = {*fold.val_diseased, *fold.val_healthy}
    if not (set(fold.train) == set(fold.val) and len(fold.train) == 1):
        held_out |= set(fold.val)
    both = sorted(held_out.intersection(learnt))
    if both:
        raise UserError(f"{where} both trains on and holds out {abbreviate(both)}. {delete}")


def _load(path: Path) -> list[dict[str, list[str]]]:
    if not path.is_file():
        raise UserError(f"There is no split file {path}.")
    try:
        content: Any = json.loads(path.read_text())
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


def _shuffled(identifiers: Sequence[str], seed: int) -> list[str]:
    shuffled = sorted(identifiers)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _hold_out(identifiers: Sequence[str], fold: int, seed: int) -> tuple[list[str], list[str]]:
    """Split the cases of one kind into those to train on and those held out in this fold."""
    if len(identifiers) < 3:
        return sorted(identifiers), []
    shuffled = _shuffled(identifiers, seed)
    # With fewer cases than folds the strides would leave some folds empty; a case may be held out in two folds.
    held_out = (shuffled[fold::MAX_FOLDS] or [shuffled[fold % len(shuffled)]])[:MAX_HELD_OUT]
    return sorted(set(identifiers) - set(held_out)), sorted(held_out)
