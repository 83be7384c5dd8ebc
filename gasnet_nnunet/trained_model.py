"""A trained model as nnU-Net leaves it in nnUNet_results: its plans, its folds and what is on record of their training.

Checkpoints are unpickled by torch as nnU-Net itself does; no other pickle of a model's folder is opened.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from gasnet_nnunet.checkpoints import CHECKPOINTS, predicting_folds, read_checkpoint
from gasnet_nnunet.decision import HEADS_KEY, carried_logit
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import read_json
from gasnet_nnunet.progress import TrainingCurves
from gasnet_nnunet.settings import PLANS_KEY
from gasnet_nnunet.splits import Fold, recorded_cases, trainer_attributes


@dataclass(frozen=True)
class TrainedFold:
    """One fold of a trained model.

    Args:
        name: Its number, or `all`.
        folder: Where it lies.
        weights: Weights of S, nothing else; of its average where S was averaged, because that is what predicts.
        head_biases: Biases of S's heads as training has them, without the threshold; empty where there is none.
        threshold: Probability in training above which `weights` call a voxel lesion.
        mirroring_axes: Axes that nnU-Net mirrors at test time; `None` for none.
        epochs: Epochs that the checkpoint was trained for.
        cases: The cases it was trained on, where the training left a record.
        validation: nnU-Net's `validation/summary.json`, where the validation has run.
        last_epoch: Our curves at the checkpoint's last epoch, by column; empty where there are none.
        torch_version: torch of the training machine, where recorded.
    """

    name: int | str
    folder: Path
    weights: dict[str, torch.Tensor]
    head_biases: dict[str, torch.Tensor]
    threshold: float
    mirroring_axes: tuple[int, ...] | None
    epochs: int
    cases: Fold | None
    validation: dict[str, Any] | None
    last_epoch: dict[str, float]
    torch_version: str | None


@dataclass(frozen=True)
class TrainedModel:
    """A model's folder, read.

    Args:
        folder: `<trainer>__<plans>__<configuration>` in nnUNet_results, or a copy of it.
        plans: Content of `plans.json`.
        dataset_json: Content of `dataset.json`.
        configuration: Name of the trained configuration.
        trainer: Name of the trainer class.
        checkpoint: "final" or "best".
        folds: The folds, by number.
    """

    folder: Path
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    trainer: str
    checkpoint: str
    folds: tuple[TrainedFold, ...]

    @property
    def manager(self) -> PlansManager:
        """nnU-Net's view of the plans."""
        return PlansManager(self.plans)

    @property
    def settings(self) -> dict[str, Any]:
        """GASNet's settings as they were trained with; empty for a model of another trainer."""
        return dict(self.manager.get_configuration(self.configuration).configuration.get(PLANS_KEY, {}))

    def predictor(self, device: torch.device) -> nnUNetPredictor:
        """nnU-Net's predictor with all folds of this model, as `nnUNetv2_predict` makes it.

        Raises:
            UserError: As `load_predictor`.
        """
        return load_predictor(self.folder, [fold.name for fold in self.folds], CHECKPOINTS[self.checkpoint], device)


def find_model_folder(dataset: str, *, trainer: str, plans: str, configuration: str) -> Path:
    """Find a model in nnUNet_results as nnU-Net's `-d`, `-tr`, `-p` and `-c` name it.

    Args:
        dataset: `501` or `Dataset501_Covid`.
        trainer: Name of the trainer class.
        plans: Name of the plans.
        configuration: Name of the configuration.

    Raises:
        UserError: nnUNet_results is not set, or has no such dataset or model.
    """
    if not nnUNet_results.is_set():
        raise UserError("nnUNet_results is not set. Set it (export nnUNet_results=/a/folder), or name the model by -m.")
    results = Path(nnUNet_results)
    datasets = sorted(path.name for path in results.glob("Dataset*_*") if path.is_dir())
    number = int(dataset) if dataset.isdecimal() else None
    found = [name for name in datasets if name == dataset or name[len("Dataset") : name.index("_")] == f"{number:03}"]
    if len(found) != 1:
        raise UserError(
            f"Expected one dataset '{dataset}' with models in {results}, found {', '.join(found) or 'none'}. "
            f"Datasets there: {', '.join(datasets) or 'none'}."
        )
    name = f"{trainer}__{plans}__{configuration}"
    folder = results / found[0] / name
    if not folder.is_dir():
        models = sorted(path.name for path in folder.parent.glob("*__*__*") if path.is_dir())
        raise UserError(
            f"{folder.parent} has no model {name}; it has {', '.join(models) or 'none'}. The parts of a name are for "
            "-tr, -p and -c."
        )
    return folder


