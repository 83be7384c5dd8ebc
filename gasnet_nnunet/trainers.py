"""GASNetTrainer: nnU-Net's life cycle with two more networks, and its supervised baseline.

Both are reached by name: `nnUNetv2_train DatasetXXX 3d_fullres 0 -tr GASNetTrainer`. `self.network` is the segmenter S
as nnU-Net planned it and nothing else, so that prediction needs nothing of ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from time import monotonic, time
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch import distributed as dist

from gasnet_nnunet.adversary import Adversary
from gasnet_nnunet.checkpoints import CHECKPOINT_KEY, read_checkpoint, remove_leftovers, write_checkpoint
from gasnet_nnunet.cohort import COHORT_CACHE, Cohort, abbreviate, read_cohort
from gasnet_nnunet.decision import HEADS_KEY, decide_at, head_biases, weights_in_training
from gasnet_nnunet.errors import DISK_FULL, UserError
from gasnet_nnunet.fine_tuning import read_origin
from gasnet_nnunet.intensity import IntensityWindow, measure_window
from gasnet_nnunet.networks import Topology
from gasnet_nnunet.organ_masks import OrganMasks, ensure_organ_masks
from gasnet_nnunet.progress import TrainingCurves
from gasnet_nnunet.sampling import PairLoader, PairTransform, PastedLoader, VolumeReader
from gasnet_nnunet.selection import BestEpoch, epoch_score
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings
from gasnet_nnunet.splits import Fold, make_splits, read_fold, write_splits
from gasnet_nnunet.steps import STEP_COLUMNS, GASNetStep, SegmentationTask, as_numbers, plain_module
from gasnet_nnunet.watch import Watch

ATTRIBUTES = {
    "num_epochs": "num_epochs",
    "num_iterations_per_epoch": "iterations_per_epoch",
    "num_val_iterations_per_epoch": "validation_iterations_per_epoch",
    "initial_lr": "learning_rate_s",
    "weight_decay": "weight_decay_s",
}
"""nnU-Net's attribute for a setting of ours."""


