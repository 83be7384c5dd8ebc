"""Dice, sensitivity and specificity as in section IV-C of the paper, and tables and figures that compare models.

Every metric counts the voxels of one volume. Where one is not defined it is NaN and left out of the means: Dice and
sensitivity of a healthy case, which is judged by its false positives instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mask = NDArray[np.bool_]
Window = tuple[float, float]

PERCENTAGES = {
    "dice": "Dice %",
    "sensitivity": "Sensitivity %",
    "specificity": "Specificity %",
    "false_positive_lung": "Lung called lesion, healthy %",
}
"""Columns that a summary shows, as a share of 1, and their headings."""

MODEL_COLOURS = ("#8a8f98", "#c8352c", "#2f6fb7", "#2a9d5c", "#e39a1c")
CONFUSION_COLOURS = ListedColormap(["#8a5322", "#ffd21f", "#27b34a"])
LUNG_WINDOW: Window = (-1250.0, 250.0)


def score_case(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    lung: ArrayLike | None = None,
    voxel_ml: float = 1.0,
    ignore_label: int | None = None,
) -> dict[str, float]:
    """Metrics of one volume; every label above 0 is lesion.

    Args:
        prediction: Predicted labels (Z, Y, X).
        reference: True labels (Z, Y, X).
        lung: Lung mask (Z, Y, X), for the share of the lung that is falsely called lesion.
        voxel_ml: Volume of a voxel in ml.
        ignore_label: Voxels of this reference label are not counted.

    Returns:
        `dice` = 2 TP / (2 TP + FP + FN), `sensitivity` = TP / (TP + FN), `specificity` = TN / (TN + FP), all as shares
        of 1; `lesion_ml`, `predicted_ml` and `false_positive_ml`; `false_positive_lung`, the share of the lung's
        voxels that are falsely called lesion. NaN: Dice and sensitivity without a lesion in the reference,
        specificity without a voxel free of it, `false_positive_lung` without a lung mask.

    Examples:
        >>> score = score_case([[[0, 1, 1, 0]]], [[[0, 0, 1, 1]]])
        >>> score["dice"], score["sensitivity"], score["specificity"]
        (0.5, 0.5, 0.5)
        >>> score_case([[[0, 1]]], [[[0, 0]]])["dice"]
        nan
    """
    truth = np.asarray(reference)
    counted = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    true, found = (truth > 0) & counted, (np.asarray(prediction) > 0) & counted
    tp, fp, fn = (int(voxels.sum()) for voxels in (true & found, found & ~true, true & ~found))
    tn = int(counted.sum()) - tp - fp - fn
    score = {
        "dice": 2 * tp / (2 * tp + fp + fn) if tp + fn else np.nan,
        "sensitivity": tp / (tp + fn) if tp + fn else np.nan,
        "specificity": tn / (tn + fp) if tn + fp else np.nan,
        "lesion_ml": (tp + fn) * voxel_ml,
        "predicted_ml": (tp + fp) * voxel_ml,
        "false_positive_ml": fp * voxel_ml,
        "false_positive_lung": np.nan,
    }
    if lung is not None and np.any(inside := (np.asarray(lung) > 0) & counted):
        score["false_positive_lung"] = float((found & ~true & inside).sum() / inside.sum())
    return score


def evaluate_folder(
    predictions: Path,
    references: Path,
    *,
    lungs: Path | None = None,
    file_ending: str = ".nii.gz",
    ignore_label: int | None = None,
) -> pd.DataFrame:
    """Metrics of every case that has a reference.

    Args:
        predictions: Folder of predicted label maps `<case><file_ending>`; those of other cases are left alone.
        references: Folder of true label maps of the same names.
        lungs: Folder of lung masks of the same names.
        file_ending: Ending of all files.
        ignore_label: Voxels of this reference label are not counted.

    Returns:
        One row a case (index `case`), the columns of `score_case`.

    Raises:
        UserError: No reference, a case without prediction or lung mask, a file that is no image, or a geometry that
            differs from the reference's.
    """
    files = sorted(path for path in references.glob(f"*{file_ending}") if not path.name.startswith("."))
    if not files:
        raise UserError(f"There is no reference *{file_ending} in {references}.")
    folders = [folder for folder in (predictions, lungs) if folder is not None]
    for folder in folders:
        missing = [path.name for path in files if not (folder / path.name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(files)} cases that have a reference in {references}: "
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Predict them first."
            )
    rows = {}
    for path in files:
        reference = _read(path)
        others = [_read_like(folder / path.name, reference, path) for folder in folders]
        rows[path.name.removesuffix(file_ending)] = score_case(
            others[0],
            sitk.GetArrayViewFromImage(reference),
            lung=others[1] if lungs is not None else None,
            voxel_ml=float(np.prod(reference.GetSpacing())) / 1000,
            ignore_label=ignore_label,
        )
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("case")


def summarise(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean and standard deviation over the cases.

    Args:
        frames: Result of `evaluate_folder` of each model.

    Returns:
        One row a model; columns (metric, "mean" | "sd" | "n") for `dice`, `sensitivity` and `specificity` over the
        cases with a lesion and `false_positive_lung` over those without one. `n` counts the cases that are not NaN;
        the standard deviation is that of a sample.
    """
    columns: dict[tuple[str, str], list[float]] = {}
    for metric in PERCENTAGES:
        values = [_values(frame, metric) for frame in frames.values()]
        columns[metric, "mean"] = [column.mean() for column in values]
        columns[metric, "sd"] = [column.std() for column in values]
        columns[metric, "n"] = [column.count() for column in values]
    return pd.DataFrame(columns, index=pd.Index(list(frames), name="model"))


