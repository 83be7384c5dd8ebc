"""The README of a shared model: what it learned from, how well it did, what it is for and what it is not."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np

from gasnet_nnunet import __version__
from gasnet_nnunet.checkpoints import CHECKPOINTS
from gasnet_nnunet.files import read_json
from gasnet_nnunet.trained_model import TrainedFold, TrainedModel

INTENDED_USE = (
    "Research on lesion segmentation. It is no medical device, was not assessed as one, and is not for diagnosis or "
    "treatment."
)
VOLUME_TERMS = (
    "weight_mil",
    "weight_outside",
    "weight_suspicion",
    "weight_pseudo",
    "weight_adversarial",
    "weight_generated",
    "weight_diseased",
    "weight_reconstruction",
)
"""Settings that are 0 where the volumes without a mask were left out, as by the supervised baseline."""


def model_card(model: TrainedModel, command: str) -> str:
    """Write the card of a model.

    Args:
        model: The model.
        command: How to predict with it once it is installed.

    Returns:
        Markdown, without names of cases and folders.
    """
    plans = model.plans
    parts = [
        f"# {plans['dataset_name']}, {plans['plans_name']}, {model.configuration}",
        _summary(model),
        "## Intended use and limits",
        _bullets(_limits(model)),
        "Whoever shares this model should add what it does not record: where the scans come from, consent and licence "
        "of the data, patients, scanners and reconstruction, a licence of the weights, whom to ask.",
        "## Predict",
        "It needs [nnU-Net v2](https://github.com/MIC-DKFZ/nnUNet) and nothing else; on a machine without a GPU add "
        f"`-device cpu`. `NEW_CTS` holds `<case>_0000{model.dataset_json['file_ending']}`, {_channels(model)}, as they "
        "are: cropping, resampling and normalisation are in the plans.",
        f"```bash\nnnUNetv2_install_pretrained_model_from_zip model.zip\n{command}\n```",
        "## Training data",
        _table(
            ["fold", "masks", "diseased", "healthy", "masks to validate on", "diseased held out", "healthy held out"],
            [_counts(model, fold) for fold in model.folds],
        ),
        "*Masks* are cases with a voxel mask; *diseased* and *healthy* ones carry a diagnosis and no mask.",
        _scans(model),
        "## Validation",
        _table(["fold", "epochs", "cases", *(f"Dice of {name}" for name in _scored(model).values())], _dice(model)),
        *_remarks(model),
        "## Settings",
        _settings(model),
        "## Versions",
        _versions(model),
        "## What is in here",
        f"`checkpoint_final.pth` of each fold is `{CHECKPOINTS[model.checkpoint]}` of the training, the segmenter's "
        f"weights alone{_averaged(model)}{_decided(model)}. Left out on purpose: generator, discriminator and "
        "optimisers (training cannot go on from here, `-pretrained_weights` can), logs, pictures, predictions, "
        "post-processing, and the names of cases, patients, machines and folders.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(model: TrainedModel) -> str:
    kind = "GASNet" if model.settings and _uses_volumes(model) else "supervised training"
    return (
        f"A segmenter of {', '.join(_labels(model))} in {_channels(model)} for nnU-Net v2, trained by {kind} "
        f"(`{model.trainer}`" + (" of gasnet-nnunet)." if model.settings else ").")
    )


def _averaged(model: TrainedModel) -> str:
    iterations = model.settings.get("averaged_iterations", 1)
    return f", averaged over about {iterations} iterations" if iterations > 1 else ""


def _decided(model: TrainedModel) -> str:
    thresholds = {f"{fold.threshold:.3g}" for fold in model.folds}
    if thresholds == {"0.5"}:
        return ""
    return f", with heads by which a probability of 0.5 is what training called {' or '.join(sorted(thresholds))}"


def _labels(model: TrainedModel) -> list[str]:
    return [name for name in model.dataset_json["labels"] if name not in ("background", "ignore")]


def _channels(model: TrainedModel) -> str:
    names = model.dataset_json.get("channel_names", model.dataset_json.get("modality", {})).values()
    return " and ".join("CT in HU" if str(name).casefold() == "ct" else str(name) for name in names)


def _uses_volumes(model: TrainedModel) -> bool:
    return any(model.settings.get(name) for name in VOLUME_TERMS)


def _counts(model: TrainedModel, fold: TrainedFold) -> list[str]:
    cases = fold.cases
    if cases is None:
        return [str(fold.name), *["not recorded"] * 6]
    numbers = [cases.train, cases.diseased, cases.healthy, cases.val, cases.val_diseased, cases.val_healthy]
    counts = [str(len(names)) for names in numbers]
    if not _uses_volumes(model):
        counts[1] = f"0 of {counts[1]}"
        if not model.settings.get("weight_healthy") and not model.settings.get("pasted_share"):
            counts[2] = f"0 of {counts[2]}"
    return [str(fold.name), *counts]


def _scans(model: TrainedModel) -> str:
    fingerprint = model.folder / "dataset_fingerprint.json"
    configuration = model.manager.get_configuration(model.configuration)
    spacing, patch = (_times(values) for values in (configuration.spacing, configuration.patch_size))
    lines = []
    if fingerprint.is_file():
        spacings = np.asarray(read_json(fingerprint).get("spacings", []), dtype=float)
        if spacings.ndim == 2 and len(spacings):
            ends = dict.fromkeys((_times(spacings.min(axis=0)), _times(spacings.max(axis=0))))
            lines.append(f"Voxels of the scans: {' to '.join(ends)} mm (Z x Y x X).")
    lines.append(f"The network sees {spacing} mm in patches of {patch} voxels.")
    for channel, scheme in enumerate(configuration.normalization_schemes):
        if scheme == "CTNormalization":
            window = model.manager.foreground_intensity_properties_per_channel[str(channel)]
            low, high = window["percentile_00_5"], window["percentile_99_5"]
            lines.append(f"Intensities are clipped to {low:g} to {high:g} HU.")
    return " ".join(lines)


def _scored(model: TrainedModel) -> dict[str, str]:
    """Names of the labels and regions by nnU-Net's key in a summary."""
    names = {_key(value): name for name, value in model.dataset_json["labels"].items()}
    keys = dict.fromkeys(key for fold in model.folds for key in (fold.validation or {}).get("mean", {}))
    return {key: names.get(_key(key), key) for key in keys}


