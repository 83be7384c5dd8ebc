"""Figures that compare models: every case's values side by side, and what each model found on the CTs themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gasnet_nnunet.evaluation import METRICS, Metric, check_grid, judged, shown_metrics
from gasnet_nnunet.files import write_figure
from gasnet_nnunet.metrics import Mask, overlap_scores
from gasnet_nnunet.volumes import HIGHEST_AIR, read_volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Window = tuple[float, float]

MODEL_COLOURS = ("#8a8f98", "#c8352c", "#2f6fb7", "#2a9d5c", "#e39a1c")
CONFUSION_COLOURS = {"found": "#8a5322", "false alarm": "#ffd21f", "missed": "#27b34a"}
COLOUR_STRENGTH = 0.85
LEGEND = "brown: found    green: missed    yellow: false alarm"
LUNG_WINDOW: Window = (-1250.0, 250.0)
PANELS_IN_A_ROW = 5


def plot_comparison(frames: Mapping[str, pd.DataFrame], path: Path, *, metrics: Sequence[str] | None = None) -> None:
    """Draw every case under every model, joined by a line, with the mean of each model.

    Where no case has any of the metrics, the figure says so: an earlier one under its name would be of other cases.

    Args:
        frames: Result of `evaluate_folder` of each model.
        path: The PNG to write.
        metrics: Columns to draw; if `None` those of `summarise`.
    """
    known = shown_metrics(frames)
    shown = {name: metric for name, metric in known.items() if metrics is None or name in metrics}
    columns = max(1, min(PANELS_IN_A_ROW, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    with matplotlib.style.context("default"):
        width = max(3.4, 0.9 * len(frames) + 1.2)
        figure = Figure(figsize=(width * columns, 4.2 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (name, metric) in zip(axes, shown.items(), strict=False):
            _draw_strips(axis, name, metric, frames)
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        if not shown:
            wanted = "; ".join(METRICS[name].heading if name in METRICS else name for name in metrics or METRICS)
            text = textwrap.fill(f"No case has a value of: {wanted}", 40)
            axes[0].text(0.5, 0.5, text, transform=axes[0].transAxes, ha="center", va="center", fontsize=9)
        write_figure(path, figure)


def plot_overlays(
    path: Path,
    *,
    images: Path,
    references: Path,
    predictions: Mapping[str, Path],
    cases: Sequence[str],
    file_ending: str = ".nii.gz",
    ignore_label: int | None = None,
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
        ignore_label: Value of the reference where nothing is known, so that nothing is drawn there.
        window: Intensities shown as black and as white.

    Raises:
        UserError: A file is missing, is no image or has another grid than the reference.
    """
    rows = []
    for case in cases:
        name = f"{case}{file_ending}"
        image = images / f"{case}_0000{file_ending}"
        found = {model: folder / name for model, folder in predictions.items()}
        place = image if image.exists() else images / name
        scan = _Scan.read(case, place, references / name, found, window, ignore_label)
        rows.append((scan, scan.slices()[0]))
    _draw_overlays(path, rows)


def plot_case(
    path: Path,
    *,
    case: str,
    image: Path,
    reference: Path,
    predictions: Mapping[str, Path],
    ignore_label: int | None = None,
    window: Window = LUNG_WINDOW,
) -> None:
    """Draw what each model found in one case: the slices with most lesion, most missed and most false alarms.

    Args:
        path: The PNG to write.
        case: Its name.
        image: Its CT.
        reference: Its true label map.
        predictions: Predicted label map of each model.
        ignore_label: As in `plot_overlays`.
        window: Intensities shown as black and as white, if the image has air as dark as a CT's.

    Raises:
        UserError: As in `plot_overlays`.
    """
    scan = _Scan.read(case, image, reference, predictions, window, ignore_label)
    _draw_overlays(path, [(scan, position) for position in scan.slices()])


