"""Which case is voxel-labelled, which diseased and which healthy.

The labels alone tell the three kinds apart: a mask with lesion in it, a file filled with nnU-Net's `ignore` label, a
file of zeros. `dataset.json` may overrule single cases:

    "gasnet": {"cohort": {"case_007": "diseased"}}

and name the patients, which labels cannot tell: "gasnet": {"cases": {"case_007": {"patient": "p3"}}}.

Nobody else in this package looks at label values to guess a kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json
from gasnet_nnunet.parallel import run_jobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

TINY_MASK_VOXELS = 10
FEW_CASES = 3
LISTED_CASES = 8
COHORT_CACHE = "gasnet_cohort.json"
"""What was read of the label files, in the dataset's folder in nnUNet_preprocessed."""
LISTED_PROBLEMS = 20


class Kind(str, Enum):
    """What is known about a case."""

    LABELLED = "labelled"
    """A CT with its lesion mask: I_l and M_l of the paper."""
    DISEASED = "diseased"
    """A CT of a patient known to have the disease, without a mask (or with one that is to stay hidden): I_d."""
    HEALTHY = "healthy"
    """A CT known to show no lesion, whose mask is zero by definition: I_h."""


@dataclass(frozen=True)
class Case:
    """One case of the cohort.

    Args:
        identifier: nnU-Net's case identifier.
        kind: What the case is used as.
        lesion_voxels: Voxels of the label file that are neither background nor ignored, hidden or not.
        ignored_fraction: Share of the voxels that carry the `ignore` label, 0 to 1.
        overruled: Whether `dataset.json` makes it another kind than its labels say.
        patient: Whom it shows, where `dataset.json` says so; all cases of a patient are kept on one side of a fold.
    """

    identifier: str
    kind: Kind
    lesion_voxels: int
    ignored_fraction: float
    overruled: bool = False
    patient: str | None = None


@dataclass(frozen=True)
class Cohort:
    """All training cases of a dataset.

    Args:
        cases: The cases by their identifiers.
    """

    cases: dict[str, Case]

    @property
    def labelled(self) -> list[str]:
        """Identifiers of the voxel-labelled cases, sorted."""
        return self._of(Kind.LABELLED)

    @property
    def diseased(self) -> list[str]:
        """Identifiers of the diseased cases without a mask (or with a hidden one), sorted."""
        return self._of(Kind.DISEASED)

    @property
    def healthy(self) -> list[str]:
        """Identifiers of the healthy cases, sorted."""
        return self._of(Kind.HEALTHY)

    def report(self) -> str:
        """Counts, cases and what is odd, for a terminal or a log."""
        lines = [f"Cohort: {len(self.cases)} cases"]
        for identifiers, meaning in (
            (self.labelled, "voxel-labelled (a mask with lesion)"),
            (self.diseased, "diseased (no mask, or a hidden one)"),
            (self.healthy, "healthy (no lesion)"),
        ):
            lines.append(f"  {len(identifiers):4d} {meaning}{': ' if identifiers else ''}{abbreviate(identifiers)}")
        lines += [f"  Note: {remark}" for remark in self.remarks()]
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """What is odd about the cohort although it can be trained on, one sentence each."""
        remarks = []
        if len(self.labelled) == 1:
            remarks.append(
                f"ONLY ONE MASK: {self.labelled[0]} is the training case AND the validation case. Its validation Dice "
                "says little about other patients."
            )
        if not self.diseased:
            remarks.append("no diseased case without a mask: the voxel-labelled ones serve as diseased ones too.")
        for identifiers, kind in ((self.diseased, Kind.DISEASED), (self.healthy, Kind.HEALTHY)):
            if 0 < len(identifiers) < FEW_CASES:
                remarks.append(
                    f"very few {kind.value} cases ({len(identifiers)}): none can be held out to watch the training, "
                    "and the generator and the discriminator will learn them by heart."
                )
        for case in self.cases.values():
            if case.overruled:
                hidden = f", its mask of {case.lesion_voxels} lesion voxels is hidden" if case.lesion_voxels else ""
                remarks.append(f"{case.identifier} is {case.kind.value} because dataset.json says so{hidden}.")
            elif case.kind is Kind.LABELLED and case.ignored_fraction > 0:
                remarks.append(f"{case.identifier}: {100 * case.ignored_fraction:.1f} % of its voxels are ignored.")
            if case.kind is Kind.LABELLED and case.lesion_voxels < TINY_MASK_VOXELS:
                remarks.append(f"{case.identifier}: its mask is tiny ({case.lesion_voxels} lesion voxels).")
        return remarks

    def _of(self, kind: Kind) -> list[str]:
        return sorted(identifier for identifier, case in self.cases.items() if case.kind is kind)


