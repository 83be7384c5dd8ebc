"""What `gasnet-nnunet compare` compares: models, cases and subsets, looked up and checked before any long work."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gasnet_nnunet.checkpoints import CHECKPOINTS, checkpoint_file, named_folds, predicting_folds
from gasnet_nnunet.cohort import DeclaredLabels, abbreviate, declared_labels, patients_of, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.evaluation import files_of_cases
from gasnet_nnunet.raw_dataset import read_json
from gasnet_nnunet.splits import recorded_cases
from gasnet_nnunet.volumes import grid_difference, read_grid

CHANNEL = re.compile(r"_(\d{4})$")
MOST_GROUPS = 12
"""Subsets of a column beyond which it is no column of subsets."""


@dataclass(frozen=True)
class Model:
    """One of the models to compare.

    Args:
        name: What it is called in tables.
        folder: A model folder of nnU-Net's (`trainer__plans__configuration`), or a folder of predictions.
        folds: Folds that predict together; none where the predictions are there.
        checkpoint: File of each fold that predicts.
        predictions: Predicted label map of each case, where they are there.
        dataset_json: nnU-Net's `dataset.json` of it, empty if there is none.
        learnt: Cases whose validation is taken although training learnt from them, as far as its folder tells.
    """

    name: str
    folder: Path
    folds: tuple[str, ...] = ()
    checkpoint: str = CHECKPOINTS["final"]
    predictions: Mapping[str, Path] = field(default_factory=dict)
    dataset_json: Mapping[str, Any] = field(default_factory=dict)
    learnt: tuple[str, ...] = ()

    @property
    def labels(self) -> frozenset[int] | None:
        """Values that its predictions may hold; `None` where nothing says so."""
        return declared_labels(self.dataset_json).values if "labels" in self.dataset_json else None

    def checkpoints(self) -> list[Path]:
        """The files that predict."""
        return [self.folder / f"fold_{fold}" / self.checkpoint for fold in self.folds]


@dataclass(frozen=True)
class CaseFiles:
    """The cases that all models are tested on.

    Args:
        references: True label map of each case.
        images: Files of the channels of each case; empty without CTs.
        lungs: Lung masks of some cases, or of all.
        labels: What the `dataset.json` of the masks declares, else what those of the models agree on.
        classes: Label values of each lesion class, where there are several.
        declared: Whether `labels` are of the masks' own `dataset.json`.
        notes: What is odd about it, one sentence each.
        patients: Whom the cases show, as far as it is known.
    """

    references: Mapping[str, Path]
    images: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    lungs: Mapping[str, Path] = field(default_factory=dict)
    labels: DeclaredLabels | None = None
    classes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    declared: bool = False
    notes: tuple[str, ...] = ()
    patients: Mapping[str, str] = field(default_factory=dict)


def find_model(
    name: str | None,
    folder: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = "final",
    validation: bool = False,
) -> Model:
    """Look a model up and check that it can be compared.

    Args:
        name: What it is to be called; its folder's name if `None`.
        folder: A model folder of nnU-Net's, one fold of it, or a folder of predictions, e.g. a fold's `validation`.
        folds: Folds to take, e.g. `["0", "1"]` or `["all"]`; all trained ones if `None`. Of one fold's folder, that.
        checkpoint: What predicts in each fold: `final`, `best` or a file's name.
        validation: Take the predictions on the folds' validation cases that training left behind.

    Raises:
        UserError: There is no such folder, it holds neither, or a fold, a checkpoint or its predictions are missing.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. A model is an nnU-Net model folder or a folder of predictions.")
    folder = folder.resolve()
    if folder.name.startswith("fold_") and (folder.parent / "plans.json").is_file():
        named = folder.name.removeprefix("fold_")
        if folds and named not in folds:
            raise UserError(
                f"{folder} is fold {named}, but -f takes {', '.join(folds)}. Name its folder, or leave out -f."
            )
        folds, folder = [named], folder.parent
    # A fold's folder `validation` has its dataset.json two levels above, nnU-Net's other predictions beside them.
    settings = [place / "dataset.json" for place in (folder, folder.parent.parent) if (place / "plans.json").is_file()]
    dataset_json = read_json(settings[0]) if settings and settings[0].is_file() else {}
    model = Model(name or folder.name, folder, checkpoint=checkpoint_file(checkpoint), dataset_json=dataset_json)
    if not named_folds(folder):
        found = files_of_cases(folder, _ending(dataset_json))
        if validation or not found:
            raise UserError(
                f"{folder} holds {'no folds' if validation else 'neither folds nor predictions'}. Name an nnU-Net "
                "model folder with folders fold_0, ..., "
                + ("whose validation is there." if validation else f"or a folder of files *{_ending(dataset_json)}.")
            )
        return replace(model, predictions=found)
    if validation:
        folds = named_folds(folder, folds)
        found = _validation(folder, folds, _ending(dataset_json))
        return replace(model, predictions=found, learnt=_learnt(folder, folds, sorted(found)))
    return _with_checkpoints(model, folds)


