"""Which cases a study trains and tests on: choices of the masks, folds, and test cases of patients never learnt from.

A run learns from N masks. The masks of all other cases that are not tested are hidden, so those are diseased volumes.
Nothing is held out to be watched: a study predicts with the last checkpoint, and where there are few, each volume
counts.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from gasnet_nnunet.cohort import Cohort, Kind, abbreviate
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.splits import VAL_IS_LEARNT
from gasnet_nnunet.study.definition import Groups, Study

IMAGES_TS = "imagesTs"
"""Name of the test set that is nnU-Net's own."""
HIDDEN = "hidden"
"""Every case whose mask a conversion has put aside, or that the study's `truth` has."""
REST = "rest"
"""Every case whose mask might have been learnt from but is not."""
MAX_HEALTHY = 20
"""Healthy cases that are tested beside those."""
SHARE_TESTED = 3
"""One group of so many is tested, where the study does not say which."""


@dataclass(frozen=True)
class Deal:
    """The cases of a run.

    Args:
        masks: How many masks are learnt from.
        repeat: Which choice of them.
        fold: Which fold of the cross-validation.
        train: The masks.
        diseased: Diseased volumes, hidden masks among them.
        healthy: Healthy volumes.
        test: Test cases, of the dataset or of `imagesTs`.
    """

    masks: int
    repeat: int
    fold: int
    train: tuple[str, ...]
    diseased: tuple[str, ...]
    healthy: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for files, e.g. `masks1_repeat0_fold0`."""
        return f"masks{self.masks}_repeat{self.repeat}_fold{self.fold}"

    def entry(self, volumes: Sequence[str] | None = None) -> dict[str, Any]:
        """The fold as it stands in `splits_final.json`.

        nnU-Net wants a mask to validate on. A study has none to spare, so the first one that is learnt from serves.

        Args:
            volumes: Patterns of the volume-level cases to learn from; all if `None`.

        Raises:
            UserError: The patterns leave no healthy volume.
        """

        def chosen(cases: Sequence[str]) -> list[str]:
            return sorted(case for case in cases if volumes is None or _matches(case, volumes))

        if not chosen(self.healthy):
            raise UserError(f"volumes: {list(volumes or ())} match no healthy case that could be learnt from.")
        return {
            "train": sorted(self.train),
            "val": [self.train[0]],
            "diseased": chosen(self.diseased),
            "healthy": chosen(self.healthy),
            "val_diseased": [],
            "val_healthy": [],
            VAL_IS_LEARNT: True,
        }


def read_groups(cohort: Cohort, groups: Groups | None, patients: Mapping[str, str]) -> dict[str, str]:
    """Whom each case shows, where that is known: by the study's file, else by the patient in `dataset.json`.

    Args:
        cohort: The cases of the dataset.
        groups: The study's file.
        patients: Whom the cases show by `dataset.json`, those of imagesTs too.

    Raises:
        UserError: The file cannot be read, or it takes the cases of a patient apart.
    """
    if groups is None:
        return dict(patients)
    read = _read_groups(groups)
    if not set(read) & set(cohort.cases):
        raise UserError(
            f"{groups.file} names none of the dataset's cases ({abbreviate(sorted(cohort.cases), 3)}), but "
            f"{abbreviate(sorted(read), 3)}."
        )
    found = {**patients, **read}
    of_patient: dict[str, str] = {}
    for case, patient in sorted(patients.items()):
        if of_patient.setdefault(patient, found[case]) != found[case]:
            raise UserError(
                f"{groups.file} puts cases of the patient {patient} into two groups, {of_patient[patient]} and "
                f"{found[case]} ({case}). Correct the file, or the patients in dataset.json."
            )
    return found


def make_deals(
    study: Study,
    cohort: Cohort,
    groups: Mapping[str, str],
    *,
    truths: Collection[str] = (),
    images_ts: Collection[str] = (),
) -> list[Deal]:
    """The cases of every run of an arm.

    The choices of a repeat are nested: those of 4 masks hold that of 1. Those of the repeats lie apart in the order of
    the masks, and repeats that are added leave the others as they were; a choice that would come twice, as with all
    masks there are, comes once.

    Args:
        study: The study.
        cohort: The cases of its dataset.
        groups: Whom the cases show, those of `imagesTs` too; cases of a group stay on one side.
        truths: Cases without a mask in the dataset that can be tested nevertheless.
        images_ts: Cases of `imagesTs` that can be tested.

    Raises:
        UserError: Too few masks, patients or healthy cases for what the study asks for.
    """
    members: dict[str, list[str]] = {}
    for case in sorted(cohort.cases):
        members.setdefault(groups.get(case, case), []).append(case)
    seen: set[tuple[Any, ...]] = set()
    deals = []
    for fold, tested in enumerate(_test_sets(study, cohort, members, groups, truths, images_ts)):
        pool = _pool(study, cohort, {case for group in tested for case in members.get(group, ())})
        if study.masks[-1] > len(pool):
            raise UserError(
                f"masks: {study.masks[-1]} are asked for, but only {len(pool)} cases with a mask are left to learn "
                f"from{'' if study.test == REST else f' in fold {fold}'}. Ask for fewer (--set "
                f"masks=[{', '.join(str(number) for number in study.masks if number <= len(pool)) or 1}]), or test "
                "fewer."
            )
        starts = _starts(len(pool), study.repeats)
        for number in study.masks:
            for repeat, start in enumerate(starts):
                train = tuple((pool[start:] + pool[:start])[:number])
                choice = (fold, frozenset(train))
                if choice in seen:
                    continue
                seen.add(choice)
                left = tested
                if study.test == REST:
                    learnt = {groups.get(case, case) for case in train}
                    left = tested | ({groups.get(case, case) for case in pool} - learnt)
                deal = _deal(study, cohort, members, left, train, truths, images_ts)
                deals.append(replace(deal, masks=number, repeat=repeat, fold=fold))
    return deals


def _deal(
    study: Study,
    cohort: Cohort,
    members: Mapping[str, Sequence[str]],
    tested: Collection[str],
    train: tuple[str, ...],
    truths: Collection[str],
    images_ts: Collection[str],
) -> Deal:
    """The cases of a run that learns from these masks and tests these groups."""
    held_out = {case for group in tested for case in members.get(group, ())}
    healthy = tuple(case for case in cohort.healthy if case not in held_out)
    if not healthy:
        raise UserError(
            "Every healthy case is of a patient that is tested, and none is left to learn from. Test fewer, or add "
            "healthy cases with: gasnet-nnunet extend"
        )
    hidden = {case for case in cohort.labelled if case not in held_out} - set(train)
    test = [case for case in held_out if _can_be_tested(cohort, case, truths)]
    if _uses_images_ts(study, images_ts):
        test = [*(test if _named_patterns(study) else ()), *images_ts]
    if not test:
        raise UserError("No test case has a mask, or a label file of zeros: there is nothing to judge the arms by.")
    diseased = tuple(sorted(hidden | (set(cohort.diseased) - held_out)))
    return Deal(len(train), 0, 0, train, diseased, healthy, tuple(sorted(test)))


def _test_sets(
    study: Study,
    cohort: Cohort,
    members: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    truths: Collection[str],
    images_ts: Collection[str],
) -> list[set[str]]:
    """The groups that each fold tests; none are learnt from."""
    if IMAGES_TS in _patterns(study) and not images_ts:
        raise UserError(
            "test: imagesTs is asked for, but the dataset has no test cases with masks. Put masks of them into "
            "labelsTs, or name the folder that holds them as 'truth'."
        )
    # Whoever is in imagesTs as well is not learnt from.
    shown = {groups[case] for case in images_ts if case in groups} if _uses_images_ts(study, images_ts) else set()
    if patterns := _named_patterns(study):
        return [shown | _named(patterns, members, truths)]
    if _uses_images_ts(study, images_ts):
        return [shown]

    def testable(kinds: Collection[Kind]) -> list[str]:
        return [
            group
            for group, cases in members.items()
            if any(_can_be_tested(cohort, case, truths) and cohort.cases[case].kind in kinds for case in cases)
        ]

    ill = _shuffled(testable((Kind.LABELLED, Kind.DISEASED)), study.seed)
    well = _shuffled([group for group in testable((Kind.HEALTHY,)) if group not in ill], study.seed + 1)
    if study.folds > 1:
        if len(ill) < study.folds:
            raise UserError(
                f"folds: {study.folds} are asked for, but cases with masks are of {len(ill)} patients. Ask for fewer."
            )
        # Healthy patients are dealt out from the other end, so that folds have about as many cases each.
        dealt = [set(ill[fold :: study.folds]) for fold in range(study.folds)]
        return [tested | set(well[study.folds - 1 - fold :: study.folds]) for fold, tested in enumerate(dealt)]
    if study.test == REST:
        return [set(well[: min(MAX_HEALTHY, len(well) // SHARE_TESTED)])]
    number = study.test if isinstance(study.test, int) else max(1, len(ill) // SHARE_TESTED)
    if number >= len(ill):
        raise UserError(
            f"test: {number} patients with masks are to be tested, but there are {len(ill)} and at least one has to be "
            "learnt from. Test fewer, or put test cases with masks into imagesTs and labelsTs."
        )
    return [{*ill[:number], *well[: round(len(well) * number / len(ill))]}]


def _patterns(study: Study) -> tuple[str, ...]:
    """Names of cases and groups to be tested, where the study has them."""
    if isinstance(study.test, str):
        return () if study.test in ("auto", REST) else (study.test,)
    return study.test if isinstance(study.test, tuple) else ()


def _named_patterns(study: Study) -> list[str]:
    """Those of them that name cases and groups of the training set."""
    return [pattern for pattern in _patterns(study) if pattern != IMAGES_TS]


def _uses_images_ts(study: Study, images_ts: Collection[str]) -> bool:
    return study.folds == 1 and (IMAGES_TS in _patterns(study) or (study.test == "auto" and bool(images_ts)))


def _named(patterns: Sequence[str], members: Mapping[str, Sequence[str]], truths: Collection[str]) -> set[str]:
    named = set()
    for pattern in patterns:
        if pattern == HIDDEN:
            put_aside = {group for group, cases in members.items() if set(cases) & set(truths)}
            if not put_aside:
                raise UserError(
                    "test: hidden is asked for, but no mask was put aside: hiddenTr of the dataset is empty."
                )
            named |= put_aside
            continue
        found = {
            group
            for group, cases in members.items()
            if fnmatchcase(group, pattern) or any(fnmatchcase(case, pattern) for case in cases)
        }
        if not found:
            raise UserError(
                f"test: '{pattern}' is no case or group of the dataset. Groups: {abbreviate(sorted(members))}."
            )
        named |= found
    return named


def check_patterns(study: Study, cohort: Cohort, deals: Sequence[Deal]) -> None:
    """Refuse patterns that match nothing: a misspelt one would leave an arm without its diseased volumes.

    Raises:
        UserError: At least one; all are named.
    """
    cases = sorted(cohort.cases)
    tested = sorted({case for deal in deals for case in deal.test})
    asked = {"volumes": (study.volumes or (), cases), "subsets": (tuple(study.subsets.values()), tested)}
    asked |= {f"arms.{key}.volumes": (arm.volumes or (), cases) for key, arm in study.arms.items()}
    problems = [
        f"{place}: '{pattern}' is no {'test case' if place == 'subsets' else 'case'} of the dataset. There are "
        f"{abbreviate(valid)}."
        for place, (patterns, valid) in asked.items()
        for pattern in patterns
        if not any(fnmatchcase(case, pattern) for case in valid)
    ]
    if problems:
        raise UserError(" ".join(problems))


def _pool(study: Study, cohort: Cohort, held_out: Collection[str]) -> list[str]:
    """Cases whose masks may be learnt from, in the order in which they are chosen."""
    free = [case for case in cohort.labelled if case not in held_out]
    if study.labelled is None:
        return _shuffled(free, study.seed + 2)
    pool: list[str] = []
    for pattern in study.labelled:
        if not any(fnmatchcase(case, pattern) for case in cohort.labelled):
            raise UserError(f"labelled: '{pattern}' is no case with a mask. There are {abbreviate(cohort.labelled)}.")
        found = [case for case in free if fnmatchcase(case, pattern) and case not in pool]
        pool += _shuffled(found, study.seed + 2)
    return pool


def _starts(masks: int, repeats: int) -> list[int]:
    """Where in the order of the masks each repeat begins: three thirds, then each as far from the others as can be.

    No start depends on how many there are. With more repeats than masks they come again.
    """
    starts = [repeat * max(1, masks // 3) % masks for repeat in range(min(repeats, 3))]
    while len(starts) < repeats:
        apart = {new: min((new - old) % masks for old in starts) for new in range(masks)}
        apart = {new: min(ahead, *((old - new) % masks for old in starts)) for new, ahead in apart.items()}
        starts.append(max(apart, key=lambda new: apart[new]))
    return starts


def _can_be_tested(cohort: Cohort, case: str, truths: Collection[str]) -> bool:
    entry = cohort.cases[case]
    if entry.kind is Kind.DISEASED:
        return entry.lesion_voxels > 0 or case in truths
    return True


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    return random.Random(seed).sample(sorted(names), len(names))


def _matches(case: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(case, pattern) for pattern in patterns)


def _read_groups(groups: Groups) -> dict[str, str]:
    try:
        text = groups.file.read_text(encoding="utf-8-sig")
        if groups.file.suffix.lower() == ".json":
            content: Any = json.loads(text)
            rows = content if isinstance(content, dict) else {}
        else:
            table = list(csv.DictReader(text.splitlines()))
            rows = {row["case"]: row for row in table}
            for row in table:
                if groups.key is not None and row.get(groups.key) != (other := rows[row["case"]].get(groups.key)):
                    raise UserError(
                        f"{groups.file} puts the case '{row['case']}' into two groups, {row.get(groups.key)} and "
                        f"{other}. Leave one row."
                    )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"{groups.file} cannot be read ({error}). Expected JSON with an entry for each case, or CSV with a column "
            "'case'."
        ) from None
    if not rows:
        raise UserError(f"{groups.file} holds no case. Expected an entry (JSON) or a row (CSV) for each case.")
    if groups.key is None:
        flat = {case: value for case, value in rows.items() if isinstance(value, str | int)}
        if not flat:
            raise UserError(f"groups.key is missing: which entry of {groups.file} holds the group of a case?")
        return {case: str(value) for case, value in flat.items()}
    found = {
        case: str(row[groups.key])
        for case, row in rows.items()
        if isinstance(row, Mapping) and row.get(groups.key) not in (None, "")
    }
    if not found:
        known = sorted({str(name) for row in rows.values() if isinstance(row, Mapping) for name in row if name})
        raise UserError(f"groups.key '{groups.key}' stands nowhere in {groups.file}; there are {', '.join(known)}.")
    return found