def abbreviate(identifiers: Sequence[str], limit: int = LISTED_CASES) -> str:
    """List names, the later ones of a long list as a count.

    Examples:
        >>> abbreviate(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(identifiers[:limit])
    return shown if len(identifiers) <= limit else f"{shown} and {len(identifiers) - limit} more"


def raise_problems(problems: Sequence[str], what: str) -> None:
    """Raise one UserError for all problems found, or return if there are none.

    Args:
        problems: One sentence each.
        what: What could not be used, to head the list.

    Raises:
        UserError: There is at least one problem.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:LISTED_PROBLEMS])
        if len(problems) > LISTED_PROBLEMS:
            listed += f"\n  and {len(problems) - LISTED_PROBLEMS} more"
        raise UserError(f"{len(problems)} problems with {what}:{listed}")


def read_cohort(
    label_folder: Path,
    dataset_json: Mapping[str, Any],
    *,
    identifiers: Sequence[str] | None = None,
    cache: Path | None = None,
    num_processes: int = 2,
    progress: bool = False,
) -> Cohort:
    """Read the label files of a dataset and tell the kinds of its cases apart.

    Args:
        label_folder: Holds `<case><file_ending>`: `labelsTr` of nnUNet_raw or `gt_segmentations` of
            nnUNet_preprocessed.
        dataset_json: The dataset's `dataset.json`.
        identifiers: Cases to read; all files of the folder if `None`.
        cache: JSON file that keeps what was read of each file (by size and time of its last change), so that only new
            files are read the next time. Any name; made if missing.
        num_processes: Label files read at a time.
        progress: Show a progress bar.

    Raises:
        UserError: A label file is missing, unreadable or holds undeclared values; a case filled with one value that
            could only be `ignore` where dataset.json has no `ignore`; a partly ignored mask without lesion; an
            impossible overruling; no mask at all; no healthy case.
    """
    if "file_ending" not in dataset_json:
        raise UserError('dataset.json has no \'file_ending\'. Add it, e.g. "file_ending": ".nii.gz".')
    ending = str(dataset_json["file_ending"])
    if not label_folder.is_dir():
        raise UserError(f"There is no folder of labels at {label_folder}.")
    on_disk = {path.name[: -len(ending)]: path for path in sorted(label_folder.iterdir()) if path.name.endswith(ending)}
    wanted = list(on_disk) if identifiers is None else list(identifiers)
    if not wanted:
        raise UserError(f"{label_folder} holds no file ending in '{ending}', which is dataset.json's file_ending.")
    return cohort_of_files(
        {identifier: label_folder / f"{identifier}{ending}" for identifier in wanted},
        dataset_json,
        known=on_disk,
        cache=cache,
        num_processes=num_processes,
        progress=progress,
    )


