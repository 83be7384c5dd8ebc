"""`gasnet-nnunet convert folders`: plain folders of CTs made into an nnU-Net dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet.errors import UserError


def folders(
    dataset_id: Annotated[int, typer.Option("--id", help="nnU-Net's id of the new dataset, 1 to 999.")],
    name: Annotated[str, typer.Option(help="Its name: letters, digits, '_' and '-'.")],
    labelled: Annotated[
        tuple[Path, Path], typer.Option(metavar="IMAGES MASKS", help="CTs with lesion masks; one is enough.")
    ],
    healthy: Annotated[Path, typer.Option(metavar="IMAGES", help="CTs without lesions.")],
    diseased: Annotated[
        Path | None, typer.Option(metavar="IMAGES", help="CTs of patients known to have the disease, without masks.")
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGES [MASKS]", help="CTs kept out of training, with or without masks."),
    ] = None,
    lungs: Annotated[
        Path | None, typer.Option(metavar="MASKS", help="Lung masks of training cases, instead of computed ones.")
    ] = None,
    rescale: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(metavar="LO HI HU_LO HU_HI", help="Map stored values LO..HI to HU, e.g. 0 255 -1250 250."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset of this id and name.")] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Cases read and written at a time.")] = 2,
) -> None:
    """Make an nnU-Net dataset out of folders of CTs: NIfTI, anything else SimpleITK reads, or DICOM.

    A file is a case and its name the case's name; an image and its mask have the same name. DICOM: a folder for each
    case. All files are checked before anything is written.

    Raises:
        UserError: nnUNet_raw is not set, the id is taken, or files cannot be used.
    """
    from gasnet_nnunet.dataset_conversion.folders import convert_folders
    from gasnet_nnunet.dataset_conversion.sources import Rescaling

    if test and len(test) > 2:
        raise UserError(f"--test takes IMAGES [MASKS], one or two folders; found {len(test)}.")
    test_images, test_masks = [*(test or ()), None, None][:2]
    converted = convert_folders(
        dataset_id=dataset_id,
        name=name,
        labelled=labelled,
        healthy=healthy,
        diseased=diseased,
        test=test_images,
        test_masks=test_masks,
        lungs=lungs,
        rescaling=Rescaling(*rescale) if rescale else None,
        overwrite=overwrite,
        num_processes=num_processes,
        progress=True,
    )
    console = Console(highlight=False, soft_wrap=True)
    counts = ", ".join(f"{number} {kind}" for kind, number in converted.counts.items())
    console.print(f"Made {escape(str(converted.folder))}: {counts}.")
    for remark in converted.remarks:
        console.print(f"[yellow]Note:[/] {escape(remark)}")
    console.print(f"Report, with a picture of every case: {escape(str(converted.report))}")
    console.print(f"Next: [bold]gasnet-nnunet plan -d {dataset_id}[/]")
