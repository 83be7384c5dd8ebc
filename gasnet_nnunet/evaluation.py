"""Predictions against true masks, case by case, and tables that compare models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.table import Table
from scipy import stats

from gasnet_nnunet.cohort import abbreviate, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.metrics import CLASS_PREFIX, score_case
from gasnet_nnunet.parallel import run_jobs
from gasnet_nnunet.volumes import Grid, grid_difference, read_volume


@dataclass(frozen=True)
class Metric:
    """How a column of `evaluate_folder` is averaged and shown.

    Args:
        heading: Its name in tables and figures.
        factor: What values are multiplied by to be shown: 100 for shares.
        digits: Decimals that are shown.
        healthy: Averaged over the cases without lesion, not over those with lesion.
    """

    heading: str
    factor: float = 1.0
    digits: int = 1
    healthy: bool = False

    def text(self, value: float, *, sign: str = "") -> str:
        """A value of the column as it is shown."""
        return f"{self.factor * value:{sign}.{self.digits}f}"

    def mean_and_sd(self, mean: float, sd: float) -> str:
        """A mean with its standard deviation, where there is one, as they are shown."""
        if np.isnan(mean):
            return ""
        return self.text(mean) if np.isnan(sd) else f"{self.text(mean)} ± {self.text(sd)}"


METRICS: Mapping[str, Metric] = {
    "dice": Metric("Dice %", 100),
    "sensitivity": Metric("Sensitivity %", 100),
    "specificity": Metric("Specificity %", 100, digits=2),
    "hd95_mm": Metric("HD95 mm"),
    "surface_dice": Metric("Surface Dice %", 100),
    "lesion_f1": Metric("Lesion F1 %", 100),
    "volume_error_ml": Metric("Volume error ml"),
    "false_positive_ml": Metric("False positives ml, healthy", healthy=True),
    "false_positive_lung": Metric("Lung called lesion, healthy %", 100, digits=2, healthy=True),
}
"""Columns that tables and figures show, in their order; the Dice of single classes follows."""
PAPER_METRICS = ("dice", "sensitivity", "specificity", "false_positive_lung")
"""Those of the paper's tables, and what is called lesion in healthy lungs."""

CONFIDENCE = 0.95
RESAMPLES = 10_000
STARTING_SECONDS = 20.0
"""What it takes to start processes that import torch, MONAI and matplotlib on a machine that has other work."""


