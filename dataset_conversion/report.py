"""The report of a conversion: `conversion_report.json` for machines and a page for people, in one file each."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gasnet_nnunet.files import write_json
from gasnet_nnunet.pages import inline, write_page

from .examination import Record
from .sources import Source

REPORT_FILES = ("conversion_report.html", "conversion_report.json")


def case_rows(sources: Sequence[Source], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a case: what it is, its grid, intensities, volumes and oddities.

    Spacing and size stand in (Z, Y, X), spacing in mm, intensities in HU where the source says how to map to them,
    volumes in ml.
    """
    rows = []
    for source, record in zip(sources, records, strict=True):
        size, spacing = record.grid.size[::-1], record.grid.spacing[::-1]
        rows.append(
            {
                "case": source.case,
                "kind": source.kind.value if source.kind else "test",
                "files": [str(file) for file in source.images],
                "mask": None if source.mask is None else str(source.mask),
                **source.facts(),
                "size": list(size),
                "spacing": list(spacing),
                "p00_5": record.percentiles[0],
                "median": record.percentiles[1],
                "p99_5": record.percentiles[2],
                "lowest": record.lowest,
                "lesion_ml": {str(label): round(volume, 3) for label, volume in record.lesion_ml.items()},
                "lungs_ml": record.lungs_ml,
                "digest": record.digest,
                "oddities": list(record.oddities),
            }
        )
    return rows


def write_report(
    folder: Path, name: str, sources: Sequence[Source], records: Sequence[Record], remarks: Sequence[str]
) -> None:
    """Write both reports into the folder of a conversion, whose records hold a thumbnail of each case.

    Args:
        folder: Folder of the conversion.
        name: The dataset's name.
        sources: The cases.
        records: What was found in each.
        remarks: What the user should know, one sentence each.
    """
    rows = case_rows(sources, records)
    cases = pd.DataFrame(rows)
    odd = Counter(oddity for record in records for oddity in record.oddities)
    counts = cases["kind"].value_counts().to_dict()
    content = {"dataset": name, "counts": counts, "remarks": list(remarks), "oddities": dict(odd), "cases": rows}
    write_json(folder / REPORT_FILES[1], content)
    write_page(
        folder / REPORT_FILES[0],
        "conversion.html",
        title=name,
        counts=counts,
        remarks=remarks,
        odd=[f"{number} x {oddity}: {_cases_with(cases, oddity)}" for oddity, number in odd.most_common()],
        figures=_figures(cases),
        summary=_summary(cases),
        cases=[_case(folder, source, row) for source, row in zip(sources, rows, strict=True)],
    )


def _cases_with(cases: pd.DataFrame, oddity: str, limit: int = 8) -> str:
    names = cases.loc[[oddity in oddities for oddities in cases["oddities"]], "case"].tolist()
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _numbers(cases: pd.DataFrame) -> pd.DataFrame:
    """The columns worth a distribution."""
    return pd.DataFrame(
        {
            "kind": cases["kind"],
            "slice distance (mm)": [spacing[0] for spacing in cases["spacing"]],
            "pixel (mm)": [spacing[2] for spacing in cases["spacing"]],
            "slices": [size[0] for size in cases["size"]],
            "columns": [size[2] for size in cases["size"]],
            "0.5 % of values (HU)": cases["p00_5"],
            "99.5 % of values (HU)": cases["p99_5"],
            "lesion (ml)": [sum(volumes.values()) if volumes else float("nan") for volumes in cases["lesion_ml"]],
        }
    )


def _summary(cases: pd.DataFrame) -> str:
    numbers = _numbers(cases).groupby("kind").agg(["min", "median", "max"])
    table = numbers.stack(level=0, future_stack=True).unstack(level=0).swaplevel(axis=1).sort_index(axis=1)
    return table.to_html(float_format=lambda value: f"{value:.4g}", na_rep="", border=0)


def _figures(cases: pd.DataFrame) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = _numbers(cases)
    columns = [str(column) for column in numbers if column != "kind" and numbers[column].notna().any()]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    for axis, column in zip(figure.subplots(2, 4).flat, columns, strict=False):
        groups = {str(kind): group.dropna().to_numpy() for kind, group in numbers.groupby("kind")[column]}
        axis.hist(list(groups.values()), bins=15, stacked=True, label=list(groups))
        axis.set_title(column, fontsize=10)
    for axis in list(figure.axes)[len(columns) :]:
        axis.set_axis_off()
    figure.axes[0].legend(fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=80)
    return inline(buffer.getvalue())


def _case(folder: Path, source: Source, row: dict[str, Any]) -> dict[str, str]:
    picture = folder / "records" / ("Tr" if source.kind else "Ts") / f"{source.case}.png"
    facts = [row["kind"], " x ".join(map(str, row["size"])), " x ".join(f"{n:.3g}" for n in row["spacing"]) + " mm"]
    if row["lesion_ml"]:
        facts.append(f"{sum(row['lesion_ml'].values()):.1f} ml lesion")
    odd = "; ".join(row["oddities"])
    return {"name": source.case, "picture": inline(picture.read_bytes()), "facts": ", ".join(facts), "odd": odd}
