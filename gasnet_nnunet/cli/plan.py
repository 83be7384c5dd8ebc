"""`gasnet-nnunet plan`: whole-lung plans, splits and preprocessed data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from gasnet_nnunet.estimate import Cost
    from gasnet_nnunet.planning import Planned

MOST_PROCESSES = 8


def plan(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset id or name in nnUNet_raw.")],
    preset: Annotated[
        str | None, typer.Option(help="Where to start from: default (if left out), paper or small.")
    ] = None,
    patch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="Z Y X", help="Patch size in voxels; derived from the data if left out."),
    ] = None,
    features: Annotated[
        list[int] | None,
        typer.Option(metavar="F ...", help="Feature maps of S: at full resolution, or of every stage."),
    ] = None,
    segmenter: Annotated[
        str | None, typer.Option(help="Network of S: plain (if left out), resenc, vbnet or unetpp.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Trained model to go on from: its weights, and its network, spacing, patch, window and settings.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the plans, for nnU-Net's -p.")] = "GASNetPlans",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE ...",
            help="GASNet's settings, and batch_size, max_features and hu_window of the plans.",
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory target of nnU-Net's rule for S, in GB.", min=0.1)] = 8.0,
    num_processes: Annotated[
        int | None, typer.Option(help="Processes that read and preprocess cases; 8 or the number of cores.", min=1)
    ] = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess/--no-preprocess", help="Whether to run nnU-Net's preprocessing.")
    ] = True,
) -> None:
    """Choose spacing and patch so that one patch holds the lungs, write the plans and the split, and preprocess.

    Measures the lungs of every case in nnUNet_raw; masks in the dataset's folder lungsTr win over computed ones. An
    existing splits_final.json is never overwritten.
    """
    console = Console(highlight=False)
    with console.status("Loading nnU-Net"):
        from gasnet_nnunet.estimate import estimate_cost
        from gasnet_nnunet.planner import resolve_choices
        from gasnet_nnunet.planning import make_plans, prepare_organ_masks, run_preprocessing
        from gasnet_nnunet.settings import load_preset

    choices, settings = resolve_choices(
        preset, patch, features or [], set_ or [], segmenter=segmenter, init_from=init_from
    )
    processes = num_processes or min(MOST_PROCESSES, os.cpu_count() or 1)
    planned = make_plans(
        dataset,
        choices,
        settings,
        plans_name=name,
        gpu_memory_gb=gpu_memory,
        num_processes=processes,
        progress=True,
    )
    console.print(escape(planned.cohort.report()))
    console.print(_table(planned, preset or "default"))
    deviations = load_preset(preset).deviations if preset else ()
    if deviations:
        console.print("Where this differs from the paper:")
        for deviation in deviations:
            console.print(f"  - {escape(deviation)}")
    with console.status("Timing the networks"):
        cost = estimate_cost(
            planned.configuration,
            channels=len(planned.dataset.dataset_json["channel_names"]),
            labels=len(planned.dataset.dataset_json["labels"]),
            voxels=planned.voxels,
        )
    console.print(_cost(cost))
    console.print(f"Plans: {planned.plans_file}", soft_wrap=True)
    console.print(_splits(planned), soft_wrap=True)
    number = planned.dataset.number
    if preprocess:
        ran = run_preprocessing(planned, num_processes=processes)
        prepare_organ_masks(planned, num_processes=processes, progress=True)
        kept = "" if ran else " (up to date, not made again)"
        console.print(f"Preprocessed data: {planned.data_folder}{kept}", soft_wrap=True)
    else:
        console.print("\nNot preprocessed, as you asked. Before training:")
        console.print(f"  nnUNetv2_preprocess -d {number} -plans_name {name} -c 3d_fullres", soft_wrap=True)
    console.print("\nNext:")
    device = "" if cost.device == "cuda" else f" -device {cost.device}"
    console.print(f"  nnUNetv2_train {number} 3d_fullres 0 -tr GASNetTrainer -p {name}{device}", soft_wrap=True)
    predict = f"nnUNetv2_predict -d {number} -i INPUT_FOLDER -o OUTPUT_FOLDER -c 3d_fullres -f 0"
    console.print(f"  {predict} -tr GASNetTrainer -p {name}{device}", soft_wrap=True)


def _table(planned: Planned, preset: str) -> Table:
    """What was chosen and why."""
    configuration, geometry, settings = planned.configuration, planned.geometry, planned.settings
    organ = settings.organ
    origin = planned.origin
    source = f"preset {preset}" if origin is None else f"goes on from {origin.plans['dataset_name']}"
    table = Table(title=f"{planned.plans['plans_name']} for {planned.dataset.name} ({source})", title_justify="left")
    for column in ("", "chosen", "why"):
        table.add_column(column, overflow="fold")

    def row(name: str, chosen: str, *reasons: str) -> None:
        table.add_row(name, escape(chosen), escape(" ".join(reason for reason in reasons if reason)))

    given = "given." if planned.choices.patch_size is not None else "derived."
    at_most = f"at most {planned.choices.max_features}."
    batch_size, extent = configuration["batch_size"], planned.covered_extent
    batch_rule = "given."
    if not planned.choices.batch_size:
        batch_rule = "nnU-Net's rule: memory target, at most 5 % of the data, at least 2."
    made_for = f"{organ} of {_times(extent, '.0f')} mm, as in {planned.decisive_cases}, in a patch of"
    if origin is not None:
        given = at_most = "that of the checkpoint."
        made_for = "that of the checkpoint, with which a patch is"
        batch_rule = given if batch_size == origin.configuration["batch_size"] else batch_rule
        alone = "" if settings.needs_generator else "Of S alone: the terms of G and D are off in its settings."
        row("weights", f"{origin.trainer} on {origin.plans['dataset_name']}", f"{origin.path}.", alone)
    row("patch (Z Y X)", _times(geometry.patch_size), given, *geometry.remarks)
    row(
        "spacing (mm)",
        _times(geometry.spacing, ".3g"),
        made_for,
        f"{_times(planned.patch_mm, '.0f')} mm; median of the data {_times(planned.median_spacing, '.3g')} mm.",
    )
    held = len(planned.measures) - len(planned.cut_off)
    cut = [f"{case} ({_times(planned.measures[case].box_mm, '.0f')} mm)" for case in planned.cut_off]
    row(
        "one patch holds",
        f"{held} of {len(planned.measures)} cases",
        f"Cut off: {', '.join(cut)}." if cut else f"the {organ} of every case.",
    )
    for channel, name in planned.dataset.dataset_json["channel_names"].items():
        if int(channel) in planned.dataset.ct_channels:
            window = planned.plans["foreground_intensity_properties_per_channel"][channel]
            bounds = f"{window['percentile_00_5']:g} to {window['percentile_99_5']:g} HU"
            row(f"window of {name}", bounds, planned.window_reason)
        else:
            row(f"window of {name}", configuration["normalization_schemes"][int(channel)], "nnU-Net's, by its name.")
    row("batch size", str(batch_size), batch_rule)
    arch = configuration["architecture"]["arch_kwargs"]
    row("network of S", *_segmenter(configuration))
    row("features of S", " ".join(map(str, arch["features_per_stage"])), at_most)
    row("strides", " ".join("".join(map(str, stride)) for stride in arch["strides"]), "nnU-Net's rules (Z Y X each).")
    row(
        "training",
        f"{settings.num_epochs} epochs x {settings.iterations_per_epoch} iterations",
        f"{settings.discriminator_steps} D updates each; pseudo-labels after {settings.pseudo_start:.0%}.",
    )
    return table


def _segmenter(configuration: dict[str, Any]) -> tuple[str, str]:
    """What S is, and who can predict with it."""
    from gasnet_nnunet.segmenters import SEGMENTERS, needs_this_package, segmenter_of

    name = segmenter_of(configuration)
    shown = configuration["architecture"]["network_class_name"].split(".")[-1] if name is None else name
    what = f"{SEGMENTERS[name].description}; " if name is not None else ""
    who = "predicting needs this package" if needs_this_package(configuration) else "stock nnU-Net predicts with it"
    return shown, f"{what}{who}."


def _cost(cost: Cost) -> str:
    amount = f"{cost.hours / 24:.0f} days" if cost.hours > 72 else f"{cost.hours:.1f} hours"
    duration = amount if cost.hours >= 2 else f"{60 * cost.hours:.0f} minutes"
    advice = " Without a GPU, --preset small is meant for that." if cost.device == "cpu" and cost.hours > 24 else ""
    return escape(
        f"Estimate: {duration} ({cost.seconds_per_iteration:.3g} s an iteration) on this machine's {cost.device} if "
        f"nothing else runs, {cost.memory_gb:.1f} GB of memory for feature maps, {cost.disk_gb:.2g} GB of disk before "
        f"compression.{advice}"
    )


def _splits(planned: Planned) -> str:
    folds = "fold 0" if planned.folds == 1 else f"folds 0 to {planned.folds - 1}"
    whose = (
        ""
        if planned.splits_are_ours
        else " It was there before and is kept as it is; delete it to have a new one made."
    )
    unused = f" Fold 0 does not use {planned.unused}." if planned.unused else ""
    return escape(f"Split: {planned.splits_file} with {folds}.{whose}{unused}")


def _times(values: object, form: str = "") -> str:
    return " x ".join(format(value, form) for value in values)  # type: ignore[attr-defined]