def evaluate_folder(
    predictions: Path,
    references: Path,
    *,
    lungs: Path | None = None,
    file_ending: str = ".nii.gz",
    num_processes: int = 1,
    description: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Metrics of every case that has a reference.

    Args:
        predictions: Folder of predicted label maps `<case><file_ending>`; those of other cases are left alone.
        references: Folder of true label maps of the same names.
        lungs: Folder of lung masks of the same names.
        file_ending: Ending of all files.
        num_processes: Cases measured at a time.
        description: Title of a progress bar; none is shown if `None`.
        options: `labels`, and what `score_case` takes: `ignore_label`, `classes`, `tolerance_mm`.

    Returns:
        One row a case (index `case`), the columns of `gasnet_nnunet.metrics.score_case`.

    Raises:
        UserError: No reference, a case without prediction or lung mask, a file that is no image, a grid that differs
            from the reference's, or values that are no labels.
    """
    truth = files_of_cases(references, file_ending)
    if not truth:
        raise UserError(f"There is no reference *{file_ending} in {references}.")
    found = []
    for folder in (predictions, lungs):
        files = {} if folder is None else {case: folder / path.name for case, path in truth.items()}
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(files)} cases that have a reference in {references}: "
                f"{abbreviate(missing)}. Predict them first."
            )
        found.append(files)
    return evaluate_files(
        found[0], truth, lungs=found[1], num_processes=num_processes, description=description, **options
    )


def files_of_cases(folder: Path, file_ending: str) -> dict[str, Path]:
    """The images of a folder by the names of their cases, sorted; hidden files are no cases."""
    if not folder.is_dir():
        return {}
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(file_ending))
    return {name.removesuffix(file_ending): folder / name for name in names if not name.startswith(".")}


def evaluate_files(
    predictions: Mapping[str, Path],
    references: Mapping[str, Path],
    *,
    lungs: Mapping[str, Path] | None = None,
    labels: Iterable[int] | None = None,
    num_processes: int = 1,
    description: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """As `evaluate_folder`, for files that lie anywhere.

    Args:
        predictions: Predicted label map of each case.
        references: True label map of each case; these are the cases that are measured.
        lungs: Lung mask of each case, or of some.
        labels: Values that predictions may hold; any whole numbers from 0 on if `None`. Those of the references are
            for `check_references` to check: they may be labelled otherwise than a model predicts.
        num_processes: As in `evaluate_folder`.
        description: As in `evaluate_folder`.
        options: What `score_case` takes.

    Raises:
        UserError: As in `evaluate_folder`; all files that cannot be used are named.
    """
    allowed = None if labels is None else frozenset(labels)
    jobs = [
        _Job(predictions[case], reference, (lungs or {}).get(case), allowed, options)
        for case, reference in references.items()
    ]
    results = run_jobs(
        _evaluate, jobs, num_processes=num_processes, description=description, starting_seconds=STARTING_SECONDS
    )
    raise_problems([result for result in results if isinstance(result, str)], "the masks")
    rows = {case: row for case, row in zip(references, results, strict=True) if not isinstance(row, str)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("case")


def check_references(
    references: Mapping[str, Path],
    *,
    labels: Iterable[int] | None = None,
    ignore_label: int | None = None,
    declared_by: str = "dataset.json",
    num_processes: int = 1,
) -> dict[str, bool | None]:
    """Read true label maps, whose faults are better known before others are predicted.

    Args:
        references: True label map of each case.
        labels: Values that label maps may hold; any whole numbers from 0 on if `None`.
        ignore_label: The value that is no lesion but ignored.
        declared_by: What declares `labels`, for the error message.
        num_processes: Files read at a time.

    Returns:
        Whether each case has a lesion; `None` where that is not known, because it shows none in what is not ignored.

    Raises:
        UserError: A file is no image or holds values that are no labels; all of them are named.
    """
    allowed = None if labels is None else frozenset(labels)
    options = {"ignore_label": ignore_label, "declared_by": declared_by}
    jobs = [_Job(path, path, None, allowed, options) for path in references.values()]
    results = run_jobs(_has_lesion, jobs, num_processes=num_processes)
    raise_problems([result for result in results if isinstance(result, str)], "the masks")
    return {case: result for case, result in zip(references, results, strict=True) if not isinstance(result, str)}


def check_scans(scans: Sequence[Path], *, num_processes: int = 1) -> None:
    """Read scans whole: nnU-Net takes half of a compressed file for all of it, and predicts the rest as it may.

    Args:
        scans: The files, one a channel.
        num_processes: Files read at a time.

    Raises:
        UserError: A file is no image, not whole, or has NaN; all of them are named.
    """
    raise_problems([said for said in run_jobs(_fault, scans, num_processes=num_processes) if said], "the scans")


def summarise(frames: Mapping[str, pd.DataFrame], *, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean and standard deviation over the cases.

    Args:
        frames: Result of `evaluate_folder` of each model.
        metrics: Columns to summarise; if `None` all of `METRICS` and the Dice of single classes.

    Returns:
        One row a model; columns (metric, "mean" | "sd" | "n"), over the cases with a lesion or, where `METRICS` says
        so, over those without one. `n` counts the cases that are not NaN; the standard deviation is that of a sample.
    """
    columns: dict[tuple[str, str], list[float]] = {}
    for metric in shown_metrics(frames) if metrics is None else metrics:
        values = [judged(frame, metric) for frame in frames.values()]
        columns[metric, "mean"] = [column.mean() for column in values]
        columns[metric, "sd"] = [column.std() for column in values]
        columns[metric, "n"] = [column.count() for column in values]
    return pd.DataFrame(columns, index=pd.Index(list(frames), name="model"))


def shown_metrics(frames: Mapping[str, pd.DataFrame]) -> dict[str, Metric]:
    """The metrics that at least one case of one model has, in the order of tables."""
    classes = {name: metric for frame in frames.values() for name, metric in class_metrics(frame).items()}
    return {
        name: metric
        for name, metric in {**METRICS, **classes}.items()
        if any(judged(frame, name).notna().any() for frame in frames.values())
    }


def class_metrics(frame: pd.DataFrame) -> dict[str, Metric]:
    """The Dice of each lesion class that a frame has, where there are several.

    Args:
        frame: Rows as `evaluate_folder` makes them.
    """
    names = [str(column) for column in frame if str(column).startswith(CLASS_PREFIX)]
    return {name: Metric(f"Dice {name.removeprefix(CLASS_PREFIX)} %", 100) for name in names}


def paired_differences(
    frames: Mapping[str, pd.DataFrame],
    *,
    reference: str,
    metrics: Sequence[str] | None = None,
    patients: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """How much every model differs from a reference model on the same cases.

    Interval and test take the differences for independent, which those of several CTs of a patient are not: they are
    averaged first.

    Args:
        frames: Result of `evaluate_folder` of each model, for the same cases.
        reference: The model that the others are compared with.
        metrics: Columns to compare; if `None` those of `summarise`.
        patients: Whom the cases show, as far as it is known; other cases are of a patient each.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        One row a model and metric: `model`, `metric`, `n` patients, `difference` = mean over them of (model -
        reference), in the metric's own unit, `low` and `high`, its 95 % interval by a bias-corrected and accelerated
        bootstrap over the patients, and `p` of Wilcoxon's signed-rank test, two-sided; ties of 0 are left out, and p is
        1 if all are. NaN where there are fewer than two patients.

    Raises:
        UserError: There is no model of that name, or a model has other cases.
    """
    if reference not in frames:
        raise UserError(f"There is no model '{reference}' to compare with; the models are {', '.join(frames)}.")
    expected = set(frames[reference].index)
    for model, frame in frames.items():
        if other := sorted(expected.symmetric_difference(frame.index)):
            raise UserError(
                f"{model} and {reference} were tested on different cases: {abbreviate(other)}. Paired differences need "
                "the same cases for both."
            )
    rows = []
    for model, frame in frames.items():
        for metric in shown_metrics(frames) if metrics is None else metrics:
            if model != reference:
                difference = (judged(frame, metric) - judged(frames[reference], metric)).dropna()
                of_patients = difference.groupby(_patients(difference.index, patients), sort=False).mean()
                rows.append({"model": model, "metric": metric, **_paired(of_patients.to_numpy(float), resamples, seed)})
    return pd.DataFrame(rows, columns=["model", "metric", "n", "difference", "low", "high", "p"])


def independent_units(cases: Iterable[str], patients: Mapping[str, str] | None) -> str:
    """What `paired_differences` takes for independent, for its caption.

    Args:
        cases: The cases.
        patients: Whom they show, as far as it is known.

    Examples:
        >>> independent_units(["a", "b", "c"], {"a": "p1", "b": "p1"})
        '2 patients or groups that the 3 cases are of, averaged within each first'
        >>> independent_units(["a", "b"], {"a": "p1"})
        'cases'
    """
    names = list(cases)
    number = len(set(_patients(names, patients)))
    if number == len(names):
        return "cases"
    return f"{number} patients or groups that the {len(names)} cases are of, averaged within each first"


def _patients(cases: Iterable[str], patients: Mapping[str, str] | None) -> list[str]:
    """Whom each case shows; itself where nothing is known."""
    return [(patients or {}).get(case, case) for case in cases]


def markdown_table(frames: Mapping[str, pd.DataFrame], *, metrics: Sequence[str] | None = None) -> str:
    """The summary as a Markdown table, a row a model: mean ± standard deviation."""
    return to_markdown(_summary_text(frames, metrics))


def rich_table(
    frames: Mapping[str, pd.DataFrame], *, title: str | None = None, metrics: Sequence[str] | None = None
) -> Table:
    """The summary as a table for the terminal, a row a metric, because a terminal is narrow."""
    text = _summary_text(frames, metrics).T.rename_axis(None)
    return to_rich(text, title=title)


def differences_text(differences: pd.DataFrame, frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What `paired_differences` found, as the cells of a table."""
    known = shown_metrics(frames)
    rows = []
    for row in differences.to_dict("records"):
        metric = known.get(str(row["metric"]), Metric(str(row["metric"])))
        difference, low, high = (metric.text(row[name], sign="+") for name in ("difference", "low", "high"))
        rows.append(
            {
                "Model": row["model"],
                "Metric": metric.heading,
                "n": str(row["n"]),
                "Difference": difference,
                "95 % interval": "" if np.isnan(row["low"]) else f"{low} to {high}",
                "p": "" if np.isnan(row["p"]) else "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
            }
        )
    return pd.DataFrame(rows, columns=["Model", "Metric", "n", "Difference", "95 % interval", "p"]).set_index("Model")


def to_markdown(text: pd.DataFrame) -> str:
    """A table of texts as Markdown, its index in the first column."""
    header = [str(text.index.name or ""), *map(str, text.columns)]
    rows = [[str(name), *cells] for name, cells in zip(text.index, text.to_numpy().tolist(), strict=True)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines) + "\n"


def to_rich(text: pd.DataFrame, *, title: str | None = None) -> Table:
    """A table of texts for the terminal, its index in the first column."""
    table = Table(title=title)
    for position, name in enumerate([text.index.name or "", *text.columns]):
        table.add_column(str(name), justify="right" if position else "left", overflow="fold")
    for name, cells in zip(text.index, text.to_numpy().tolist(), strict=True):
        table.add_row(str(name), *cells)
    return table


@dataclass(frozen=True)
class _Job:
    """What is read to measure a case."""

    prediction: Path
    reference: Path
    lung: Path | None
    labels: frozenset[int] | None
    options: Mapping[str, Any] = field(default_factory=dict)


def _evaluate(job: _Job) -> dict[str, float] | str:
    """The metrics of a case, or the sentence that says why there are none."""
    try:
        reference, grid = _read_labels(job.reference, None)
        prediction, found = _read_labels(job.prediction, job.labels)
        check_grid(job.prediction, found, job.reference, grid)
        lung = None
        if job.lung is not None:
            lung, found = read_volume(job.lung)
            check_grid(job.lung, found, job.reference, grid)
        x, y, z = grid.spacing
        return score_case(prediction, reference, lung=lung, spacing=(z, y, x), **job.options)
    except UserError as error:
        return str(error)


def _fault(scan: Path) -> str:
    """What is wrong with a scan; nothing if it can be read."""
    try:
        read_volume(scan)
    except UserError as error:
        return str(error)
    return ""


def _has_lesion(job: _Job) -> bool | str | None:
    try:
        array, _ = _read_labels(job.reference, job.labels, job.options["declared_by"])
    except UserError as error:
        return str(error)
    ignored = array == job.options["ignore_label"]
    if ((array > 0) & ~ignored).any():
        return True
    return None if ignored.any() else False


def _read_labels(
    path: Path, allowed: frozenset[int] | None, declared_by: str = "dataset.json"
) -> tuple[NDArray[Any], Grid]:
    array, grid = read_volume(path)
    values = pd.unique(array.ravel())  # np.unique sorts all the voxels of a CT
    wrong = [value for value in values if value < 0 or value != int(value)]
    if wrong:
        raise UserError(f"{path} holds the value {wrong[0]:g}; labels must be whole numbers from 0 on.")
    undeclared = sorted(int(value) for value in values if allowed is not None and int(value) not in allowed)
    if allowed is not None and undeclared:
        raise UserError(
            f"{path} holds {undeclared[:8]}, which {declared_by} does not declare (declared: {sorted(allowed)}). "
            "Correct the file or the labels."
        )
    return array, grid


def check_grid(path: Path, found: Grid, reference: Path, expected: Grid) -> None:
    difference = grid_difference(found, expected)
    if difference:
        raise UserError(
            f"{path} does not lie on the grid of {reference}: {difference}. Metrics need both on one grid: resample "
            "the one to the other."
        )


def judged(frame: pd.DataFrame, metric: str) -> pd.Series:
    """A metric of the cases it is averaged over: false positives of the healthy ones, all else of those with lesion.

    A case that shows no lesion in what is not ignored is neither.

    Args:
        frame: Rows as `evaluate_folder` makes them.
        metric: One of its columns; NaN where there is no such column.
    """
    if metric not in frame:
        return pd.Series(np.nan, index=frame.index)
    if metric in METRICS and METRICS[metric].healthy:
        return frame.loc[(frame["lesion_ml"] == 0) & (frame["ignored_ml"] == 0), metric]
    return frame.loc[frame["lesion_ml"] > 0, metric]


def _paired(difference: NDArray[np.float64], resamples: int, seed: int) -> dict[str, float]:
    result = {"n": len(difference), "difference": float(difference.mean()) if len(difference) else np.nan}
    if len(difference) < 2:
        return {**result, "low": np.nan, "high": np.nan, "p": np.nan}
    low = high = result["difference"]
    if np.ptp(difference) > 0:  # of equal differences a bootstrap is degenerate
        generator = np.random.default_rng(seed)
        interval = stats.bootstrap(
            (difference,), np.mean, n_resamples=resamples, confidence_level=CONFIDENCE, random_state=generator
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    untied = difference[difference != 0]
    p = float(stats.wilcoxon(untied).pvalue) if len(untied) else 1.0
    return {**result, "low": low, "high": high, "p": p}


def _summary_text(frames: Mapping[str, pd.DataFrame], metrics: Sequence[str] | None) -> pd.DataFrame:
    known = shown_metrics(frames)
    shown = {name: metric for name, metric in known.items() if metrics is None or name in metrics}
    summary = summarise(frames, metrics=list(shown))
    text = {
        metric.heading: [metric.mean_and_sd(row[name, "mean"], row[name, "sd"]) for _, row in summary.iterrows()]
        for name, metric in shown.items()
    }
    return pd.DataFrame(text, index=pd.Index(list(frames), name="Model"), dtype=str)
