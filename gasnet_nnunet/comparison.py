"""Trained models side by side: their predictions on the same cases, measured, tabulated and drawn.

What has not been predicted yet is predicted by nnU-Net's own predictor.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape

from gasnet_nnunet.cohort import abbreviate
from gasnet_nnunet.comparison_figures import plot_case, plot_comparison
from gasnet_nnunet.comparison_inputs import CaseFiles, Model
from gasnet_nnunet.devices import check_device
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.evaluation import (
    STARTING_SECONDS,
    check_references,
    check_scans,
    differences_text,
    evaluate_files,
    independent_units,
    markdown_table,
    paired_differences,
    summarise,
    to_markdown,
)
from gasnet_nnunet.files import file_stamp, read_json, write_json, write_text
from gasnet_nnunet.lungs import segment_lungs
from gasnet_nnunet.metrics import CLASS_PREFIX, TOLERANCE_MM
from gasnet_nnunet.organ_masks import VERSION
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.prediction import predict_cases
from gasnet_nnunet.volumes import read_volume, write_volume

MADE_BY = "gasnet-nnunet compare"
MARKER = "compare.json"
"""What was compared; tells a folder of an earlier comparison from one that holds anything else."""
LUNGS_RECORD = "computed.json"
"""In the folder of computed lung masks: the CTs that they were made from, and by which version of the package."""


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Args:
        folder: Folder with all results.
        frames: Metrics of every case (index `case`), by model.
        differences: Result of `paired_differences`; empty with one model.
        reference: The model that the others are compared with.
        groups: Subset of each case (index `case`), a column a division into subsets.
        notes: What the reader should know, one sentence each.
        seconds: Time of the predicting of each model that was predicted, and of all the rest ("compare").
        patients: Whom the cases show, as far as it is known; the differences are between patients.
    """

    folder: Path
    frames: Mapping[str, pd.DataFrame]
    differences: pd.DataFrame
    reference: str
    groups: pd.DataFrame
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    patients: Mapping[str, str] = field(default_factory=dict)


def compare_models(
    models: Sequence[Model],
    cases: CaseFiles,
    folder: Path,
    *,
    reference: str | None = None,
    groups: pd.DataFrame | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    device: str | None = None,
    num_processes: int = 2,
    progress: bool = False,
) -> Comparison:
    """Predict what is missing, measure, and write tables and figures.

    Args:
        models: The models; their names differ.
        cases: The cases.
        folder: Folder of the results; made if missing. Those of an earlier comparison are replaced, its predictions
            are used again where model and CT have not changed.
        reference: Name of the model that the others are compared with; the first if `None`.
        groups: Result of `read_groups`.
        tolerance_mm: Tolerance of the surface Dice in mm.
        device: "cpu", "cuda" or "mps"; cuda where there is one if `None`, else cpu.
        num_processes: Cases measured and drawn at a time.
        progress: Show progress bars.

    Raises:
        UserError: The folder holds anything else, names are doubled or unknown, masks cannot be used, or a model cannot
            predict.
    """
    reference = reference or models[0].name
    _check_names(models, reference)
    clock, seconds = time.monotonic(), {}
    cases, healthy = _known(cases, num_processes)
    options: dict[str, Any] = {"tolerance_mm": tolerance_mm, "classes": dict(cases.classes)}
    options["ignore_label"] = cases.labels.ignore if cases.labels else None
    if any(model.folds for model in models):
        check_scans([path for paths in cases.images.values() for path in paths], num_processes=num_processes)
        check_device(device)
    make_folder(folder)
    if not (folder / MARKER).is_file():
        # What was compared is written with the tables: until then those of an earlier comparison may be there.
        write_json(folder / MARKER, {"made_by": MADE_BY})
    notes = list(cases.notes)
    lungs, remark = _lungs(cases, healthy, folder, models, num_processes, progress)
    notes += [remark] if remark else []

    def measure(model: Model) -> pd.DataFrame:
        return evaluate_files(
            model.predictions,
            cases.references,
            lungs=lungs,
            num_processes=num_processes,
            description=f"Measuring {escape(model.name)}" if progress else None,
            labels=model.labels,
            **options,
        )

    # Those that are there first: what is wrong with them is said before others are predicted.
    measured = {model.name: measure(model) for model in models if not model.folds}
    done = []
    for model in models:
        if model.folds:
            start = time.monotonic()
            target = folder / "predictions" / _file_name(model.name)
            predicted, number = predict_cases(
                model.folder,
                model.checkpoints(),
                cases.images,
                target,
                device=device,
                description=f"Predicting {escape(model.name)}" if progress else None,
            )
            if number:
                seconds[model.name] = time.monotonic() - start
            clock += time.monotonic() - start
            model = replace(model, predictions=predicted)
            measured[model.name] = measure(model)
        done.append(model)
    frames, remark = _with_classes({model.name: measured[model.name] for model in models}, cases)
    notes += [remark] if remark else []
    differences = paired_differences(frames, reference=reference, patients=cases.patients)
    notes += _remarks(frames)
    index = pd.Index(list(cases.references), name="case")
    groups = pd.DataFrame(index=index) if groups is None else groups.loc[index]
    result = Comparison(folder, frames, differences, reference, groups, tuple(notes), seconds, cases.patients)
    write_json(folder / MARKER, _provenance(models, cases, reference, tolerance_mm))
    # A fault in a figure costs no table; what the figures take is in the second writing.
    write_results(result, tolerance_mm=tolerance_mm)
    _draw(folder, done, cases, frames, num_processes, progress)
    seconds["compare"] = time.monotonic() - clock
    write_results(result, tolerance_mm=tolerance_mm)
    return result