def find_models(
    results: Path, *, trainers: Sequence[str] = (), plans: Sequence[str] = (), configurations: Sequence[str] = ()
) -> dict[str, Path]:
    """The trained models of a dataset, by names that say no more than what differs.

    Args:
        results: The dataset's folder in nnUNet_results.
        trainers: Trainers to take; all if none is named.
        plans: Plans to take; all if none are named.
        configurations: Configurations to take; all if none is named.

    Raises:
        UserError: There is none, or none of a trainer, plans or configuration that was named.

    Examples:
        >>> import tempfile
        >>> results = Path(tempfile.mkdtemp())
        >>> for trainer in ("nnUNetTrainer", "GASNetTrainer"):
        ...     (results / f"{trainer}__GASNetPlans__3d_fullres" / "fold_0").mkdir(parents=True)
        >>> list(find_models(results))
        ['GASNetTrainer', 'nnUNetTrainer']
    """
    folders = sorted({path.parent for path in results.glob("*__*__*/fold_*")})
    parts = {folder: tuple(folder.name.split("__")) for folder in folders if folder.name.count("__") == 2}
    wanted = list(zip(("trainer", "plans", "configuration"), (trainers, plans, configurations), strict=True))
    taken = [
        folder
        for folder, part in parts.items()
        if all(not names or part[i] in names for i, (_, names) in enumerate(wanted))
    ]
    for position, (kind, names) in enumerate(wanted):
        for name in names:
            if name not in {parts[folder][position] for folder in taken}:
                raise UserError(
                    f"No trained model in {results} has the {kind} {name} (and what else was named); there are: "
                    f"{abbreviate([folder.name for folder in parts]) or 'none'}."
                )
    if not taken:
        raise UserError(f"{results} holds no trained model. Train one with nnUNetv2_train, or name folders by --model.")
    differing = [i for i in range(3) if len({parts[folder][i] for folder in taken}) > 1] or [0]
    return {"__".join(parts[folder][i] for i in differing): folder for folder in taken}