def read_model(folder: Path, *, folds: Sequence[str] = (), checkpoint: str = "final") -> TrainedModel:
    """Read a model's folder.

    Args:
        folder: `<trainer>__<plans>__<configuration>`.
        folds: Numbers of the folds, or `all`; every numbered one there is if empty, as nnU-Net takes them.
        checkpoint: "final" or "best".

    Raises:
        UserError: No such folder or fold; a file is missing, broken or truncated; a fold's training has not ended;
            the folds are of different trainings.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"The checkpoint is '{checkpoint}'; expected {' or '.join(CHECKPOINTS)}.")
    chosen = predicting_folds(folder, folds, CHECKPOINTS[checkpoint], unfinished=True)
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    read: list[TrainedFold] = []
    origins: list[tuple[str, str]] = []
    for fold in chosen:
        path = folder / f"fold_{fold}" / CHECKPOINTS[checkpoint]
        content = read_checkpoint(path)
        try:
            origins.append((content["trainer_name"], content["init_args"]["configuration"]))
            read.append(_fold(int(fold) if fold.isdecimal() else fold, path, content))
        except (KeyError, TypeError):
            raise UserError(
                f"{path} lacks what nnU-Net's predictor needs; it is no checkpoint of nnU-Net v2."
            ) from None
        del content
    if len(set(origins)) > 1:
        told = ", ".join(f"{one.folder.name}: {' '.join(origin)}" for one, origin in zip(read, origins, strict=True))
        raise UserError(f"The folds of {folder} are of different trainings ({told}). Name those of one with -f.")
    trainer, configuration = origins[0]
    if configuration not in plans.get("configurations", {}):
        raise UserError(
            f"{folder / 'plans.json'} has no configuration '{configuration}', but {path} was trained on it."
        )
    return TrainedModel(folder, plans, dataset_json, configuration, trainer, checkpoint, tuple(read))


def load_predictor(
    folder: Path,
    folds: Sequence[int | str],
    checkpoint_name: str,
    device: torch.device,
    *,
    step_size: float = 0.5,
    mirroring: bool = True,
) -> nnUNetPredictor:
    """nnU-Net's predictor of a model, with everything that it prints left out.

    Args:
        folder: The model's folder.
        folds: Its folds.
        checkpoint_name: Name of the checkpoint file in each.
        device: Where to predict.
        step_size: Step of the sliding window, in shares of the patch.
        mirroring: Mirror the input along the axes that were trained with.

    Raises:
        UserError: nnU-Net does not find the trainer or the network, or the weights do not fit the plans.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnUNetPredictor(
                tile_step_size=step_size,
                use_mirroring=mirroring,
                device=device,
                perform_everything_on_device=device.type == "cuda",
                allow_tqdm=False,
            )
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint_name)
    # Plans name classes to import, so that whatever these raise comes out here.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"nnU-Net cannot load {folder}: {type(error).__name__}: {reason[:500]}. If the trainer is what is missing, "
            "gasnet-nnunet doctor says why."
        ) from None
    return predictor


def _fold(name: int | str, path: Path, content: dict[str, Any]) -> TrainedFold:
    folder = path.parent
    epochs = int(content["current_epoch"])
    axes = content.get("inference_allowed_mirroring_axes")
    summary = folder / "validation" / "summary.json"
    return TrainedFold(
        name=name,
        folder=folder,
        weights=content["network_weights"],
        head_biases=content.get(HEADS_KEY, {}),
        threshold=1 / (1 + math.exp(-carried_logit(content))),
        mirroring_axes=None if axes is None else tuple(int(axis) for axis in axes),
        epochs=epochs,
        cases=recorded_cases(folder),
        validation=read_json(summary) if summary.is_file() else None,
        last_epoch=_curves(folder, epochs - 1),
        torch_version=trainer_attributes(folder).get("torch_version"),
    )


def _curves(folder: Path, epoch: int) -> dict[str, float]:
    try:
        rows = TrainingCurves(folder).read()
        row = rows[rows["epoch"] == epoch].drop(columns="epoch").dropna(axis="columns")
        return {str(name): float(row[name].iloc[0]) for name in row} if len(row) else {}
    except (KeyError, OSError, ValueError):  # a file cut short by a kill is no reason to stop
        return {}
