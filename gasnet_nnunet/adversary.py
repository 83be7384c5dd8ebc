"""G, D and their optimisers: the terms they add to the S+G step, and D's own step (Algorithm 1)."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn

from gasnet_nnunet import losses
from gasnet_nnunet.intensity import IntensityWindow
from gasnet_nnunet.losses import HEALTHY, NOT_HEALTHY
from gasnet_nnunet.networks import Discriminator, Generator, Topology, build_discriminator, build_generator
from gasnet_nnunet.settings import GASNetSettings
from gasnet_nnunet.synthesis import restore

Input = Literal["healthy", "restored", "diseased", "generated"]
"""The four inputs of D: I_h, I_s, I_d, I_g."""


GENERATOR_GRADIENT = 2.0**-6
"""Factor of the gradient that enters G. Adam steps alike with any; but D makes it large, and S shares its loss scale on
cuda, which large gradients in half precision push so far down that the faint ones of S are rounded away."""


class Adversary:
    """Generator G, discriminator D and their optimisers, beside the segmenter (never inside it).

    G runs under the caller's autocast; D always in single precision, because it is small and spectral norm and
    cross-entropies suffer in half precision. Images enter in nnU-Net-normalised units and are mapped into [-1, 1] here.

    Args:
        settings: The method's numbers. Terms with weight zero cost nothing: G or D is then not built at all.
        topology: The plan's strides and kernels.
        window: Map between nnU-Net's units and [-1, 1].
        device: Where G and D live.
        num_epochs: Length of the learning-rate schedule.
    """

    def __init__(
        self,
        settings: GASNetSettings,
        topology: Topology,
        window: IntensityWindow,
        device: torch.device,
        *,
        num_epochs: int,
    ) -> None:
        self.settings = settings
        self.window = window.to(device)
        channels = len(window.bounds)
        self.generator: Generator | None = None
        self.discriminator: Discriminator | None = None
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if settings.needs_generator:
            self.generator = build_generator(settings, topology, channels).to(device)
            self.optimizers["generator"] = _adam(self.generator, settings.learning_rate_g)
        if settings.needs_discriminator:
            self.discriminator = build_discriminator(settings, topology, channels).to(device)
            self.optimizers["discriminator"] = _adam(self.discriminator, settings.learning_rate_d)
        self._schedulers = [
            PolyLRScheduler(optimizer, optimizer.param_groups[0]["lr"], num_epochs)
            for optimizer in self.optimizers.values()
        ]

    def start_epoch(self, epoch: int) -> None:
        """Set the learning rates of an epoch by nnU-Net's polynomial schedule, and training mode."""
        for scheduler in self._schedulers:
            scheduler.step(epoch)
        for network in self._networks().values():
            network.train()

    def generate(self, diseased: Tensor) -> Tensor:
        """I_g = G(I_d).

        Shape: (B, C, Z, Y, X) in [-1, 1] -> (B, C, Z, Y, X) in [-1, 1]
        """
        assert self.generator is not None
        return losses.scale_gradient(self.generator(diseased), GENERATOR_GRADIENT)

    def fooling_terms(self, diseased: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`BCE(D(I_s), 0)` and `BCE(D(I_g), 0)`, weighted: what S and G minimise of L_GAN, sharing one G(I_d).

        Args:
            diseased: I_d, (B, C, Z, Y, X), nnU-Net-normalised.
            mask: M^ with its graph, (B, 1, Z, Y, X). The gradient that flows into it is scaled by 1 / lambda_S.

        Returns:
            "L_adv" and "L_IgToD", each only where its weight is not zero.
        """
        terms: dict[str, Tensor] = {}
        if self.generator is None or self.discriminator is None:
            return terms
        x = self.window.to_window(diseased)
        generated = self.generate(x)
        # In training mode every forward would move D's spectral-norm buffers, although D is frozen here.
        self.discriminator.eval()
        self.discriminator.requires_grad_(False)
        if self.settings.weight_adversarial:
            restored = restore(x, generated, losses.scale_gradient(mask, 1 / self.settings.lambda_s))
            terms["L_adv"] = self.settings.weight_adversarial * losses.judged_as(self._judge(restored), HEALTHY)
        if self.settings.weight_generated:
            terms["L_IgToD"] = self.settings.weight_generated * losses.judged_as(self._judge(generated), HEALTHY)
        self.discriminator.requires_grad_(True)
        self.discriminator.train()
        return terms

    def reconstruction_term(self, healthy: Tensor) -> Tensor | None:
        """L_recons of G(I_h), weighted; `None` where its weight is zero.

        Shape: (B, C, Z, Y, X), nnU-Net-normalised -> scalar
        """
        if self.generator is None or not self.settings.weight_reconstruction:
            return None
        x = self.window.to_window(healthy)
        loss = losses.reconstruction_loss(self.generate(x), x, self.settings.reconstruction_loss)
        return self.settings.weight_reconstruction * loss

    def discriminator_step(self, diseased: Tensor, healthy: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """One update of D on fresh draws, all inputs in one forward.

        Args:
            diseased: I_d, (B, C, Z, Y, X), nnU-Net-normalised.
            healthy: I_h, same shape and units.
            mask: M^(I_d) without gradient, (B, 1, Z, Y, X); needed where I_s is one of D's inputs.

        Returns:
            "L_D_<input>" and "D_<input>" (mean probability of "not healthy") for each of D's inputs in use.
        """
        assert self.discriminator is not None
        inputs: dict[Input, tuple[Tensor, float, float]] = {"healthy": (self.window.to_window(healthy), HEALTHY, 1.0)}
        x = self.window.to_window(diseased)
        if self.generator is not None:
            with torch.no_grad():
                generated = self.generate(x)
            if self.settings.weight_adversarial and mask is not None:
                inputs["restored"] = (restore(x, generated, mask), NOT_HEALTHY, self.settings.weight_adversarial)
            if self.settings.weight_generated:
                inputs["generated"] = (generated, NOT_HEALTHY, self.settings.weight_generated)
        if self.settings.weight_diseased:
            inputs["diseased"] = (x, NOT_HEALTHY, self.settings.weight_diseased)

        optimizer = self.optimizers["discriminator"]
        optimizer.zero_grad(set_to_none=True)
        logits = self._judge(torch.cat([images for images, _, _ in inputs.values()])).chunk(len(inputs))
        report: dict[str, Tensor] = {}
        total = logits[0].new_zeros(())
        for (name, (_, label, weight)), logit in zip(inputs.items(), logits, strict=True):
            loss = losses.judged_as(logit, label)
            total = total + weight * loss
            report[f"L_D_{name}"] = loss.detach()
            report[f"D_{name}"] = logit.detach().sigmoid().mean()
        total.backward()
        # S and G overflow in half precision now and then. The scaler guards their steps; one such draw would cost all
        # of D's weights, and with them every later step of S.
        if torch.isfinite(nn.utils.clip_grad_norm_(self.discriminator.parameters(), math.inf)):
            optimizer.step()
        return report

    def state_dict(self) -> dict[str, Any]:
        """Weights of G and D and the states of their optimisers."""
        states: dict[str, Any] = {name: network.state_dict() for name, network in self._networks().items()}
        states |= {f"optimizer_{name}": opt.state_dict() for name, opt in self.optimizers.items()}
        return states if self.generator is None else {**states, "generator_gradient": GENERATOR_GRADIENT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name, network in self._networks().items():
            network.load_state_dict(state[name])
            self.optimizers[name].load_state_dict(state[f"optimizer_{name}"])
        ratio = GENERATOR_GRADIENT / state.get("generator_gradient", 1.0)
        if self.generator is not None and ratio != 1:
            # Moments of an earlier version's larger gradients would all but stop Adam for thousands of steps.
            for moments in self.optimizers["generator"].state.values():
                moments["exp_avg"] *= ratio
                moments["exp_avg_sq"] *= ratio**2

    def _judge(self, x: Tensor) -> Tensor:
        assert self.discriminator is not None
        # Some torch releases know no autocast on mps, not even to switch it off; it never runs under it.
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if kind in ("cuda", "cpu") else contextlib.nullcontext():
            return self.discriminator(x.float())

    def _networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module | None] = {"generator": self.generator, "discriminator": self.discriminator}
        return {name: network for name, network in networks.items() if network is not None}

    def __repr__(self) -> str:
        sizes = [
            f"{name} {sum(p.numel() for p in network.parameters()):,} parameters"
            for name, network in self._networks().items()
        ]
        return f"Adversary({', '.join(sizes) or 'no terms in use'}, {self.window})"


def _adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.5, 0.999))
