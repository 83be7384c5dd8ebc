"""A trained model for machines that have nnU-Net and nothing of ours.

Only S exists at test time, and S is a network that nnU-Net planned: under the name of nnU-Net's own trainer a
checkpoint of ours is one of nnU-Net's. What goes into the archive is listed below. Whatever else lies in a model's
folder (G, D, optimisers, logs, pictures, names of cases, patients, machines and folders) stays at home because it is
not on the list.
"""

from __future__ import annotations

import glob
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from PIL import Image

from gasnet_nnunet.checkpoints import CHECKPOINTS
from gasnet_nnunet.decision import HEADS_KEY
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json, written_whole
from gasnet_nnunet.model_card import model_card
from gasnet_nnunet.trained_model import TrainedFold, TrainedModel, load_predictor
from gasnet_nnunet.volumes import read_volume

STOCK_TRAINER = nnUNetTrainer.__name__
STOCK_PACKAGES = ("nnunetv2", "dynamic_network_architectures", "torch")
"""Packages that a network of a stock nnU-Net may come from."""

PLANS_KEYS = (
    "dataset_name",  # nnU-Net finds the model by it
    "plans_name",
    "original_median_spacing_after_transp",
    "original_median_shape_after_transp",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "experiment_planner_used",
    "label_manager",
    "foreground_intensity_properties_per_channel",
    "foreground_intensity_properties_by_modality",  # what older versions called it
)
"""What stays of plans.json beside the one configuration: what nnU-Net's planner writes and its predictor reads."""
CONFIGURATION_KEYS = (
    "data_identifier",
    "preprocessor_name",
    "batch_size",
    "patch_size",
    "median_image_size_in_voxels",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
    "architecture",
    "batch_dice",
)
"""What stays of the configuration."""
DATASET_KEYS = (
    "channel_names",
    "modality",  # what older versions called it
    "labels",
    "regions_class_order",
    "file_ending",
    "numTraining",
    "overwrite_image_reader_writer",
)
"""What stays of dataset.json: what nnU-Net needs, none of its free text."""
FINGERPRINT_KEYS = ("foreground_intensity_properties_per_channel", "median_relative_size_after_cropping")
FINGERPRINT_LISTS = ("shapes_after_crop", "spacings")
"""Of these, which have an entry a case, the least, median and greatest along each axis stay."""
SUMMARY_KEYS = ("foreground_mean", "mean")
"""What stays of validation/summary.json; the metrics of single cases do not."""

LOGIT_TOLERANCE = 1e-2
"""Least difference of logits that is no rounding of the half precision which nnU-Net adds patches up in."""


@dataclass(frozen=True)
class Comparison:
    """What both models made of one case.

    Args:
        case: Its name, for the user of this machine.
        voxels: Voxels of the mask.
        lesion_voxels: Those that both models call something else than background.
    """

    case: str
    voxels: int
    lesion_voxels: int


@dataclass(frozen=True)
class Exported:
    """An archive that was written.

    Args:
        file: Where it is.
        files: What it holds, by path, in bytes.
        comparison: What both models made of one case.
        command: How to predict with it.
    """

    file: Path
    files: dict[str, int]
    comparison: Comparison
    command: str


class Case:
    """One case to compare models on: images as they were acquired, or one that nnU-Net preprocessed for training."""

    def __init__(self, name: str, *, images: Sequence[Path] = (), preprocessed: Path | None = None) -> None:
        self.name = name
        self.images = [str(path) for path in images]
        self.preprocessed = preprocessed

    def load(self, predictor: nnUNetPredictor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The preprocessed image (C, Z, Y, X) and nnU-Net's record of its preprocessing."""
        if self.preprocessed is not None:
            dataset = infer_dataset_class(str(self.preprocessed))(str(self.preprocessed), [self.name])
            data, _, _, properties = dataset.load_case(self.name)
            return torch.from_numpy(np.asarray(data[:], dtype=np.float32)), dict(properties)
        configuration = predictor.configuration_manager
        data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
            self.images, None, predictor.plans_manager, configuration, predictor.dataset_json
        )
        return torch.from_numpy(data), properties


