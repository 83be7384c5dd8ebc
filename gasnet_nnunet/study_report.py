"""Tables and figures of a study, from what its runs have left.

Written are `results.csv` (a row for each test case of each run), `runs.csv` (a row for each run), `summary.md` and the
figures. Means are taken as in the paper, over the test cases; a case that several choices of the masks were tested on
counts once, by its mean over those.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from gasnet_nnunet.evaluation import MODEL_COLOURS, PERCENTAGES, evaluate_folder, plot_overlays
from gasnet_nnunet.files import write_json
from gasnet_nnunet.raw_dataset import read_json
from gasnet_nnunet.study_workspace import Run, Workspace

if TYPE_CHECKING:
    from gasnet_nnunet.study_runner import Clock

SESSIONS = "time.json"
HEADINGS = {**PERCENTAGES, "choices": "Mean Dice % of each choice", "updates": "Updates of S", "minutes": "Training, min"}
SHOWN_CASES = (3, 1)
"""Diseased and healthy cases of which the overlays show what every arm found."""


@dataclass(frozen=True)
class Report:
    """What a study came to.

    Args:
        table: For the terminal.
        remarks: A sentence each.
        files: What was written.
        failed: Number of runs that have failed.
    """

    table: Table
    remarks: list[str]
    files: list[Path]
    failed: int


def score_run(workspace: Workspace, run: Run, predictions: Path, target: Path) -> None:
    """Score the predictions of a run and write a row a case.

    Args:
        workspace: The study.
        run: The run.
        predictions: Folder of what its model found.
        target: CSV file to write.

    Raises:
        UserError: A prediction or a mask is missing or does not fit.
    """
    tests = workspace.test_set(run.deal)
    frame = evaluate_folder(
        predictions,
        tests.folder / "masks",
        lungs=tests.lungs,
        file_ending=workspace.ending,
        ignore_label=workspace.ignore_label,
    )
    _write(target, frame.to_csv())


def write_report(workspace: Workspace, clock: Clock | None = None) -> Report:
    """Collect what the runs have left.

    Args:
        workspace: The study.
        clock: Of what has just been run.
    """
    runs = _runs(workspace)
    results = _results(workspace, runs)
    out = workspace.out
    files = [out / "runs.csv"]
    _write(files[0], runs.to_csv(index=False))
    header, rows = _cells(workspace, runs, results)
    text = [f"# {workspace.study.title}\n", _describe(workspace), _markdown(header, rows)]
    if not results.empty:
        files.append(out / "results.csv")
        _write(files[-1], results.to_csv(index=False))
        text += _subsets(workspace, runs, results)
        files += _figures(workspace, runs, results)
    remarks = _remarks(workspace, runs, clock)
    text.append("\n".join(f"- {remark}" for remark in remarks) + "\n")
    files.append(out / "summary.md")
    _write(files[-1], "\n".join(text))
    table = Table(title=workspace.study.title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    return Report(table, remarks, files, int((runs["state"] == "failed").sum()))


def _runs(workspace: Workspace) -> pd.DataFrame:
    """A row for each run of the study as it is now."""
    from gasnet_nnunet.study_runner import record_of, state_of

    rows = []
    for run in workspace.runs:
        content = record_of(workspace, run).content
        state = state_of(workspace, run)
        row: dict[str, Any] = {
            "arm": run.arm,
            "masks": run.deal.masks,
            "repeat": run.deal.repeat,
            "fold": run.deal.fold,
            "state": state,
            "labelled": " ".join(run.deal.train),
            "diseased": len(run.deal.diseased),
            "healthy": len(run.deal.healthy),
            "nnunet_fold": run.number,
        }
        done = state == "done"
        for name in ("epochs", "updates", "training_seconds", "predict_seconds", "seconds"):
            row[name] = content.get(name) if done else None
        row["reason"] = "" if done else content.get("reason", "")
        rows.append(row)
    return pd.DataFrame(rows)


def _results(workspace: Workspace, runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each test case of each run that is done."""
    frames = []
    for run, state in zip(workspace.runs, runs["state"], strict=True):
        path = workspace.out / "runs" / run.arm / f"{run.deal.name}.csv"
        if state == "done" and path.is_file():
            frame = pd.read_csv(path, dtype={"case": str})
            places = {"arm": run.arm, "masks": run.deal.masks, "repeat": run.deal.repeat, "fold": run.deal.fold}
            for position, (name, value) in enumerate(places.items()):
                frame.insert(position, name, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _cells(
    workspace: Workspace, runs: pd.DataFrame, results: pd.DataFrame, cases: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """The table of arms and numbers of masks, as text; of the cases that match a pattern if one is given."""
    study = workspace.study
    if cases is not None and not results.empty:
        results = results[[fnmatchcase(case, cases) for case in results["case"]]]
    rows = []
    for arm in study.arms:
        for number in study.masks_of(arm):
            mine = runs[(runs["arm"] == arm) & (runs["masks"] == number)]
            done = mine[mine["state"] == "done"]
            row = [study.title_of(arm), str(number), f"{len(done)} of {len(mine)}"]
            of_run = results[(results["arm"] == arm) & (results["masks"] == number)] if not results.empty else results
            if of_run.empty:
                states = ", ".join(sorted(set(mine["state"])))
                rows.append([*row, *(states if name == "dice" else "" for name in HEADINGS)])
                continue
            by_case = of_run.groupby("case").mean(numeric_only=True)
            for metric in PERCENTAGES:
                values = 100 * judged(by_case, metric)
                row.append(_mean(values))
            choices = [100 * judged(frame, "dice").mean() for _, frame in of_run.groupby("repeat")]
            row.append(", ".join(f"{value:.1f}" for value in choices))
            row.append(f"{done['updates'].mean():.0f}")
            row.append(f"{done['training_seconds'].mean() / 60:.1f}")
            rows.append(row)
    header = ["Arm", "Masks", "Runs done", *HEADINGS.values()]
    return header, rows


def judged(frame: pd.DataFrame, metric: str) -> pd.Series:
    """A metric of the cases it is averaged over: false positives of the healthy ones, all else of the others.

    Args:
        frame: Rows as `evaluate_folder` makes them.
        metric: One of its columns.
    """
    healthy = frame["lesion_ml"] == 0
    return frame.loc[healthy if metric == "false_positive_lung" else ~healthy, metric].dropna()


def _mean(values: pd.Series) -> str:
    if values.empty:
        return ""
    return f"{values.mean():.1f}" if len(values) == 1 else f"{values.mean():.1f} ± {values.std():.1f}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines) + "\n"


def _describe(workspace: Workspace) -> str:
    study, deals = workspace.study, workspace.deals
    tests = [set(workspace.test_set(deal).cases) for deal in deals]
    folds = f", cross-validated in {study.folds} folds" if study.folds > 1 else ""
    grouped = "patients and groups kept apart" if workspace.groups else "each case taken for a patient of its own"
    return (
        f"{workspace.dataset.name}: {len(set().union(*tests))} test cases{folds}, {grouped}. Mean ± standard deviation "
        "over the test cases, each by its mean over the choices of the masks; Dice, sensitivity and specificity of the "
        "cases with lesion. The cases of every run are in `runs.csv`, every score in `results.csv`, the settings in "
        "`study.yaml`.\n"
    )


def _subsets(workspace: Workspace, runs: pd.DataFrame, results: pd.DataFrame) -> list[str]:
    text = []
    for name, pattern in workspace.study.subsets.items():
        header, rows = _cells(workspace, runs, results, pattern)
        text.append(f"## {name} (`{pattern}`)\n\n{_markdown(header, rows)}")
    return text


def _remarks(workspace: Workspace, runs: pd.DataFrame, clock: Clock | None) -> list[str]:
    remarks = []
    for _, row in runs[runs["reason"] != ""].iterrows():
        name = f"{row['arm']}/masks{row['masks']}_repeat{row['repeat']}_fold{row['fold']}"
        remarks.append(f"{name}: {row['state']}: {' '.join(str(row['reason']).split())}")
    times = _times(workspace, clock)
    total = sum(times.values())
    if total:
        shares = ", ".join(f"{name} {seconds:.0f} s ({100 * seconds / total:.1f} %)" for name, seconds in times.items())
        remarks.append(f"Time so far: {shares}.")
    return remarks


def _times(workspace: Workspace, clock: Clock | None) -> dict[str, float]:
    """Seconds of all sessions of the study; the study's own is what was neither of the others."""
    path = workspace.out / SESSIONS
    sessions: list[dict[str, float]] = read_json(path)["sessions"] if path.is_file() else []
    if clock is not None:
        made = workspace.preparation_seconds
        spent = {"training": clock.training, "prediction": clock.prediction, "pseudo-labels": clock.other}
        own = clock.total - sum(spent.values()) - made
        sessions.append({**spent, "data and plans": made, "the study itself": own})
        write_json(path, {"sessions": sessions})
    names = list(dict.fromkeys(name for session in sessions for name in session))
    return {name: sum(session.get(name, 0.0) for session in sessions) for name in names}


def _figures(workspace: Workspace, runs: pd.DataFrame, results: pd.DataFrame) -> list[Path]:
    """Dice over the number of masks, every case under every arm, and what the arms found."""
    made = []
    numbers = sorted(set(results["masks"]))
    if len(numbers) > 1:
        made.append(workspace.out / "dice_over_masks.png")
        _plot_over_masks(workspace, results, made[-1])
    for number in numbers:
        made.append(workspace.out / f"arms_masks{number}.png")
        _plot_arms(workspace, results[results["masks"] == number], made[-1], number)
    for deal in workspace.deals:
        done = runs[(runs["masks"] == deal.masks) & (runs["repeat"] == deal.repeat) & (runs["fold"] == deal.fold)]
        arms = list(done.loc[done["state"] == "done", "arm"])
        if len(arms) == len(done):
            made.append(workspace.out / "overlays.png")
            tests = workspace.test_set(deal)
            scores = results[(results["arm"] == arms[0]) & (results["fold"] == deal.fold)].drop_duplicates("case")
            ill = scores.loc[scores["lesion_ml"] > 0].sort_values("lesion_ml", ascending=False)["case"]
            well = scores.loc[scores["lesion_ml"] == 0, "case"]
            # The largest, the middle and the smallest lesions, so that no method shows its best side only.
            spread = [ill.iloc[i] for i in sorted({0, len(ill) // 2, len(ill) - 1})] if len(ill) else []
            plot_overlays(
                made[-1],
                images=tests.folder / "images",
                references=tests.folder / "masks",
                predictions={
                    workspace.study.title_of(arm): workspace.out / "predictions" / arm / deal.name for arm in arms
                },
                cases=[*spread[: SHOWN_CASES[0]], *well[: SHOWN_CASES[1]]],
                file_ending=workspace.ending,
            )
            break
    return made


def _colours(workspace: Workspace) -> Mapping[str, Any]:
    colours = list(MODEL_COLOURS)
    if len(workspace.study.arms) > len(colours):
        colours = [matplotlib.colormaps["tab20"](index) for index in range(20)]
    return {arm: colours[index % len(colours)] for index, arm in enumerate(workspace.study.arms)}


def _plot_over_masks(workspace: Workspace, results: pd.DataFrame, path: Path) -> None:
    """Mean Dice over the number of masks, as Fig. 11 of the paper, with every choice of the masks as a dot."""
    numbers = sorted(set(results["masks"]))
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axis = figure.subplots()
        for arm, colour in _colours(workspace).items():
            mine = results[results["arm"] == arm]
            if mine.empty:
                continue
            by_case = mine.groupby(["masks", "case"]).mean(numeric_only=True)
            means = {number: 100 * judged(by_case.loc[number], "dice").mean() for number in sorted(set(mine["masks"]))}
            positions = [numbers.index(number) for number in means]
            axis.plot(positions, list(means.values()), "o-", color=colour, label=workspace.study.title_of(arm))
            for (number, _), frame in mine.groupby(["masks", "repeat"]):
                dice = 100 * judged(frame, "dice").mean()
                axis.plot(numbers.index(number), dice, ".", color=colour, alpha=0.45, markersize=5)
        axis.set_xticks(range(len(numbers)), [str(number) for number in numbers])
        axis.set_xlabel("Masks to learn from")
        axis.set_ylabel("Mean Dice %")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
        _save(figure, path)


def _plot_arms(workspace: Workspace, results: pd.DataFrame, path: Path, number: int) -> None:
    """Dice and false positives of every test case under every arm, each by its mean over the choices."""
    arms = [arm for arm in workspace.study.arms if (results["arm"] == arm).any()]
    frames = {arm: results[results["arm"] == arm].groupby("case").mean(numeric_only=True) for arm in arms}
    metrics = [name for name in ("dice", "false_positive_lung") if any(len(judged(f, name)) for f in frames.values())]
    colours = _colours(workspace)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(4.6 * len(metrics) + 1.5, 0.45 * len(arms) + 1.3), layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            columns = pd.DataFrame({arm: 100 * judged(frames[arm], metric) for arm in arms})
            positions = np.arange(len(arms))
            axis.plot(columns.to_numpy().T, positions, color="0.85", linewidth=0.8, zorder=1)
            for position, arm in zip(positions, arms, strict=True):
                values = columns[arm].dropna()
                axis.scatter(values, [position] * len(values), color=colours[arm], s=20, alpha=0.8, zorder=2)
                axis.vlines(values.mean(), position - 0.3, position + 0.3, color="black", linewidth=2, zorder=3)
                axis.annotate(
                    f"{values.mean():.1f}", (values.mean(), position - 0.32), ha="center", va="bottom", fontsize=8
                )
            axis.set_yticks(positions, [workspace.study.title_of(arm) for arm in arms], fontsize=9)
            axis.set_ylim(len(arms) - 0.4, -0.8)
            axis.set_title(f"{PERCENTAGES[metric]} (n = {len(columns.dropna(how='all'))})", fontsize=10)
            axis.grid(axis="x", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(f"{number} mask{'s' if number > 1 else ''} to learn from; black: mean", fontsize=9)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
