"""The trainers in this process, on preprocessed phantoms: what they learn, report, save and restore.

nnU-Net's own commands are run in `nnunet_contract`.
"""

from __future__ import annotations

import copy
import errno
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_dataset
import torch
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from matplotlib.image import imread
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from gasnet_nnunet.decision import HEADS_KEY, called_lesion, weights_in_training
from gasnet_nnunet.losses import lesion_logit
from gasnet_nnunet.phantom import Phantom
from gasnet_nnunet.selection import BestEpoch
from gasnet_nnunet.settings import NOT_YET, GASNetSettings, parse_assignments
from gasnet_nnunet.steps import STEP_COLUMNS
from gasnet_nnunet.trainers import CHECKPOINT_KEY, GASNetTrainer, SupervisedBaselineTrainer

DATASET = "Dataset501_Tiny"
CPU = torch.device("cpu")
NNUNET_KEYS = {
    *("network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch", "init_args"),
    *("trainer_name", "inference_allowed_mirroring_axes"),
}
EPOCH_COLUMNS = (
    "M_healthy",
    "M_diseased",
    "false_positive_share",
    "pseudo_dice",
    "score",
    "lr_S",
    "loss_scale",
    "seconds",
)


# Datasets -------------------------------------------------------------------------------------------------------------