def find_cases(
    models: Sequence[Model],
    masks: Path,
    *,
    images: Path | None = None,
    lungs: Path | None = None,
    needs_images: bool = True,
    manifest: Path | None = None,
) -> CaseFiles:
    """Find the cases that all models are tested on, and check all that can be checked without reading voxels.

    With CTs these are the cases, and every one needs a mask; without, all models must have predicted the same cases.

    Args:
        models: The models.
        masks: Folder of true label maps `<case><file_ending>`.
        images: Folder of CTs, `<case>_0000<file_ending>` as nnU-Net names them, or `<case><file_ending>`.
        lungs: Folder of lung masks, of all or of some cases.
        needs_images: Whether the cases are those that have CTs; otherwise CTs are taken where they are there.
        manifest: Table whose column `patient`, if it has one, says whom the cases show; else the `dataset.json` that
            lies with the masks says so.

    Raises:
        UserError: A folder is missing or empty, a CT has no mask, a model has no prediction of a case or other cases
            than the others, a channel is missing, the grids of a case differ, or the manifest knows none of the cases.
    """
    of_masks = json_of_masks(masks)
    of_models = [model.dataset_json for model in models if "labels" in model.dataset_json]
    ending = _ending(of_masks or next((model.dataset_json for model in models if model.dataset_json), {}))
    on_disk = files_of_cases(masks, ending)
    if not on_disk:
        raise UserError(f"There are no masks *{ending} in {masks}.")
    unpredicted = [model for model in models if model.folds]
    channels = {} if images is None else _find_images(images, ending, [model.dataset_json for model in unpredicted])
    if unpredicted and not channels:
        raise UserError(f"{unpredicted[0].name} has yet to predict: name the folder of CTs with --images.")
    predicted = [model for model in models if not model.folds]
    cases = sorted(channels) if channels and needs_images else _common_cases(predicted, needs_images)
    if without := [case for case in cases if case not in on_disk]:
        raise UserError(
            f"{len(without)} of {len(cases)} cases have no mask in {masks}: {abbreviate(without)} (expected e.g. "
            f"{masks / without[0]}{ending}). A healthy case needs a mask of zeros."
        )
    for model in predicted:
        if lacking := [case for case in cases if case not in model.predictions]:
            raise UserError(
                f"{model.name} has no prediction of {len(lacking)} of {len(cases)} cases: {abbreviate(lacking)} "
                f"(looked in {model.folder}). Models are compared on the same cases: predict these too."
            )
    notes = [
        f"{model.name} has learnt from {abbreviate(model.learnt)}, which says nothing about what it finds in others."
        for model in models
        if model.learnt
    ]
    spare = [case for case in on_disk if case not in cases]
    if spare and needs_images:
        notes.append(f"{len(spare)} masks in {masks} belong to no case that was compared: {abbreviate(spare)}.")
    found_lungs = {} if lungs is None else files_of_cases(lungs, ending)
    if lungs is not None and not set(found_lungs) & set(cases):
        raise UserError(f"{lungs} holds no lung mask <case>{ending} of any case.")
    files = CaseFiles(
        references={case: on_disk[case] for case in cases},
        images={case: channels[case] for case in cases if case in channels},
        lungs={case: found_lungs[case] for case in cases if case in found_lungs},
        labels=_labels([of_masks] if "labels" in of_masks else of_models),
        classes=lesion_classes([*of_models, *([of_masks] if "labels" in of_masks else [])]),
        declared="labels" in of_masks,
        notes=tuple(notes),
        patients=_patients(cases, masks, manifest),
    )
    _check_grids(files, predicted)
    return files


def read_groups(
    cases: Iterable[str], columns: Sequence[str], *, manifest: Path | None, dataset_json: Mapping[str, Any]
) -> pd.DataFrame:
    """The subsets that cases belong to.

    Args:
        cases: The cases.
        columns: Columns of the manifest, or details of `gasnet.cases` in `dataset.json`.
        manifest: CSV or XLSX file with a column `case`, or `image` with file names.
        dataset_json: Where the details stand without a manifest: that of the masks. A model's would speak of the cases
            that it learnt from, and others may bear the same names.

    Returns:
        A row a case (index `case`), the columns as text, "not given" where a cell is empty.

    Raises:
        UserError: A column or case is missing, or a column has too many values to divide the cases.
    """
    names = list(cases)
    if manifest is not None:
        rows = _manifest_rows(manifest, columns)
        place = str(manifest)
    else:
        rows = dataset_json.get("gasnet", {}).get("cases", {})
        place = "dataset.json beside the masks, under gasnet.cases,"
    if columns and (unknown := [name for name in names if name not in rows]):
        raise UserError(f"{place} says nothing about {len(unknown)} of {len(names)} cases: {abbreviate(unknown)}.")
    groups = pd.DataFrame(index=pd.Index(names, name="case"))
    for column in columns:
        groups[column] = [str(rows[name].get(column, "not given")) for name in names]
        values = groups[column].unique()
        if list(values) == ["not given"]:
            known = sorted({key for row in rows.values() for key in row})
            raise UserError(f"{place} has no '{column}' of any case; it has {', '.join(known) or 'nothing'}.")
        if len(values) > MOST_GROUPS:
            raise UserError(
                f"'{column}' has {len(values)} values ({abbreviate(list(values), 4)}), too many to divide "
                f"{len(names)} cases by. Name a column of at most {MOST_GROUPS}."
            )
    return groups