def export_model(
    model: TrainedModel, output: Path, *, case: Case, device: torch.device, overwrite: bool = False
) -> Exported:
    """Write an archive for `nnUNetv2_install_pretrained_model_from_zip`.

    Args:
        model: The model to share.
        output: The archive, a `.zip`.
        case: Predicted with the model and with what the archive holds; both have to agree in every voxel.
        device: Where to predict it.
        overwrite: Replace an archive that exists.

    Raises:
        UserError: Stock nnU-Net cannot run this model; `output` exists or cannot be written; the models disagree.
    """
    check_output(output, ".zip", overwrite=overwrite)
    check_stock(model)
    command = predict_command(model)
    with written_whole(output) as (temporary,):
        write_archive(model, temporary, model_card(model, command))
        comparison = _compare(model, temporary, case, device)
    with zipfile.ZipFile(output) as archive:
        files = {entry.filename: entry.file_size for entry in archive.infolist()}
    return Exported(output, files, comparison, command)


def check_output(output: Path, ending: str, *, overwrite: bool) -> None:
    """Refuse a file to write that is there already, or has no place.

    Raises:
        UserError: It is.
    """
    if output.suffix != ending:
        raise UserError(f"-o is '{output}'; expected a file name ending in {ending}.")
    if output.is_dir():
        raise UserError(f"{output} is a folder; expected the name of a file to write.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists. Replace it with --overwrite, or name another file with -o.")
    if not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent} to write {output.name} to. Make it, or correct -o.")


def check_stock(model: TrainedModel) -> None:
    """Refuse a model that nnU-Net by itself cannot run.

    Raises:
        UserError: It has a network or a trainer of another package, or is predicted from a previous stage.
    """
    configuration = model.manager.get_configuration(model.configuration)
    if configuration.previous_stage_name is not None:
        raise UserError(
            f"{model.configuration} is predicted from the masks of {configuration.previous_stage_name}, so it cannot "
            "be shared alone. Use nnUNetv2_export_model_to_zip."
        )
    arguments = configuration.network_arch_init_kwargs
    imported = [arguments[name] for name in configuration.network_arch_init_kwargs_req_import if arguments.get(name)]
    for name in [configuration.network_arch_class_name, *map(str, imported)]:
        package = name.split(".")[0]
        if package not in STOCK_PACKAGES:
            raise UserError(
                f"The segmenter of {model.folder} is built from {name}, and a machine with nnU-Net alone does not have "
                f"the package {package}. Share it as ONNX (--onnx -o model.onnx), or as it is "
                f"(nnUNetv2_export_model_to_zip) for machines that have {package}."
            )
    try:
        with _silent():
            trainer = recursive_find_trainer_class_by_name(model.trainer)
    except RuntimeError:
        raise UserError(
            f"nnU-Net does not find {model.trainer}, which trained {model.folder}. gasnet-nnunet doctor says why."
        ) from None
    if trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise UserError(
            f"{model.trainer} builds its network in a way of its own, which {STOCK_TRAINER} does not know. Share it as "
            "ONNX (--onnx -o model.onnx), or with that class by nnUNetv2_export_model_to_zip."
        )