def cohort_of_files(
    files: Mapping[str, Path],
    dataset_json: Mapping[str, Any],
    *,
    known: Iterable[str] | None = None,
    cache: Path | None = None,
    num_processes: int = 2,
    progress: bool = False,
) -> Cohort:
    """As `read_cohort`, for label files that lie anywhere (nnU-Net's `dataset` entry of `dataset.json`).

    Args:
        files: Label file of each case.
        dataset_json: The dataset's `dataset.json`.
        known: Identifiers that an overruling may name; those of `files` if `None`.
        cache: As in `read_cohort`.
        num_processes: As in `read_cohort`.
        progress: As in `read_cohort`.

    Raises:
        UserError: As in `read_cohort`.
    """
    cases = classify_files(
        files, dataset_json, known=known, cache=cache, num_processes=num_processes, progress=progress
    )
    cohort = Cohort(cases)
    if not cohort.labelled:
        raise UserError(
            f"None of the {len(cases)} cases has a mask with lesion in it. GASNet needs at least one "
            "voxel-labelled case; gasnet-nnunet convert merge joins a dataset that has one with this one."
        )
    if not cohort.healthy:
        raise UserError(
            f"None of the {len(cases)} cases is healthy (a label file of zeros). GASNet needs healthy cases; add some "
            "with: gasnet-nnunet extend -d N --healthy FOLDER"
        )
    return cohort


def classify_files(
    files: Mapping[str, Path],
    dataset_json: Mapping[str, Any],
    *,
    known: Iterable[str] | None = None,
    cache: Path | None = None,
    num_processes: int = 2,
    progress: bool = False,
) -> dict[str, Case]:
    """Tell the kinds of cases apart as `cohort_of_files` does, whether or not they are a cohort to train on.

    Args:
        files: As in `cohort_of_files`.
        dataset_json: As in `cohort_of_files`.
        known: As in `cohort_of_files`.
        cache: As in `read_cohort`.
        num_processes: As in `read_cohort`.
        progress: As in `read_cohort`.

    Raises:
        UserError: As in `read_cohort`, but for the last two.
    """
    labels = declared_labels(dataset_json)
    overrulings = _overrulings(dataset_json, set(files if known is None else known))
    counts = _count_all(files, dataset_json, cache, num_processes, progress)
    patients = patients_of(dataset_json)
    cases, problems = {}, []
    for identifier in sorted(files):
        try:
            case = classify(identifier, counts[identifier], labels, overrulings.get(identifier))
            cases[identifier] = replace(case, patient=patients.get(identifier))
        except UserError as problem:
            problems.append(str(problem))
    raise_problems(problems, "the label files")
    return cases


@dataclass(frozen=True)
class DeclaredLabels:
    """Label values of a `dataset.json`.

    Args:
        values: All declared values, 0 and `ignore` included.
        ignore: Value of the `ignore` label, if there is one.
    """

    values: frozenset[int]
    ignore: int | None


def declared_labels(dataset_json: Mapping[str, Any]) -> DeclaredLabels:
    """Label values that `dataset.json` declares, be they labels or regions (lists of values).

    Examples:
        >>> sorted(declared_labels({"labels": {"background": 0, "lesion": [1, 2], "core": 2, "ignore": 3}}).values)
        [0, 1, 2, 3]

    Raises:
        UserError: There are no labels, or `ignore` is not one number.
    """
    labels = dataset_json.get("labels")
    if not isinstance(labels, Mapping) or "background" not in labels:
        raise UserError(
            'dataset.json declares no labels; expected e.g. "labels": {"background": 0, "lesion": 1, "ignore": 2}.'
        )
    values = {
        int(value) for entry in labels.values() for value in (entry if isinstance(entry, list | tuple) else [entry])
    }
    ignore = labels.get("ignore")
    if ignore is not None and (not isinstance(ignore, int) or ignore != max(values)):
        raise UserError(
            f"The label 'ignore' of dataset.json is {ignore}; nnU-Net wants one number above all other labels "
            f"(declared: {sorted(values)})."
        )
    return DeclaredLabels(frozenset(values | {0}), ignore)