def markdown_table(frames: Mapping[str, pd.DataFrame]) -> str:
    """The summary as a Markdown table, in percent, mean ± standard deviation."""
    header, rows = _cells(frames)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def rich_table(frames: Mapping[str, pd.DataFrame], *, title: str | None = None) -> Table:
    """The summary as a table for the terminal, in percent, mean ± standard deviation."""
    header, rows = _cells(frames)
    table = Table(title=title)
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    return table


def plot_comparison(frames: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw every case under every model, joined by a line, with the mean of each model.

    Args:
        frames: Result of `evaluate_folder` of each model.
        path: The PNG to write.
    """
    shown = [metric for metric in PERCENTAGES if any(_values(frame, metric).notna().any() for frame in frames.values())]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(3.4 * len(shown), 4.2), layout="constrained")
        for axis, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            columns = pd.DataFrame({model: _values(frame, metric) * 100 for model, frame in frames.items()})
            positions = np.arange(columns.shape[1])
            axis.plot(positions, columns.to_numpy().T, color="0.8", linewidth=1, zorder=1)
            for position, model in zip(positions, columns, strict=True):
                colour = MODEL_COLOURS[position % len(MODEL_COLOURS)]
                values = columns[model].dropna()
                axis.scatter([position] * len(values), values, color=colour, s=26, alpha=0.8, zorder=2)
                mean = values.mean()
                axis.hlines(mean, position - 0.28, position + 0.28, color="black", linewidth=2, zorder=3)
                axis.annotate(f"{mean:.1f}", (position + 0.3, mean), va="center", fontsize=9)
            axis.set_xticks(positions, list(columns), fontsize=9)
            axis.set_xlim(-0.6, len(positions) - 0.3)
            axis.set_title(f"{PERCENTAGES[metric]} (n = {len(columns.dropna(how='all'))})", fontsize=10)
            axis.grid(axis="y", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        _save(figure, path)


def plot_overlays(
    path: Path,
    *,
    images: Path,
    references: Path,
    predictions: Mapping[str, Path],
    cases: Sequence[str],
    file_ending: str = ".nii.gz",
    window: Window = LUNG_WINDOW,
) -> None:
    """Draw what each model found in a few cases, as Fig. 9 of the paper: the slice with most lesion of each.

    Args:
        path: The PNG to write.
        images: Folder of the CTs, `<case>_0000<file_ending>` as nnU-Net names them, or `<case><file_ending>`.
        references: Folder of the true label maps `<case><file_ending>`.
        predictions: Folder of the predicted label maps of each model.
        cases: The cases to draw.
        file_ending: Ending of all files.
        window: Intensities shown as black and as white.

    Raises:
        UserError: A file is missing, is no image or has another geometry than the reference.
    """
    header = ["CT", "Truth", *predictions]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(2.6 * len(header), 2.6 * len(cases) + 0.6), layout="constrained")
        grid = figure.subplots(len(cases), len(header), squeeze=False)
        for row, case in zip(grid, cases, strict=True):
            file = references / f"{case}{file_ending}"
            reference = _read(file)
            image_file = images / f"{case}_0000{file_ending}"
            image = _read_like(image_file if image_file.exists() else images / file.name, reference, file)
            true = sitk.GetArrayFromImage(reference) > 0
            found = [_read_like(folder / file.name, reference, file) > 0 for folder in predictions.values()]
            area = (true if true.any() else np.logical_or.reduce(found)).sum(axis=(1, 2))
            middle = int(area.argmax()) if area.any() else len(area) // 2
            aspect = reference.GetSpacing()[1] / reference.GetSpacing()[0]
            for axis, overlay in zip(row, [None, true, *found], strict=True):
                axis.imshow(image[middle], cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
                axis.set_xticks([])
                axis.set_yticks([])
                if overlay is not None:
                    _draw_confusion(axis, overlay[middle], true[middle], aspect)
            for axis, mask in zip(row[2:], found, strict=True):
                score = score_case(mask, true, voxel_ml=float(np.prod(reference.GetSpacing())) / 1000)
                text = (
                    f"Dice {100 * score['dice']:.0f} %" if true.any() else f"{score['predicted_ml']:.0f} ml, all false"
                )
                axis.text(0.03, 0.97, text, transform=axis.transAxes, va="top", color="white", fontsize=9)
            row[0].set_ylabel(case, fontsize=8)
        for axis, title in zip(grid[0], header, strict=True):
            axis.set_title(title, fontsize=10)
        figure.supxlabel("brown: found    green: missed    yellow: false alarm", fontsize=9)
        _save(figure, path)


def _cells(frames: Mapping[str, pd.DataFrame]) -> tuple[list[str], list[list[str]]]:
    summary = summarise(frames)
    shown = [metric for metric in PERCENTAGES if summary[metric, "n"].any()]
    header = ["Model", *(PERCENTAGES[metric] for metric in shown)]
    rows = []
    for model in summary.index:
        row = [str(model)]
        for metric in shown:
            mean, sd = (100 * float(summary.loc[model, (metric, name)]) for name in ("mean", "sd"))
            row.append(f"{mean:.1f}" if np.isnan(sd) else f"{mean:.1f} ± {sd:.1f}")
        rows.append(row)
    return header, rows


def _values(frame: pd.DataFrame, metric: str) -> pd.Series:
    """A metric of the cases it is averaged over: false positives of the healthy ones, all else of the others."""
    healthy = frame["lesion_ml"] == 0
    return frame.loc[healthy if metric == "false_positive_lung" else ~healthy, metric]


def _draw_confusion(axis: Axes, found: Mask, true: Mask, aspect: float) -> None:
    kinds = np.select([found & true, found, true], [0, 1, 2], default=-1)
    shown = np.ma.masked_less(kinds, 0)
    axis.imshow(shown, cmap=CONFUSION_COLOURS, vmin=0, vmax=2, alpha=0.85, interpolation="nearest", aspect=aspect)


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as an image. Put a whole file in its place. ({error})") from None


def _read_like(path: Path, reference: sitk.Image, reference_path: Path) -> NDArray[Any]:
    """Voxels (Z, Y, X) of an image that has to lie on the reference's grid."""
    image = _read(path)
    properties = {
        "size": (image.GetSize(), reference.GetSize()),
        "spacing": (image.GetSpacing(), reference.GetSpacing()),
        "origin": (image.GetOrigin(), reference.GetOrigin()),
        "direction": (image.GetDirection(), reference.GetDirection()),
    }
    for name, (found, expected) in properties.items():
        if not np.allclose(found, expected, rtol=1e-3, atol=1e-2):
            raise UserError(
                f"The {name} of {path} is {_short(found)}, but that of {reference_path} is {_short(expected)}. "
                "Metrics need both on one grid: resample the one to the other."
            )
    return sitk.GetArrayFromImage(image)


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=120)
    os.replace(temporary, path)
