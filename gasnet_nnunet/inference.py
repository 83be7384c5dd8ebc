"""A trained model at work on one CT: the mask as nnU-Net predicts it, and the restored CT that G adds to it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gasnet_nnunet import __version__
from gasnet_nnunet.checkpoints import checkpoint_file, predicting_folds, read_checkpoint
from gasnet_nnunet.decision import carried_logit
from gasnet_nnunet.devices import choose_device
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.intensity import IntensityWindow, normalised_to_hu
from gasnet_nnunet.losses import lesion_logit
from gasnet_nnunet.networks import Generator, Topology, build_generator
from gasnet_nnunet.resampling import interpolate_slab, resample_logits
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings
from gasnet_nnunet.trained_model import load_predictor
from gasnet_nnunet.volumes import Grid, as_image

RESTORE_FROM = 0.05
"""M^ from which on a voxel is restored; what lies below is the CT's own."""
PROBABILITY_STEPS = 4096
"""M^ is rounded to multiples of 1 / this, far below what it means, because random last digits do not compress."""
READERS = ("SimpleITKIO", "NibabelIO")
"""nnU-Net's readers that hand over a CT's voxels in the order of the file."""
GENERATOR_PATH = ("gasnet", "adversary", "generator")
"""Where a checkpoint keeps G."""

Volume = NDArray[Any]
CT = sitk.Image | Volume | Sequence[sitk.Image]
OnProgress = Callable[[float], None]


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """What S found in a CT, on the CT's own grid.

    Args:
        mask: Labels (Z, Y, X), the voxels of nnU-Net's own prediction.
        probability: M^, the probability of any lesion (Z, Y, X), in multiples of 1/4096.
        grid: Where they lie.
    """

    mask: Volume
    probability: NDArray[np.float32]
    grid: Grid

    def image(self, name: str) -> Any:
        """One of the arrays, by its name, as a SimpleITK image."""
        return as_image(getattr(self, name), self.grid)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({np.count_nonzero(self.mask)} lesion voxels, {self.grid})"


@dataclass(frozen=True, eq=False, repr=False)
class Restoration(Segmentation):
    """What S and G made of a CT, on the CT's own grid.

    Args:
        restored: I_s = M^ * I_g + (1 - M^) * CT (Eq. 1) in HU; where M^ is below the threshold, the CT's own values.
        generated: I_g = G(CT) in HU, within the window that G knows.
        difference: CT - I_s in HU: what the disease added; positive where it made the lungs denser.
    """

    restored: Volume
    generated: Volume
    difference: Volume


