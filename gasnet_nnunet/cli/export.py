"""`gasnet-nnunet export`: a trained model that stock nnU-Net runs, or its segmenter as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet.devices import check_device, choose_device
from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from gasnet_nnunet.export import Case
    from gasnet_nnunet.trained_model import TrainedModel


def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .zip, or .onnx with --onnx.")],
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Dataset id or name.")] = None,
    plans: Annotated[str, typer.Option("--plans", "-p", help="Name of the plans.")] = "GASNetPlans",
    configuration: Annotated[
        str, typer.Option("--configuration", "-c", help="Name of the configuration.")
    ] = "3d_fullres",
    trainer: Annotated[str, typer.Option("--trainer", "-tr", help="Name of the trainer.")] = "GASNetTrainer",
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", metavar="FOLDER", help="The model's folder, instead of -d, -p, -c and -tr."),
    ] = None,
    folds: Annotated[
        list[str] | None,
        typer.Option("--folds", "-f", metavar="FOLD ...", help="Folds, by number or 'all'; the numbered ones there."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-chk", help="Which checkpoint of each fold: final or best.")
    ] = "final",
    case: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE ...",
            help="Image of a case (one file a channel) to compare both models on; a preprocessed one if left out.",
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write the segmenter alone as ONNX, and a JSON file on its use.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", "-device", help="cpu, cuda or mps; cuda where there is one, else cpu.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write a model that runs on machines with nnU-Net and nothing of ours, after proving that it predicts the same.

    The archive is for nnUNetv2_install_pretrained_model_from_zip. It holds the segmenter under the name of nnU-Net's
    own trainer and a model card; no generator, discriminator or optimiser, and no name of a case, patient, machine or
    folder.

    Raises:
        UserError: The model or the case cannot be used, the file cannot be written, or the models disagree.
    """
    if (dataset is None) == (model is None):
        raise UserError("Name a model either by -d (with -p, -c and -tr) or by its folder with -m.")
    check_device(device)
    console = Console(highlight=False)
    with console.status("Loading nnU-Net"):
        import torch

        from gasnet_nnunet.export import check_output
        from gasnet_nnunet.trained_model import find_model_folder, read_model

    check_output(output, ".onnx" if onnx else ".zip", overwrite=overwrite)
    if model is None:
        assert dataset is not None
        model = find_model_folder(dataset, trainer=trainer, plans=plans, configuration=configuration)
    chosen = checkpoint.removeprefix("checkpoint_").removesuffix(".pth")  # nnU-Net's -chk takes file names
    with console.status("Reading checkpoints"):
        trained = read_model(model, folds=folds or (), checkpoint=chosen)
    if onnx:
        _export_onnx(trained, output, case or [], overwrite, console)
        return
    where = torch.device(choose_device(device))
    _export_archive(trained, output, case or [], where, overwrite, console)


def _export_archive(
    model: TrainedModel, output: Path, images: list[Path], device: object, overwrite: bool, console: Console
) -> None:
    import torch

    from gasnet_nnunet.export import check_stock, export_model, find_case

    assert isinstance(device, torch.device)
    check_stock(model)
    case = find_case(model, images)
    with console.status(f"Predicting {escape(case.name)} with both models on {device.type}"):
        exported = export_model(model, output, case=case, device=device, overwrite=overwrite)
    for name, size in exported.files.items():
        console.print(f"  {size / 1e6:9.3f} MB  {escape(name)}", soft_wrap=True)
    compared = exported.comparison
    console.print(
        f"{escape(compared.case)} predicted by both models: the same mask in all {compared.voxels} voxels "
        f"({compared.lesion_voxels} of lesion).",
        soft_wrap=True,
    )
    if not compared.lesion_voxels:
        console.print(
            "[yellow]Note:[/] no lesion was found in it; name a case with lesions by --case for a stricter comparison."
        )
    console.print(f"Written: {escape(str(output))} ({output.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    console.print(
        f"The dataset's name, {escape(model.plans['dataset_name'])}, is in it: nnU-Net finds the model by it.",
        soft_wrap=True,
    )
    console.print("\nOn the other machine:")
    console.print(f"  nnUNetv2_install_pretrained_model_from_zip {escape(output.name)}", soft_wrap=True)
    console.print(f"  {escape(exported.command)}", soft_wrap=True)


def _export_onnx(model: TrainedModel, output: Path, images: list[Path], overwrite: bool, console: Console) -> None:
    from gasnet_nnunet.export import find_case
    from gasnet_nnunet.onnx_export import export_onnx

    case: Case | None
    try:
        case = find_case(model, images)
    except UserError:
        if images:
            raise
        case = None
    with console.status("Translating the segmenter"):
        exported = export_onnx(model, output, case=case, overwrite=overwrite)
    console.print(
        f"onnxruntime and torch agree on {escape(exported.checked_on)}: "
        f"logits differ by up to {exported.difference:.2g}.",
        soft_wrap=True,
    )
    console.print(
        f"Written: {escape(str(exported.file))} ({exported.file.stat().st_size / 1e6:.1f} MB)", soft_wrap=True
    )
    console.print(f"How to use it: {escape(str(exported.description))}", soft_wrap=True)