def write_results(result: Comparison, *, tolerance_mm: float) -> None:
    """Write `cases.csv`, `summary.json` and `summary.md` into the folder of a comparison."""
    cases = pd.concat(result.frames, names=["model"])
    # A manifest may call a column as a metric is called.
    taken = {*cases.columns, *cases.index.names}
    groups = result.groups.rename(columns=lambda name: f"{name} (subset)" if name in taken else name)
    with_groups = groups.join(cases, how="right").reorder_levels(["model", "case"])
    write_text(result.folder / "cases.csv", with_groups.to_csv())
    subsets = subset_frames(result)
    content = {
        "reference": result.reference,
        "tolerance_mm": tolerance_mm,
        "notes": list(result.notes),
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
        "models": _nested(result.frames),
        "differences": json.loads(result.differences.to_json(orient="records", double_precision=15)),
        "subsets": {
            column: {value: _nested(frames) for value, frames in values.items()} for column, values in subsets.items()
        },
    }
    write_json(result.folder / "summary.json", content)
    write_text(result.folder / "summary.md", _markdown(result, subsets))


def subset_frames(result: Comparison) -> dict[str, dict[str, dict[str, pd.DataFrame]]]:
    """The frames of every subset: by column, value and model."""
    return {
        str(column): {
            str(value): {model: frame.loc[frame.index.isin(members.index)] for model, frame in result.frames.items()}
            for value, members in result.groups.groupby(result.groups[column])
        }
        for column in result.groups
    }