def patients_of(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Whom the cases show, those of `imagesTs` too, as far as the conversion noted it.

    Args:
        dataset_json: nnU-Net's `dataset.json`.

    Raises:
        UserError: Its details of cases are not as a conversion writes them.
    """
    section = dataset_json.get("gasnet", {}).get("cases", {})
    if not isinstance(section, Mapping) or not all(isinstance(details, Mapping) for details in section.values()):
        raise UserError('dataset.json: "gasnet" must have "cases" like {"case_007": {"patient": "p3"}}.')
    return {case: str(details["patient"]) for case, details in section.items() if details.get("patient") is not None}


def classify(identifier: str, counts: Mapping[int, int], labels: DeclaredLabels, overruling: Kind | None) -> Case:
    """Tell a case's kind from how often each value stands in its label file.

    Args:
        identifier: Name of the case.
        counts: Voxels of each label value.
        labels: Declared values.
        overruling: Kind that dataset.json gives the case, if it does.

    Raises:
        UserError: Undeclared values, or a kind that these labels cannot be.
    """
    total = sum(counts.values())
    ignored = counts.get(labels.ignore, 0) if labels.ignore is not None else 0
    lesion = total - ignored - counts.get(0, 0)
    undeclared = sorted(set(counts) - labels.values)
    if overruling is not Kind.DISEASED and labels.ignore is None and len(counts) == 1 and lesion:
        value = next(iter(counts))
        raise UserError(
            f"{identifier}: every voxel of its label file is {value}, as for a diseased case without a mask, but "
            f"dataset.json has no label 'ignore'. Add one to its labels (\"ignore\": {max(labels.values | {value})}) "
            "or correct the file."
        )
    if undeclared:
        raise UserError(
            f"{identifier}: its label file holds {undeclared}, which dataset.json does not declare "
            f"(declared: {sorted(labels.values)}). Correct the file or the labels."
        )
    if ignored == total:
        derived: Kind | None = Kind.DISEASED
    elif lesion:
        derived = Kind.LABELLED
    elif not ignored:
        derived = Kind.HEALTHY
    else:
        derived = None
    kind = overruling or derived
    if kind is None:
        raise UserError(
            f"{identifier}: its mask is partly ignored ({100 * ignored / total:.1f} %) and shows no lesion elsewhere, "
            "so it is neither healthy nor labelled. Say which in dataset.json: "
            f'"gasnet": {{"cohort": {{"{identifier}": "diseased"}}}} (or "healthy").'
        )
    if kind is Kind.HEALTHY and lesion:
        raise UserError(
            f"{identifier}: dataset.json calls it healthy, but its mask has {lesion} lesion voxels. Correct either."
        )
    if kind is Kind.LABELLED and not lesion:
        raise UserError(
            f"{identifier}: dataset.json calls it labelled, but its mask has no lesion voxel. Correct either."
        )
    return Case(identifier, kind, lesion, ignored / total, overruled=kind is not derived)


def count_label_values(path: Path, ending: str, reader_name: str | None = None) -> dict[int, int] | str:
    """Count how many voxels of a label file have each value; a sentence that says why if that is impossible.

    Args:
        path: Label file, (Z, Y, X) or a 2D image.
        ending: `file_ending` of the dataset, by which nnU-Net chooses its reader.
        reader_name: `overwrite_image_reader_writer` of the dataset, if it has one.
    """
    import numpy as np

    from gasnet_nnunet.volumes import NIFTI_ENDINGS, read_nifti_values

    try:
        volume = read_nifti_values(path) if ending in NIFTI_ENDINGS else _read_as_nnunet(path, ending, reader_name)
    except UserError as error:
        return str(error)
    totals: dict[int, int] = {}
    # Slice by slice: np.unique on a whole CT sorts some 10^8 voxels.
    for plane in volume.reshape(-1, *volume.shape[-2:]):
        with np.errstate(invalid="ignore"):
            integers = plane.astype(np.int64)
        if not np.array_equal(integers, plane) or integers.min() < 0:
            wrong = plane[(integers != plane) | (integers < 0)].flat[0]
            return f"{path} holds the value {wrong:g}; labels must be whole numbers from 0 on."
        if integers.max() > 65535:
            return f"{path} holds the value {integers.max()}, which is no label. Is this an image?"
        found = np.bincount(integers.ravel())
        for value in np.flatnonzero(found):
            totals[int(value)] = totals.get(int(value), 0) + int(found[value])
    return totals


def _read_as_nnunet(path: Path, ending: str, reader_name: str | None) -> NDArray[Any]:
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name

    if reader_name:
        readers = [recursive_find_reader_writer_by_name(reader_name)]
    else:
        readers = [reader for reader in LIST_OF_IO_CLASSES if ending.lower() in reader.supported_file_endings]
    failure = f"nnU-Net has no reader for {ending}"
    for reader in readers:
        try:
            return reader().read_seg(str(path))[0]
        # Readers report a broken file by whatever their library raises; it becomes the message.
        except Exception as error:
            failure = " ".join(str(error).split())[-200:]
    raise UserError(f"{path} cannot be read as a label file: {failure}")


def _overrulings(dataset_json: Mapping[str, Any], known: set[str]) -> dict[str, Kind]:
    section = dataset_json.get("gasnet", {})
    entries = section.get("cohort", {}) if isinstance(section, Mapping) else None
    if not isinstance(entries, Mapping):
        raise UserError('dataset.json: "gasnet" must look like {"cohort": {"case_007": "diseased"}}.')
    kinds = [kind.value for kind in Kind]
    overrulings = {}
    for identifier, kind in entries.items():
        if identifier not in known:
            raise UserError(f"dataset.json's gasnet.cohort names the case '{identifier}', which has no label file.")
        if kind not in kinds:
            raise UserError(
                f"dataset.json's gasnet.cohort calls {identifier} {kind!r}; the kinds are {', '.join(kinds)}."
            )
        overrulings[identifier] = Kind(kind)
    return overrulings


def _count_all(
    files: Mapping[str, Path],
    dataset_json: Mapping[str, Any],
    cache: Path | None,
    num_processes: int,
    progress: bool,
) -> dict[str, dict[int, int]]:
    cached = _load_cache(cache)
    missing = [identifier for identifier, path in files.items() if not path.is_file()]
    if missing:
        raise UserError(
            f"No label file for {abbreviate(missing)} (expected e.g. {files[missing[0]]}). Every case needs one: its "
            "mask, zeros for a healthy case, or the ignore label throughout for a diseased one."
        )
    stamps = {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}
    counts: dict[str, dict[int, int]] = {}
    for identifier, stamp in stamps.items():
        entry = cached.get(identifier)
        if entry is not None and entry["stamp"] == stamp:
            counts[identifier] = {int(value): count for value, count in entry["counts"].items()}
    pending = [identifier for identifier in files if identifier not in counts]
    reader = dataset_json.get("overwrite_image_reader_writer")
    read = partial(
        count_label_values,
        ending=str(dataset_json["file_ending"]),
        reader_name=None if reader in (None, "None") else str(reader),
    )
    results = run_jobs(
        read,
        [files[identifier] for identifier in pending],
        num_processes=num_processes,
        description="Reading labels" if progress else None,
    )
    problems = []
    for identifier, result in zip(pending, results, strict=True):
        if isinstance(result, str):
            problems.append(result)
        else:
            counts[identifier] = result
    if cache is not None and pending and os.access(cache.parent, os.W_OK):
        entries = {
            **cached,
            **{name: {"stamp": stamps[name], "counts": counts[name]} for name in counts},
        }
        write_json(cache, entries)
    raise_problems(problems, "the label files")
    return counts


def _load_cache(cache: Path | None) -> dict[str, Any]:
    if cache is None or not cache.is_file():
        return {}
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and {"stamp", "counts"} <= set(entry)}