def _draw_strips(axis: Axes, name: str, metric: Metric, frames: Mapping[str, pd.DataFrame]) -> None:
    shares = pd.DataFrame({model: judged(frame, name) for model, frame in frames.items()})
    values = shares * metric.factor
    positions = np.arange(values.shape[1])
    axis.plot(positions, values.to_numpy().T, color="0.8", linewidth=1, zorder=1)
    for position, model in zip(positions, values, strict=True):
        colour = MODEL_COLOURS[position % len(MODEL_COLOURS)]
        known = values[model].dropna()
        axis.scatter([position] * len(known), known, color=colour, s=26, alpha=0.8, zorder=2)
        if len(known):
            axis.hlines(known.mean(), position - 0.28, position + 0.28, color="black", linewidth=2, zorder=3)
            text = metric.text(shares[model].mean())
            axis.annotate(text, (position + 0.3, known.mean()), va="center", fontsize=9)
    longest = max(len(model) for model in frames)
    turned = longest * len(frames) > 34
    axis.set_xticks(
        positions, list(values), fontsize=9, rotation=30 if turned else 0, ha="right" if turned else "center"
    )
    axis.set_xlim(-0.6, len(positions) - 0.3)
    axis.set_title(f"{metric.heading} (n = {len(values.dropna(how='all'))})", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class _Scan:
    """A case as it is drawn, patient's right on the left, front on top."""

    case: str
    image: NDArray[Any]
    true: Mask
    found: Mapping[str, Mask]
    spacing: tuple[float, ...]
    window: Window

    @classmethod
    def read(
        cls,
        case: str,
        image: Path,
        reference: Path,
        predictions: Mapping[str, Path],
        window: Window,
        ignore_label: int | None,
    ) -> _Scan:
        truth, grid = read_volume(reference)
        arrays = []
        for path in (image, *predictions.values()):
            array, found = read_volume(path)
            check_grid(path, found, reference, grid)
            arrays.append(array)
        # Of an array in ITK's LPS: rows run to the back, columns to the left.
        turn = (slice(None), *(slice(None, None, -1 if grid.direction[axis] < 0 else 1) for axis in (4, 0)))
        values, *masks = (array[turn] for array in arrays)
        if values.min() > HIGHEST_AIR:
            low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
            window = low, high
        known = truth[turn] != ignore_label if ignore_label is not None else np.ones(values.shape, bool)
        found_by = {model: (mask > 0) & known for model, mask in zip(predictions, masks, strict=True)}
        return cls(case, values, (truth[turn] > 0) & known, found_by, grid.spacing, window)

    def slices(self) -> list[int]:
        """The slice with most lesion, then those with most missed and most false alarms of all models together."""
        found = np.sum(list(self.found.values()), axis=0, dtype=np.int32)
        interest = (
            self.true if self.true.any() else found,
            np.where(self.true, len(self.found) - found, 0),
            np.where(self.true, 0, found),
        )
        positions = []
        for voxels in interest:
            area = voxels.sum(axis=(1, 2))
            if area.any():
                positions.append(int(area.argmax()))
        return list(dict.fromkeys(positions)) or [len(self.true) // 2]

    def label(self, model: str) -> str:
        """What stands in the corner of a model's picture."""
        found = self.found[model]
        if self.true.any():
            return f"Dice {100 * overlap_scores(found, self.true)['dice']:.0f} %"
        return f"{np.count_nonzero(found) * np.prod(self.spacing) / 1000:.0f} ml, all false"


def _draw_overlays(path: Path, rows: Sequence[tuple[_Scan, int]]) -> None:
    header = ["CT", "Truth", *rows[0][0].found]
    with matplotlib.style.context("default"):
        cell = 2.6
        heights = [
            cell * scan.true.shape[1] * scan.spacing[1] / (scan.true.shape[2] * scan.spacing[0]) for scan, _ in rows
        ]
        width, height = cell * len(header) + 0.4, sum(heights) + 0.7
        # Fixed margins: matplotlib's layout engine takes longer than all the rest.
        figure = Figure(figsize=(width, height))
        margins = {"left": 0.35 / width, "right": 1 - 0.05 / width, "bottom": 0.35 / height, "top": 1 - 0.3 / height}
        spaces = {"wspace": 0.02, "hspace": 0.03, "height_ratios": heights}
        grid = figure.subplots(len(rows), len(header), squeeze=False, gridspec_kw={**margins, **spaces})
        for axes, (scan, position) in zip(grid, rows, strict=True):
            aspect = scan.spacing[1] / scan.spacing[0]
            masks = [None, scan.true, *scan.found.values()]
            for axis, mask in zip(axes, masks, strict=True):
                found = None if mask is None else mask[position]
                picture = _picture(scan.image[position], scan.true[position], found, scan.window)
                axis.imshow(picture, interpolation="nearest", aspect=aspect)
                axis.set_xticks([])
                axis.set_yticks([])
            for axis, model in zip(axes[2:], scan.found, strict=True):
                text = scan.label(model)
                box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 2}
                axis.text(0.03, 0.97, text, transform=axis.transAxes, va="top", color="white", fontsize=9, bbox=box)
            axes[0].set_ylabel(f"{scan.case}, slice {position}", fontsize=8)
        for axis, title in zip(grid[0], header, strict=True):
            axis.set_title(title, fontsize=10)
        figure.text(0.5, 0.12 / height, LEGEND, fontsize=9, ha="center", va="center")
        write_figure(path, figure)


def _picture(image: NDArray[Any], true: Mask, found: Mask | None, window: Window) -> NDArray[np.float64]:
    """A slice (Y, X, RGB) with what was found, missed and falsely called lesion on it, or with nothing on it."""
    grey = np.clip((image.astype(float) - window[0]) / max(window[1] - window[0], 1e-9), 0, 1)
    picture = np.repeat(grey[..., None], 3, axis=-1)
    if found is not None:
        for kind, voxels in (("found", found & true), ("false alarm", found & ~true), ("missed", true & ~found)):
            colour = np.array(to_rgb(CONFUSION_COLOURS[kind]))
            picture[voxels] = COLOUR_STRENGTH * colour + (1 - COLOUR_STRENGTH) * picture[voxels]
    return picture