def make_folder(folder: Path) -> None:
    """Make the folder of a comparison, or take that of an earlier one.

    Raises:
        UserError: It is a file, or holds something that no comparison made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name a new folder with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(f"{folder} is not empty and holds no earlier comparison. Name a new folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)


def _known(cases: CaseFiles, num_processes: int) -> tuple[CaseFiles, list[str]]:
    """Read the masks; the cases of which it is known whether they have a lesion, and those that have none.

    Raises:
        UserError: A mask cannot be used, or nothing is known of any case.
    """
    labels = cases.labels
    ill = check_references(
        cases.references,
        labels=labels.values if labels else None,
        ignore_label=labels.ignore if labels else None,
        declared_by="dataset.json"
        if cases.declared
        else "a dataset.json beside the masks, or else every model's alike,",
        num_processes=num_processes,
    )
    unknown = [case for case, lesion in ill.items() if lesion is None]
    healthy = [case for case, lesion in ill.items() if lesion is False]
    if not unknown:
        return cases, healthy
    why = "are 'ignore', in part or throughout, and show no lesion elsewhere, so whether there is one is not known"
    if len(unknown) == len(ill):
        raise UserError(f"The masks of all {len(ill)} cases {why}: {abbreviate(unknown)}. Name others with --masks.")
    left_out = f"{len(unknown)} of {len(ill)} cases are left out, because their masks {why}: {abbreviate(unknown)}."

    def of_known(files: Mapping[str, Any]) -> dict[str, Any]:
        return {case: path for case, path in files.items() if case not in unknown}

    known = replace(
        cases,
        references=of_known(cases.references),
        images=of_known(cases.images),
        lungs=of_known(cases.lungs),
        notes=(*cases.notes, left_out),
    )
    return known, healthy


def _with_classes(frames: Mapping[str, pd.DataFrame], cases: CaseFiles) -> tuple[Mapping[str, pd.DataFrame], str]:
    """The frames without the Dice of single classes where the masks seem not to tell these apart, and a remark then."""
    columns = [f"{CLASS_PREFIX}{name}" for name in cases.classes]
    any_frame = next(iter(frames.values()))
    absent = [name for name, column in zip(cases.classes, columns, strict=True) if any_frame[column].isna().all()]
    if not absent or cases.declared or not (any_frame["lesion_ml"] > 0).any():
        return frames, ""
    remark = (
        f"no mask shows {' or '.join(absent)}, so the masks may not tell classes apart and none has a Dice of its own; "
        "if they do, put a dataset.json with their labels beside them."
    )
    return {model: frame.drop(columns=columns) for model, frame in frames.items()}, remark


def _check_names(models: Sequence[Model], reference: str) -> None:
    counts = Counter(_file_name(model.name).casefold() for model in models)
    doubled = [model.name for model in models if counts[_file_name(model.name).casefold()] > 1]
    if doubled:
        raise UserError(f"Names of models must differ: {', '.join(doubled)}. Give them with --model NAME=FOLDER.")
    if reference not in {model.name for model in models}:
        names = ", ".join(model.name for model in models)
        raise UserError(f"There is no model '{reference}' to compare with; the models are {names}.")


def _file_name(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def _provenance(models: Sequence[Model], cases: CaseFiles, reference: str, tolerance_mm: float) -> dict[str, Any]:
    """What was compared, for whoever finds the folder later."""
    return {
        "made_by": MADE_BY,
        "models": [
            {
                "name": model.name,
                "folder": str(model.folder),
                "folds": list(model.folds),
                "checkpoint": model.checkpoint if model.folds else None,
            }
            for model in models
        ],
        "reference": reference,
        "tolerance_mm": tolerance_mm,
        "masks": {case: str(path) for case, path in cases.references.items()},
        "ignore_label": cases.labels.ignore if cases.labels else None,
        "classes": {name: list(values) for name, values in cases.classes.items()},
        "patients": dict(cases.patients),
    }


def _lungs(
    cases: CaseFiles,
    healthy: Sequence[str],
    folder: Path,
    models: Sequence[Model],
    num_processes: int,
    progress: bool,
) -> tuple[dict[str, Path], str]:
    """Lung masks that are given, and computed ones of the other cases without lesion where these are CTs."""
    lungs = dict(cases.lungs)
    channels = next((model.dataset_json["channel_names"] for model in models if model.dataset_json), {"0": "CT"})
    if str(channels["0"]).casefold() != "ct":
        return lungs, ""
    jobs = {
        case: (cases.images[case][0], folder / "lungs" / cases.references[case].name)
        for case in healthy
        if case not in lungs and case in cases.images
    }
    record = folder / "lungs" / LUNGS_RECORD
    known = read_json(record) if record.is_file() else {}
    stamps = {case: [VERSION, "lungs", *file_stamp(image)] for case, (image, _) in jobs.items()}
    left = [case for case, (_, target) in jobs.items() if known.get(case) != stamps[case] or not target.is_file()]
    description = "Finding lungs of cases without lesion" if progress else None
    found = run_jobs(_segment, [jobs[case] for case in left], num_processes=num_processes, description=description)
    without = [case for case, there in zip(left, found, strict=True) if not there]
    lungs |= {case: target for case, (_, target) in jobs.items() if case not in without}
    if len(left) > len(without):
        write_json(record, {case: stamp for case, stamp in stamps.items() if case not in without})
    if not without:
        return lungs, ""
    return lungs, f"no lungs were found in {abbreviate(without)}; give masks with --lungs to learn their share of it."


def _segment(job: tuple[Path, Path]) -> bool:
    """Write the lung mask of a CT; whether there are lungs."""
    image, target = job
    ct, grid = read_volume(image)
    x, y, z = grid.spacing
    mask = segment_lungs(ct, (z, y, x))
    if not mask.any():
        return False
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    write_volume(temporary, mask.astype(np.uint8), grid)
    os.replace(temporary, target)
    return True


def _remarks(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    remarks = []
    for model, frame in frames.items():
        nothing = frame.index[(frame["lesion_ml"] > 0) & (frame["predicted_ml"] == 0)].tolist()
        if nothing:
            remarks.append(
                f"{model} found nothing in cases with lesion ({abbreviate(nothing)}); their HD95 is the "
                "diagonal of the volume."
            )
    any_frame = next(iter(frames.values()))
    ignored = any_frame.index[any_frame["ignored_ml"] > 0].tolist()
    if ignored:
        remarks.append(f"voxels labelled 'ignore' in the masks of {abbreviate(ignored)} were not counted.")
    if not (any_frame["lesion_ml"] == 0).any():
        remarks.append("no case is free of lesion, so nothing is said of false positives in healthy cases.")
    return remarks


def _draw(
    folder: Path,
    models: Sequence[Model],
    cases: CaseFiles,
    frames: Mapping[str, pd.DataFrame],
    num_processes: int,
    progress: bool,
) -> None:
    plot_comparison(frames, folder / "comparison.png")
    overlays = folder / "overlays"
    for old in overlays.glob("*.png"):
        old.unlink()
    if cases.images:
        overlays.mkdir(exist_ok=True)
    jobs = [
        {
            "path": overlays / f"{case}.png",
            "case": case,
            "image": images[0],
            "reference": cases.references[case],
            "predictions": {model.name: model.predictions[case] for model in models},
            "ignore_label": cases.labels.ignore if cases.labels else None,
        }
        for case, images in cases.images.items()
    ]
    run_jobs(
        _draw_case,
        jobs,
        num_processes=num_processes,
        description="Drawing" if progress else None,
        starting_seconds=STARTING_SECONDS,
    )


def _draw_case(job: Mapping[str, Any]) -> None:
    plot_case(**job)


def _nested(frames: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, dict[str, float | None]]]:
    """A summary for JSON: model, metric, then mean, sd and n."""
    summary = summarise(frames)
    nested: dict[str, dict[str, dict[str, float | None]]] = {}
    for model, row in summary.iterrows():
        metrics = nested.setdefault(str(model), {})
        for metric in dict.fromkeys(summary.columns.get_level_values(0)):
            mean, sd, n = (float(row[metric, name]) for name in ("mean", "sd", "n"))
            metrics[str(metric)] = {
                "mean": None if np.isnan(mean) else mean,
                "sd": None if np.isnan(sd) else sd,
                "n": int(n),
            }
    return nested


def _markdown(result: Comparison, subsets: Mapping[str, Mapping[str, Mapping[str, pd.DataFrame]]]) -> str:
    parts = [
        f"# {len(result.frames)} model{'s' * (len(result.frames) != 1)} on {_count(result.frames)}\n",
        markdown_table(result.frames),
    ]
    parts.append("Mean ± standard deviation over the cases with lesion; columns named healthy, over those without.\n")
    parts += [f"- Note: {note}" for note in result.notes] + [""] * bool(result.notes)
    if len(result.differences):
        parts.append(f"## Differences from {result.reference}\n")
        parts.append(to_markdown(differences_text(result.differences, result.frames)))
        units = independent_units(next(iter(result.frames.values())).index, result.patients)
        parts.append(
            "Mean of the paired differences, model minus reference, its bootstrap interval, and p of Wilcoxon's "
            f"signed-rank test, not corrected for the number of comparisons, over the {units}.\n"
        )
    for column, values in subsets.items():
        parts.append(f"## By {column}\n")
        for value, frames in values.items():
            parts += [f"### {column}: {value}, {_count(frames)}\n", markdown_table(frames)]
    parts.append("## Figures\n\n![every case under every model](comparison.png)\n")
    if any((result.folder / "overlays").glob("*.png")):
        parts.append("What each model found in each case: [overlays](overlays).\n")
    return "\n".join(parts)


def _count(frames: Mapping[str, pd.DataFrame]) -> str:
    frame = next(iter(frames.values()))
    healthy = int((frame["lesion_ml"] == 0).sum())
    return f"{len(frame)} case{'s' * (len(frame) != 1)} ({len(frame) - healthy} with lesion, {healthy} without)"
