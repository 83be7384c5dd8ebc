"""What one looks at while GASNet trains: the curves of every loss and a gallery of what S and G make of a volume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from gasnet_nnunet.files import write_figure, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour a kind of input, the same wherever D's view of it is drawn.
INPUT_COLOURS = {"healthy": "#2a9d5c", "restored": "#2f6fb7", "diseased": "#c8352c", "generated": "#e39a1c"}
OTHER_COLOURS = ("#2f6fb7", "#2a9d5c", "#c8352c", "#8a5fb0", "#e39a1c", "#5f6b73")

GALLERY_PANELS = ("I_d", "M^", "I_g", "I_s", "I_ps", "M_ps")
"""Names of the panels of a gallery row, in the order they are drawn."""

PANEL_CAPTIONS = {
    "I_d": "I_d\ndiseased",
    "overlay": "M^ on I_d",
    "M^": "M^\nlesion probability",
    "I_g": "I_g = G(I_d)\ngenerated",
    "I_s": "I_s\nrestored",
    "I_ps": "I_ps\npseudo-labelled",
    "M_ps": "M_ps\nred lesion, grey ignored",
}


class TrainingCurves:
    """The losses of every epoch, in `gasnet_progress.csv` and drawn in `gasnet_progress.png`.

    The file is the only state: a training that is resumed goes on with the rows that are there.

    Args:
        folder: Folder of the two files; it has to exist.

    Examples:
        >>> import tempfile
        >>> curves = TrainingCurves(Path(tempfile.mkdtemp()))
        >>> curves.append(0, {"L_lab": 0.7, "L_ps": float("nan")})
        >>> curves.append(1, {"L_lab": 0.6, "L_ps": 0.4})
        >>> curves.truncate(1)
        >>> curves.read()["epoch"].tolist()
        [0]
    """

    def __init__(self, folder: Path) -> None:
        self.csv_file = Path(folder) / "gasnet_progress.csv"
        self.figure_file = Path(folder) / "gasnet_progress.png"

    def read(self) -> pd.DataFrame:
        """One row an epoch, `epoch` first; empty if nothing was logged yet."""
        if not self.csv_file.exists():
            return pd.DataFrame({"epoch": pd.Series(dtype=int)})
        return pd.read_csv(self.csv_file)

    def append(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add an epoch. Rows of the same and of later epochs, left by an earlier run, are replaced.

        Args:
            epoch: Number of the epoch, from 0.
            values: Value of each column; NaN where a loss is not on. Columns of any name are kept.
        """
        rows = self.read()
        row = pd.DataFrame([{"epoch": epoch, **{name: float(value) for name, value in values.items()}}])
        earlier = rows[rows["epoch"] < epoch]
        self._write(row if earlier.empty else pd.concat([earlier, row], ignore_index=True))

    def truncate(self, first_epoch_to_drop: int) -> None:
        """Cut back to a checkpoint: drop the epochs that a resumed training runs again."""
        rows = self.read()
        if (rows["epoch"] >= first_epoch_to_drop).any():
            self._write(rows[rows["epoch"] < first_epoch_to_drop])

    def plot(self) -> None:
        """Draw every known column into `gasnet_progress.png`; columns that hold no number are left out."""
        # nnU-Net calls seaborn.set(), so the look is set here instead of being what happens to be configured.
        with matplotlib.style.context("default"):
            write_figure(self.figure_file, draw_curves(self.read()), dpi=90)

    def _write(self, rows: pd.DataFrame) -> None:
        write_text(self.csv_file, rows.to_csv(index=False))


def draw_curves(rows: pd.DataFrame) -> Figure:
    """The figure of all known columns of `TrainingCurves.read`; columns that hold no number are left out."""
    figure = Figure(figsize=(16, 13))
    # Fixed margins: matplotlib's layout engine would take longer than a short epoch.
    margins = {"left": 0.05, "right": 0.985, "bottom": 0.04, "top": 0.97, "wspace": 0.12, "hspace": 0.27}
    axes = figure.subplots(3, 2, gridspec_kw=margins)
    supervised = dict(zip(("L_lab", "L_hea", "L_MIL", "L_out", "L_ps", "L_sus"), OTHER_COLOURS, strict=True))
    _draw(axes[0, 0], rows, supervised, "Losses of S")
    labels = {"L_adv": "L_adv (S + G)", "L_IgToD": "L_IgToD (G)", "L_recons": "L_recons (G)"}
    adversarial = dict(zip(labels, OTHER_COLOURS, strict=False))
    _draw(axes[0, 1], rows, adversarial, "Adversarial losses and reconstruction", labels=labels)

    names = {"healthy": "I_h", "restored": "I_s", "diseased": "I_d", "generated": "I_g"}
    losses = {f"L_D_{kind}": colour for kind, colour in INPUT_COLOURS.items()}
    _draw(axes[1, 0], rows, losses, "Loss of D on each input", labels={f"L_D_{k}": v for k, v in names.items()})
    axes[1, 0].axhline(math.log(2), color="0.5", linestyle=":", linewidth=1)
    probabilities = {f"D_{kind}": colour for kind, colour in INPUT_COLOURS.items()}
    _draw(
        axes[1, 1],
        rows,
        probabilities,
        'D\'s mean probability of "not healthy" (aim: I_h 0, others 1)',
        labels={f"D_{k}": v for k, v in names.items()},
        limits=(-0.02, 1.02),
    )
    axes[1, 1].axhline(0.5, color="0.5", linestyle=":", linewidth=1)

    held_out = {"M_healthy": INPUT_COLOURS["healthy"], "M_diseased": INPUT_COLOURS["diseased"]}
    labels = {"M_healthy": "healthy", "M_diseased": "diseased"}
    _draw(axes[2, 0], rows, held_out, "Mean M^ on held-out volumes (collapse: healthy rises)", labels=labels)
    scores = {"pseudo_dice": OTHER_COLOURS[0], "score": OTHER_COLOURS[3]}
    labels = {"pseudo_dice": "validation Dice", "score": "score that picks checkpoint_best"}
    _draw(axes[2, 1], rows, scores, "Validation", labels=labels)
    return figure


