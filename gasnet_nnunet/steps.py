"""One iteration of Algorithm 1: the update of S and G, and the updates of D."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autocast, nn
from torch._dynamo import OptimizedModule
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from gasnet_nnunet import losses
from gasnet_nnunet.adversary import Adversary
from gasnet_nnunet.settings import GASNetSettings
from gasnet_nnunet.synthesis import paste_lesions, pseudo_label, visible_lesions

D_INPUTS = ("healthy", "restored", "diseased", "generated")
S_LOSSES = ("L_lab", "L_hea", "L_MIL", "L_out", "L_sus", "L_ps")
STEP_COLUMNS = (
    *S_LOSSES,
    *("L_adv", "L_IgToD", "L_recons"),
    *(f"L_D_{name}" for name in D_INPUTS),
    *(f"D_{name}" for name in D_INPUTS),
)
"""What an iteration reports, in the order of `gasnet_progress.csv`; NaN where a term is not on."""

MAX_GRADIENT_NORM = 12
"""nnU-Net's clipping of S."""

REGION_MM = 12.0
"""Half the box in which the contrast of a lesion is measured: a few vessels do not make it one."""

Loss = Callable[[Any, Any], Tensor]
Pair = dict[str, Tensor]
"""A batch of `sampling.PairLoader` on the device."""


@dataclass(frozen=True)
class SegmentationTask:
    """What S predicts and how nnU-Net scores it.

    Args:
        loss: nnU-Net's loss on S's outputs, for L_lab.
        loss_pseudo: The same with `ignore_label` ignored, for L_ps.
        level_weights: Weight of each deep-supervision level; one weight where that is off.
        deep_supervision: Whether the losses take lists of levels.
        regions: Whether the channels are regions.
        labels: Label value of each lesion channel.
        ignore_label: Label value that `loss_pseudo` ignores.
        lesions: Label values that are lesion, for regions too.
        spacing: Voxel size in mm, (Z, Y, X).
    """

    loss: Loss
    loss_pseudo: Loss
    level_weights: Sequence[float]
    deep_supervision: bool
    regions: bool
    labels: tuple[int, ...]
    ignore_label: int
    lesions: tuple[int, ...]
    spacing: tuple[float, ...]