def manifest_patients(manifest: Path) -> dict[str, str]:
    """Whom the cases of a manifest show, by its column `patient`; nothing if it has none.

    Args:
        manifest: CSV or XLSX file with a column `case`, or `image` with file names.

    Raises:
        UserError: It cannot be read, names no case, or two patients of one.
    """
    rows = _manifest_rows(manifest, ("patient",), required=())
    return {case: row["patient"] for case, row in rows.items() if "patient" in row}


def _patients(cases: Sequence[str], masks: Path, manifest: Path | None) -> dict[str, str]:
    # Not by the dataset.json of a model, as in `read_groups`.
    known = {} if manifest is None else manifest_patients(manifest)
    found = known or patients_of(json_of_masks(masks))
    if known and not set(known) & set(cases):
        raise UserError(
            f"{manifest} says whom {abbreviate(sorted(known), 3)} show, but nothing about any of the cases that are "
            f"compared: {abbreviate(cases, 3)}. Correct its column 'case' or 'image'."
        )
    return {case: found[case] for case in cases if case in found}


def _ending(dataset_json: Mapping[str, Any]) -> str:
    return str(dataset_json.get("file_ending", ".nii.gz"))


def _validation(folder: Path, folds: Sequence[str], ending: str) -> dict[str, Path]:
    """The predictions on the validation cases of some folds, pooled."""
    predictions: dict[str, Path] = {}
    for fold in folds:
        place = folder / f"fold_{fold}" / "validation"
        found = files_of_cases(place, ending)
        if not found:
            raise UserError(
                f"{place} holds no predictions. Validate the fold with nnUNetv2_train ... --val, or choose others "
                "with -f."
            )
        if twice := sorted(set(found) & set(predictions)):
            raise UserError(
                f"{abbreviate(twice)} are validated on in fold {fold} and in an earlier one of {folder}. Compare one "
                "fold at a time: -f 0."
            )
        predictions |= found
    return predictions


def _learnt(folder: Path, folds: Sequence[str], cases: Sequence[str]) -> tuple[str, ...]:
    """The validation cases that training learnt from: all of fold `all`, and a mask that is the only one."""
    if "all" in folds:
        return tuple(cases)
    recorded = [recorded_cases(folder / f"fold_{fold}") for fold in folds]
    twice = {case for fold in recorded if fold is not None for case in set(fold.train) & set(fold.val)}
    return tuple(case for case in cases if case in twice)


def _with_checkpoints(model: Model, folds: Sequence[str] | None) -> Model:
    """A trained model with the folds that predict."""
    if model.folder.name.endswith("3d_cascade_fullres"):
        raise UserError(
            f"{model.folder.name} needs the predictions of an earlier stage: predict with nnUNetv2_predict, then name "
            "the folder of predictions."
        )
    model = replace(model, folds=tuple(predicting_folds(model.folder, folds, model.checkpoint)))
    for path in model.checkpoints():
        if not zipfile.is_zipfile(path):
            raise UserError(f"The checkpoint {path} is damaged or incomplete. Copy it again, or train it to its end.")
    return model


def _labels(dataset_jsons: Sequence[Mapping[str, Any]]) -> DeclaredLabels | None:
    """The label values on whose meaning all agree: what is lesion to one model may be `ignore` to another."""
    declared = [declared_labels(dataset_json) for dataset_json in dataset_jsons]
    if not declared:
        return None
    first, *others = declared
    alike = [value for value in first.values if all(value in other.values for other in others)]
    known = frozenset(v for v in alike if all((v == first.ignore) == (v == other.ignore) for other in others))
    return DeclaredLabels(known, first.ignore if first.ignore in known else None)


