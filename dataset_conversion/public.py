"""What the public datasets have in common: their folders found as published, and whose masks are kept chosen.

Each dataset has a module of its own that knows its names and values.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gasnet_nnunet.cohort import Kind, abbreviate, raise_problems
from gasnet_nnunet.errors import UserError

from .conversion import Converted, check_target, convert
from .sources import Source

OPTION = "--in"
ENDINGS = (".nii.gz", ".nii")
Cases = int | tuple[str, ...]
"""A number of cases to be drawn, or the names of cases."""


@dataclass(frozen=True)
class Output:
    """The dataset to be made, and how.

    Args:
        dataset_id: nnU-Net's dataset id, 1 to 999.
        name: Name behind the id: letters, digits, `_` and `-`.
        overwrite: Replace a dataset of the same id and name.
        num_processes: Cases read and written at a time.
        progress: Show progress bars.
    """

    dataset_id: int
    name: str
    overwrite: bool = False
    num_processes: int = 2
    progress: bool = False


@dataclass(frozen=True)
class Roles:
    """Whose masks training may see, and who is kept out of it.

    Args:
        labelled: Cases whose masks are kept; `None` for all that are no test cases. The others become diseased.
        test: Cases for the test set.
        seed: Decides which cases are drawn. With one seed, more cases include the fewer.
    """

    labelled: Cases | None = None
    test: Cases = ()
    seed: int = 0

    @classmethod
    def parse(cls, labelled: Sequence[str] | None, test: Sequence[str] | None, seed: int) -> Roles:
        """Roles from the words of a command line, where a single number is a number of cases.

        Examples:
            >>> Roles.parse(["4"], ["study_0255", "study_0256"], seed=1)
            Roles(labelled=4, test=('study_0255', 'study_0256'), seed=1)
        """
        return cls(_parse(labelled) if labelled else None, _parse(test or ()), seed)


def _parse(words: Sequence[str]) -> Cases:
    return int(words[0]) if len(words) == 1 and words[0].isdecimal() else tuple(words)


def find_folder(root: Path, *names: str) -> Path | None:
    """The folder of one of these names in the downloaded root, upper and lower case alike, if there is one."""
    wanted = {name.casefold() for name in names}
    return next((path for path in _folders(root) if path.name.casefold() in wanted), None)


def need_folder(root: Path, *names: str) -> Path:
    """As `find_folder`, for a folder that must be there.

    Raises:
        UserError: There is none.
    """
    if (folder := find_folder(root, *names)) is not None:
        return folder
    if not root.is_dir():
        raise UserError(f"{OPTION}: {root} is no folder." if root.exists() else f"{OPTION}: there is no {root}.")
    found = abbreviate(sorted(path.name for path in root.iterdir())) or "nothing"
    raise UserError(
        f"{OPTION}: {root} has no folder {' or '.join(names)}; it holds {found}. Unpack the downloaded archives and "
        "name the folder that holds theirs."
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def find_files(folder: Path) -> list[Path]:
    """NIfTI files of a folder, however deep: some archives are unpacked into a folder named like the file or theirs."""
    return sorted(
        path for path in folder.rglob("*.nii*") if path.is_file() and path.name.endswith(ENDINGS) and _seen(path)
    )


def _seen(path: Path) -> bool:
    # macOS leaves `._name` beside each file of an archive, and `__MACOSX` beside its folders.
    return not path.name.startswith(".")


def stem(path: Path) -> str:
    """File name without the ending of a NIfTI file.

    Examples:
        >>> stem(Path("rp_im/1.nii.gz"))
        '1'
    """
    return path.name.removesuffix(".gz").removesuffix(".nii")


def by_case(files: Sequence[Path], names: Mapping[Path, str | None], expected: str) -> dict[str, Path]:
    """Files by the names of their cases.

    Args:
        files: The files.
        names: Name of the case of each; `None` for a file that is none of the dataset.
        expected: What the files of this folder are called, for messages.

    Raises:
        UserError: A file has another name, or two are of one case.
    """
    found: dict[str, Path] = {}
    problems = []
    for path in files:
        case = names[path]
        if case is None:
            problems.append(f"{OPTION}: {path} is none of the dataset's files; expected {expected}. Move it elsewhere.")
        elif case in found:
            problems.append(f"{OPTION}: {found[case]} and {path} are both the case {case}. Keep one of them.")
        else:
            found[case] = path
    raise_problems(problems, "the files")
    return found


def unpaired(images: Mapping[str, Path], masks: Mapping[str, Path]) -> Iterator[str]:
    """One sentence for images without a mask and one for masks without an image, which a broken download leaves."""
    for those, others, what in ((images, masks, "image without a mask"), (masks, images, "mask without an image")):
        if alone := sorted(set(those) - set(others)):
            yield f"{OPTION}: {what}: {abbreviate(alone)} (e.g. {those[alone[0]]}). Complete the download."


def assign_roles(sources: Sequence[Source], roles: Roles) -> list[Source]:
    """Cases with masks made labelled, diseased (their masks kept aside for scoring) or test cases.

    A drawn test case takes all scans of its patient along.

    Args:
        sources: All cases; those with a mask to choose from are labelled ones.
        roles: What is wanted.

    Raises:
        UserError: There are no cases of these names, or too few.
    """
    masked = sorted(source.case for source in sources if source.kind is Kind.LABELLED)
    raise_problems([*_misnamed(sources, masked, roles)], "the cases")
    order = random.Random(roles.seed).sample(masked, len(masked))
    named = set() if roles.labelled is None or isinstance(roles.labelled, int) else set(roles.labelled)
    test = _draw_test(sources, order[::-1], named, roles.test) if isinstance(roles.test, int) else set(roles.test)
    left = [case for case in order if case not in test]
    if isinstance(roles.labelled, int):
        if not 1 <= roles.labelled <= len(left):
            raise UserError(
                f"--labelled {roles.labelled}: there are {len(left)} cases with masks that are no test cases; at least "
                "one must be labelled."
            )
        named = set(left[: roles.labelled])
    kept = set(left) if roles.labelled is None else named
    if masked and not kept:
        raise UserError("No case would keep its mask for training; at least one must. Name fewer test cases.")
    changed = []
    for source in sources:
        kind = source.kind
        if source.case in test:
            kind = None
        elif kind is Kind.LABELLED and source.case not in kept:
            kind = Kind.DISEASED
        changed.append(replace(source, kind=kind))
    return changed


def _misnamed(sources: Sequence[Source], masked: Sequence[str], roles: Roles) -> Iterator[str]:
    everyone = sorted(source.case for source in sources)
    for option, cases, known, what in (
        ("--labelled", roles.labelled, masked, "case with a mask"),
        ("--test", roles.test, everyone, "case"),
    ):
        if cases is None or isinstance(cases, int):
            continue
        for case in cases:
            if case not in known:
                yield f"{option}: there is no {what} named {case}; there are {abbreviate(known)}."
    if isinstance(roles.labelled, tuple) and isinstance(roles.test, tuple):
        for case in sorted(set(roles.labelled) & set(roles.test)):
            yield f"{case} is named both with --labelled and with --test."


def _draw_test(sources: Sequence[Source], order: Sequence[str], named: set[str], wanted: int) -> set[str]:
    patients = {source.case: source.patient or source.case for source in sources}
    scans: dict[str, set[str]] = {}
    for case, patient in patients.items():
        scans.setdefault(patient, set()).add(case)
    test: set[str] = set()
    for case in order:
        group = scans[patients[case]]
        if not group & (named | test) and len(test | group) <= wanted:
            test |= group
    if len(test) < wanted:
        raise UserError(
            f"--test {wanted}: only {len(test)} cases with masks can be test cases. Ask for fewer; those of a patient "
            "stay together."
        )
    return test


def convert_public(
    sources: Sequence[Source], roles: Roles, output: Output, *, class_names: Sequence[str], remarks: Sequence[str]
) -> Converted:
    """Make a dataset of the cases of a public one.

    Args:
        sources: The cases.
        roles: Whose masks are kept.
        output: The dataset to be made.
        class_names: Names of the labels 1, 2, ...
        remarks: What the user should know about the source.

    Raises:
        UserError: See `assign_roles` and `conversion.convert`.
    """
    check_target(output.dataset_id, output.name, output.overwrite)
    chosen = assign_roles(sources, roles)
    notes = [*remarks, *missing_healthy(chosen, output.dataset_id)]
    if not any(source.kind is Kind.LABELLED for source in chosen):
        notes.append(
            "no case has a mask, and training needs one. Join a dataset that has some: gasnet-nnunet convert merge -d "
            f"{output.dataset_id} OTHER --id N --name NAME"
        )
    return convert(chosen, class_names=class_names, remarks=notes, **asdict(output))


def missing_healthy(sources: Sequence[Source], dataset_id: int) -> Iterator[str]:
    """What to do about a dataset without healthy cases, if it has none."""
    if not any(source.kind is Kind.HEALTHY for source in sources):
        yield (
            "there is no healthy case, and training needs some. Add them with: gasnet-nnunet extend -d "
            f"{dataset_id} --healthy FOLDER, or join a dataset that has them: gasnet-nnunet convert merge -d "
            f"{dataset_id} OTHER --id N --name NAME"
        )


def incomplete(found: int, published: int, what: str) -> Iterator[str]:
    """A remark on a part of the dataset that is smaller or larger than the published one."""
    if found != published:
        yield f"the published dataset has {published} {what}; here are {found}."
