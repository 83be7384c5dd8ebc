"""The report of a training: state, signs of trouble, curves, galleries, settings and validation cases on one page."""

from __future__ import annotations

import ast
import io
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from PIL import Image

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json
from gasnet_nnunet.pages import inline, slice_picture, write_page
from gasnet_nnunet.progress import TrainingCurves, draw_curves
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings, Preset, load_preset, preset_names
from gasnet_nnunet.signs import Level, best_epoch, signs_of_trouble, verdict

MOST_GALLERIES = 30
MOST_PICTURES = 24
"""Validation cases with a picture; of more, the best and the worst."""
GALLERY_WIDTH = 1400
QUIET_MINUTES = 15.0
"""A training that wrote nothing for so long, and for three epochs, has been interrupted."""
LUNG_WINDOW = (-1350.0, 150.0)
TRUTH, FOUND = (39, 179, 74), (255, 214, 0)
LOG_SETTINGS = re.compile(r"GASNet settings: (\{.*\})")
LOG_WARNING = re.compile(r"WARNING: (.+)")
LOG_CASES = re.compile(r"(Fold \S+: \d+ masks to learn from.+)")


@dataclass(frozen=True)
class TrainingState:
    """How far a training got.

    Args:
        level: "good" when it is finished, "bad" when it was interrupted, "unknown" while it runs.
        text: The same in a sentence, with what to do.
    """

    level: Level
    text: str


@dataclass(frozen=True)
class Log:
    """What nnU-Net's logs of a fold tell.

    Args:
        settings: Settings of the last start; empty if none are there.
        cases: How many cases the fold has of each kind, in a sentence.
        warnings: Its warnings.
        last_change: When it was last written to, in seconds since the epoch; 0 without a log.
    """

    settings: Mapping[str, Any]
    cases: str
    warnings: tuple[str, ...]
    last_change: float


def write_training_report(folder: Path, out: Path | None = None, *, preset: str | None = None) -> Path:
    """Write the report of a fold, or of all folds of a model.

    Args:
        folder: nnU-Net's folder of a fold (`fold_0`), or of a model (`<trainer>__<plans>__<configuration>`).
        out: The page to write; `report.html` in the folder if `None`.
        preset: Preset to hold the settings against; the most similar one if `None`.

    Returns:
        The page.

    Raises:
        UserError: The folder is not nnU-Net's, or it was trained by another trainer than ours; an unknown preset; no
            place for the page.
    """
    path = out or folder / "report.html"
    if path.is_dir() or (out is not None and not path.parent.is_dir()):
        raise UserError(f"No page can be written to {path}; expected the name of a file in a folder that exists.")
    model, folds = _find_folds(folder)
    plans, dataset = read_json(model / "plans.json"), read_json(model / "dataset.json")
    trainer, _, configuration = _names(model)
    presets = [load_preset(name) for name in ([preset] if preset else preset_names())]
    sections = [_section(fold, plans, dataset, trainer, configuration, presets) for fold in folds]
    title = f"{plans['dataset_name']}: {trainer}, {configuration}"
    facts = _plan_facts(plans, configuration)
    write_page(path, "training.html", title=title, model=model.name, facts=facts, folds=sections)
    return path


def training_state(fold: Path, curves: pd.DataFrame, planned: int | None, now: float) -> TrainingState:
    """Tell whether a training is finished, running or interrupted.

    Args:
        fold: Folder of the fold.
        curves: Its curves.
        planned: Epochs of the training, if they are known.
        now: The time, in seconds since the epoch.
    """
    done = len(curves)
    of = "" if planned is None else f" of {planned}"
    final = (fold / "checkpoint_final.pth").is_file()
    if final and (planned is None or done >= planned):
        hours = curves["seconds"].sum() / 3600 if "seconds" in curves else math.nan
        spent = "" if math.isnan(hours) else f" in {_duration(hours)}"
        if (fold / "validation" / "summary.json").is_file():
            return TrainingState("good", f"Finished: {done} epochs{spent}, and validated.")
        return TrainingState(
            "bad", f"Trained: {done} epochs{spent}, but not validated. Repeat the training's command with --val."
        )
    older = " checkpoint_final.pth is of an earlier training." if final else ""
    last = max((path.stat().st_mtime for path in [*fold.glob("*.csv"), *fold.glob("training_log_*.txt")]), default=0.0)
    seconds = float(curves["seconds"].median()) if done and "seconds" in curves else 0.0
    if now - last < max(60 * QUIET_MINUTES, 3 * seconds):
        left = "" if planned is None or not seconds else f", about {_duration((planned - done) * seconds / 3600)} left"
        return TrainingState("unknown", f"Running: {done}{of} epochs done{left}.{older}")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
    kept = [name for name in ("latest", "best") if (fold / f"checkpoint_{name}.pth").is_file()]
    advice = (
        f"go on with --c, which starts from checkpoint_{kept[0]}.pth."
        if kept
        else "no checkpoint is left: start again."
    )
    return TrainingState("bad", f"Interrupted: {done}{of} epochs done, nothing written since {when}; {advice}{older}")