def halves(name: str, phantom: Phantom) -> np.ndarray:
    """Lesions are 1 on one side of the body and 2 on the other; diseased patients are ignored (3)."""
    if name.startswith("diseased"):
        return np.full_like(phantom.lesion, 3)
    label = phantom.lesion.copy()
    label[..., label.shape[-1] // 2 :] *= 2
    return label


def half_ignored(name: str, phantom: Phantom) -> np.ndarray:
    label = tiny_dataset.mask_by_kind(name, phantom).copy()
    if name == "labelled_0":
        # The half with less lesion, or nothing might be left of it.
        half = len(label) // 2
        label[slice(None, half) if label[:half].sum() < label[half:].sum() else slice(half, None)] = 2
    return label


def ignored_healthy(name: str, phantom: Phantom) -> np.ndarray:
    label = tiny_dataset.mask_by_kind(name, phantom)
    return np.full_like(label, 2) if name == "healthy_0" else label


@dataclass(frozen=True)
class Layout:
    """How a dataset is labelled."""

    labels: Mapping[str, Any] = field(default_factory=lambda: tiny_dataset.DATASET_JSON["labels"])
    mask: Callable[[str, Phantom], np.ndarray] = tiny_dataset.mask_by_kind
    channels: tuple[str, ...] = ("CT",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    splits: Any = None
    cases: tuple[int, int, int] = (2, 2, 3)

    @property
    def dataset_json(self) -> dict[str, Any]:
        channel_names = {str(number): name for number, name in enumerate(self.channels)}
        return {"channel_names": channel_names, "labels": self.labels, "file_ending": ".nii.gz", **self.extra}


REGIONS = {"labels": {"background": 0, "lesion": [1, 2], "left": 2}, "extra": {"regions_class_order": [1, 2]}}
HIDDEN = [
    {
        "train": ["labelled_0"],
        "val": ["labelled_1"],
        "diseased": ["diseased_0", "diseased_1"],
        "healthy": ["healthy_0", "healthy_1"],
    }
]
LAYOUTS = {
    "one class": Layout(),
    "one mask": Layout(cases=(1, 2, 3)),
    "masks and healthy cases alone": Layout(cases=(2, 0, 3)),
    "two classes": Layout({"background": 0, "right": 1, "left": 2, "ignore": 3}, halves),
    "regions": Layout({**REGIONS["labels"], "ignore": 3}, halves, extra=REGIONS["extra"]),
    "no ignore label": Layout({"background": 0, "lesion": 1}, lambda _, p: p.lesion, splits=HIDDEN),
    "regions without ignore label": Layout(
        REGIONS["labels"], lambda _, p: halves("", p), extra=REGIONS["extra"], splits=HIDDEN
    ),
    "partly ignored mask": Layout(mask=half_ignored),
    "overruled": Layout(mask=ignored_healthy, extra={"gasnet": {"cohort": {"healthy_0": "healthy"}}}),
    "two channels, no CT": Layout(channels=("T1", "T2"), settings={"organ": "volume"}),
}

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes each dataset once; the folder that holds its `raw` and `preprocessed`."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            root, layout = tmp_path_factory.mktemp("dataset"), LAYOUTS[name]
            raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
            cases = tiny_dataset.names(*layout.cases)
            tiny_dataset.write_raw(raw, cases, mask=layout.mask, dataset_json=layout.dataset_json)
            ct = layout.channels == ("CT",)
            plans = tiny_dataset.plans(DATASET, channels=len(layout.channels), ct=ct)
            tiny_dataset.preprocess(raw, preprocessed, plans)
            if layout.splits is not None:
                (preprocessed / "splits_final.json").write_text(json.dumps(layout.splits))
            made[name] = root
        return made[name]

    return make


def use_folders(environment: pytest.MonkeyPatch, root: Path, results: Path) -> None:
    """Point nnU-Net to a dataset, and load data in this process."""
    for folder in ("raw", "preprocessed"):
        environment.setenv(f"nnUNet_{folder}", str(root / folder))
    environment.setenv("nnUNet_results", str(results))
    environment.setenv("nnUNet_n_proc_DA", "0")


def build(
    root: Path,
    layout: str,
    trainer_class: type[nnUNetTrainer] = GASNetTrainer,
    *,
    fold: int | str = 0,
    continue_training: bool = False,
    **settings: Any,
) -> Any:
    """A trainer as nnU-Net's `get_trainer_from_args` makes it."""
    preprocessed = root / "preprocessed" / DATASET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["gasnet"].update(LAYOUTS[layout].settings, **settings)
    plans["continue_training"] = continue_training
    dataset_json = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
    return trainer_class(plans, "3d_fullres", fold, dataset_json, CPU)  # type: ignore[arg-type]


@pytest.fixture
def make(datasets: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Trainers that write to a folder of this test's own."""

    def make(layout: str = "one class", *arguments: Any, **options: Any) -> Any:
        root = datasets(layout)
        use_folders(monkeypatch, root, tmp_path / "results")
        return build(root, layout, *arguments, **options)

    return make


def run_epoch(trainer: Any) -> list[dict[str, float]]:
    """nnU-Net's `run_training` for an epoch, without the figures and checkpoints at its end."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    return outputs


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equality of nested states, tensors included."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert one == other, where


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text(encoding="utf-8")


# What it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_labelling_trains(layout: str, make: Make, tmp_path: Path) -> None:
    trainer = make(layout, pseudo_start=0.0, weight_suspicion=0.05)
    trainer.on_train_start()
    before = weights(trainer.network)
    outputs = run_epoch(trainer)
    assert all(tuple(output) == ("loss", *STEP_COLUMNS) for output in outputs)
    assert np.isfinite([list(output.values()) for output in outputs]).all()
    assert not torch.equal(before, weights(trainer.network))
    assert not math.isnan(trainer.logger.get_value("mean_fg_dice", step=-1))
    trainer.watch.draw_gallery(tmp_path / "gallery.png", pseudo_on=True, aspect=1.0)
    assert imread(tmp_path / "gallery.png").std() > 0.05


def test_masks_that_the_split_hides_are_never_learnt_from(make: Make) -> None:
    trainer = make("no ignore label")
    trainer.on_train_start()
    batches = [next(trainer.dataloader_train) for _ in range(5)]
    assert {key for batch in batches for key in batch["keys"]} == {"labelled_0"}
    pairs = [next(trainer._pairs) for _ in range(10)]
    assert {d for batch in pairs for d, _ in batch["keys"]} == {"diseased_0", "diseased_1", "labelled_0"}
    assert {h for batch in pairs for _, h in batch["keys"]} == {"healthy_0", "healthy_1"}


@pytest.mark.parametrize("layout", ["no ignore label", "regions without ignore label"])
def test_unsure_voxels_are_ignored_where_the_dataset_has_no_ignore_label(layout: str, make: Make) -> None:
    trainer = make(layout)
    trainer.initialize()
    task = trainer.gasnet_step.task
    heads = trainer.label_manager.num_segmentation_heads
    unsure = torch.zeros(1, heads + 1 if task.regions else 1, 4, 4, 4)
    unsure[:, -1, :2] = 1 if task.regions else task.ignore_label
    logits = torch.randn(1, heads, 4, 4, 4)
    changed = logits.clone()
    changed[:, -1, :2] += 5
    loss = task.loss_pseudo.loss
    assert loss(logits, unsure).item() == pytest.approx(loss(changed, unsure).item())
    assert loss(logits, 0 * unsure).item() != pytest.approx(loss(changed, 0 * unsure).item())


def test_folds_hold_out_one_mask_each(make: Make) -> None:
    folds = [make(fold=fold).do_split() for fold in (0, 1)]
    assert sorted(fold[1] for fold in folds) == [["labelled_0"], ["labelled_1"]]
    assert all(not set(train) & set(val) for train, val in folds)
    assert make(fold="all").do_split() == (["labelled_0", "labelled_1"],) * 2


def test_overruled_patient_is_healthy(make: Make) -> None:
    trainer = make("overruled")
    trainer.on_train_start()
    assert "healthy_0 is healthy because dataset.json says so" in log_of(trainer)
    assert "healthy_0" in (*trainer._cases.healthy, *trainer._cases.val_healthy)


def test_window_of_other_modalities_is_measured_and_kept(make: Make) -> None:
    trainer = make("two channels, no CT")
    trainer.initialize()
    window = trainer.settings.window
    assert len(window) == 2
    assert all(low < 0 < high for low, high in window)
    plans = trainer.my_init_kwargs["plans"]
    assert plans["configurations"]["3d_fullres"]["gasnet"]["window"] == [list(ends) for ends in window]


@pytest.mark.parametrize(("patches", "pairs"), [("bag", 4), ("volume", 2)])
def test_patches_are_a_bag_or_volumes(patches: str, pairs: int, make: Make) -> None:
    trainer = make(patches=patches, bag_size=4, volumes_per_step=2)
    trainer.on_train_start()
    batch = next(trainer._pairs)
    assert batch["diseased"].shape == (pairs, 1, *tiny_dataset.PATCH)
    assert len({diseased for diseased, _ in batch["keys"]}) == (1 if patches == "bag" else 2)
    assert np.isfinite(run_epoch(trainer)[0]["L_MIL"])


def test_masked_normalisation_reaches_every_healthy_patch(make: Make) -> None:
    trainer = make()
    trainer.configuration_manager.configuration["use_mask_for_norm"] = [True]
    trainer.on_train_start()
    transforms = trainer._background.data_loader.transforms.transforms
    assert any(isinstance(transform, MaskImageTransform) for transform in transforms)


def test_plans_of_nnunet_are_trained_with_bags(make: Make) -> None:
    assert make(patches="auto").settings.patches == "bag"


# Settings -------------------------------------------------------------------------------------------------------------

ON = {"L_lab", "L_hea", "L_adv", "L_D_healthy", "L_D_restored", "D_healthy", "D_restored"}
ADDED = {
    "+ recons": {"L_recons"},
    "+ IgToD": {"L_IgToD", "L_D_generated", "D_generated"},
    "+ IdToD": {"L_D_diseased", "D_diseased"},
    "+ MIL": {"L_MIL"},
    "+ ps": {"L_ps"},
}


def documented_ablations() -> dict[str, list[str]]:
    """The rows of the table in docs/train.md."""
    text = (Path(__file__).parents[1] / "docs" / "train.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (none|\+ \w+) \| (?:`(.*)`|\(all on\)) \|$", text, flags=re.MULTILINE)
    return {name: words.split() for name, words in rows}


@pytest.mark.parametrize("row", ["none", *ADDED])
def test_every_documented_ablation_trains_its_terms_alone(row: str, make: Make) -> None:
    rows = documented_ablations()
    assert list(rows) == ["none", *ADDED]
    trainer = make(pseudo_start=0.0, weight_outside=0.0, **parse_assignments(rows[row]))
    trainer.on_train_start()
    report = run_epoch(trainer)[-1]
    wanted = ON.union(*(ADDED[name] for name in list(rows)[1 : list(rows).index(row) + 1]))
    assert {name for name in STEP_COLUMNS if not math.isnan(report[name])} == wanted


def test_what_is_near_the_lungs_is_told_in_mm(make: Make) -> None:
    trainer = make(outside_margin_mm=12.0)
    spacing = trainer.configuration_manager.spacing
    assert trainer._outside_margin() == [round(12.0 / mm) for mm in spacing]
    assert make(weight_outside=0.0)._outside_margin() is None


@pytest.mark.parametrize(
    ("weights", "generator", "discriminator"),
    [
        ({"weight_adversarial": 0.0, "weight_generated": 0.0}, True, False),
        ({"weight_adversarial": 0.0, "weight_generated": 0.0, "weight_reconstruction": 0.0}, False, False),
        ({"weight_reconstruction": 0.0, "weight_generated": 0.0}, True, True),
    ],
)
def test_networks_without_a_use_are_not_built(
    weights: dict[str, float], generator: bool, discriminator: bool, make: Make
) -> None:
    trainer = make(**weights)
    trainer.on_train_start()
    assert (trainer.adversary.generator is not None) == generator
    assert (trainer.adversary.discriminator is not None) == discriminator
    report = run_epoch(trainer)[-1]
    assert math.isnan(report["L_D_healthy"]) == (not discriminator)
    assert math.isnan(report["L_recons"]) == (not generator or not trainer.settings.weight_reconstruction)


def test_step_reports_the_same_names_before_and_after_pseudo_labels(make: Make) -> None:
    trainer = make(num_epochs=1, iterations_per_epoch=2, pseudo_start=0.5, weight_suspicion=0.05)
    trainer.on_train_start()
    early, late = run_epoch(trainer)
    assert list(early) == list(late) == ["loss", *STEP_COLUMNS]
    assert math.isnan(early["L_ps"])
    assert math.isfinite(late["L_ps"])
    assert {name for name in early if math.isnan(early[name])} == {"L_ps"}


def test_optimizer_and_loss_follow_the_settings(make: Make) -> None:
    trainer = make(optimizer_s="adam", learning_rate_s=1e-4, segmentation_loss="ce", num_epochs=2)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    trainer.lr_scheduler.step(1)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.5**0.9)
    logits, target = torch.randn(1, 2, 4, 4, 4), torch.randint(0, 2, (1, 1, 4, 4, 4)).float()
    expected = torch.nn.functional.cross_entropy(logits, target[:, 0].long())
    assert trainer.loss.loss(logits, target).item() == pytest.approx(expected.item())


def test_seed_fixes_patches_and_weights(make: Make) -> None:
    runs = []
    for seed in (1, 1, 2):
        trainer = make(seed=seed, pseudo_start=0.0, weight_suspicion=0.05)
        trainer.on_train_start()
        outputs = [list(output.values()) for output in run_epoch(trainer)]
        columns = [trainer._extra_columns[name] for name in ("pseudo_dice", "M_healthy", "M_diseased", "score")]
        state = trainer.adversary.state_dict()
        runs.append((outputs, columns, dict(trainer.network.state_dict()), state["generator"], state["discriminator"]))
    assert_same(runs[0], runs[1])
    assert runs[0][0] != runs[2][0]
    assert not torch.equal(*(next(iter(run[2].values())) for run in (runs[0], runs[2])))


def test_training_without_mirroring_predicts(make: Make) -> None:
    trainer = make(mirror_axes=[])
    trainer.on_train_start()
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "GASNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, *tiny_dataset.SIZE))
    assert logits.shape == (2, *tiny_dataset.SIZE)


# The baseline ---------------------------------------------------------------------------------------------------------


def test_baseline_steps_are_those_of_nnunet(make: Make) -> None:
    baseline = make(trainer_class=SupervisedBaselineTrainer)
    assert baseline.settings.lesion_threshold == 0.5
    baseline.on_train_start()
    vanilla = make(trainer_class=nnUNetTrainer)
    vanilla.initialize()
    vanilla.set_deep_supervision_enabled(True)
    vanilla.network.load_state_dict(baseline.network.state_dict())
    for _ in range(3):
        batch = next(baseline.dataloader_train)
        losses = [float(trainer.train_step(copy.deepcopy(batch))["loss"]) for trainer in (baseline, vanilla)]
        assert losses[0] == losses[1]
    assert torch.equal(weights(baseline.network), weights(vanilla.network))


@pytest.mark.parametrize("healthy", [False, True])
def test_baseline_learns_from_healthy_volumes_only_if_asked(healthy: bool, make: Make) -> None:
    trainer = make(trainer_class=SupervisedBaselineTrainer, baseline_healthy=healthy)
    trainer.on_train_start()
    report = run_epoch(trainer)[-1]
    on = {"L_lab", "L_hea"} if healthy else {"L_lab"}
    assert {name for name in STEP_COLUMNS if not math.isnan(report[name])} == on
    assert (trainer._pairs is not None) == healthy
    assert trainer.adversary.state_dict() == {}


def test_nothing_is_learnt_before_the_only_term_joins(make: Make) -> None:
    others = (
        "labelled",
        "healthy",
        "mil",
        "outside",
        "adversarial",
        "generated",
        "diseased",
        "reconstruction",
    )
    trainer = make(pseudo_start=1.0, **{f"weight_{name}": 0.0 for name in others})
    trainer.on_train_start()
    assert trainer._pasted is None
    before = copy.deepcopy(trainer.network.state_dict())
    assert all(math.isnan(run_epoch(trainer)[-1][name]) for name in STEP_COLUMNS)
    assert all(torch.equal(before[name], value) for name, value in trainer.network.state_dict().items())


def test_pseudo_labels_leave_out_what_cannot_be_seen(make: Make) -> None:
    trainer = make()
    trainer.initialize()
    step, low = trainer.gasnet_step, trainer.window.low.view(1, -1, 1, 1, 1)
    dense, plain = (0, slice(None), slice(3, 6), slice(4, 10), slice(4, 10)), (0, slice(None), slice(3, 6), 20, 20)
    diseased = torch.zeros(1, 1, 12, 32, 32) + low + 0.2
    diseased[dense] += 1.0
    logits = torch.zeros(1, 2, 12, 32, 32)
    logits[:, 0] = 6.0
    for place in (dense, plain):
        logits[(0, slice(1, 2), *place[2:])] = 12.0
    lungs = torch.ones(1, 1, 12, 32, 32)
    pair = {"diseased": diseased, "healthy": diseased - 0.1, "lungs": lungs, "lungs_diseased": lungs}
    image, label = step.pseudo_labelled(pair, logits)
    assert (label[dense] == 1).all()
    assert (label[plain] == 0).all()
    torch.testing.assert_close(image[plain], pair["healthy"][plain])
    step.settings = step.settings.replace(pseudo_contrast=0.0)
    image, label = step.pseudo_labelled(pair, logits)
    assert (label[dense] == 1).all()
    assert (label[plain] == 1).all()
    assert (image[plain] > pair["healthy"][plain]).all()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_several_gpus_are_refused_in_one_sentence(make: Make, tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit, match=r"^Error: GASNetTrainer trains on one GPU .* without -num_gpus\.$"):
            make()
    finally:
        distributed.destroy_process_group()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [32, 32]}, "'3d_fullres' is not one; use 3d_fullres or 3d_lowres"),
        ({"previous_stage": "3d_lowres"}, "'3d_fullres' is not one; use 3d_fullres or 3d_lowres"),
        ({"gasnet": {"lamda_s": 3}}, r"Unknown setting 'lamda_s' .*Did you mean 'lambda_s'\? Valid settings: num_epo"),
        ({"gasnet": {"bag_size": "many"}}, "Impossible setting .*bag_size"),
        ({"gasnet": {"window": [[0, 1], [0, 2]]}}, "window in .* has bounds for 2 channels, but the data have 1"),
        ({"gasnet": [1]}, "names and values in braces"),
    ],
)
def test_impossible_plans_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, datasets: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    use_folders(monkeypatch, datasets("one class"), tmp_path / "results")
    plans = {**tiny_dataset.plans(DATASET), "continue_training": False}
    plans["configurations"]["3d_fullres"].update(changes)
    with pytest.raises(SystemExit, match=message) as caught:
        GASNetTrainer(plans, "3d_fullres", 0, tiny_dataset.DATASET_JSON, CPU)
    assert str(caught.value).startswith("Error: ")
    assert not (tmp_path / "results").exists()


# A whole training -----------------------------------------------------------------------------------------------------


class RecordingLogger:
    """An external logger of nnU-Net, like its one for Weights & Biases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, list[tuple[int, Any]]] = {}
        self.resumable: list[int] = []

    def update_config(self, config: dict[str, Any]) -> None:
        pass

    def log(self, key: str, value: Any, step: int) -> None:
        self.values.setdefault(key, []).append((step, value))
        if key == "gasnet/score":
            latest = self.folder / "checkpoint_latest.pth"
            found = torch.load(latest, weights_only=False)["current_epoch"] if latest.exists() else 0
            self.resumable.append(found)

    def log_summary(self, key: str, value: Any) -> None:
        pass


@dataclass
class Finished:
    """A training that went through, and what it left."""

    root: Path
    trainer: Any
    folder: Path
    logger: RecordingLogger

    @property
    def curves(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "gasnet_progress.csv")

    def checkpoint(self, name: str) -> dict[str, Any]:
        return dict(torch.load(self.folder / f"checkpoint_{name}.pth", weights_only=False))


@pytest.fixture(scope="module")
def finished(datasets: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Three epochs, with a gallery and a `checkpoint_latest` after each."""
    root, results = datasets("one class"), tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as environment:
        use_folders(environment, root, results)
        options = {"gallery_every_epochs": 1, "save_every_minutes": 1e-6, "weight_suspicion": 0.05}
        trainer = build(root, "one class", averaged_iterations=4, **options)
        folder = Path(trainer.output_folder)
        leftover = folder / ".checkpoint_best.pth.tmp"
        leftover.write_bytes(b"half a checkpoint")
        logger = RecordingLogger(folder)
        trainer.logger.loggers.append(logger)
        trainer.run_training()
        yield Finished(root, trainer, folder, logger)


def test_curves_hold_every_epoch(finished: Finished) -> None:
    curves = finished.curves
    assert curves["epoch"].tolist() == [0, 1, 2]
    assert set(curves.columns) == {"epoch", *STEP_COLUMNS, *EPOCH_COLUMNS}
    assert curves.drop(columns=["L_ps", "loss_scale"]).notna().all().all()
    assert curves["loss_scale"].isna().all(), "of cuda alone"
    assert curves["L_ps"].notna().tolist() == [False, True, True]
    assert curves["lr_S"].tolist() == pytest.approx([0.01 * (1 - epoch / 3) ** 0.9 for epoch in range(3)])
    log = log_of(finished.trainer)
    assert all(log.count(f"{name} ") >= 3 for name in ("L_lab", "L_MIL", "D_restored", "M_healthy"))


def test_figures_show_something(finished: Finished) -> None:
    galleries = sorted(path.name for path in (finished.folder / "gasnet_gallery").iterdir())
    assert galleries == ["epoch_0000.png", "epoch_0001.png", "epoch_0002.png"]
    pictures = [imread(finished.folder / "gasnet_gallery" / name) for name in galleries]
    for picture in (imread(finished.folder / "gasnet_progress.png"), *pictures):
        assert picture.shape[0] > 100
        assert picture[..., :3].std() > 0.05
    assert pictures[0].shape != pictures[1].shape or not np.array_equal(pictures[0], pictures[1])
    assert (finished.folder / "progress.png").stat().st_size > 1000


def test_external_loggers_receive_every_value(finished: Finished) -> None:
    curves = finished.curves.set_index("epoch")
    ours = {key.removeprefix("gasnet/"): values for key, values in finished.logger.values.items() if "gasnet/" in key}
    assert set(ours) == set(curves.columns)
    for name, values in ours.items():
        assert [step for step, _ in values] == [0, 1, 2]
        assert [value for _, value in values] == pytest.approx(curves[name].tolist(), nan_ok=True)
    assert "train_losses" in finished.logger.values


def test_debug_information_is_written(finished: Finished) -> None:
    debug = json.loads((finished.folder / "debug.json").read_text(encoding="utf-8"))
    assert debug["settings"].startswith("GASNetSettings(num_epochs=3")
    assert "generator" in debug["adversary"]


def test_latest_checkpoint_is_never_put_off_by_a_better_one(finished: Finished) -> None:
    """The values of an epoch are logged before its checkpoints: what `--c` would find then is the epoch before."""
    assert finished.logger.resumable == [0, 1, 2]


def test_best_checkpoint_is_the_epoch_of_the_best_moving_average(finished: Finished) -> None:
    rule = BestEpoch()
    best = [epoch for epoch, score in enumerate(finished.curves["score"]) if rule.update(score)][-1]
    checkpoint = finished.checkpoint("best")
    assert checkpoint["current_epoch"] == best + 1
    assert checkpoint[CHECKPOINT_KEY]["best_epoch"]["best"] == pytest.approx(rule.best)


def test_checkpoint_holds_nnunets_keys_and_one_of_ours(finished: Finished) -> None:
    checkpoint = finished.checkpoint("final")
    assert set(checkpoint) == {*NNUNET_KEYS, HEADS_KEY, CHECKPOINT_KEY}
    assert checkpoint["current_epoch"] == 3
    assert {len(values) for values in checkpoint["logging"].values()} == {3}
    assert not np.isnan(checkpoint["logging"]["ema_fg_dice"]).any()
    trainer = finished.trainer
    plain = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 2, enable_deep_supervision=True
    )
    plain.load_state_dict(checkpoint["network_weights"], strict=True)
    assert set(checkpoint[CHECKPOINT_KEY]["adversary"]) == {
        *("generator", "optimizer_generator", "discriminator", "optimizer_discriminator", "generator_gradient")
    }
    stored = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["gasnet"]
    assert stored == trainer.settings.to_dict()
    assert (
        json.loads((finished.folder.parent / "plans.json").read_text(encoding="utf-8"))
        == checkpoint["init_args"]["plans"]
    )


def test_nothing_temporary_is_left(finished: Finished) -> None:
    assert sorted(path.name for path in finished.folder.iterdir() if not path.name.startswith("training_log")) == [
        *("checkpoint_best.pth", "checkpoint_final.pth", "debug.json", "gasnet_gallery", "gasnet_progress.csv"),
        *("gasnet_progress.png", "progress.png"),
    ]
    assert not [path for path in finished.root.rglob("*tmp*") if path.is_file()]


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def resume(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A new trainer that has loaded one of the finished training's checkpoints."""

    def resume(name: str = "best", trainer_class: type = GASNetTrainer, **settings: Any) -> Any:
        use_folders(monkeypatch, finished.root, tmp_path)
        trainer = build(finished.root, "one class", trainer_class, continue_training=True, **{"seed": 5, **settings})
        trainer.load_checkpoint(str(finished.folder / f"checkpoint_{name}.pth"))
        return trainer

    return resume


def test_every_state_is_restored(finished: Finished, resume: Make) -> None:
    checkpoint, trainer = finished.checkpoint("final"), resume("final")
    assert trainer.current_epoch == 3
    assert_same(dict(trainer.network.state_dict()), dict(checkpoint[CHECKPOINT_KEY]["segmenter"]))
    average = trainer.gasnet_step.average
    assert_same(dict(average.module.state_dict()), weights_in_training(checkpoint))
    assert average.n_averaged == 6
    assert_same(trainer.optimizer.state_dict(), checkpoint["optimizer_state"])
    assert checkpoint["optimizer_state"]["state"][0]["momentum_buffer"].any()
    assert_same(_plain(trainer.adversary.state_dict()), _plain(checkpoint[CHECKPOINT_KEY]["adversary"]))
    assert checkpoint[CHECKPOINT_KEY]["adversary"]["optimizer_generator"]["state"][0]["step"] == 6
    assert_same(trainer.logger.get_checkpoint(), checkpoint["logging"])
    assert trainer.best_epoch.state_dict() == finished.trainer.best_epoch.state_dict()


def test_the_average_of_s_predicts_and_s_goes_on_training(finished: Finished, resume: Make) -> None:
    checkpoint, trainer = finished.checkpoint("final"), resume("final")
    averaged, current = checkpoint["network_weights"], checkpoint[CHECKPOINT_KEY]["segmenter"]
    assert any(not torch.equal(averaged[name], current[name]) for name in current)
    trainer.on_train_start()
    trainer.on_validation_epoch_start()
    assert_same(dict(trainer.network.state_dict()), dict(averaged))
    trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    assert_same(dict(trainer.network.state_dict()), dict(current))


def test_validation_predicts_by_the_checkpoint_and_leaves_s_alone(
    finished: Finished, resume: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, trainer = finished.checkpoint("final"), resume("final")
    trainer.on_train_start()
    seen = []
    validate = nnUNetTrainer.perform_actual_validation

    def spy(self: Any, save_probabilities: bool = False) -> None:
        seen.append({name: value.clone() for name, value in self.network.state_dict().items()})
        self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_meanwhile.pth"))
        if len(seen) == 1:
            validate(self, save_probabilities)

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", spy)
    for _ in range(2):
        trainer.perform_actual_validation()
        assert_same(seen[-1], dict(checkpoint["network_weights"]))
        assert_same(dict(trainer.network.state_dict()), dict(checkpoint[CHECKPOINT_KEY]["segmenter"]))
        meanwhile = torch.load(Path(trainer.output_folder) / "checkpoint_meanwhile.pth", weights_only=False)
        assert_same(weights_in_training(meanwhile), weights_in_training(checkpoint))
        assert_same(meanwhile[CHECKPOINT_KEY]["segmenter"], checkpoint[CHECKPOINT_KEY]["segmenter"])


@pytest.mark.parametrize("layout", ["one class", "two classes", "regions"])
def test_a_checkpoint_calls_lesion_what_is_above_the_threshold(layout: str, make: Make) -> None:
    trainer = make(layout, lesion_threshold=0.8)
    trainer.on_train_start()
    current = copy.deepcopy(dict(trainer.network.state_dict()))
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    assert_same(dict(trainer.network.state_dict()), current)
    checkpoint = torch.load(path, weights_only=False)
    assert_same(weights_in_training(checkpoint), current)
    image, regions = next(trainer._pairs)["diseased"], layout == "regions"
    with torch.no_grad():
        before = lesion_logit(trainer.network(image)[0], regions=regions)
        trainer.network.load_state_dict(checkpoint["network_weights"])
        after = lesion_logit(trainer.network(image)[0], regions=regions)
    torch.testing.assert_close(after, before - math.log(4), atol=1e-4, rtol=1e-4)
    trainer.load_checkpoint(str(path))
    assert_same(dict(trainer.network.state_dict()), current)


def test_a_network_that_cannot_carry_the_threshold_is_refused(make: Make) -> None:
    trainer = make()
    build_network = trainer.build_network_architecture

    @functools.wraps(build_network)
    def without_biases(*arguments: Any, **options: Any) -> Any:
        network = build_network(*arguments, **options)
        for head in network.decoder.seg_layers:
            head.register_parameter("bias", None)
        return network

    trainer.build_network_architecture = without_biases
    with pytest.raises(SystemExit, match=r"^Error: .* no biases named seg_layers.N.bias .* Set lesion_threshold=0.5"):
        trainer.initialize()


def test_watch_counts_what_the_checkpoint_calls_lesion(make: Make) -> None:
    trainer = make(lesion_threshold=0.5)
    trainer.on_train_start()
    shares = {}
    images, lungs = trainer.watch._read(trainer.watch.healthy[0])
    trainer.network.eval()
    with torch.no_grad():
        logits = torch.cat([trainer.network(image[None])[0] for image in images])
    for threshold in (0.3, 0.5, 0.6):
        trainer.gasnet_step.settings = trainer.settings.replace(lesion_threshold=threshold)
        reading = next(reading for reading in trainer.watch.readings() if reading.case == trainer.watch.healthy[0])
        shares[threshold] = reading.burden
        called = called_lesion(logits, threshold, regions=False)
        assert reading.burden == pytest.approx(float((called * lungs).sum() / lungs.sum()), abs=1e-5)
    assert shares[0.3] > shares[0.5] > shares[0.6]


@pytest.mark.parametrize("layout", ["one class", "two classes", "regions"])
def test_pasted_patches_hold_the_lesions_of_the_masks(layout: str, make: Make) -> None:
    trainer = make(layout)
    trainer.on_train_start()
    targets = [next(trainer._pasted)["target"][0] for _ in range(8)]
    assert {len(target) for target in targets} == {4}  # twice as many as in a batch
    # Density may tell classes apart: a consolidation at half its strength would be ground glass of the wrong class.
    assert trainer.gasnet_step.paste_strength == ((0.7, 1.0) if layout == "one class" else (1.0, 1.0))
    values = {int(value) for target in targets for value in target.unique()}
    assert values == ({0, 1, 2} if layout == "two classes" else {0, 1})


@pytest.mark.parametrize(("share", "seen"), [(0.5, [2, 1]), (2.0, [2, 2, 2])])
def test_pasted_patches_count_like_those_of_the_batch(share: float, seen: list[int], make: Make) -> None:
    trainer = make(pasted_share=share)
    trainer.on_train_start()
    batch, pasted, step = next(trainer.dataloader_train), next(trainer._pasted), trainer.gasnet_step
    step.zero_grad()
    targets = zip(batch["target"], pasted["target"], strict=True)
    together = step.labelled_term(
        (torch.cat([batch["data"], pasted["data"]]), [torch.cat([one, other.to(one.dtype)]) for one, other in targets])
    )
    learning = [parameter for parameter in trainer.network.parameters() if parameter.grad is not None]
    expected = [parameter.grad.clone() for parameter in learning]
    step.zero_grad()
    sizes = []
    hook = trainer.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    report = step.labelled_term(*((each["data"], each["target"]) for each in (batch, pasted)))
    hook.remove()
    assert sizes == seen, "no more at a time than the memory is planned for"
    torch.testing.assert_close(report["L_lab"], together["L_lab"], atol=1e-5, rtol=1e-4)
    for parameter, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def test_an_average_begins_as_s_itself_and_then_follows_it(make: Make) -> None:
    trainer = make(averaged_iterations=1000)
    trainer.on_train_start()
    before = weights(trainer.network)
    run_epoch(trainer)
    after, averaged = weights(trainer.network), weights(trainer.gasnet_step.average)
    # Over as many iterations as there have been, not over a thousand that would keep the first weights.
    assert (averaged - after).norm() < 0.6 * (before - after).norm()


def _plain(states: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(state) if isinstance(state, Mapping) else state for name, state in states.items()}


def test_settings_of_the_checkpoint_win_and_differences_are_logged(resume: Make) -> None:
    trainer = resume(seed=1, lambda_s=7.0, num_epochs=9)
    assert trainer.settings.lambda_s == 100.0
    assert trainer.num_epochs == 3
    assert trainer.gasnet_step.settings is trainer.settings
    line = next(line for line in log_of(trainer).splitlines() if "the checkpoint's win: " in line)
    assert line.split("win: ")[1].strip().split("; ") == [
        "num_epochs: 9 -> 3",
        "save_every_minutes: 10.0 -> 1e-06",
        "gallery_every_epochs: 0 -> 1",
        "lambda_s: 7.0 -> 100.0",
        "weight_suspicion: 0.0 -> 0.05",
        "averaged_iterations: 1 -> 4",
    ]


def test_a_checkpoint_goes_on_without_what_came_after_it(resume: Make, finished: Finished, tmp_path: Path) -> None:
    checkpoint = finished.checkpoint("final")
    entry = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["gasnet"]
    later = ("weight_outside", "pseudo_contrast", "pasted_share", "lesion_threshold")
    assert all(entry.pop(name) > NOT_YET[name] for name in later)
    checkpoint["network_weights"] = weights_in_training(checkpoint)
    del checkpoint[HEADS_KEY]
    older = tmp_path / "older.pth"
    torch.save(checkpoint, older)
    trainer = resume()
    trainer.was_initialized = False
    trainer.load_checkpoint(str(older))
    assert all(getattr(trainer.settings, name) == NOT_YET[name] for name in later)
    assert_same(trainer._prediction_weights(), dict(checkpoint["network_weights"]))


def test_measured_window_is_no_difference(make: Make, tmp_path: Path) -> None:
    first = make("two channels, no CT")
    first.initialize()
    path = tmp_path / "checkpoint.pth"
    first.save_checkpoint(str(path))
    second = make("two channels, no CT", continue_training=True)
    second.load_checkpoint(str(path))
    assert second.settings == first.settings
    assert "checkpoint's win" not in log_of(second)


class OnFaultyDisk(GASNetTrainer):
    fault = errno.ENOSPC

    def on_epoch_end(self) -> None:
        raise OSError(self.fault, os.strerror(self.fault), "progress.png")


def test_full_disk_ends_in_one_sentence_wherever_it_is_met(make: Make) -> None:
    trainer = make(trainer_class=OnFaultyDisk, num_epochs=1)
    with pytest.raises(SystemExit, match=r"^Error: .*fold_0 cannot be written to: No space left.*go on with --c\.$"):
        trainer.run_training()
    trainer.fault = errno.ENOENT
    with pytest.raises(FileNotFoundError):
        trainer.run_training()


class Longer(GASNetTrainer):
    """What people write."""

    def __init__(self, plans, configuration, fold, dataset_json, device=CPU):  # type: ignore[no-untyped-def]
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 7


@pytest.mark.parametrize("num_epochs", [3, 9])
def test_attributes_of_a_subclass_outlive_a_resumption(num_epochs: int, resume: Make) -> None:
    trainer = resume(trainer_class=Longer, num_epochs=num_epochs)
    assert trainer.num_epochs == 7
    trainer.lr_scheduler.step(6)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (1 - 6 / 7) ** 0.9)
    trainer.adversary.start_epoch(6)
    assert trainer.adversary.optimizers["generator"].param_groups[0]["lr"] == pytest.approx(1e-4 * (1 / 7) ** 0.9)


def test_resumed_training_draws_other_patches(resume: Make, finished: Finished) -> None:
    """Repeating the first epochs' patches would learn a seed's few patches by heart."""
    trainer = resume()
    assert torch.initial_seed() == 1 + trainer.current_epoch


@pytest.mark.parametrize("damage", ["truncated", "no checkpoint", "of another trainer", "missing"])
def test_unusable_checkpoints_are_refused_in_one_sentence(damage: str, make: Make, finished: Finished) -> None:
    trainer = make(continue_training=True)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    whole = (finished.folder / "checkpoint_final.pth").read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "no checkpoint":
        torch.save([1, 2], path)
    elif damage == "of another trainer":
        content = finished.checkpoint("final")
        del content[CHECKPOINT_KEY]
        torch.save({**content, "trainer_name": "nnUNetTrainer"}, path)
    message = {
        "truncated": "cannot be read .* truncated",
        "no checkpoint": "is no nnU-Net checkpoint",
        "of another trainer": "holds no GASNet state.*written by nnUNetTrainer.*-pretrained_weights",
        "missing": "cannot be read",
    }[damage]
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(SystemExit, match=f"^Error: .*checkpoint_latest.pth.*{message}") as caught:
        trainer.load_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == before


def test_periodic_checkpoint_of_nnunet_holds_its_own_epoch(make: Make) -> None:
    trainer = make(num_epochs=2, save_every_minutes=1e6)
    trainer.save_every = 1
    trainer.on_train_start()
    run_epoch(trainer)
    trainer.on_epoch_end()
    folder = Path(trainer.output_folder)
    checkpoint = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 1
    assert checkpoint[CHECKPOINT_KEY]["best_epoch"] == trainer.best_epoch.state_dict()
    assert pd.read_csv(folder / "gasnet_progress.csv")["epoch"].tolist() == [0]


def test_pretrained_weights_are_those_of_the_segmenter_without_its_heads(make: Make, finished: Finished) -> None:
    trainer = make(seed=9, averaged_iterations=4)
    trainer.initialize()
    fresh = copy.deepcopy(trainer.network.state_dict())
    load_pretrained_weights(trainer.network, str(finished.folder / "checkpoint_final.pth"))
    pretrained = finished.checkpoint("final")["network_weights"]
    for name, weight in trainer.network.state_dict().items():
        assert torch.equal(weight, (fresh if ".seg_layers." in name else pretrained)[name])
    trainer.on_train_start()
    averaged = trainer.gasnet_step.average.module.state_dict()  # it may teach before the first update
    assert_same(dict(averaged), dict(trainer.network.state_dict()))


# Fine-tuning ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fine_tuned(make: Make, finished: Finished) -> Make:
    """A trainer for another archive, on its way from the finished training's final checkpoint."""

    def build(layout: str = "one mask", *arguments: Any, **options: Any) -> Any:
        return make(layout, *arguments, **{"init_from": str(finished.folder / "checkpoint_final.pth"), **options})

    return build


def test_fine_tuning_starts_from_all_three_networks_with_fresh_optimisers(fine_tuned: Make, finished: Finished) -> None:
    checkpoint, trainer = finished.checkpoint("final"), fine_tuned(seed=5, averaged_iterations=4)
    trainer.on_train_start()
    for network in (trainer.network, trainer.gasnet_step.average.module):
        assert_same(dict(network.state_dict()), weights_in_training(checkpoint))
    for name in ("generator", "discriminator"):
        stored = checkpoint[CHECKPOINT_KEY]["adversary"][name]
        assert_same(dict(getattr(trainer.adversary, name).state_dict()), dict(stored))
    assert trainer.current_epoch == 0
    optimizers = [trainer.optimizer, *trainer.adversary.optimizers.values()]
    assert not any(optimizer.state for optimizer in optimizers)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.initial_lr
    assert trainer.best_epoch.state_dict() == BestEpoch().state_dict()
    assert f"starts from the weights in {finished.folder}" in log_of(trainer)
    assert "data of another kind" not in log_of(trainer)
    loaded = weights(trainer.network)
    outputs = run_epoch(trainer)
    assert np.isfinite([output["L_adv"] for output in outputs]).all()
    assert not torch.equal(weights(trainer.network), loaded)


def test_weights_are_loaded_once(fine_tuned: Make, tmp_path: Path) -> None:
    """A continued training goes on from its own weights, even where the first model is gone."""
    first = fine_tuned()
    first.on_train_start()
    run_epoch(first)
    path = tmp_path / "checkpoint_latest.pth"
    content = first.settings.to_dict()
    first.save_checkpoint(str(path))
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["gasnet"]["init_from"] = "/gone.pth"
    torch.save(checkpoint, path)

    second = fine_tuned(continue_training=True)
    second.load_checkpoint(str(path))
    second.on_train_start()

    assert content["init_from"].endswith("checkpoint_final.pth")
    assert second.current_epoch == 1
    assert torch.equal(weights(second.network), weights(first.network))


def test_baseline_is_fine_tuned_without_g_and_d(fine_tuned: Make, finished: Finished) -> None:
    trainer = fine_tuned("one mask", SupervisedBaselineTrainer)
    trainer.on_train_start()
    assert_same(dict(trainer.network.state_dict()), weights_in_training(finished.checkpoint("final")))
    assert "data of another kind" not in log_of(trainer)


def test_data_of_another_kind_are_warned_of(fine_tuned: Make) -> None:
    trainer = fine_tuned()
    trainer.configuration_manager.configuration["spacing"] = [5.0, 7.0, 7.0]
    trainer.plans_manager.plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = -400.0
    trainer.on_train_start()
    line = next(line for line in log_of(trainer).splitlines() if "data of another kind" in line)
    assert "spacing: [12.5, 7.0, 7.0] -> [5.0, 7.0, 7.0]" in line
    assert '"mean": -450.0' in line


UNFIT = {
    "missing": "init_from names .*origin.pth, which is no file",
    "truncated": "origin.pth cannot be read",
    "of another trainer": "origin.pth holds no generator and no discriminator: it was written by nnUNetTrainer",
    "other labels": r'trained on other outputs.*labels .*"lesion": 1} there, .*"right": 1, "left": 2} here',
    "other channels": r'channel_names \["t1"\] there, \["ct"\] here',
    "other architecture": r"another architecture.*features_per_stage \[4, 8, 16\] there, \[4, 8, 8\] here.*--init-from",
    "other generator": r"The generator in .* is of another size .*\(generator_features: 4 -> 8\)",
}


@pytest.mark.parametrize("fault", UNFIT)
def test_unfit_origin_is_refused_before_any_work(
    fault: str, fine_tuned: Make, finished: Finished, tmp_path: Path
) -> None:
    path = tmp_path / "origin.pth"
    content = finished.checkpoint("final")
    arguments = content["init_args"]
    layout, settings = "one mask", {"init_from": str(path)}
    if fault == "of another trainer":
        del content[CHECKPOINT_KEY]
        content["trainer_name"] = "nnUNetTrainer"
    elif fault == "other labels":
        layout = "two classes"
    elif fault == "other channels":
        arguments["dataset_json"]["channel_names"] = {"0": "T1"}
    elif fault == "other architecture":
        architecture = arguments["plans"]["configurations"]["3d_fullres"]["architecture"]
        architecture["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    elif fault == "other generator":
        settings["generator_features"] = 8
    if fault != "missing":
        torch.save(content, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    trainer = fine_tuned(layout, **settings)
    with pytest.raises(SystemExit, match=f"^Error: .*{UNFIT[fault]}") as caught:
        trainer.on_train_start()
    assert "\n" not in str(caught.value)
    assert trainer._cases is None


# Validation -----------------------------------------------------------------------------------------------------------


def test_pseudo_dice_is_never_nan(make: Make) -> None:
    """One NaN would stay in nnU-Net's moving average for good."""
    trainer = make()
    trainer.on_train_start()

    def validate(epoch: int, tp: float, fp: float) -> None:
        trainer.current_epoch = epoch
        counts = {"tp_hard": np.array([tp]), "fp_hard": np.array([fp]), "fn_hard": np.zeros(1)}
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([{"loss": np.array(0.5), **counts}])

    for epoch, (tp, fp) in enumerate([(0.0, 0.0), (3.0, 2.0), (0.0, 0.0), (0.0, 4.0), (0.0, 0.0)]):
        validate(epoch, tp, fp)
    assert trainer.logger.get_value("mean_fg_dice", None) == pytest.approx([0.0, 0.75, 0.75, 0.0, 0.0])
    assert np.isfinite(trainer.logger.get_value("ema_fg_dice", None)).all()


def test_settings_stand_in_attributes_that_subclasses_may_change(make: Make) -> None:
    trainer = make(iterations_per_epoch=4, validation_iterations_per_epoch=3, learning_rate_s=0.5, weight_decay_s=0.25)
    assert isinstance(trainer.settings, GASNetSettings)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (3, 4, 3)
    assert (trainer.initial_lr, trainer.weight_decay) == (0.5, 0.25)
    assert os.environ["nnUNet_results"] in trainer.output_folder