class GASNetStep:
    """The updates of an iteration.

    S is run once a term, each with a backward of its own, so that no more than one of its graphs is held at a time; it
    steps once, after the last term.

    Args:
        settings: The method's numbers.
        task: What S predicts.
        segmenter: S.
        optimizer: Optimiser of S.
        scaler: nnU-Net's gradient scaler, which S and G share; `None` off cuda.
        adversary: G and D.
        device: Where all of it lives.

    Attributes:
        average: The moving average of S, which teaches L_ps, is validated and predicts; `None` where S does so itself.
    """

    def __init__(
        self,
        settings: GASNetSettings,
        task: SegmentationTask,
        segmenter: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        adversary: Adversary,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.task = task
        self.segmenter = segmenter
        self.optimizer = optimizer
        self.scaler = scaler
        self.adversary = adversary
        self.device = device
        self._bfloat16 = settings.cpu_bfloat16 and cpu_computes_in_bfloat16()
        self.average: AveragedModel | None = None
        if settings.averaged_iterations > 1:
            # The device is where its count lives, too.
            average = _moving_average(settings.averaged_iterations)
            self.average = AveragedModel(plain_module(segmenter), device=device, avg_fn=average)
            self.average.requires_grad_(False).eval()

    @property
    def predictor(self) -> nn.Module:
        """What predicts: the average of S, or S itself."""
        return self.segmenter if self.average is None else self.average

    @property
    def paste_strength(self) -> tuple[float, float]:
        """Range of the strength of pasted lesions; 1 where density may tell one class of lesion from another."""
        return self.settings.paste_strength if len(self.task.lesions) == 1 else (1.0, 1.0)

    def precision(self) -> AbstractContextManager[Any]:
        """Precision of S and G."""
        return training_precision(self.device.type, bfloat16=self._bfloat16)

    def zero_grad(self) -> None:
        """Begin an S+G update."""
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)

    def labelled_term(self, *batches: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """L_lab, the mean over the patches of all batches, backpropagated part by part to save memory.

        Args:
            batches: I_l, (B, C, Z, Y, X), nnU-Net-normalised, and M_l as nnU-Net's data loader gives it. S sees no more
                patches at a time than the first batch has, which is what the plans are made for.
        """
        patches, most = sum(len(image) for image, _ in batches), len(batches[0][0])
        parts = []
        for image, target in (part for batch in batches for part in _split(*batch, most)):
            with self.precision():
                loss = self.task.loss(self.segmenter(image), target)
                loss = self.settings.weight_labelled * len(image) / patches * loss
            self._backward(loss)
            parts.append(loss.detach())
        return {"L_lab": torch.stack(parts).sum()}

    def healthy_term(self, image: Tensor) -> dict[str, Tensor]:
        """L_hea, backpropagated.

        Args:
            image: I_h, (B, C, Z, Y, X), nnU-Net-normalised.
        """
        with self.precision():
            levels = as_levels(self.segmenter(image))
            loss = losses.healthy_loss(levels, self.task.level_weights, regions=self.task.regions)
            loss = self.settings.weight_healthy * loss
        self._backward(loss)
        return {"L_hea": loss.detach()}

    def diseased_terms(self, pair: Pair, *, pseudo_on: bool) -> dict[str, Tensor]:
        """L_MIL and the adversarial terms from one S(I_d) and one G(I_d); L_recons; and L_ps once it is on."""
        settings, adversary = self.settings, self.adversary
        report: dict[str, Tensor] = {}
        logits: Tensor | None = None
        alone = settings.weight_mil or settings.weight_outside or settings.weight_suspicion
        if alone or adversary.discriminator is not None:
            with self.precision():
                logits = as_levels(self.segmenter(pair["diseased"]))[0]
                if settings.weight_mil:
                    loss = losses.mil_loss(logits, regions=self.task.regions, bag=settings.patches == "bag")
                    report["L_MIL"] = settings.weight_mil * loss
                if settings.weight_outside:
                    loss = losses.outside_loss(logits, pair["near_diseased"], regions=self.task.regions)
                    report["L_out"] = settings.weight_outside * loss
                if settings.weight_suspicion:
                    loss = losses.suspicion_loss(logits, pair["lungs_diseased"], regions=self.task.regions)
                    # As much as L_hea's finest level, which it is weighed against.
                    report["L_sus"] = settings.weight_suspicion * self.task.level_weights[0] * loss
                report.update(adversary.fooling_terms(pair["diseased"], self._lesion_mask(logits, pair)))
            self._backward(torch.stack([term.float() for term in report.values()]).sum())
        if pseudo_on and (logits is None or self.average is not None):
            with torch.no_grad(), self.precision():
                logits = as_levels(self.predictor(pair["diseased"]))[0]
        with self.precision():
            reconstruction = adversary.reconstruction_term(pair["healthy"])
        if reconstruction is not None:
            report["L_recons"] = reconstruction
            self._backward(reconstruction)
        if pseudo_on and logits is not None:
            report["L_ps"] = self._pseudo_term(pair, logits.detach())
        return {name: value.detach() for name, value in report.items()}

    def step(self) -> None:
        """Clip S as nnU-Net does and step S and G once."""
        if self.scaler is not None and _has_gradients(self.optimizer):
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.segmenter.parameters(), MAX_GRADIENT_NORM)
        # Before L_ps joins, nothing may be on for one of them; a scaler that has scaled nothing refuses to step.
        optimizers = [optimizer for optimizer in self._optimizers() if _has_gradients(optimizer)]
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None and optimizers:
            self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(plain_module(self.segmenter))

    def train_discriminator(self, next_pair: Callable[[], Pair]) -> dict[str, Tensor]:
        """The D updates of an iteration, each on a fresh draw; what they report is averaged."""
        if self.adversary.discriminator is None:
            return {}
        reports: list[dict[str, Tensor]] = []
        for _ in range(self.settings.discriminator_steps):
            pair = next_pair()
            mask = None
            if self.settings.weight_adversarial:
                with torch.no_grad(), self.precision():
                    mask = self._lesion_mask(as_levels(self.segmenter(pair["diseased"]))[0], pair)
            with self.precision():
                reports.append(self.adversary.discriminator_step(pair["diseased"], pair["healthy"], mask))
        return {name: torch.stack([r[name] for r in reports]).mean() for name in (reports[0] if reports else ())}

    def pseudo_labelled(self, pair: Pair, logits: Tensor) -> tuple[Tensor, Tensor]:
        """I_ps, nnU-Net-normalised (B, C, Z, Y, X), and M_ps, from S(I_d)."""
        lesion, lungs = losses.lesion_probability(logits, regions=self.task.regions), pair["lungs"]
        if self.settings.compares_contrast:
            lungs = lungs * visible_lesions(
                self.adversary.window.to_window(pair["diseased"].float()),
                lesion,
                pair["lungs_diseased"],
                contrast=self.settings.pseudo_contrast,
                radius=[round(REGION_MM / mm) for mm in self.task.spacing],
                bag=self.settings.patches == "bag",
            )
        mask = lesion * lungs
        low, high = self.paste_strength
        strength = torch.empty(len(mask), 1, 1, 1, 1, device=mask.device).uniform_(low, high)
        label = pseudo_label(
            logits,
            lungs,
            regions=self.task.regions,
            labels=self.task.labels,
            ignore_label=self.task.ignore_label,
            margin=self.settings.pseudo_margin,
            ignore_above=self.settings.pseudo_ignore_above,
        )
        return paste_lesions(pair["diseased"], pair["healthy"], strength * mask), label

    def _pseudo_term(self, pair: Pair, logits: Tensor) -> Tensor:
        image, label = self.pseudo_labelled(pair, logits)
        with self.precision():
            levels = as_levels(self.segmenter(image))
            targets = [
                functional.interpolate(label.float(), size=level.shape[2:], mode="nearest-exact") for level in levels
            ]
            if self.task.deep_supervision:
                loss = self.task.loss_pseudo(levels, targets)
            else:
                loss = self.task.loss_pseudo(levels[0], targets[0])
            loss = self.settings.weight_pseudo * loss
        self._backward(loss)
        return loss

    def _lesion_mask(self, logits: Tensor, pair: Pair) -> Tensor:
        """M^, restricted to the lungs of I_d where the settings say so."""
        mask = losses.lesion_probability(logits, regions=self.task.regions)
        return mask * pair["lungs_diseased"] if self.settings.restore_within_organ else mask

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        generator = self.adversary.optimizers.get("generator")
        return [self.optimizer] if generator is None else [self.optimizer, generator]

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()


