"""`gasnet-nnunet restore`: masks, restored CTs and lesion burden of new CTs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gasnet_nnunet.devices import check_device
from gasnet_nnunet.errors import UserError


def restore(
    source: Annotated[
        Path, typer.Option("-i", metavar="CT_OR_FOLDER", help="A CT, a folder of CTs, or a folder of DICOM series.")
    ],
    out: Annotated[Path, typer.Option("-o", metavar="FOLDER", help="Folder of the results.")],
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Dataset id or name of the model.")] = None,
    plans: Annotated[str, typer.Option("-p", help="Plans of the model.")] = "GASNetPlans",
    configuration: Annotated[str, typer.Option("-c", help="Configuration of the model.")] = "3d_fullres",
    trainer: Annotated[str, typer.Option("-tr", help="Trainer of the model.")] = "GASNetTrainer",
    model_folder: Annotated[
        Path | None, typer.Option("-m", metavar="MODEL_FOLDER", help="The model's folder, instead of -d.")
    ] = None,
    folds: Annotated[
        list[str] | None, typer.Option("-f", help="Folds to average, several at once. All that are trained.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("-chk", help="Which checkpoint of each fold: final, best or a file's name.")
    ] = "final",
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Lesion probability from which on a voxel is restored."),
    ] = None,
    mask_only: Annotated[bool, typer.Option("--mask-only", help="Write masks and nothing else.")] = False,
    no_restored: Annotated[
        bool, typer.Option("--no-restored", help="Restore nothing: masks and burden alone.")
    ] = False,
    lungs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Lung masks of your own, named like the cases.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML reports.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do cases again that are there already.")] = False,
    step_size: Annotated[float, typer.Option("-step_size", help="Step of the sliding window, as in nnU-Net.")] = 0.5,
    disable_tta: Annotated[bool, typer.Option("--disable_tta", help="No mirroring, as in nnU-Net.")] = False,
    device: Annotated[str | None, typer.Option("-device", help="cpu, cuda or mps.")] = None,
) -> None:
    """Find the lesions in new CTs, restore healthy lung in their place, and measure the lesion burden.

    For each CT: CASE.nii.gz (the mask, as nnUNetv2_predict makes it), CASE_probability, CASE_restored, CASE_generated,
    CASE_difference, a DICOM segmentation where the CT is a DICOM series, a report to look at, and a row of burden.csv
    and burden.json. report.html lists all cases.

    Results that are there are kept; repeat an interrupted command to go on. A CT that cannot be used does not stop the
    others; the exit status is then 1.

    Raises:
        UserError: There is no such model or no CT, or some CTs could not be worked on.
    """
    if (dataset is None) == (model_folder is None):
        raise UserError("Name the model either by its dataset (-d, with -tr, -p and -c) or by its folder (-m).")
    check_device(device)
    if out.resolve() == source.resolve():
        raise UserError("-o is the folder of the CTs (-i). Choose another one, or results would be taken for CTs.")
    if out.exists() and not out.is_dir():
        raise UserError(f"-o is {out}, a file; expected a folder for the results.")
    console = Console(highlight=False, soft_wrap=True)
    with console.status("Loading nnU-Net"):
        import torch

        from gasnet_nnunet.cohort import raise_problems
        from gasnet_nnunet.inference import RESTORE_FROM, LoadedModel
        from gasnet_nnunet.new_cts import find_cases, find_lung_masks
        from gasnet_nnunet.restoration import INDEX_FILE, Options, restore_cases, summary, write_overview
        from gasnet_nnunet.trained_model import find_model_folder

        if device in (None, "cpu") and not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(os.cpu_count() or 1)  # as nnU-Net's commands do
    if model_folder is None:
        assert dataset is not None
        model_folder = find_model_folder(dataset, trainer=trainer, plans=plans, configuration=configuration)
    with console.status("Loading the model"):
        model = LoadedModel(
            model_folder,
            folds=folds,
            checkpoint=checkpoint,
            device=device,
            step_size=step_size,
            mirroring=not disable_tta,
        )
    wanted = not mask_only and not no_restored
    cases, problems = find_cases(source, model.channels, progress=True)
    options = Options(
        threshold=RESTORE_FROM if threshold is None else threshold,
        restored=wanted,
        mask_only=mask_only,
        report=not no_report,
        lungs=find_lung_masks(lungs, cases),
        overwrite=overwrite,
    )
    if wanted and model.no_restoration:
        console.print(f"[yellow]Note:[/] nothing is restored. {escape(model.no_restoration)}")
    outcomes = restore_cases(model, cases, out, options, progress=True)
    if not mask_only and outcomes:
        table = Table("case", "lesion (ml)", "% of lungs", "left %", "right %", "")
        for outcome in outcomes:
            burden = outcome.burden or {}
            values = [burden.get(name) for name in ("lesion_ml", "lesion_percent", "left_percent", "right_percent")]
            cells = ["" if value is None else f"{value:.1f}" for value in values]
            table.add_row(escape(outcome.case), *cells, outcome.state)
        console.print(table)
    for outcome in outcomes:
        for warning in outcome.warnings:
            console.print(f"[yellow]{escape(outcome.case)}:[/] {escape(warning)}")
    console.print(f"{summary(outcomes)} Results: {escape(str(out))}")
    problems += [outcome.problem for outcome in outcomes if outcome.problem]
    if wanted and model.no_restoration:
        problems.append(
            f"Nothing was restored: {model.no_restoration} Say --no-restored to have masks and burden alone."
        )
    if options.report and not mask_only:
        try:
            write_overview(out, outcomes)
        except OSError as error:
            problems.append(f"{out / INDEX_FILE} cannot be written: {error.strerror}. The cases are as said above.")
    raise_problems(problems, "the CTs")
