"""Several datasets in nnUNet_raw made into a new one.

What their cases are is what `gasnet_nnunet.cohort` reads in their labels. Lung masks, masks kept aside, test cases and
what is known of each case are taken along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gasnet_nnunet.cohort import Case, Kind, classify_files, declared_labels, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.raw_dataset import Dataset

from .conversion import HIDDEN_MASKS, Converted, check_target, convert
from .medseg import EFFUSION
from .public import Output, missing_healthy
from .sources import Source


@dataclass(frozen=True)
class _Classes:
    """Lesion classes of the merged dataset.

    Args:
        names: Names of the labels 1, 2, ...
        maps: For each dataset, the label of each of its values but 0.
    """

    names: tuple[str, ...]
    maps: tuple[Mapping[int, int], ...]


def merge_datasets(
    datasets: Sequence[Dataset],
    output: Output,
    *,
    as_volume_level: Sequence[Dataset] = (),
    one_lesion_class: bool = False,
) -> Converted:
    """Make a dataset out of several.

    A case keeps its name, or gets the dataset's in front of it where another dataset has a case of that name.

    Args:
        datasets: The datasets, each of one CT channel.
        output: The dataset to be made.
        as_volume_level: Those of them whose masks training must not see: their labelled cases become diseased.
        one_lesion_class: Make all lesion labels one, instead of refusing datasets that do not have the same.

    Raises:
        UserError: Fewer than two datasets, one twice or of other channels, labels that differ, no labelled case left,
            or as in `cohort.classify_files` and `conversion.convert`.
    """
    check_target(output.dataset_id, output.name, output.overwrite)
    raise_problems([*_unfit(datasets, as_volume_level, output.dataset_id)], "the datasets")
    classes = _one_class(datasets) if one_lesion_class else _same_classes(datasets)
    hidden = {dataset.name for dataset in as_volume_level}
    sources: list[Source] = []
    shared = _shared_names(datasets)
    for dataset, labels in zip(datasets, classes.maps, strict=True):
        cases = classify_files(
            {case: Path(entry["label"]) for case, entry in dataset.files.items()},
            dataset.dataset_json,
            num_processes=output.num_processes,
            progress=output.progress,
        )
        found = [_training_case(dataset, case, labels) for case in cases.values()]
        for source in [*found, *(_test_case(dataset, name, labels) for name in _test_names(dataset))]:
            case, kind = source.case, source.kind
            if case in shared:
                case = f"{dataset.name.removeprefix('Dataset')}_{case}"
            if kind is Kind.LABELLED and dataset.name in hidden:
                kind = Kind.DISEASED
            sources.append(replace(source, case=case, kind=kind))
    if not any(source.kind is Kind.LABELLED for source in sources):
        raise UserError(
            "None of the merged cases would be labelled, but training needs one mask at least. Leave a dataset with "
            "masks out of --as-volume-level, or add one."
        )
    remarks = [*missing_healthy(sources, output.dataset_id)]
    if shared:
        remarks.append(
            f"{len(shared)} names of cases occur in several datasets; these cases got their dataset's in front."
        )
    return convert(sources, class_names=classes.names, remarks=remarks, **asdict(output))


def _unfit(datasets: Sequence[Dataset], as_volume_level: Sequence[Dataset], dataset_id: int) -> Iterator[str]:
    names = [dataset.name for dataset in datasets]
    if len(datasets) < 2:
        yield f"-d names {', '.join(names) or 'no dataset'}; expected two or more datasets to merge."
    for name, times in Counter(names).items():
        if times > 1:
            yield f"-d names {name} {times} times; name each dataset once."
    for dataset in datasets:
        if dataset.number == dataset_id:
            yield f"--id {dataset_id} is {dataset.name}, which is to be merged. Choose another id."
        channels = [str(name) for name in dataset.dataset_json["channel_names"].values()]
        if len(channels) > 1 or not dataset.ct_channels:
            yield f"{dataset.name} has the channels {', '.join(channels)}; merge joins datasets of one channel, CT."
    for dataset in as_volume_level:
        if dataset.name not in names:
            yield f"--as-volume-level names {dataset.name}, which is not to be merged ({', '.join(names)} are)."


def _one_class(datasets: Sequence[Dataset]) -> _Classes:
    maps = []
    for dataset in datasets:
        labels = declared_labels(dataset.dataset_json)
        values = dict.fromkeys(labels.values - {0, labels.ignore}, 1)
        # Fluid around the lung is no lesion in it, as in `medseg` without --classes-apart.
        values |= {value: 0 for name, value in dataset.dataset_json["labels"].items() if name == EFFUSION}
        maps.append(_with_ignore(values, labels.ignore, 1))
    return _Classes(("lesion",), tuple(maps))


def _same_classes(datasets: Sequence[Dataset]) -> _Classes:
    """The labels that all datasets have; they may differ in `ignore` only."""
    declared = {dataset.name: dict(dataset.dataset_json["labels"]) for dataset in datasets}
    sets = []
    for labels in declared.values():
        sets.append({name: value for name, value in labels.items() if name not in ("background", "ignore")})
    first = sets[0]
    if any(labels != first for labels in sets):
        listed = "".join(f"\n  - {name}: {_listed(labels)}" for name, labels in zip(declared, sets, strict=True))
        raise UserError(
            f"The datasets do not have the same labels:{listed}\nConvert them with the same ones, or add "
            "--lesion-classes 1 to make all of them one lesion class."
        )
    if sorted(map(str, first.values())) != sorted(map(str, range(1, len(first) + 1))):
        raise UserError(
            f"The labels {_listed(first)} are not the values 1, 2, ... each; only such are kept apart. Add "
            "--lesion-classes 1 to make all of them one lesion class."
        )
    names = tuple(sorted(first, key=lambda name: int(first[name])))
    maps = []
    for dataset in datasets:
        ignore = declared_labels(dataset.dataset_json).ignore
        maps.append(_with_ignore({value: value for value in range(1, len(names) + 1)}, ignore, len(names)))
    return _Classes(names, tuple(maps))


def _listed(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in labels.items()) or "none"


def _with_ignore(values: dict[int, int], ignore: int | None, classes: int) -> dict[int, int]:
    # A partly ignored mask stays one: `ignore` comes behind the classes in the merged dataset too.
    return values if ignore is None else {**values, ignore: classes + 1}


def _shared_names(datasets: Sequence[Dataset]) -> set[str]:
    """Names of cases, be they for training or for testing, that several datasets have."""
    count = Counter(name for dataset in datasets for name in {*dataset.files, *_test_names(dataset)})
    return {name for name, times in count.items() if times > 1}


def _test_names(dataset: Dataset) -> list[str]:
    ending = f"_0000{dataset.dataset_json['file_ending']}"
    return sorted(path.name.removesuffix(ending) for path in (dataset.raw / "imagesTs").glob(f"*{ending}"))


def _training_case(dataset: Dataset, case: Case, labels: Mapping[int, int]) -> Source:
    entry = dataset.files[case.identifier]
    mask: Path | None = None
    if case.kind is Kind.LABELLED or (case.kind is Kind.DISEASED and case.lesion_voxels):
        # The label file of a case that only dataset.json makes diseased is its mask.
        mask = Path(entry["label"])
    elif case.kind is Kind.DISEASED:
        mask = _companion(dataset, HIDDEN_MASKS, case.identifier)
    lungs = _companion(dataset, "lungsTr", case.identifier)
    source = Source(case.identifier, case.kind, tuple(map(Path, entry["images"])), mask, lungs, classes=labels)
    return _with_details(dataset, source)


def _test_case(dataset: Dataset, name: str, labels: Mapping[int, int]) -> Source:
    image = dataset.raw / "imagesTs" / f"{name}_0000{dataset.dataset_json['file_ending']}"
    mask, lungs = _companion(dataset, "labelsTs", name), _companion(dataset, "lungsTs", name)
    return _with_details(dataset, Source(name, None, (image,), mask, lungs, classes=labels))


def _companion(dataset: Dataset, folder: str, case: str) -> Path | None:
    path = dataset.raw / folder / f"{case}{dataset.dataset_json['file_ending']}"
    return path if path.is_file() else None


def _with_details(dataset: Dataset, source: Source) -> Source:
    known = dataset.dataset_json.get("gasnet", {}).get("cases", {}).get(source.case, {})
    details = {"dataset": dataset.name, **known}
    # Another dataset may mean somebody else by the same pseudonym.
    patient = f"{details['dataset']}: {details['patient']}" if "patient" in details else None
    return replace(source, details=details, patient=patient, named_by=f"-d {dataset.name}")