def cpu_computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; others would only emulate it. False where torch cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def training_precision(device: str, *, bfloat16: bool) -> AbstractContextManager[Any]:
    """nnU-Net's half precision on cuda; bfloat16 on a CPU where asked for; else single precision.

    Args:
        device: "cuda", "cpu" or "mps".
        bfloat16: Whether a CPU is to compute in bfloat16.
    """
    if device == "cuda":
        return autocast("cuda", enabled=True)
    return autocast("cpu", dtype=torch.bfloat16) if device == "cpu" and bfloat16 else nullcontext()


def plain_module(network: nn.Module) -> nn.Module:
    """S itself, without torch.compile's wrapper."""
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def _moving_average(iterations: int) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Exponential average over about so many iterations; over fewer while there are not as many yet."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        # The count stays on the device: reading it would wait for the device once a weight.
        return averaged + (current - averaged) / (1 + torch.as_tensor(count) / 10).clamp(max=iterations)

    return average


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def as_levels(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """S's outputs, finest first, with or without deep supervision."""
    return [output] if isinstance(output, Tensor) else list(output)


def _split(image: Tensor, target: Tensor | list[Tensor], patches: int) -> Iterator[tuple[Tensor, Any]]:
    """A batch in parts of at most so many patches."""
    levels = [level.split(patches) for level in as_levels(target)]
    for part, *targets in zip(image.split(patches), *levels, strict=True):
        yield part, targets if isinstance(target, list) else targets[0]


def as_numbers(report: dict[str, Tensor]) -> dict[str, float]:
    """The report of an iteration with every column, in one transfer from the device; "loss" is the sum of L_S."""
    parts = [report[name].float() for name in S_LOSSES if name in report]
    named = {"loss": torch.stack(parts).sum(), **report} if parts else dict(report)
    values = torch.stack([value.float() for value in named.values()]).tolist() if named else []
    return {"loss": 0.0, **dict.fromkeys(STEP_COLUMNS, math.nan), **dict(zip(named, values, strict=True))}