def _key(label: Any) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", str(label))))


def _dice(model: TrainedModel) -> list[list[str]]:
    rows = []
    for fold in model.folds:
        summary = fold.validation or {}
        mean = summary.get("mean", {})
        cases = str(len(summary.get("metric_per_case", ()))) if summary else "not validated"
        dice = [_percent(mean.get(key, {}).get("Dice", math.nan)) for key in _scored(model)]
        planned = model.settings.get("num_epochs")
        epochs = f"{fold.epochs} of {planned}" if planned else str(fold.epochs)
        rows.append([str(fold.name), epochs, cases, *dice])
    return rows


def _remarks(model: TrainedModel) -> Iterable[str]:
    if any(fold.cases and fold.cases.validates_on_training_cases for fold in model.folds):
        yield (
            "**Trained and validated on the same mask**, because there were no others: this Dice says nothing about "
            "other patients."
        )
    if model.checkpoint == "best" and any(fold.validation for fold in model.folds):
        yield (
            "The Dice is that of the final checkpoint, unless the validation was repeated with `--val_best`; the "
            "weights here are those of the best checkpoint."
        )
    watched = [
        [str(fold.name), *(_percent(fold.last_epoch.get(name, math.nan)) for name in WATCHED)]
        for fold in model.folds
        if not set(WATCHED).isdisjoint(fold.last_epoch)
    ]
    if watched:
        held_out = all(fold.cases and fold.cases.val_healthy and fold.cases.val_diseased for fold in model.folds)
        which = "held-out volumes" if held_out else "volumes, of which some or all were trained on"
        organ = model.settings.get("organ", "lungs")
        yield (
            f"At the last epoch of these weights, on {which} without a mask (percent of the {organ}; *called lesion* "
            "is what these weights call so, in healthy volumes all of it false; probabilities are those of training):"
        )
        yield _table(["fold", *WATCHED.values()], watched)


WATCHED = {
    "false_positive_share": "called lesion, healthy",
    "M_healthy": "mean probability, healthy",
    "M_diseased": "mean probability, diseased",
}
"""Columns of our curves and their headings."""


def _limits(model: TrainedModel) -> Iterable[str]:
    yield INTENDED_USE
    masks = {len(fold.cases.train) for fold in model.folds if fold.cases}
    if masks:
        most = max(masks)
        yield (
            f"Voxel masks it learned from: {most}{'' if len(masks) == 1 else ' at most'}. Outlines of lesions that "
            "look unlike those are a guess from diagnoses alone."
            if _uses_volumes(model)
            else f"Voxel masks it learned from: {most}."
        )
    yield (
        f"It knows {', '.join(_labels(model))} and background: what looks alike (other diseases, artefacts, fluid, "
        "tumours) may be marked, and nothing else is looked for."
    )
    yield (
        "Voxel sizes, intensities, body parts and patients unlike those below are untried: look at the masks before "
        "using a number from them."
    )


def _settings(model: TrainedModel) -> str:
    if not model.settings:
        return f"Those of nnU-Net's `{model.trainer}`."
    shown = {
        # A word is a choice; anything longer might name a file of the training machine.
        name: value if not isinstance(value, str) or re.fullmatch(r"\w+", value) else "(left out)"
        for name, value in model.settings.items()
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in shown.items())
    return f"Their meaning is in `gasnet_nnunet/settings.py` of gasnet-nnunet.\n\n```\n{lines}\n```"


def _versions(model: TrainedModel) -> str:
    trained = sorted({fold.torch_version for fold in model.folds if fold.torch_version})
    made = (
        f"Shared on {date.today().isoformat()} by gasnet-nnunet {__version__} with nnunetv2 {version('nnunetv2')}, "
        f"torch {version('torch')}, Python {platform.python_version()}, and found there to predict what the trained "
        "model does."
    )
    return f"{made} Trained with torch {', '.join(trained)}." if trained else made


def _percent(share: float) -> str:
    return "not defined" if math.isnan(share) else f"{100 * share:.2f} %"


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