def json_of_masks(masks: Path) -> Mapping[str, Any]:
    """The dataset.json that masks lie with; empty if there is none."""
    places = (place / "dataset.json" for place in (masks, masks.resolve().parent))
    return next((read_json(place) for place in places if place.is_file()), {})


def lesion_classes(dataset_jsons: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Label values of each lesion class, if there are several and all have the same; else nothing.

    Args:
        dataset_jsons: nnU-Net's `dataset.json` of each model, and of the masks.
    """
    found = []
    for dataset_json in dataset_jsons:
        labels = dataset_json.get("labels", {})
        classes = {name: value for name, value in labels.items() if name not in ("background", "ignore")}
        found.append(
            {name: tuple(value) if isinstance(value, list | tuple) else (value,) for name, value in classes.items()}
        )
    alike = all(classes == found[0] for classes in found)
    return found[0] if found and alike and len(found[0]) > 1 else {}


def _find_images(folder: Path, ending: str, dataset_jsons: Sequence[Mapping[str, Any]]) -> dict[str, list[Path]]:
    """The channels of each case of a folder of CTs."""
    files = files_of_cases(folder, ending)
    if not files:
        raise UserError(f"There are no CTs *{ending} in {folder}.")
    if not all(CHANNEL.search(name) for name in files):
        channels = {name: [path] for name, path in files.items()}
    else:
        channels = {}
        for name, path in files.items():
            channels.setdefault(CHANNEL.sub("", name), []).append(path)
    for dataset_json in dataset_jsons:
        expected = len(dataset_json.get("channel_names", {"0": "CT"}))
        for case, paths in channels.items():
            if len(paths) != expected:
                raise UserError(
                    f"{case} has {len(paths)} image files in {folder}, but a model was trained on {expected} channels."
                )
    return channels


def _common_cases(models: Sequence[Model], needs_images: bool) -> list[str]:
    first, *others = models
    way = "name the folder of CTs with --images to compare on those" if needs_images else "choose folds with -f"
    for other in others:
        if differing := sorted(set(first.predictions).symmetric_difference(other.predictions)):
            counts = f"{len(first.predictions)} and {len(other.predictions)}"
            raise UserError(
                f"{first.name} and {other.name} predicted different cases ({counts}); only one of them has "
                f"{abbreviate(differing)}. Models are compared on the same cases: predict these too, or {way}."
            )
    return sorted(first.predictions)


def _check_grids(cases: CaseFiles, predicted: Sequence[Model]) -> None:
    problems = []
    for case, reference in cases.references.items():
        others = [*cases.images.get(case, ()), *(model.predictions[case] for model in predicted)]
        others += [cases.lungs[case]] if case in cases.lungs else []
        try:
            expected = read_grid(reference)
            for path in others:
                if difference := grid_difference(read_grid(path), expected):
                    problems.append(
                        f"{path} does not lie on the grid of {reference}: {difference}. Resample one onto the other's."
                    )
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems, "the cases")


def _manifest_rows(
    path: Path, columns: Sequence[str], *, required: Sequence[str] | None = None
) -> dict[str, Mapping[str, str]]:
    """The cells of each case in some columns, all of which the manifest must have if no others are required."""
    from gasnet_nnunet.dataset_conversion.manifest import read_manifest
    from gasnet_nnunet.volumes import volume_name

    rows: dict[str, Mapping[str, str]] = {}
    for row in read_manifest(path, ("case", "image", *columns), columns if required is None else required):
        if "case" not in row.cells and "image" not in row.cells:
            raise UserError(f"{path}: {row.named} names no case. A column 'case' or 'image' is expected.")
        name = row.cells.get("case") or CHANNEL.sub("", volume_name(Path(row.cells["image"])))
        if name in rows and any(rows[name].get(column) != row.cells.get(column) for column in columns):
            raise UserError(f"{path}: {row.named} says something else about {name} than an earlier row.")
        rows[name] = row.cells
    return rows