def find_case(model: TrainedModel, images: Sequence[Path] = ()) -> Case:
    """The case to compare on: the given images, or the smallest preprocessed one that the first fold validates on.

    Args:
        model: The model.
        images: Image files of one case, one a channel.

    Raises:
        UserError: An image is missing or broken, their number is wrong, or no preprocessed case is at hand.
    """
    channels = model.dataset_json.get("channel_names", model.dataset_json.get("modality", {}))
    if images:
        if len(images) != len(channels):
            raise UserError(
                f"--case names {len(images)} files; expected one for each of {', '.join(channels.values())}."
            )
        for path in images:
            if not path.is_file():
                raise UserError(f"{path}, named by --case, does not exist.")
            read_volume(path)
        return Case(images[0].name, images=images)
    advice = "Name the image file of a case by --case (one a channel) to compare on that."
    if not nnUNet_preprocessed.is_set():
        raise UserError(
            "Before it writes, this command predicts a case with both models; nnUNet_preprocessed, where it would take "
            f"one from, is not set. Set it. {advice}"
        )
    dataset = Path(nnUNet_preprocessed) / str(model.plans["dataset_name"])
    folder = dataset / model.manager.get_configuration(model.configuration).data_identifier
    sizes: dict[str, int] = {}
    if folder.is_dir():
        for name in infer_dataset_class(str(folder)).get_identifiers(str(folder)):
            sizes[name] = sum(file.stat().st_size for file in folder.glob(f"{glob.escape(name)}.*"))
    if not sizes:
        raise UserError(
            f"Before it writes, this command predicts a case with both models, and {folder} holds no preprocessed one. "
            f"{advice}"
        )
    cases = model.folds[0].cases
    # A case with lesions says more than one without.
    wanted = [case for case in (cases.val if cases else ()) if case in sizes] or list(sizes)
    return Case(min(wanted, key=lambda name: (sizes[name], name)), preprocessed=folder)


def stock_plans(model: TrainedModel) -> dict[str, Any]:
    """plans.json of the shared model: what nnU-Net needs to predict, of the one configuration."""
    # nnU-Net resolves inheritance and formats of older versions.
    configuration = model.manager.get_configuration(model.configuration).configuration
    return {
        **_only(model.plans, PLANS_KEYS),
        "configurations": {model.configuration: _only(configuration, CONFIGURATION_KEYS)},
    }


def stock_checkpoint(fold: TrainedFold, configuration: str, plans: dict[str, Any], dataset: dict[str, Any]) -> Any:
    """checkpoint_final.pth of the shared model: S under the name of nnU-Net's trainer.

    It holds tensors, numbers and strings alone, so that `torch.load(..., weights_only=True)` reads it.
    """
    return {
        "network_weights": fold.weights,
        HEADS_KEY: fold.head_biases,
        "trainer_name": STOCK_TRAINER,
        "inference_allowed_mirroring_axes": fold.mirroring_axes,
        "current_epoch": fold.epochs,
        "init_args": {
            "plans": plans,
            "configuration": configuration,
            "fold": fold.name,
            "dataset_json": dataset,
        },
    }


def predict_command(model: TrainedModel) -> str:
    """nnU-Net's command to predict with the shared model once it is installed."""
    plans = model.plans
    folds = " ".join(str(fold.name) for fold in model.folds)
    return (
        f"nnUNetv2_predict -d {plans['dataset_name']} -p {plans['plans_name']} -c {model.configuration} -f {folds} "
        "-i NEW_CTS -o OUT"
    )


def write_archive(model: TrainedModel, path: Path, card: str) -> None:
    """Write the model as nnU-Net's installer extracts it, below nnUNet_results.

    Raises:
        UserError: It cannot be written, e.g. because the disk is full.
    """
    plans, dataset = stock_plans(model), _only(model.dataset_json, DATASET_KEYS)
    root = f"{plans['dataset_name']}/{STOCK_TRAINER}__{plans['plans_name']}__{model.configuration}"
    fingerprint = model.folder / "dataset_fingerprint.json"
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{root}/README.md", card)
            archive.writestr(f"{root}/plans.json", _json(plans))
            archive.writestr(f"{root}/dataset.json", _json(dataset))
            if fingerprint.is_file():
                archive.writestr(f"{root}/{fingerprint.name}", _json(_anonymous_fingerprint(read_json(fingerprint))))
            for fold in model.folds:
                place = f"{root}/fold_{fold.name}"
                checkpoint = stock_checkpoint(fold, model.configuration, plans, dataset)
                with archive.open(f"{place}/{CHECKPOINTS['final']}", "w", force_zip64=True) as file:
                    torch.save(checkpoint, file)
                # nnU-Net validates the final checkpoint: its numbers would pass for those of the best one.
                if fold.validation is not None and model.checkpoint == "final":
                    summary = {**_only(fold.validation, SUMMARY_KEYS), "metric_per_case": []}
                    archive.writestr(f"{place}/validation/summary.json", _json(summary))
                curves = _drawn_again(fold.folder / "progress.png")
                if curves is not None:
                    archive.writestr(f"{place}/progress.png", curves)
    # A full disk is an OSError or, from torch's own writer, a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The archive could not be written to {path.parent}: {reason}. Make room there or name another place "
            "with -o."
        ) from None


