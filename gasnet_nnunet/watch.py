"""The watch on collapse: M^ on held-out volumes after every epoch, and the gallery of what S and G make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gasnet_nnunet import losses
from gasnet_nnunet.decision import called_lesion
from gasnet_nnunet.progress import save_gallery
from gasnet_nnunet.sampling import VolumeReader, watch_patches
from gasnet_nnunet.selection import VolumeReading
from gasnet_nnunet.steps import GASNetStep, as_levels
from gasnet_nnunet.synthesis import restore

GALLERY_VOLUMES = 3


class Watch:
    """Looks at the same patches of the same volumes after every epoch.

    Args:
        reader: Access to the cases.
        step: S, G and D.
        diseased: Diseased volumes to watch.
        healthy: Healthy ones.
        patch_size: (Z, Y, X)
        patches: Patches of each volume; 1 where a patch holds the lungs.
    """

    def __init__(
        self,
        reader: VolumeReader,
        step: GASNetStep,
        diseased: Sequence[str],
        healthy: Sequence[str],
        *,
        patch_size: Sequence[int],
        patches: int,
    ) -> None:
        self.reader = reader
        self.step = step
        self.diseased = list(diseased)
        self.healthy = list(healthy)
        self.patch_size = list(patch_size)
        self.patches = patches

    @torch.no_grad()
    def readings(self) -> list[VolumeReading]:
        """Mean M^ and share called lesion in the lungs of every watched volume."""
        self.step.predictor.eval()
        cases = [(case, False) for case in self.diseased] + [(case, True) for case in self.healthy]
        return [self._reading(case, healthy) for case, healthy in cases]

    @torch.no_grad()
    def draw_gallery(self, path: Path, *, pseudo_on: bool, aspect: float) -> None:
        """Draw I_d, M^, I_g, I_s and, once they are on, I_ps and M_ps of a few watched diseased volumes."""
        cases = self.diseased[:GALLERY_VOLUMES]
        if not cases:
            return
        self.step.predictor.eval()
        rows = [
            {name: volume[0, 0].float().cpu().numpy() for name, volume in self._panels(case, pseudo_on).items()}
            for case in cases
        ]
        path.parent.mkdir(exist_ok=True)
        save_gallery(path, rows, titles=cases, aspect=aspect)

    def _panels(self, case: str, pseudo_on: bool) -> dict[str, Tensor]:
        settings, adversary, task = self.step.settings, self.step.adversary, self.step.task
        images, lungs = self._read(case)
        logits = self._logits(images)
        m = losses.lesion_probability(logits, regions=task.regions)
        most = int(m.flatten(1).sum(1).argmax())
        pick = slice(most, most + 1)
        x = adversary.window.to_window(images[pick])
        panels = {"I_d": x, "M^": m[pick]}
        if adversary.generator is not None:
            with self.step.precision():
                panels["I_g"] = adversary.generate(x)
            shown = m[pick] * lungs[pick] if settings.restore_within_organ else m[pick]
            panels["I_s"] = restore(x, panels["I_g"], shown)
        if pseudo_on and self.healthy:
            healthy, healthy_lungs = self._read(self.healthy[0])
            pair = {
                "diseased": images[pick],
                "lungs_diseased": lungs[pick],
                "healthy": healthy[pick],
                "lungs": healthy_lungs[pick],
            }
            image, label = self.step.pseudo_labelled(pair, logits[pick])
            panels["I_ps"] = adversary.window.to_window(image)
            if task.regions:
                lesion, ignored = label[:, :-1].any(1, keepdim=True), label[:, -1:]
            else:
                lesion, ignored = label > 0, label == task.ignore_label
            panels["M_ps"] = torch.where(ignored, 2, lesion.long())
        return panels

    def _reading(self, case: str, healthy: bool) -> VolumeReading:
        images, lungs = self._read(case)
        logits, regions = self._logits(images), self.step.task.regions
        m = losses.lesion_probability(logits, regions=regions)
        called = called_lesion(logits, self.step.settings.lesion_threshold, regions=regions)
        size = lungs.sum().clamp(min=1)
        return VolumeReading(case, healthy, float((m * lungs).sum() / size), float((called * lungs).sum() / size))

    def _logits(self, images: Tensor) -> Tensor:
        # One patch at a time: a bag may be larger than the batches that fit the device in training.
        with self.step.precision():
            return torch.cat([as_levels(self.step.predictor(image[None]))[0] for image in images])

    def _read(self, case: str) -> tuple[Tensor, Tensor]:
        images, lungs = watch_patches(self.reader, case, self.patch_size, self.patches)
        return images.to(self.step.device), lungs.to(self.step.device)
