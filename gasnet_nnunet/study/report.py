"""Tables and figures of a study, from what its runs have left.

Written are `results.csv` (a row for each test case of each run), `runs.csv` (a row for each run), `summary.md` and the
figures. Means are taken as in the paper, over the test cases; a case that several choices of the masks were tested on
counts once, by its mean over those. Differences between arms are taken over patients or groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from gasnet_nnunet.comparison_figures import MODEL_COLOURS, plot_comparison, plot_overlays
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.evaluation import (
    METRICS,
    PAPER_METRICS,
    Metric,
    class_metrics,
    differences_text,
    independent_units,
    judged,
    paired_differences,
    to_markdown,
    to_rich,
)
from gasnet_nnunet.files import write_figure, write_text
from gasnet_nnunet.raw_dataset import read_json
from gasnet_nnunet.study.definition import Study
from gasnet_nnunet.study.runner import SESSIONS
from gasnet_nnunet.study.splits import Deal
from gasnet_nnunet.study.steps import record_of, scores_of, state_of, steps_of
from gasnet_nnunet.study.workspace import Workspace

RUN_HEADINGS = ("Mean Dice % of each choice", "Updates of S", "Training, min")
NOT_IN_TERMINALS = (METRICS["sensitivity"].heading, METRICS["specificity"].heading, "Updates of S")
REASON_LENGTH = 400
"""Characters at the end of what a run that failed has said."""
MOST_COMPARED = 6
"""Arms whose overlays fit beside each other."""


@dataclass(frozen=True)
class Report:
    """What a study came to.

    Args:
        table: For the terminal.
        remarks: A sentence each.
        files: What was written.
        failed: Runs that have predicted but could not be scored.
    """

    table: Table
    remarks: list[str]
    files: list[Path]
    failed: list[str]


def write_report(workspace: Workspace) -> Report:
    """Collect what the runs have left.

    Args:
        workspace: The study.
    """
    runs = _runs(workspace)
    failed = _score(workspace, runs)
    results = _results(workspace, runs)
    out = workspace.out
    files = [out / "runs.csv"]
    write_text(files[0], runs.to_csv(index=False))
    cells = _cells(workspace, runs, results)
    text = [f"# {workspace.study.title}\n", _describe(workspace), to_markdown(cells)]
    if not results.empty:
        files.append(out / "results.csv")
        write_text(files[-1], results.to_csv(index=False))
        text += _differences(workspace, runs, results)
        text += _subsets(workspace, runs, results)
    remarks = _remarks(workspace, runs)
    text.append("\n".join(f"- {remark}" for remark in remarks) + "\n")
    files.append(out / "summary.md")
    write_text(files[-1], "\n".join(text))
    # After all tables: a fault in a figure costs none of them.
    if not results.empty:
        files += _figures(workspace, runs, results)
    # A terminal is narrow; summary.md has all columns.
    left_out = [*NOT_IN_TERMINALS, *(metric.heading for metric in class_metrics(results).values())]
    table = to_rich(cells.drop(columns=left_out), title=workspace.study.title)
    return Report(table, remarks, files, failed)


def _runs(workspace: Workspace) -> pd.DataFrame:
    """A row for each run of the study as it is now."""
    rows = []
    for run in workspace.runs:
        content = record_of(workspace, run).content
        state = state_of(workspace, run)
        learnt_from = run.deal.entry(workspace.study.volumes_of(run.arm))
        row: dict[str, Any] = {
            "arm": run.arm,
            "masks": run.deal.masks,
            "repeat": run.deal.repeat,
            "fold": run.deal.fold,
            "state": state,
            "labelled": " ".join(run.deal.train),
            "diseased": len(learnt_from["diseased"]),
            "healthy": len(learnt_from["healthy"]),
            "nnunet_fold": run.number,
        }
        done = state == "done"
        for name in ("epochs", "updates", "training_seconds", "predict_seconds", "seconds"):
            row[name] = content.get(name) if done else None
        row["reason"] = "" if done else content.get("reason", "")
        rows.append(row)
    return pd.DataFrame(rows)


def _score(workspace: Workspace, runs: pd.DataFrame) -> list[str]:
    """Score what is not scored yet, or against masks that have changed since; the state of what cannot be is failed."""
    failed = []
    for row, run in enumerate(workspace.runs):
        if runs.loc[row, "state"] == "done":
            try:
                scores_of(workspace, run, steps_of(workspace, run, "cpu"), record_of(workspace, run))
            except (UserError, OSError, RuntimeError) as problem:
                runs.loc[row, ["state", "reason"]] = "failed", f"its predictions cannot be scored: {problem}"
                failed.append(run.name)
    return failed


def _results(workspace: Workspace, runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each test case of each run that is done."""
    frames = []
    for run, state in zip(workspace.runs, runs["state"], strict=True):
        if state == "done":
            path = record_of(workspace, run).path.with_suffix(".csv")
            frame = pd.read_csv(path, dtype={"case": str})
            places: dict[str, Any] = {
                "arm": run.arm,
                "masks": run.deal.masks,
                "repeat": run.deal.repeat,
                "fold": run.deal.fold,
            }
            for position, (name, value) in enumerate(places.items()):
                frame.insert(position, name, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _cells(workspace: Workspace, runs: pd.DataFrame, results: pd.DataFrame, cases: str | None = None) -> pd.DataFrame:
    """The table of arms and numbers of masks, as text; of the cases that match a pattern if one is given."""
    study, metrics = workspace.study, _metrics(results)
    headings = [*(metric.heading for metric in metrics.values()), *RUN_HEADINGS]
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
                rows.append([*row, ", ".join(sorted(set(mine["state"]))), *([""] * (len(headings) - 1))])
                continue
            by_case = of_run.groupby("case").mean(numeric_only=True)
            values = [(metric, judged(by_case, name)) for name, metric in metrics.items()]
            row += [metric.mean_and_sd(shown.mean(), shown.std()) for metric, shown in values]
            choices = [judged(frame, "dice").mean() for _, frame in of_run.groupby("repeat")]
            row.append(", ".join(METRICS["dice"].text(value) for value in choices))
            row.append(f"{done['updates'].mean():.0f}")
            row.append(f"{done['training_seconds'].mean() / 60:.1f}")
            rows.append(row)
    return pd.DataFrame(rows, columns=["Arm", "Masks", "Runs done", *headings]).set_index("Arm")


def _metrics(results: pd.DataFrame) -> dict[str, Metric]:
    """What the tables and figures show: the paper's metrics, and the Dice of each lesion class where there are several.

    They are those of all runs, so that tables of some of them have the same columns.
    """
    return {**{name: METRICS[name] for name in PAPER_METRICS}, **class_metrics(results)}


def _frames(workspace: Workspace, runs: pd.DataFrame, results: pd.DataFrame, number: int) -> dict[str, pd.DataFrame]:
    """The mean of each case over the choices, for the arms all of whose runs are done, by their titles."""
    frames = {}
    for arm in workspace.study.arms:
        mine = runs[(runs["arm"] == arm) & (runs["masks"] == number)]
        if len(mine) and (mine["state"] == "done").all():
            of_arm = results[(results["arm"] == arm) & (results["masks"] == number)]
            frames[workspace.study.title_of(arm)] = of_arm.groupby("case").mean(numeric_only=True)
    return frames


def _differences(workspace: Workspace, runs: pd.DataFrame, results: pd.DataFrame) -> list[str]:
    """How much every arm differs from the reference on the same cases.

    A reference that is not run with as many masks stands beside those arms with what it is run with: whether one mask
    and volume-level labels do what four masks do.
    """
    study, text = workspace.study, []
    arm = study.reference or next(iter(study.arms))
    for number in study.masks:
        frames = _frames(workspace, runs, results, number)
        title, learnt = study.title_of(arm), number
        if number not in study.masks_of(arm):
            learnt = max((other for other in study.masks_of(arm) if other < number), default=0)
            fewer = _frames(workspace, runs, results, learnt)
            frames = {title: fewer[title], **frames} if title in fewer else {}
        if title not in frames or len(frames) == 1:
            continue
        same = set.intersection(*(set(frame.index) for frame in frames.values()))
        frames = {name: frame[frame.index.isin(same)] for name, frame in frames.items()}
        found = paired_differences(frames, reference=title, metrics=list(_metrics(results)), patients=workspace.groups)
        table = differences_text(found[found["n"] > 1], frames)
        whose = title if learnt == number else f"{title} with {_masks(learnt)}"
        text.append(
            f"## {_masks(number)} against {whose}\n\nMean of the differences on the same {len(same)} cases, its 95 % "
            f"interval by bootstrap, and a signed-rank test, over the {independent_units(same, workspace.groups)}.\n\n"
            + to_markdown(table)
        )
    return text


def _masks(number: int) -> str:
    return f"{number} mask{'s' * (number != 1)}"


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
        text.append(f"## {name} (`{pattern}`)\n\n{to_markdown(_cells(workspace, runs, results, pattern))}")
    return text


def _remarks(workspace: Workspace, runs: pd.DataFrame) -> list[str]:
    remarks = []
    for _, row in runs[runs["reason"] != ""].iterrows():
        name = f"{row['arm']}/masks{row['masks']}_repeat{row['repeat']}_fold{row['fold']}"
        reason = " ".join(str(row["reason"]).split())
        if len(reason) > REASON_LENGTH:
            reason = f"... {reason[-REASON_LENGTH:]}"
        log = f" All of it is in {workspace.out / 'logs' / name}." if row["state"] == "failed" else ""
        remarks.append(f"{name}: {row['state']}: {reason}{log}")
    times = _times(workspace)
    total = sum(times.values())
    if total:
        shares = ", ".join(f"{name} {seconds:.0f} s ({100 * seconds / total:.1f} %)" for name, seconds in times.items())
        remarks.append(f"Time so far: {shares}.")
    return remarks


def _times(workspace: Workspace) -> dict[str, float]:
    """Seconds of all sessions of the study; the study's own is what was neither of the others."""
    path = workspace.out / SESSIONS
    sessions: list[dict[str, float]] = read_json(path)["sessions"] if path.is_file() else []
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
        frames = _frames(workspace, runs, results, number)
        if frames:
            made.append(workspace.out / f"arms_masks{number}.png")
            plot_comparison(frames, made[-1], metrics=list(_metrics(results)))
    for deal in workspace.deals:
        mine = _of_deal(runs, deal)
        if len(mine) and (mine["state"] == "done").all():
            made.append(workspace.out / "overlays.png")
            _draw_overlays(workspace, deal, _fitting(workspace.study, mine["arm"]), results, made[-1])
            break
    return made


def _fitting(study: Study, arms: Iterable[str]) -> list[str]:
    """As many arms as fit beside each other, and first the one that the others are compared with."""
    reference = study.reference or next(iter(study.arms))
    return sorted(arms, key=lambda arm: arm != reference)[:MOST_COMPARED]


def _of_deal(rows: pd.DataFrame, deal: Deal) -> pd.DataFrame:
    """The rows of the runs on the cases of a deal."""
    return rows[(rows["masks"] == deal.masks) & (rows["repeat"] == deal.repeat) & (rows["fold"] == deal.fold)]


def _draw_overlays(workspace: Workspace, deal: Deal, arms: list[str], results: pd.DataFrame, path: Path) -> None:
    """What the arms found in the largest, the middle and the smallest burden, and in a healthy case."""
    tests = workspace.test_set(deal)
    # Other deals may have other test cases, as with `test: rest`.
    scores = _of_deal(results[results["arm"] == arms[0]], deal)
    ill = list(scores.loc[scores["lesion_ml"] > 0].sort_values("lesion_ml", ascending=False)["case"])
    well = list(scores.loc[scores["lesion_ml"] == 0, "case"])
    spread = [ill[position] for position in sorted({0, len(ill) // 2, len(ill) - 1})] if ill else []
    plot_overlays(
        path,
        images=tests.folder / "images",
        references=tests.folder / "masks",
        predictions={workspace.study.title_of(arm): workspace.out / "predictions" / arm / deal.name for arm in arms},
        cases=[*spread, *well[:1]],
        file_ending=workspace.ending,
        ignore_label=workspace.ignore_label,
    )


def _colours(workspace: Workspace) -> Mapping[str, Any]:
    colours: list[Any] = list(MODEL_COLOURS)
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
        write_figure(path, figure)
