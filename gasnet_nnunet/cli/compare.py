"""`gasnet-nnunet compare`: trained models, or folders of predictions, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet.devices import check_device
from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from gasnet_nnunet.comparison import Comparison


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME=FOLDER",
            help="An nnU-Net model folder, a fold of it, or a folder of predictions; several or repeated.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Compare the trained models of this dataset, by id or name.")
    ] = None,
    trainers: Annotated[list[str] | None, typer.Option("-tr", help="With -d: only these trainers.")] = None,
    plans: Annotated[list[str] | None, typer.Option("-p", help="With -d: only these plans.")] = None,
    configurations: Annotated[list[str] | None, typer.Option("-c", help="With -d: only these configurations.")] = None,
    folds: Annotated[
        list[str] | None, typer.Option("-f", help="Folds that predict together; all trained ones if left out.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-chk", help="Which checkpoint of each fold: final, best or a file's name.")
    ] = "final",
    images: Annotated[
        Path | None, typer.Option("--images", "-i", help="Folder of CTs; with -d imagesTs if left out.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of true masks; with -d labelsTs if left out.")] = None,
    lungs: Annotated[
        Path | None, typer.Option(help="Folder of lung masks; those of cases without lesion are computed if left out.")
    ] = None,
    validation: Annotated[
        bool,
        typer.Option("--validation", help="Compare on the validation cases of the folds, which training predicted."),
    ] = False,
    reference: Annotated[
        str | None, typer.Option(help="Model that the others are compared with; the first if left out.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Subsets: a column of the manifest, or a detail in dataset.json."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="CSV or XLSX file with a column 'case' (or 'image'), those of --by, and perhaps 'patient'."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Tolerance of the surface Dice in mm.")] = 3.0,
    device: Annotated[
        str | None, typer.Option("--device", "-device", help="cpu, cuda or mps; cuda where there is one, else cpu.")
    ] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Cases measured and drawn at a time.")] = 2,
) -> None:
    """Compare trained models on CTs with masks, or on their validation cases.

    Predicts what is missing by nnU-Net's own predictor, measures every case, and writes cases.csv, summary.md,
    summary.json, comparison.png and a figure for each case. The same command again goes on after an interruption and
    predicts nothing twice.

    Raises:
        UserError: Models, cases, masks or options that do not fit together; all before anything is predicted.
    """
    check_device(device)
    if dataset is None and (trainers or plans or configurations):
        raise UserError("-tr, -p and -c choose among the models of a dataset: name it with -d.")
    named = [_named(text) for text in model or ()]
    console = Console(highlight=False, soft_wrap=True)
    with console.status("Loading nnU-Net"):
        from gasnet_nnunet.comparison import compare_models
        from gasnet_nnunet.comparison_inputs import (
            find_cases,
            find_model,
            find_models,
            json_of_masks,
            manifest_patients,
            read_groups,
        )
        from gasnet_nnunet.raw_dataset import dataset_folders, read_json

    if manifest is not None and not by and not manifest_patients(manifest):
        raise UserError(
            f"{manifest} says of no case whom it shows (column 'patient'), so --manifest needs --by COLUMN: which of "
            "its columns divides the cases."
        )
    folder = None
    if dataset is not None:
        folder = dataset_folders(dataset)
        chosen = find_models(
            folder.results, trainers=trainers or (), plans=plans or (), configurations=configurations or ()
        )
        named += [(name, path) for name, path in chosen.items()]
    if not named:
        raise UserError(
            "Name the models: --model NAME=FOLDER, several or repeated, or the dataset they were trained on: -d."
        )
    models = [find_model(name, path, folds=folds, checkpoint=checkpoint, validation=validation) for name, path in named]
    trained_on = {read_json(path)["dataset_name"] for item in models if (path := item.folder / "plans.json").is_file()}
    if folder is None and validation and masks is None and len(trained_on) == 1:
        folder = dataset_folders(trained_on.pop())
    if folder is not None:
        images, masks, lungs = (
            given or (found if found and found.is_dir() else None)
            for given, found in zip((images, masks, lungs), folder.of_cases(validation), strict=True)
        )
    if masks is None:
        raise UserError("Name the folder of true masks with --masks.")
    cases = find_cases(models, masks, images=images, lungs=lungs, needs_images=not validation, manifest=manifest)
    groups = read_groups(cases.references, by or (), manifest=manifest, dataset_json=json_of_masks(masks))
    result = compare_models(
        models,
        cases,
        out.absolute(),
        reference=reference,
        groups=groups,
        tolerance_mm=tolerance,
        device=device,
        num_processes=num_processes,
        progress=True,
    )
    _tell(result, console)


def _named(text: str) -> tuple[str | None, Path]:
    """Name and folder of `NAME=FOLDER`, or a folder alone."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).is_dir():
        return None, Path(text)
    if not name.strip() or not folder:
        raise UserError(f"--model is '{text}'; expected NAME=FOLDER.")
    return name.strip(), Path(folder).expanduser()


def _tell(result: Comparison, console: Console) -> None:
    from gasnet_nnunet.comparison import subset_frames
    from gasnet_nnunet.evaluation import differences_text, rich_table, to_rich

    number = len(next(iter(result.frames.values())))
    console.print()
    console.print(rich_table(result.frames, title=f"{number} case{'s' * (number != 1)}, mean ± standard deviation"))
    if len(result.differences):
        text = differences_text(result.differences, result.frames)
        console.print(to_rich(text, title=f"Paired differences from {result.reference}"))
    for column, values in subset_frames(result).items():
        for value, frames in values.items():
            count = len(next(iter(frames.values())))
            console.print(rich_table(frames, title=f"{column}: {value}, {count} case{'s' * (count != 1)}"))
    for note in result.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}")
    for name, spent in result.seconds.items():
        console.print(
            f"[dim]{'Comparing' if name == 'compare' else f'Predicting {escape(name)}'} took {spent:.0f} s.[/]"
        )
    console.print("See:")
    for name, what in (
        ("summary.md", "these tables"),
        ("cases.csv", "every case under every model"),
        ("comparison.png", "the same, drawn"),
        ("overlays", "what each model found in each case"),
    ):
        if name != "overlays" or any((result.folder / name).glob("*.png")):
            console.print(f"  {escape(str(result.folder / name))}  [dim]{what}[/]")