def read_log(fold: Path) -> Log:
    """Read nnU-Net's logs of a fold; the last start counts."""
    settings: Mapping[str, Any] = {}
    cases, warnings, last_change = "", (), 0.0
    for path in sorted(fold.glob("training_log_*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        last_change = max(last_change, path.stat().st_mtime)
        if found := LOG_SETTINGS.search(text):
            settings = ast.literal_eval(found[1])
            warnings = tuple(dict.fromkeys(match.strip() for match in LOG_WARNING.findall(text)))
            sentence = LOG_CASES.search(text)
            cases = sentence[1].strip() if sentence else ""
    return Log(settings, cases, warnings, last_change)


def closest_preset(settings: GASNetSettings, presets: Sequence[Preset], trainer: str) -> tuple[Preset, list[str]]:
    """The preset with the fewest differences, and these as 'name: preset -> training'.

    What a preset leaves to the data or the trainer is no difference.
    """
    compared = [(preset, _expected(preset, settings, trainer).differences(settings)) for preset in presets]
    return min(compared, key=lambda pair: len(pair[1]))


def validation_cases(fold: Path, ending: str) -> pd.DataFrame:
    """The validation's cases, best to worst; those without a lesion, whose Dice is not defined, last.

    Args:
        fold: Folder of the fold.
        ending: Ending of its files.

    Returns:
        `case`, `dice` (mean over the labels), `reference` and `predicted` (voxels), `false_positive` (voxels) and
        `reference_file`.
    """
    path = fold / "validation" / "summary.json"
    columns = ["case", "dice", "reference", "predicted", "false_positive", "reference_file"]
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    rows = []
    for entry in read_json(path)["metric_per_case"]:
        labels = list(entry["metrics"].values())
        dices = [label["Dice"] for label in labels if label["n_ref"] and not math.isnan(label["Dice"])]
        counts = [sum(int(label[name]) for label in labels) for name in ("n_ref", "n_pred", "FP")]
        name = Path(entry["prediction_file"]).name.removesuffix(ending)
        rows.append([name, float(np.mean(dices)) if dices else math.nan, *counts, entry["reference_file"]])
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["dice", "false_positive"], ascending=[False, True], ignore_index=True)


def _find_folds(folder: Path) -> tuple[Path, list[Path]]:
    """The model's folder and its folds trained by us."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Give a folder of nnUNet_results: a model's, or that of one fold.")
    folder = folder.resolve()
    model = folder.parent if folder.name.startswith("fold_") else folder
    found = [folder] if model != folder else sorted(path for path in folder.glob("fold_*") if path.is_dir())
    missing = [name for name in ("plans.json", "dataset.json") if not (model / name).is_file()]
    if missing or not found:
        lacks = " and ".join(missing) or "a folder fold_0"
        raise UserError(
            f"{model} has no {lacks}, so it is no model trained by nnU-Net. Give a folder of nnUNet_results, such as "
            "Dataset501_Name/GASNetTrainer__GASNetPlans__3d_fullres, or its fold_0."
        )
    ours = [path for path in found if (path / "gasnet_progress.csv").is_file() or read_log(path).settings]
    if not ours:
        raise UserError(
            f"{folder} holds no curves of GASNet's: it was trained by {_names(model)[0]}, whose curves nnU-Net draws "
            "in progress.png. This report is for GASNetTrainer, SupervisedBaselineTrainer and their subclasses."
        )
    return model, ours


def _names(model: Path) -> tuple[str, str, str]:
    """Trainer, plans and configuration by a model folder's name."""
    names = model.name.split("__")
    return (names[0], names[1], names[2]) if len(names) == 3 else (model.name, "", "3d_fullres")


def _section(
    fold: Path,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    trainer: str,
    configuration: str,
    presets: Sequence[Preset],
) -> dict[str, Any]:
    """What the template shows of a fold."""
    log = read_log(fold)
    curves = TrainingCurves(fold).read()
    stored = log.settings or plans["configurations"].get(configuration, {}).get(PLANS_KEY, {})
    settings = GASNetSettings.of_training(stored, source=f"the log of {fold.name}")
    preset, differences = closest_preset(settings, presets, trainer)
    signs = signs_of_trouble(curves)
    cases = validation_cases(fold, dataset["file_ending"])
    pictures, remark = _pictures(fold, cases, plans, dataset)
    galleries = _galleries(fold, len(curves))
    return {
        "name": fold.name.replace("_", " "),
        "state": training_state(fold, curves, settings.num_epochs, time.time()),
        "cases_text": log.cases,
        "warnings": log.warnings,
        "verdict": verdict(signs),
        "signs": signs,
        "best_epoch": best_epoch(curves),
        "curves": _curves(curves) if len(curves) else None,
        "curves_text": _curves_in_words(curves),
        "galleries": galleries,
        "preset": preset,
        "differences": [line.partition(": ")[::2] for line in differences],
        "settings": settings.to_dict(),
        "cases": [{**row, "picture": pictures.get(str(row["case"]))} for row in cases.to_dict("records")],
        "pictures_remark": remark,
    }


def _expected(preset: Preset, settings: GASNetSettings, trainer: str) -> GASNetSettings:
    """A preset as the trainer resolves it for the data at hand."""
    left_open = {
        name: getattr(settings, name)
        for name in ("window", "volumes_per_step", "patches")
        if getattr(preset.settings, name) in (None, "auto")
    }
    expected = preset.settings.replace(**left_open)
    if trainer == "GASNetTrainer":
        return expected
    from gasnet_nnunet import trainers  # nnU-Net takes seconds to import

    return getattr(trainers, trainer, trainers.GASNetTrainer).adjust_settings(expected)


def _plan_facts(plans: Mapping[str, Any], configuration: str) -> dict[str, str]:
    """What the plans say, for people."""
    planned = plans["configurations"].get(configuration, {})
    features = planned.get("architecture", {}).get("arch_kwargs", {}).get("features_per_stage", [])
    facts = {
        "Plans": plans["plans_name"],
        "Patch (Z x Y x X)": " x ".join(map(str, planned.get("patch_size", []))),
        "Spacing (mm)": " x ".join(f"{edge:.3g}" for edge in planned.get("spacing", [])),
        "Batch size": str(planned.get("batch_size", "")),
        "Features": ", ".join(map(str, features)),
    }
    return {name: value for name, value in facts.items() if value}


def _curves(curves: pd.DataFrame) -> str:
    with matplotlib.style.context("default"):
        buffer = io.BytesIO()
        FigureCanvasSVG(draw_curves(curves)).print_figure(buffer, format="svg")
    return inline(buffer.getvalue(), "svg+xml")


def _curves_in_words(curves: pd.DataFrame) -> str:
    """The last values, for those who do not see the figure."""
    if not len(curves):
        return "No epoch is done yet."
    shown = ", ".join(f"{name} {value:.3g}" for name, value in curves.iloc[-1].dropna().items() if name != "epoch")
    return f"Curves of {len(curves)} epochs. In the last one: {shown}."


def _galleries(fold: Path, epochs: int) -> list[tuple[int, str]]:
    """Epoch and picture of at most `MOST_GALLERIES` galleries, the last one among them."""
    found = {int(path.stem.removeprefix("epoch_")): path for path in fold.glob("gasnet_gallery/epoch_*.png")}
    # Those of later epochs are left from an earlier training in the same folder.
    present = sorted(epoch for epoch in found if epoch < epochs)
    step = math.ceil(len(present) / MOST_GALLERIES) or 1
    galleries = []
    for epoch in present[::-1][::step][::-1]:
        try:
            image = Image.open(found[epoch]).convert("RGB")
        except OSError:  # being written at this moment
            continue
        image.thumbnail((GALLERY_WIDTH, GALLERY_WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, format="webp", quality=88)
        galleries.append((epoch, inline(buffer.getvalue(), "webp")))
    return galleries


def _pictures(
    fold: Path, cases: pd.DataFrame, plans: Mapping[str, Any], dataset: Mapping[str, Any]
) -> tuple[dict[str, str], str]:
    """Pictures of the best and the worst validation cases, and why there are none."""
    from nnunetv2.paths import nnUNet_raw

    if cases.empty:
        return {}, ""
    if not nnUNet_raw.is_set():
        return {}, "There are no pictures, because nnUNet_raw is not set."
    raw, ending = Path(str(nnUNet_raw)) / plans["dataset_name"], dataset["file_ending"]
    half = MOST_PICTURES // 2
    shown = cases if len(cases) <= MOST_PICTURES else pd.concat([cases[:half], cases[-half:]])
    pictures = {}
    for case, reference in zip(shown["case"], shown["reference_file"], strict=True):
        files = [raw / "imagesTr" / f"{case}_0000{ending}", Path(reference), fold / "validation" / f"{case}{ending}"]
        if not files[1].is_file():
            files[1] = raw / "labelsTr" / f"{case}{ending}"
        if all(path.is_file() for path in files):
            pictures[str(case)] = inline(_overlay(*files))
    lacking = len(shown) - len(pictures)
    return pictures, f"{lacking} cases have no picture: their CT, label or prediction was not found." if lacking else ""


def _overlay(image_file: Path, reference_file: Path, prediction_file: Path) -> bytes:
    """The slice with most lesion, the truth outlined in green and what was found in yellow."""
    import SimpleITK as sitk

    from gasnet_nnunet.case_report import axial

    images = [axial(sitk.ReadImage(str(path))) for path in (image_file, reference_file, prediction_file)]
    image, reference, prediction = (sitk.GetArrayViewFromImage(one) for one in images)
    areas = ((reference > 0) if (reference > 0).any() else (prediction > 0)).sum(axis=(1, 2))
    most = int(areas.argmax()) if areas.any() else len(areas) // 2
    aspect = images[0].GetSpacing()[1] / images[0].GetSpacing()[0]
    outlines = [(prediction[most] > 0, FOUND), (reference[most] > 0, TRUTH)]
    return slice_picture(image[most], LUNG_WINDOW, outlines, aspect)


def _duration(hours: float) -> str:
    """A time in its most telling unit.

    Examples:
        >>> _duration(0.5), _duration(30.25)
        ('30 min', '30.2 h')
    """
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
