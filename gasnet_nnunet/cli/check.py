"""`gasnet-nnunet check`: a dataset looked over before a long run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def check(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset id or name.")],
    quick: Annotated[bool, typer.Option("--quick", help="Read the images' headers only, not their values.")] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Files read at a time.")] = 2,
) -> None:
    """Say which cases are voxel-labelled, diseased and healthy, what is odd about them, and whether they can be used.

    Reads all labels and images in nnUNet_raw (or, where that is gone, the labels in nnUNet_preprocessed) and the split
    file. The exit status is 1 if anything has to be mended before a training.

    Raises:
        UserError: There is no such dataset, or it has problems.
    """
    from gasnet_nnunet.cohort import raise_problems
    from gasnet_nnunet.inspection import group_sizes, inspect_dataset

    inspection = inspect_dataset(dataset, read_images=not quick, num_processes=num_processes, progress=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(escape(str(inspection.folder)))
    if inspection.cohort:
        console.print(escape(inspection.cohort.report()))
    rows = group_sizes(inspection)
    if rows:
        table = Table("kind", "scans", "size (X x Y x Z)", "spacing in mm")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"Splits: {escape(inspection.splits)}")
    for remark in inspection.remarks:
        console.print(f"[yellow]Note:[/] {escape(remark)}")
    raise_problems(inspection.problems, f"{inspection.folder.name}")
    console.print("[green]No problems found.[/]")