class GASNetTrainer(nnUNetTrainer):
    """Trains nnU-Net's segmenter by GASNet from few voxel-labelled and many volume-labelled cases (Algorithm 1).

    Every number comes from `configurations.<configuration>.gasnet` in the plans, see `GASNetSettings`.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        with _one_sentence():
            self.settings = self._settings_of(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.adversary: Adversary | None = None
        self.gasnet_step: GASNetStep | None = None
        self.watch: Watch | None = None
        self.best_epoch = BestEpoch()
        self._cohort: Cohort | None = None
        self._cases: Fold | None = None
        self._reader: VolumeReader | None = None
        self._pairs: Any = None
        self._background: Any = None
        self._pasted: Any = None
        self._extra_columns: dict[str, float] = {}
        self._held_weights: dict[str, Tensor] | None = None
        self._iterations_done = 0
        self._restored = False
        # Nothing is above infinity: nnU-Net's own rule for checkpoint_best never fires, ours does (selection.py).
        self._best_ema = math.inf
        self._use_settings(self.settings)

    # Settings ---------------------------------------------------------------------------------------------------------

    @classmethod
    def adjust_settings(cls, settings: GASNetSettings) -> GASNetSettings:
        """Settings that this trainer insists on; a hook for presets in subclasses."""
        return settings

    @classmethod
    def _settings_of(cls, plans: dict[str, Any], configuration: str) -> GASNetSettings:
        """Read, resolve and write back the settings of a configuration, so that plans.json and checkpoints hold them.

        Raises:
            UserError: Unknown or impossible settings, or a configuration that GASNet cannot train.
        """
        if dist.is_available() and dist.is_initialized():
            raise UserError(f"{cls.__name__} trains on one GPU for now: run the same command without -num_gpus.")
        name = f"{plans['plans_name']}.json"
        if configuration not in plans["configurations"]:
            raise UserError(
                f"{name} has no configuration '{configuration}'; it has {', '.join(plans['configurations'])}."
            )
        manager = PlansManager(plans).get_configuration(configuration)
        if len(manager.patch_size) != 3 or manager.previous_stage_name is not None:
            raise UserError(
                f"{cls.__name__} trains 3D configurations without a previous stage, and '{configuration}' is not one; "
                "use 3d_fullres or 3d_lowres."
            )
        entry = manager.configuration.get(PLANS_KEY, {})
        settings = GASNetSettings.from_dict(entry, source=f"configurations.{configuration}.{PLANS_KEY} of {name}")
        channels = len(manager.normalization_schemes)
        if settings.window is not None and len(settings.window) != channels:
            raise UserError(
                f"The setting window in {name} has bounds for {len(settings.window)} channels, but the data have "
                f"{channels}. Give each channel its lower and upper end, or null."
            )
        changes: dict[str, Any] = {}
        if settings.patches == "auto":
            changes["patches"] = "bag"
        if settings.volumes_per_step is None:
            changes["volumes_per_step"] = manager.batch_size
        if settings.window is None:
            window = IntensityWindow.from_plans(plans, manager.normalization_schemes)
            changes["window"] = None if window is None else window.bounds
        settings = cls.adjust_settings(settings.replace(**changes))
        plans["configurations"][configuration][PLANS_KEY] = settings.to_dict()
        return settings

    def _use_settings(self, settings: GASNetSettings, *, instead_of: GASNetSettings | None = None) -> None:
        """Hand settings to nnU-Net's plain attributes, which a subclass may change after `__init__`.

        Args:
            settings: From now on.
            instead_of: Settings in use so far; an attribute that a subclass changed is left as it is.
        """
        for attribute, name in ATTRIBUTES.items():
            if instead_of is None or getattr(self, attribute) == getattr(instead_of, name):
                setattr(self, attribute, getattr(settings, name))
        self.settings = settings
        self.plans_manager.plans["configurations"][self.configuration_name][PLANS_KEY] = settings.to_dict()

    # Construction -----------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Build S as nnU-Net does, then G and D beside it: checkpoints are loaded before a training starts."""
        self._seed(self.current_epoch)
        super().initialize()
        with _one_sentence():
            if self.settings.window is None:
                self.print_to_log_file("Measuring the intensity window on the preprocessed cases...")
                window = measure_window(self._open_dataset(None))
                self._use_settings(self.settings.replace(window=window.bounds), instead_of=self.settings)
            topology = Topology.from_arch_kwargs(self.configuration_manager.network_arch_init_kwargs)
        assert self.settings.window is not None
        self.window = IntensityWindow(self.settings.window)
        self.adversary = Adversary(self.settings, topology, self.window, self.device, num_epochs=self.num_epochs)
        self.gasnet_step = GASNetStep(
            self.settings,
            self._segmentation_task(),
            self.network,
            self.optimizer,
            self.grad_scaler,
            self.adversary,
            self.device,
        )
        with _one_sentence():
            self._prediction_weights()

    def _prediction_weights(self) -> dict[str, Tensor]:
        """What predicts: S or its average, with the threshold in its heads.

        Raises:
            UserError: S cannot carry the threshold.
        """
        assert self.gasnet_step is not None
        average = self.gasnet_step.average
        weights = self._segmenter_weights() if average is None else average.module.state_dict()
        return decide_at(weights, self.settings.lesion_threshold, regions=self.label_manager.has_regions)

    def _segmenter_weights(self) -> dict[str, Tensor]:
        """S as it goes on training, also while what predicts is in its place."""
        return plain_module(self.network).state_dict() if self._held_weights is None else self._held_weights

    def _put_in_place(self) -> None:
        """Put what predicts in the place of S."""
        if self._held_weights is None:
            self._held_weights = copy.deepcopy(plain_module(self.network).state_dict())
            plain_module(self.network).load_state_dict(self._prediction_weights())

    def _put_back(self) -> None:
        """Put S back in its place."""
        if self._held_weights is not None:
            plain_module(self.network).load_state_dict(self._held_weights)
            self._held_weights = None

    def _start_from(self, checkpoint: str) -> None:
        """Give S, G and D the weights of a trained model (the setting `init_from`)."""
        assert self.adversary is not None
        origin = read_origin(checkpoint)
        origin.check_dataset(self.dataset_json)
        configuration = self.configuration_manager.configuration
        origin.check_network(configuration)
        origin.load_into(self.network, self.adversary)
        self.print_to_log_file(
            f"Training starts from the weights in {origin.path}, trained on {origin.plans['dataset_name']} by "
            f"{origin.trainer}."
        )
        differences = origin.preprocessing_differences(self.plans_manager.plans, configuration)
        if differences:
            self.print_to_log_file(
                f"WARNING: these weights were trained on data of another kind: {'; '.join(differences)}."
            )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """nnU-Net's SGD or Adam for S, both with nnU-Net's polynomial schedule."""
        if self.settings.optimizer_s == "sgd":
            return super().configure_optimizers()
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss, without its Dice part where the settings say so (the paper)."""
        loss = super()._build_loss()
        if self.settings.segmentation_loss == "ce":
            _inner(loss).weight_dice = 0
        return loss

    def _segmentation_task(self) -> SegmentationTask:
        """What S predicts; where the dataset has no ignore label, the loss of I_ps brings its own."""
        label_manager = self.label_manager
        ignore_label, loss_pseudo = label_manager.ignore_label, self.loss
        if ignore_label is None:
            ignore_label, loss_pseudo = max(label_manager.all_labels) + 1, copy.deepcopy(self.loss)
            inner = _inner(loss_pseudo)
            if label_manager.has_regions:
                inner.use_ignore_label = True
                inner.ce = nn.BCEWithLogitsLoss(reduction="none")
            else:
                inner.ignore_label = ignore_label
                inner.ce = RobustCrossEntropyLoss(ignore_index=ignore_label)
        deep_supervision = isinstance(self.loss, DeepSupervisionWrapper)
        return SegmentationTask(
            loss=self.loss,
            loss_pseudo=loss_pseudo,
            level_weights=self.loss.weight_factors if deep_supervision else (1.0,),
            deep_supervision=deep_supervision,
            regions=label_manager.has_regions,
            labels=() if label_manager.has_regions else tuple(label_manager.foreground_labels),
            ignore_label=ignore_label,
            lesions=tuple(int(label) for label in label_manager.foreground_labels),
            spacing=tuple(float(mm) for mm in self.configuration_manager.spacing),
        )

    # Data -------------------------------------------------------------------------------------------------------------

    def do_split(self) -> tuple[list[str], list[str]]:
        """Masked cases to train and to validate on; the volume-level ones are in `self._cases`."""
        cases = self._fold_cases()
        return list(cases.train), list(cases.val)

    def _fold_cases(self) -> Fold:
        if self._cases is None:
            with _one_sentence():
                dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
                base = Path(self.preprocessed_dataset_folder_base)
                self._cohort = read_cohort(
                    base / "gt_segmentations",
                    self.dataset_json,
                    identifiers=sorted(dataset_class.get_identifiers(self.preprocessed_dataset_folder)),
                    cache=base / COHORT_CACHE,
                    num_processes=default_num_processes,
                    progress=True,
                )
                splits_file = base / "splits_final.json"
                if self.fold != "all" and not splits_file.exists():
                    write_splits(splits_file, make_splits(self._cohort))
                self._cases = read_fold(splits_file, self.fold, self._cohort)
        return self._cases

    def _open_dataset(self, cases: Sequence[str] | None) -> Any:
        names = None if cases is None else list(cases)
        return infer_dataset_class(self.preprocessed_dataset_folder)(self.preprocessed_dataset_folder, names)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, tuple[int, ...]]:  # noqa: N802
        """nnU-Net's augmentation with our rotation range and mirror axes: chests do not stand on their heads."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.settings.rotation_degrees is not None:
            angle = math.radians(self.settings.rotation_degrees)
            rotation = (-angle, angle)
            patch_size = self.configuration_manager.patch_size
            initial_patch_size = get_patch_size(patch_size, rotation, rotation, rotation, (0.85, 1.25))
            if dummy_2d:
                initial_patch_size[0] = patch_size[0]
        if self.settings.mirror_axes is not None:
            # nnU-Net's prediction takes the maximum of the axes, so no axis has to be None.
            mirror_axes = self.inference_allowed_mirroring_axes = self.settings.mirror_axes or None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders for the masked cases, and beside them the streams of volume-level patches."""
        loaders = super().get_dataloaders()
        settings, cases = self.settings, self._fold_cases()
        rotation, dummy_2d, read_size, mirror = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        transforms = self.get_training_transforms(
            self.configuration_manager.patch_size,
            rotation,
            self._get_deep_supervision_scales(),
            mirror,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            foreground_labels=self.label_manager.foreground_labels,
            regions=self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            ignore_label=self.label_manager.ignore_label,
        )
        pasted_patches = settings.pasted_patches(self.batch_size)
        if self._needs_pairs() or pasted_patches:
            assert self._reader is not None
            bag = settings.patches == "bag"
            transform = PairTransform(transforms, self._reader.low)
            if transform.left_out:
                self.print_to_log_file(f"Not applied to diseased and healthy patches: {', '.join(transform.left_out)}.")
            options: dict[str, Any] = {
                "read_size": read_size,
                "patch_size": self.configuration_manager.patch_size,
                "transform": transform,
                "jitter": settings.centre_jitter,
            }
            if self._needs_pairs():
                pairs = PairLoader(
                    self._reader,
                    self._diseased_cases(),
                    cases.healthy,
                    batch_size=settings.bag_size if bag else settings.volumes_per_step or self.batch_size,
                    bag=bag,
                    with_diseased_mask=self._needs_diseased_lungs(),
                    margin=self._outside_margin(),
                    **options,
                )
                self._pairs = self._start_stream(pairs, get_allowed_n_proc_DA())
            if pasted_patches:
                assert self.gasnet_step is not None
                pasted = PastedLoader(
                    self._reader,
                    cases.train,
                    cases.healthy,
                    batch_size=pasted_patches,
                    strength=self.gasnet_step.paste_strength,
                    lesions=self.gasnet_step.task.lesions,
                    **options,
                )
                # Those of an iteration take less than half of what its pairs take, one for every update of S and D.
                self._pasted = self._start_stream(pasted, math.ceil(get_allowed_n_proc_DA() / 2))
        if settings.weight_healthy and settings.healthy_outside:
            background = nnUNetDataLoader(
                self._open_dataset(cases.healthy),
                self.batch_size,
                read_size,
                self.configuration_manager.patch_size,
                self.label_manager,
                transforms=transforms,
            )
            self._background = self._start_stream(background, min(1, get_allowed_n_proc_DA()))
        return loaders

    def _start_stream(self, loader: DataLoader, workers: int) -> Any:
        if workers == 0:
            return SingleThreadedAugmenter(loader, None)
        stream = NonDetMultiThreadedAugmenter(
            data_loader=loader,
            transform=None,
            num_processes=workers,
            num_cached=max(3, workers),
            # Without seeds of their own all forked workers draw alike from torch's generator.
            seeds=np.random.randint(2**31, size=workers).tolist(),
            pin_memory=self.device.type == "cuda",
            wait_time=0.002,
        )
        next(stream)
        return stream

    def _needs_pairs(self) -> bool:
        settings = self.settings
        return bool(
            settings.weight_healthy
            or settings.weight_mil
            or settings.weight_outside
            or settings.weight_suspicion
            or settings.weight_pseudo
            or settings.needs_generator
        )

    def _needs_diseased_lungs(self) -> bool:
        settings = self.settings
        return bool(settings.restore_within_organ or settings.weight_suspicion or settings.compares_contrast)

    def _outside_margin(self) -> list[int] | None:
        """Voxels around the lungs where L_out says nothing; `None` where it is off."""
        if not self.settings.weight_outside:
            return None
        return [round(self.settings.outside_margin_mm / mm) for mm in self.configuration_manager.spacing]

    def _diseased_cases(self) -> tuple[str, ...]:
        """Cases to draw I_d from."""
        cases = self._fold_cases()
        if self.settings.labelled_as_diseased or not cases.diseased:
            return (*cases.diseased, *cases.train)
        return cases.diseased

    def _watched_cases(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Diseased and healthy volumes to watch M^ on; training volumes where none are held out."""
        cases, limit = self._fold_cases(), self.settings.watch_volumes or None
        return (cases.val_diseased or self._diseased_cases())[:limit], (cases.val_healthy or cases.healthy)[:limit]

    def _organ_masks(self) -> OrganMasks:
        raw = Path(str(nnUNet_raw)) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None
        diseased, healthy = self._watched_cases()
        cases = self._fold_cases()
        return ensure_organ_masks(
            Path(self.preprocessed_dataset_folder_base),
            self.plans_manager.plans,
            self.configuration_name,
            sorted({*self._diseased_cases(), *cases.train, *cases.healthy, *diseased, *healthy}),
            organ=self.settings.organ,
            raw_folder=raw if raw is not None and raw.is_dir() else None,
            num_processes=default_num_processes,
            progress=True,
        )

    # Life cycle -------------------------------------------------------------------------------------------------------

    def run_training(self) -> None:
        """nnU-Net's; a full disk ends it in one sentence, whoever was writing."""
        with _one_sentence(), self._disk_full_told("--c"):
            super().run_training()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, by what the checkpoint predicts with; a full disk ends it in one sentence."""
        self._put_in_place()
        try:
            with _one_sentence(), self._disk_full_told("--val"):
                super().perform_actual_validation(save_probabilities)
        finally:
            self._put_back()

    @contextmanager
    def _disk_full_told(self, option: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise UserError(
                f"{self.output_folder} cannot be written to: {error.strerror}. The checkpoints written so far are "
                f"untouched; make room on that disk, then go on with {option}."
            ) from None

    def on_train_start(self) -> None:
        """Check the cohort and make the lung masks before anything else, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        if self.settings.init_from is not None and not self._restored:
            with _one_sentence():
                self._start_from(self.settings.init_from)
        assert self.gasnet_step is not None
        if self.gasnet_step.average is not None and not self._restored:
            # By init_from or -pretrained_weights S is another one than it was made, and where pseudo_start is 0 its
            # average teaches from the first iteration on.
            self.gasnet_step.average.module.load_state_dict(plain_module(self.network).state_dict())
        cases = self._fold_cases()
        assert self._cohort is not None
        self.print_to_log_file(self._cohort.report(), add_timestamp=False)
        self.print_to_log_file(
            f"Fold {self.fold}: {len(cases.train)} masks to learn from, {len(cases.diseased)} diseased and "
            f"{len(cases.healthy)} healthy volumes; {len(cases.val)} masks to validate on, {len(cases.val_diseased)} "
            f"diseased and {len(cases.val_healthy)} healthy volumes held out."
        )
        used = {case for part in astuple(cases) for case in part}
        if unused := sorted(set(self._cohort.cases) - used):
            self.print_to_log_file(f"This fold does not use {abbreviate(unused)}.")
        if cases.validates_on_training_cases:
            self.print_to_log_file(
                f"WARNING: {', '.join(cases.val)}: TRAINING AND VALIDATION ON THE SAME MASK. The pseudo Dice and the "
                "validation Dice of this training say nothing about other patients."
            )
        self.print_to_log_file(f"GASNet settings: {self.settings.to_dict()}", also_print_to_console=False)
        self.print_to_log_file(self.adversary)
        with _one_sentence():
            self._reader = VolumeReader(self._open_dataset(None), self._organ_masks(), self.window.low.tolist())
        diseased, healthy = self._watched_cases()
        self.watch = Watch(
            self._reader,
            self.gasnet_step,
            diseased,
            healthy,
            patch_size=self.configuration_manager.patch_size,
            patches=self.settings.bag_size if self.settings.patches == "bag" else 1,
        )
        super().on_train_start()
        remove_leftovers(Path(self.output_folder))
        self.curves = TrainingCurves(Path(self.output_folder))
        self.curves.truncate(self.current_epoch)
        if self.current_epoch:
            self.curves.plot()
        self._last_save = monotonic()

    def on_train_epoch_start(self) -> None:
        """nnU-Net's, and the learning rates of G and D."""
        super().on_train_epoch_start()
        assert self.adversary is not None
        self.adversary.start_epoch(self.current_epoch)
        self._iterations_done = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One iteration of Algorithm 1: an update of S and G, then the updates of D on fresh draws.

        Returns:
            "loss", the sum of L_S, and every name in `STEP_COLUMNS`.
        """
        settings, step = self.settings, self.gasnet_step
        assert step is not None
        report: dict[str, Tensor] = {}
        step.zero_grad()
        if settings.weight_labelled:
            batches = [batch] if self._pasted is None else [batch, next(self._pasted)]
            labelled = [(self._to_device(each["data"]), self._to_device(each["target"])) for each in batches]
            report.update(step.labelled_term(*labelled))
        if self._needs_pairs():
            pair = self._next_pair()
            if settings.weight_healthy:
                outside = self._background is not None and np.random.uniform() < settings.healthy_outside
                report.update(
                    step.healthy_term(self._to_device(next(self._background)["data"]) if outside else pair["healthy"])
                )
            report.update(step.diseased_terms(pair, pseudo_on=self._pseudo_on()))
        step.step()
        report.update(step.train_discriminator(self._next_pair))
        self._iterations_done += 1
        return as_numbers(report)

    def _next_pair(self) -> dict[str, Tensor]:
        batch = next(self._pairs)
        return {name: self._to_device(value) for name, value in batch.items() if isinstance(value, Tensor)}

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._to_device(item) for item in value]
        return value.to(self.device, non_blocking=True)

    def _pseudo_on(self) -> bool:
        """Whether L_ps has joined; schedules follow the share of the training that is done."""
        iterations = self.current_epoch * self.num_iterations_per_epoch + self._iterations_done
        fraction = iterations / (self.num_epochs * self.num_iterations_per_epoch)
        return bool(self.settings.weight_pseudo) and fraction >= self.settings.pseudo_start

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        """nnU-Net's, and the mean of each loss over the epoch."""
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        self._extra_columns = {
            name: float(np.nanmean(outputs[name])) if np.isfinite(outputs[name]).any() else math.nan
            for name in STEP_COLUMNS
        }

    def on_validation_epoch_start(self) -> None:
        """nnU-Net's, with what predicts in the place of S."""
        super().on_validation_epoch_start()
        self._put_in_place()

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """nnU-Net's on the masked cases, then M^ on the watched volumes and the score of the epoch."""
        if not any(np.sum(output[key]) for output in val_outputs for key in ("tp_hard", "fp_hard", "fn_hard")):
            # A NaN pseudo Dice would stay in nnU-Net's moving average for good: repeat the epoch before.
            earlier = self.logger.get_value("mean_fg_dice", None)
            dice = earlier[-1] if earlier else 0.0
            like = val_outputs[0]["tp_hard"]
            for key, value in (("tp_hard", dice), ("fp_hard", 1 - dice), ("fn_hard", 1 - dice)):
                val_outputs[0][key] = np.full_like(like, value, dtype=float)
        super().on_validation_epoch_end(val_outputs)
        self._put_back()
        assert self.watch is not None
        readings = self.watch.readings()
        dice = float(self.logger.get_value("mean_fg_dice", step=-1))
        for kind in ("healthy", "diseased"):
            means = [reading.mean for reading in readings if reading.healthy == (kind == "healthy")]
            self._extra_columns[f"M_{kind}"] = float(np.mean(means)) if means else math.nan
        burdens = [reading.burden for reading in readings if reading.healthy]
        self._extra_columns["false_positive_share"] = float(np.mean(burdens)) if burdens else math.nan
        self._extra_columns.update(pseudo_dice=dice, score=epoch_score(dice, readings))

    def on_epoch_end(self) -> None:
        """nnU-Net's, with our curves, gallery, and checkpoints by our rule and by the clock."""
        epoch = self.current_epoch
        seconds = time() - self.logger.get_value("epoch_start_timestamps", step=-1)
        scale = math.nan if self.grad_scaler is None else self.grad_scaler.get_scale()
        self._extra_columns.update(lr_S=self.optimizer.param_groups[0]["lr"], loss_scale=scale, seconds=seconds)
        # nnU-Net saves `checkpoint_latest` in there every 50 epochs, and this epoch has to be in it.
        is_best = self.best_epoch.update(self._extra_columns["score"])
        self.curves.append(epoch, self._extra_columns)
        super().on_epoch_end()
        # At once: a `checkpoint_latest` of this epoch takes it for saved.
        if is_best:
            self.print_to_log_file(f"New best score (moving average): {self.best_epoch.best:.4f}")
            self._save_epoch("checkpoint_best.pth")
        self._report_epoch(epoch)
        every = self.settings.gallery_every_epochs
        if every and ((epoch + 1) % every == 0 or epoch + 1 == self.num_epochs):
            assert self.watch is not None
            spacing = self.configuration_manager.spacing
            gallery = Path(self.output_folder) / "gasnet_gallery" / f"epoch_{epoch:04d}.png"
            pseudo_on = not math.isnan(self._extra_columns["L_ps"])
            self.watch.draw_gallery(gallery, pseudo_on=pseudo_on, aspect=spacing[1] / spacing[2])
        overdue = monotonic() - self._last_save > 60 * self.settings.save_every_minutes
        if overdue and epoch + 1 < self.num_epochs:
            self._save_epoch("checkpoint_latest.pth")
            self._last_save = monotonic()

    def _save_epoch(self, name: str) -> None:
        """Save the epoch that has just ended."""
        # As in nnU-Net's on_train_end: the epoch counter has moved on, and a checkpoint stores the one after it.
        self.current_epoch -= 1
        self.save_checkpoint(str(Path(self.output_folder) / name))
        self.current_epoch += 1

    def _report_epoch(self, epoch: int) -> None:
        columns = self._extra_columns
        shown = ", ".join(f"{name} {value:.4g}" for name, value in columns.items() if not math.isnan(value))
        self.print_to_log_file(f"GASNet: {shown}")
        self.curves.plot()
        for logger in self.logger.loggers:
            for name, value in columns.items():
                logger.log(f"gasnet/{name}", value, epoch)

    def on_train_end(self) -> None:
        """nnU-Net's, and the end of our worker processes."""
        super().on_train_end()
        for stream in (self._pairs, self._background, self._pasted):
            if isinstance(stream, NonDetMultiThreadedAugmenter):
                stream._finish()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with G, D and their optimisers in it; the old file stays until the new one is whole.

        `network_weights` hold the average of S where there is one, with the threshold in its heads, because nnU-Net
        predicts with them; beside them stand the biases without it, and our state holds the S that goes on training.
        """
        if self.disable_checkpointing or self.local_rank != 0:
            super().save_checkpoint(filename)
            return
        assert self.adversary is not None
        assert self.gasnet_step is not None
        state: dict[str, Any] = {
            "adversary": self.adversary.state_dict(),
            "best_epoch": self.best_epoch.state_dict(),
        }
        segmenter, average = self._segmenter_weights(), self.gasnet_step.average
        heads = head_biases(segmenter if average is None else average.module.state_dict())
        if average is not None:
            state["segmenter"] = segmenter
            state["averaged"] = int(average.n_averaged)
        extra = {"network_weights": self._prediction_weights(), HEADS_KEY: heads, CHECKPOINT_KEY: state}
        with _one_sentence():
            write_checkpoint(Path(filename), super().save_checkpoint, extra)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Restore S, G, D, their optimisers, the scaler and the settings; on `--c` the checkpoint's settings win."""
        with _one_sentence():
            if not isinstance(filename_or_checkpoint, str):
                raise UserError(f"{type(self).__name__} loads checkpoints by their path.")
            checkpoint = read_checkpoint(Path(filename_or_checkpoint))
            if CHECKPOINT_KEY not in checkpoint:
                raise UserError(
                    f"{filename_or_checkpoint} holds no GASNet state, so {type(self).__name__} cannot go on from it; "
                    f"it was written by {checkpoint.get('trainer_name')}. To start from its weights use "
                    "-pretrained_weights."
                )
            if not self.was_initialized:
                self._adopt_settings(checkpoint["init_args"]["plans"])
        super().load_checkpoint(filename_or_checkpoint)
        assert self.adversary is not None
        assert self.gasnet_step is not None
        state, average = checkpoint[CHECKPOINT_KEY], self.gasnet_step.average
        self.adversary.load_state_dict(state["adversary"])
        self.best_epoch.load_state_dict(state["best_epoch"])
        weights = weights_in_training(checkpoint)
        if average is not None:
            # A checkpoint without an average holds S alone: the average begins with it.
            average.module.load_state_dict(weights)
            average.n_averaged.fill_(state.get("averaged", 0))
        plain_module(self.network).load_state_dict(state.get("segmenter", weights))
        self._restored = True
        self._seed(self.current_epoch)

    def _adopt_settings(self, plans: dict[str, Any]) -> None:
        plans = copy.deepcopy(plans)
        configuration = plans["configurations"][self.configuration_name]
        entry = configuration.get(PLANS_KEY, {})
        configuration[PLANS_KEY] = GASNetSettings.of_training(entry, source="the checkpoint's plans").to_dict()
        stored = self._settings_of(plans, self.configuration_name)
        # A window that was measured stands in the checkpoint alone.
        mine = self.settings if self.settings.window else self.settings.replace(window=stored.window)
        differences = mine.differences(stored)
        if differences:
            self.print_to_log_file(
                "The checkpoint was trained with other settings than the plans hold now; the checkpoint's win: "
                + "; ".join(differences)
            )
        self._use_settings(stored, instead_of=self.settings)

    def _seed(self, epoch: int) -> None:
        """Seed weights and draws; a resumed training goes on with other patches than it began with."""
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed + epoch)
            np.random.seed(self.settings.seed + epoch)