def _compare(model: TrainedModel, archive: Path, case: Case, device: torch.device) -> Comparison:
    """Install the archive in a folder of its own and predict the case with both models.

    Raises:
        UserError: The archive cannot be read back, or a voxel differs.
    """
    mask, logits = _predict(model.predictor(device), case, device)
    folder = Path(tempfile.mkdtemp(prefix=f".{archive.stem}.", dir=archive.parent))
    try:
        with zipfile.ZipFile(archive) as stored:
            stored.extractall(folder)
        (installed,) = folder.glob(f"*/{STOCK_TRAINER}__*")
        for path in installed.glob("fold_*/*.pth"):
            torch.load(path, map_location="cpu", weights_only=True)
        predictor = load_predictor(installed, [fold.name for fold in model.folds], CHECKPOINTS["final"], device)
        stock_mask, stock_logits = _predict(predictor, case, device)
    except OSError as error:
        raise UserError(
            f"{archive.parent} has no room to try the archive: {error.strerror}. Make room there or name another place "
            "with -o."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    differing = int((mask != stock_mask).sum())
    if differing or not np.allclose(logits, stock_logits, rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE):
        raise UserError(
            f"Nothing was written: {case.name} predicted with {model.folder} and with what was to be shared differs in "
            f"{differing} of {mask.size} voxels of the mask, and by up to {np.abs(logits - stock_logits).max():.3g} in "
            "the logits. On a GPU try --device cpu, which computes alike every time; if that differs too, "
            f"{model.trainer} predicts in a way that {STOCK_TRAINER} does not know."
        )
    return Comparison(case.name, mask.size, int((mask > 0).sum()))


def _predict(predictor: nnUNetPredictor, case: Case, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Mask in the case's own grid (Z, Y, X) and logits (K, Z, Y, X) in that of the plans."""
    with _silent():
        data, properties = case.load(predictor)
        # nnU-Net lets cuDNN choose its algorithms by their speed, each time anew.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            logits = predictor.predict_logits_from_preprocessed_data(data).cpu()
        mask = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, properties
        )
    return np.asarray(mask), logits.float().numpy()


@contextmanager
def _silent() -> Iterator[None]:
    with redirect_stdout(io.StringIO()):
        yield


def _only(content: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: deepcopy(content[key]) for key in keys if key in content}


def _json(content: Any) -> str:
    return json.dumps(content, indent=4) + "\n"


def _anonymous_fingerprint(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    kept = _only(fingerprint, FINGERPRINT_KEYS)
    for name in FINGERPRINT_LISTS:
        rows = np.asarray(fingerprint.get(name, []))
        if rows.ndim == 2 and len(rows):
            kept[name] = [rows.min(axis=0).tolist(), np.median(rows, axis=0).tolist(), rows.max(axis=0).tolist()]
    return kept


def _drawn_again(path: Path) -> bytes | None:
    """A picture without whatever else its file holds; `None` where it cannot be read."""
    try:
        with Image.open(path) as picture:
            stream = io.BytesIO()
            Image.fromarray(np.asarray(picture.convert("RGB"))).save(stream, "PNG")
    except OSError:
        return None
    return stream.getvalue()
