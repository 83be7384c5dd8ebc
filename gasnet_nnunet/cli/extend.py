"""`gasnet-nnunet extend`: volume-level cases added to an nnU-Net dataset that exists already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def extend(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset id or name in nnUNet_raw.")],
    diseased: Annotated[
        Path | None, typer.Option(metavar="IMAGES", help="CTs of patients known to have the disease, without masks.")
    ] = None,
    healthy: Annotated[Path | None, typer.Option(metavar="IMAGES", help="CTs without lesions.")] = None,
    rescale: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(metavar="LO HI HU_LO HU_HI", help="Map stored values LO..HI to HU, e.g. 0 255 -1250 250."),
    ] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Cases read and written at a time.")] = 2,
) -> None:
    """Add diseased and healthy cases without masks to an nnU-Net dataset, and the label 'ignore' where it is needed.

    Images of several channels are named CASE_0000, CASE_0001 and so on. All files are checked before anything is
    written.

    Raises:
        UserError: There is nothing to add, the dataset cannot be extended, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.extension import extend_dataset
    from gasnet_nnunet.dataset_conversion.sources import Rescaling
    from gasnet_nnunet.raw_dataset import find_dataset

    extended = extend_dataset(
        find_dataset(dataset),
        diseased=diseased,
        healthy=healthy,
        rescaling=Rescaling(*rescale) if rescale else None,
        num_processes=num_processes,
        progress=True,
    )
    console = Console(highlight=False, soft_wrap=True)
    counts = " and ".join(f"{number} {kind}" for kind, number in extended.counts.items())
    console.print(f"Added {counts} cases to {escape(str(extended.folder))}.")
    for remark in extended.remarks:
        console.print(f"[yellow]Note:[/] {escape(remark)}")
    console.print(f"Next: [bold]gasnet-nnunet plan -d {escape(dataset)}[/]")