class SupervisedBaselineTrainer(GASNetTrainer):
    """The fair baseline: the same S, schedule, augmentation and S updates, learning from the masks alone.

    With `baseline_healthy` it learns L_hea on the healthy volumes too.
    """

    @classmethod
    def adjust_settings(cls, settings: GASNetSettings) -> GASNetSettings:
        """Switch off every term that needs a diseased volume, and decide as nnU-Net does."""
        return settings.supervised()


class VanillaTrainer(nnUNetTrainer):
    """nnU-Net's own trainer, with the length and the seed of the settings in the plans instead of 1000 epochs.

    The schedule, the augmentation and everything else are nnU-Net's: what a user of nnU-Net has without this package,
    with as many updates of S as GASNetTrainer makes.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        with _one_sentence():
            entry = self.configuration_manager.configuration.get(PLANS_KEY, {})
            source = f"configurations.{configuration}.{PLANS_KEY} of {plans['plans_name']}.json"
            settings = GASNetSettings.from_dict(entry, source=source)
        # These alone are what a study knows a model of this trainer by (`study.steps.VANILLA_SETTINGS`).
        self.num_epochs = settings.num_epochs
        self.num_iterations_per_epoch = settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.validation_iterations_per_epoch
        # nnU-Net's 50 of 1000 epochs.
        self.save_every = max(1, settings.num_epochs // 20)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
            np.random.seed(settings.seed)

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint; the old file stays until the new one is whole, so that a study can always go on."""
        if self.disable_checkpointing or self.local_rank != 0:
            super().save_checkpoint(filename)
            return
        with _one_sentence():
            write_checkpoint(Path(filename), super().save_checkpoint, {})


def _inner(loss: nn.Module) -> Any:
    """nnU-Net's loss of one deep-supervision level."""
    return loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss


@contextmanager
def _one_sentence() -> Iterator[None]:
    """End a user's mistake with its message: a plain exception would reach the user as nnU-Net's traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