class LoadedModel:
    """A trained nnU-Net model, with the generators of its folds where it has them.

    Args:
        folder: The model's folder, `<trainer>__<plans>__<configuration>`.
        folds: Folds to average; `None` for all that have the checkpoint (but `all` only where there is no other).
        checkpoint: "final", "best", or the checkpoint's file name in each fold.
        device: "cuda", "cpu" or "mps"; `None` for cuda where there is one, else cpu.
        step_size: Step of the sliding window, in shares of the patch.
        mirroring: Mirror S's input along the axes that were trained with, as nnU-Net does.

    Raises:
        UserError: There is no such model, a file of it is damaged, or it is one that cannot be used here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        folds: Sequence[str | int] | None = None,
        checkpoint: str = "final",
        device: str | None = None,
        step_size: float = 0.5,
        mirroring: bool = True,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint_file(checkpoint)
        self.folds = predicting_folds(folder, folds, self.checkpoint)
        self.device = torch.device(choose_device(device))
        if not 0 < step_size <= 1:
            raise UserError(f"The step of the sliding window is {step_size:g}; expected above 0 and at most 1.")
        contents = [read_checkpoint(path) for path in self._files()]
        self._predictor = load_predictor(
            folder, self.folds, self.checkpoint, self.device, step_size=step_size, mirroring=mirroring
        )
        self.plans: PlansManager = self._predictor.plans_manager
        self.configuration = self._predictor.configuration_manager
        self.dataset_json: dict[str, Any] = self._predictor.dataset_json
        self.channels: int = determine_num_input_channels(self.plans, self.configuration, self.dataset_json)
        self._check_usable()
        self.settings = _settings(contents[0])
        # Folds are averaged as logits.
        self._threshold_logit = float(np.mean([carried_logit(content) for content in contents]))
        self._generators, self.no_restoration = self._load_generators(contents)

    def _files(self) -> list[Path]:
        return [self.folder / f"fold_{fold}" / self.checkpoint for fold in self.folds]

    def _check_usable(self) -> None:
        if self.configuration.previous_stage_name is not None:
            raise UserError(
                f"{self.folder} is the second stage of a cascade, which needs the first one's masks. Use "
                "nnUNetv2_predict for it."
            )
        reader = self.plans.image_reader_writer_class.__name__
        if reader not in READERS:
            raise UserError(
                f"{self.folder} was planned with nnU-Net's reader {reader}, which turns images or is not for CTs; "
                f"expected {' or '.join(READERS)}. Use nnUNetv2_predict for it."
            )

    def _load_generators(
        self, contents: Sequence[dict[str, Any]]
    ) -> tuple[list[tuple[Generator, IntensityWindow]], str | None]:
        """G of each fold with its window; or none, and why."""
        generators = []
        for path, content in zip(self._files(), contents, strict=True):
            state: Any = content
            for key in GENERATOR_PATH:
                state = state.get(key) or {}
            if not state:
                return [], (
                    f"{path} holds the segmenter alone, as a supervised "
                    "baseline, an exported model or a model of nnU-Net's own does; what restores a CT is the generator "
                    "of a GASNet training."
                )
            settings = _settings(content)
            assert settings is not None
            assert settings.window is not None
            topology = Topology.from_arch_kwargs(self.configuration.network_arch_init_kwargs)
            generator = build_generator(settings, topology, len(settings.window))
            try:
                generator.load_state_dict(state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"The generator in {path} is not the one that its settings describe: {reason}"
                ) from None
            window = IntensityWindow(settings.window).to(self.device)
            generators.append((generator.to(self.device).eval(), window))
        scheme = self.configuration.normalization_schemes[0]
        if scheme != "CTNormalization":
            return [], f"{self.folder} normalises its images by {scheme}, from which no way leads back to HU."
        return generators, None

    @property
    def description(self) -> dict[str, str]:
        """What a report says of the model."""
        return {
            "Model": self.folder.name,
            "Dataset": str(self.plans.plans.get("dataset_name", "")),
            "Folds": ", ".join(str(fold) for fold in self.folds),
            "Checkpoint": self.checkpoint,
            "Checksum": self._checksum,
            "Sliding window": f"step {self._predictor.tile_step_size:g}, "
            + ("mirrored" if self._predictor.use_mirroring else "not mirrored"),
            "Target spacing (mm)": " x ".join(f"{edge:.3g}" for edge in self.configuration.spacing),
            "Patch": " x ".join(str(edge) for edge in self.configuration.patch_size),
            "gasnet_nnunet": __version__,
        }

    @functools.cached_property
    def _checksum(self) -> str:
        """Tells trainings apart whose folders have the same name."""
        digest = hashlib.sha256()
        for path in self._files():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return f"sha256 {digest.hexdigest()[:16]}"

    def segment(
        self, ct: CT, spacing: Sequence[float] | None = None, *, on_progress: OnProgress | None = None
    ) -> Segmentation:
        """Find the lesions in one CT; the mask is that of nnU-Net's own prediction, voxel by voxel.

        Args:
            ct: A SimpleITK image in HU, or an array (Z, Y, X) with its spacing. For a model of several channels a
                sequence of images, or an array (C, Z, Y, X).
            spacing: Voxel size (Z, Y, X) in mm of an array; an image has its own.
            on_progress: Called with the share of the networks' work that is done.

        Raises:
            UserError: The CT has another number of channels than the model, NaN, or nothing to see.
        """
        values, grid = self._channels_of(ct, spacing)
        data, properties = self._preprocess(values, grid)
        with self._counted(on_progress, data.shape[1:], generate=False):
            logits = self._predictor.predict_logits_from_preprocessed_data(data)
        result = Segmentation(*self._empty(grid), grid)
        mask, probability = self._views(properties, result.mask, result.probability)
        for rows, slab in self._on_ct(logits, properties):
            mask[rows], probability[rows] = self._interpret(slab)
        compute_gaussian.cache_clear()
        return result

    def restore(
        self,
        ct: CT,
        spacing: Sequence[float] | None = None,
        *,
        threshold: float = RESTORE_FROM,
        on_progress: OnProgress | None = None,
    ) -> Restoration:
        """Find the lesions in one CT and paint healthy lung in their place (Eq. 1 of the paper).

        Args:
            ct: As for `segment`; the first channel is restored.
            spacing: As for `segment`.
            threshold: Where M^ is below this, the restored CT has the CT's own values, bit for bit.
            on_progress: As for `segment`.

        Raises:
            UserError: As for `segment`; or the model has no generator (`no_restoration` says why).
        """
        if self.no_restoration:
            raise UserError(f"Nothing can be restored: {self.no_restoration}")
        values, grid = self._channels_of(ct, spacing)
        data, properties = self._preprocess(values, grid)
        with self._counted(on_progress, data.shape[1:], generate=True):
            logits = self._predictor.predict_logits_from_preprocessed_data(data)
            generated_hu = self._generate(data)
        del data
        original = values[0]
        kind = original.dtype if original.dtype.kind in "if" and original.dtype.itemsize > 1 else np.dtype(np.int32)
        restored = original.astype(kind)  # a copy
        generated = restored.copy()  # what lies beyond the cropped part is nothing that G has seen
        wide = kind.kind == "i" and kind.itemsize == 2 and not _fits_int16(original, generated_hu)
        difference = np.zeros(original.shape, np.int32 if wide else kind)
        result = Restoration(*self._empty(grid), grid, restored, generated, difference)
        arrays = (result.mask, result.probability, original, restored, generated, difference)
        views = self._views(properties, *arrays)
        shape = views[0].shape
        for rows, slab in self._on_ct(logits, properties):
            mask, probability, before, after, painted, removed = (view[rows] for view in views)
            mask[:], probability[:] = self._interpret(slab)
            hu = interpolate_slab(generated_hu, shape, rows)
            mixed = before + probability * (hu - before)
            if kind.kind == "i":
                mixed, hu = np.rint(mixed), np.rint(hu)
            painted[:] = hu
            np.copyto(after, mixed.astype(kind), where=(probability >= threshold) & (probability > 0))
            np.subtract(before, after, out=removed, dtype=difference.dtype, casting="unsafe")
        compute_gaussian.cache_clear()
        return result

    def _channels_of(self, ct: CT, spacing: Sequence[float] | None) -> tuple[list[Volume], Grid]:
        """One array (Z, Y, X) a channel, in the CT's own type, and the grid."""
        if isinstance(ct, np.ndarray):
            if spacing is None or len(spacing) != 3:
                raise UserError("An array needs its spacing: the voxel size (Z, Y, X) in mm.")
            values = list(ct) if ct.ndim == 4 else [ct]
            size = tuple(int(edge) for edge in values[0].shape[::-1]) if values else ()
            identity = tuple(np.eye(3).ravel().tolist())
            grid = Grid(size, tuple(float(edge) for edge in spacing[::-1]), (0.0, 0.0, 0.0), identity)
        else:
            images = [ct] if isinstance(ct, sitk.Image) else list(ct)
            values, grid = [sitk.GetArrayFromImage(image) for image in images], Grid.of(images[0])
        if len(values) != self.channels:
            names = ", ".join(self.dataset_json["channel_names"].values())
            raise UserError(
                f"The CT has {len(values)} channel{'s' * (len(values) != 1)}, but the model takes {self.channels} "
                f"({names})."
            )
        for array in values:
            if array.ndim != 3 or array.shape != values[0].shape or array.dtype.kind not in "iuf":
                raise UserError(f"Found {array.dtype} voxels of shape {array.shape}; expected numbers (Z, Y, X).")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError("The CT has voxels that are NaN or infinite. Replace them, e.g. by -1024 HU.")
            if array.min() == array.max():
                raise UserError(f"The CT is {array.min():g} throughout; it shows nothing.")
        return values, grid

    def _preprocess(self, values: Sequence[Volume], grid: Grid) -> tuple[Tensor, dict[str, Any]]:
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        spacing = [abs(edge) for edge in grid.spacing[::-1]]
        stacked = values[0][None] if len(values) == 1 else np.stack(values)
        data, _, properties = preprocessor.run_case_npy(
            stacked, None, {"spacing": spacing}, self.plans, self.configuration, self.dataset_json
        )
        return torch.from_numpy(data).to(torch.float32, memory_format=torch.contiguous_format), properties

    @torch.inference_mode()
    def _generate(self, data: Tensor) -> Tensor:
        """I_g of the first channel in HU, (z, y, x) on the plan's grid, averaged over the folds.

        The windows and weights are those of nnU-Net's predictor, the sums are in single precision: in its half
        precision, which does for logits, the corners of a scan were off by 100 HU.
        """
        patch = tuple(self.configuration.patch_size)
        weights = compute_gaussian(patch, value_scaling_factor=10, dtype=torch.float32, device=torch.device("cpu"))
        total = torch.zeros(data.shape[1:])
        lacking = [max(0, edge - n) for edge, n in zip(patch, total.shape, strict=True)]
        margins = [(edge // 2, edge - edge // 2) for edge in lacking]
        unpadded = tuple(slice(low, low + n) for (low, _), n in zip(margins, total.shape, strict=True))
        for generator, window in self._generators:
            low = window.low[:, None, None, None]
            # The lower bound is what pads a patch in training.
            shifted = functional.pad(data - low.cpu(), [edge for pair in reversed(margins) for edge in pair])
            painted, weight = torch.zeros(shifted.shape[1:]), torch.zeros(shifted.shape[1:])
            for place in self._places(shifted.shape[1:]):
                every_channel = (slice(None), *place)
                x = window.to_window(shifted[every_channel][None].to(self.device) + low)
                with torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext():
                    generated = generator(x)
                painted[place] += (
                    normalised_to_hu(window.from_window(generated)[0, 0].cpu(), self.plans.plans) * weights
                )
                weight[place] += weights
            total += (painted / weight)[unpadded]
        return total / len(self._generators)

    def _empty(self, grid: Grid) -> tuple[Volume, NDArray[np.float32]]:
        many = len(self._predictor.label_manager.foreground_labels) >= 255
        shape = grid.size[::-1]
        return np.zeros(shape, np.uint16 if many else np.uint8), np.zeros(shape, np.float32)

    def _views(self, properties: dict[str, Any], *arrays: Volume) -> list[Volume]:
        """The part of arrays on the CT's grid that nnU-Net did not crop, with the plan's order of axes."""
        crop = tuple(slice(*edge) for edge in properties["bbox_used_for_cropping"])
        return [array.transpose(self.plans.transpose_forward)[crop] for array in arrays]

    def _on_ct(self, logits: Tensor, properties: dict[str, Any]) -> Iterator[tuple[slice, Volume]]:
        """Logits on the CT's grid, a slab (K, n, Y, X) at a time, as in nnU-Net's export."""
        shape = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][axis] for axis in self.plans.transpose_forward]
        target = list(self.configuration.spacing)
        current = target if len(target) == len(shape) else [spacing[0], *target]
        yield from resample_logits(logits, shape, current, spacing, self.configuration)

    def _interpret(self, logits: Volume) -> tuple[Volume, NDArray[np.float32]]:
        """Labels and M^ (n, Y, X) of logits (K, n, Y, X); M^ is what G was trained with, before any threshold."""
        labels = self._predictor.label_manager
        mask = np.asarray(labels.convert_logits_to_segmentation(logits))
        logit = lesion_logit(torch.from_numpy(logits)[None], regions=labels.has_regions)[0, 0]
        probability = (logit + self._threshold_logit).sigmoid()
        return mask, ((probability * PROBABILITY_STEPS).round() / PROBABILITY_STEPS).numpy()

    @contextlib.contextmanager
    def _counted(self, on_progress: OnProgress | None, shape: Sequence[int], *, generate: bool) -> Iterator[None]:
        """Tell the share of forward passes that are done."""
        if on_progress is None:
            yield
            return
        windows = len(self._places(shape))
        mirrored = 2 ** len(self._predictor.allowed_mirroring_axes or ()) if self._predictor.use_mirroring else 1
        total = windows * len(self.folds) * (mirrored + (1 if generate else 0))
        done = 0

        def count(*_: Any) -> None:
            nonlocal done
            done += 1
            on_progress(min(1.0, done / total))

        networks = [self._predictor.network, *(generator for generator, _ in self._generators)]
        hooks = [network.register_forward_hook(count) for network in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _places(self, shape: Sequence[int]) -> list[tuple[slice, ...]]:
        """Places of the sliding window in a volume, which is padded to the patch; in each slice for 2D plans."""
        patch = self.configuration.patch_size
        flat = len(shape) - len(patch)
        size = tuple(max(edge, least) for edge, least in zip(shape[flat:], patch, strict=True))
        steps = compute_steps_for_sliding_window(size, tuple(patch), self._predictor.tile_step_size)
        slices = [range(edge) for edge in shape[:flat]]
        return [
            tuple(slice(start, start + edge) for start, edge in zip(starts, (*[1] * flat, *patch), strict=True))
            for starts in itertools.product(*slices, *steps)
        ]


def _settings(checkpoint: dict[str, Any]) -> GASNetSettings | None:
    """The settings that a checkpoint was trained with; `None` for models of other trainers."""
    arguments = checkpoint.get("init_args") or {}
    configurations = (arguments.get("plans") or {}).get("configurations", {})
    configuration: Any = configurations.get(arguments.get("configuration"), {})
    if PLANS_KEY not in configuration:
        return None
    return GASNetSettings.of_training(configuration[PLANS_KEY], source="the checkpoint")


def _fits_int16(original: Volume, generated: Tensor) -> bool:
    """Whether CT - I_s stays within 16 bits."""
    low, high = min(float(original.min()), float(generated.min())), max(float(original.max()), float(generated.max()))
    return high - low <= np.iinfo(np.int16).max
