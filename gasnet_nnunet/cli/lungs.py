"""`gasnet-nnunet lungs`: lung masks of a raw dataset, made in one of three ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def lungs(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset id or name in nnUNet_raw.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="threshold|lungmask|folder",
            help="By thresholding, by the package lungmask's network R231, or out of a folder of masks.",
        ),
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="With folder: a mask a case, or a folder a case of TotalSegmentator's lobes."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that are there already.")] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Cases worked on at a time, one with lungmask.")] = 2,
) -> None:
    """Write lung masks of all training cases to the dataset's folder lungsTr, where they win over computed ones.

    Masks that are there already are kept; repeat an interrupted command to go on. The exit status is 1 if some could
    not be made.

    Raises:
        UserError: There is no such dataset, the method cannot be used, or masks could not be made.
    """
    console = Console(highlight=False, soft_wrap=True)
    with console.status("Loading nnU-Net"):
        from gasnet_nnunet.cohort import abbreviate, raise_problems
        from gasnet_nnunet.lung_masks import make_lung_masks
        from gasnet_nnunet.raw_dataset import find_dataset

    found = find_dataset(dataset)
    result = make_lung_masks(
        found, method, masks=masks, overwrite=overwrite, num_processes=num_processes, progress=True
    )
    table = Table(
        "case", "lungs (ml)", "box (mm, Z x Y x X)", "", "odd", title=str(result.folder), title_justify="left"
    )
    for mask in result.masks:
        box = " x ".join(f"{edge:.0f}" for edge in mask.box_mm)
        state = "" if mask.ml == 0 else "made" if mask.made else "kept"
        table.add_row(escape(mask.case), f"{mask.ml:.0f}", box, state, f"[yellow]{mask.oddity}[/]")
    console.print(table)
    made = sum(mask.made for mask in result.masks)
    kept = sum(not mask.made and mask.ml > 0 for mask in result.masks)
    console.print(f"{made} masks made, {kept} kept.")
    for remark in result.remarks:
        console.print(f"[yellow]Note:[/] {escape(remark)}")
    problems = list(result.problems)
    empty = [mask.case for mask in result.masks if mask.ml == 0]
    if empty:
        problems.append(
            f"No lungs were found in {abbreviate(empty)}. Look at the CTs; put masks of your own into "
            f"{result.folder}, or take the cases out."
        )
    raise_problems(problems, "the lung masks")
    console.print(f"Next: [bold]gasnet-nnunet plan -d {found.number}[/]")