def save_gallery(
    path: Path,
    panels: Sequence[Mapping[str, np.ndarray]],
    *,
    titles: Sequence[str],
    aspect: float = 1.0,
) -> None:
    """Draw what S and G make of a few diseased volumes, each at the slice with most M^.

    Args:
        path: The PNG to write.
        panels: One mapping a volume, from the names in `GALLERY_PANELS` to arrays (Z, Y, X): images in [-1, 1], M^ in
            [0, 1], M_ps with 0 background, 1 lesion, -1 or 2 ignored. A panel that is missing is shown empty.
        titles: Name of each volume.
        aspect: Height of a voxel over its width within a slice.

    Raises:
        ValueError: No volume, as many titles as volumes are not given, or a volume without I_d or M^.
    """
    if not panels or len(panels) != len(titles):
        raise ValueError(f"A gallery needs volumes and a title for each, found {len(panels)} and {len(titles)} titles")
    for title, row in zip(titles, panels, strict=True):
        if row.get("I_d") is None or row.get("M^") is None:
            raise ValueError(f"The gallery of {title} needs I_d and M^, found {', '.join(row) or 'nothing'}")

    height, width = panels[0]["I_d"].shape[1:]
    columns = list(PANEL_CAPTIONS)
    cell = 2.0
    with matplotlib.style.context("default"):
        figure = Figure(
            figsize=(cell * len(columns) + 1.2, cell * aspect * height / width * len(panels) + 0.5),
            layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01),
        )
        grid = figure.subplots(len(panels), len(columns), squeeze=False)
        for axes, title, row in zip(grid, titles, panels, strict=True):
            most = slice_with_most(row["M^"])
            slices = {name: np.asarray(array)[most] for name, array in row.items() if array is not None}
            axes[0].set_ylabel(f"{title}\nslice {most} of {len(row['M^'])}", fontsize=8)
            for axis, name in zip(axes, columns, strict=True):
                _draw_panel(axis, name, slices, aspect)
        for axis, name in zip(grid[0], columns, strict=True):
            axis.set_title(PANEL_CAPTIONS[name], fontsize=9)
        heatmaps = [axis for axis, name in zip(grid[0], columns, strict=True) if name == "M^"]
        bar = figure.colorbar(heatmaps[0].images[0], ax=grid[:, -1], fraction=0.08, pad=0.04, aspect=18)
        bar.set_label("M^", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        write_figure(path, figure, dpi=110)


def slice_with_most(probability: np.ndarray) -> int:
    """Index of the slice of (Z, Y, X) with the greatest sum; the middle one where there is nothing at all."""
    sums = np.asarray(probability, dtype=np.float64).sum(axis=(1, 2))
    return int(sums.argmax()) if sums.max() > 0 else len(sums) // 2


_OVERLAY = LinearSegmentedColormap.from_list("overlay", [(1, 0.85, 0, 0), (1, 0.55, 0, 0.45), (1, 0.1, 0, 0.75)])
_PSEUDO_LABEL = ListedColormap(["black", "#c8352c", "#7f8fa6"])


def _draw_panel(axis: Axes, name: str, slices: Mapping[str, np.ndarray], aspect: float) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    show = partial(axis.imshow, aspect=aspect, interpolation="nearest")
    if name == "overlay":
        show(slices["I_d"], cmap="gray", vmin=-1, vmax=1)
        show(slices["M^"], cmap=_OVERLAY, vmin=0, vmax=1)
    elif name not in slices:
        axis.set_facecolor("0.93")
        axis.set_aspect(aspect)
        axis.set_xlim(0, slices["I_d"].shape[1])
        axis.set_ylim(slices["I_d"].shape[0], 0)
        axis.text(0.5, 0.5, "not on yet", transform=axis.transAxes, ha="center", va="center", fontsize=8, color="0.4")
    elif name == "M^":
        show(slices[name], cmap="inferno", vmin=0, vmax=1)
    elif name == "M_ps":
        label = slices[name]
        show(np.where((label < 0) | (label == 2), 2, label), cmap=_PSEUDO_LABEL, vmin=0, vmax=2)
    else:
        show(slices[name], cmap="gray", vmin=-1, vmax=1)


def _draw(
    axis: Axes,
    rows: pd.DataFrame,
    columns: Mapping[str, str],
    title: str,
    *,
    labels: Mapping[str, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    known = [name for name in columns if name in rows and rows[name].notna().any()]
    for name in known:
        marker = "o" if rows[name].notna().sum() < 3 else None
        label = (labels or {}).get(name, name)
        axis.plot(rows["epoch"], rows[name], color=columns[name], label=label, marker=marker, linewidth=1.6)
    if limits is not None:
        axis.set_ylim(*limits)
    if known:
        axis.legend(fontsize=9, loc="best", framealpha=0.8)
    else:
        axis.text(0.5, 0.5, "nothing yet", transform=axis.transAxes, ha="center", va="center", color="0.5")
