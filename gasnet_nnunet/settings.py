"""Every number of the method, in one frozen dataclass that lives in the nnU-Net plans.

A plans file carries them under `configurations.<configuration>.gasnet`, so that a run is changed by editing the plans
(or by `gasnet-nnunet plan --set key=value`), never by a subclass. What the plans leave out takes the default below;
the trainer writes the resolved values back, so that the model folder and the checkpoint hold all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, TypeAdapter, ValidationError

from gasnet_nnunet.errors import UserError, hint

PLANS_KEY = "gasnet"
"""Where the settings stand inside a configuration of the plans."""

NOT_YET = {
    "discriminator_gain": 1.0,
    "cpu_bfloat16": False,
    "weight_outside": 0.0,
    "outside_margin_mm": 20.0,  # of no effect without L_out
    "weight_suspicion": 0.0,
    "pseudo_contrast": 0.0,
    "pasted_share": 0.0,
    "paste_strength": (1.0, 1.0),
    "averaged_iterations": 1,
    "lesion_threshold": 0.5,
    "init_from": None,
}
"""How something was trained whose settings lack one of these: they hold all that there were.

Every setting that came after the first trainings stands here, because its default may change.
"""

OF_DISCRIMINATOR = (
    *("learning_rate_d", "discriminator_features", "discriminator_layers", "discriminator_norm", "discriminator_gain"),
    *("discriminator_steps", "weight_diseased", "restore_within_organ", "lambda_s"),
)
OF_GENERATOR = (
    *("learning_rate_g", "generator_features", "generator_downsamplings", "generator_residual_blocks"),
    "reconstruction_loss",
)
OF_PSEUDO = ("pseudo_start", "pseudo_margin", "pseudo_ignore_above", "pseudo_contrast")
"""Settings of no effect where there is no discriminator, no generator or no L_ps."""

Weight = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LearningRate = Annotated[float, Field(gt=0.0, lt=10.0)]
Count = Annotated[int, Field(ge=1)]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
)
class GASNetSettings:
    """Settings of one GASNet training. Symbols and equations are those of the paper (arXiv 2010.09456).

    Args:
        num_epochs: Epochs of the training.
        iterations_per_epoch: S+G updates in an epoch.
        validation_iterations_per_epoch: Validation batches in an epoch, as in nnU-Net.
        seed: Seed of the first weights and, with `nnUNet_n_proc_DA=0` alone, of the patches: nnU-Net's workers draw by
            chance, whatever the seed. `None` leaves both to chance.
        save_every_minutes: `checkpoint_latest.pth` is written at the end of the first epoch that ends this many
            minutes after the last save (and every 50 epochs, as in nnU-Net).
        gallery_every_epochs: How often the gallery of I_d, M^, I_g, I_s, I_ps and M_ps is drawn; 0 for never.
        cpu_bfloat16: Train in bfloat16 on a CPU that computes in it (AVX512-BF16, AMX), which is nearly twice as fast;
            other CPUs train in single precision, cuda in nnU-Net's half precision. D is always in single precision.
        optimizer_s: Optimiser of S: nnU-Net's SGD (Nesterov momentum 0.99) or Adam (the authors' code).
        learning_rate_s: Initial learning rate of S; decays by nnU-Net's polynomial schedule.
        weight_decay_s: Weight decay of S.
        segmentation_loss: Loss of L_lab and L_ps: nnU-Net's Dice + cross-entropy, or cross-entropy alone (the paper).
        learning_rate_g: Learning rate of G (Adam).
        learning_rate_d: Learning rate of D (Adam).
        generator_features: Feature maps of G at full resolution; doubled at each of its down-samplings.
        generator_downsamplings: Strided stages of G, the plan's own and at most as many (CycleGAN: 2).
        generator_residual_blocks: Residual blocks at G's lowest resolution.
        discriminator_features: Feature maps of D's first convolution; doubled with each further one.
        discriminator_layers: Strided convolutions of D, with the plan's strides and at most as many.
        discriminator_norm: Normalisation inside D beside the spectral norm. Instance norm removes the mean density of
            a feature map, which is what ground glass changes.
        discriminator_gain: Factor after each convolution of D, which spectral norm would otherwise let shrink every
            difference until D sees none (see `networks.Discriminator`).
        discriminator_steps: D updates on fresh draws after each S+G update (the paper's theta_i).
        lambda_s: Weight of L_S against L_GAN (the paper's lambda_S). S sees `L_S + L_GAN / lambda_s`.
        weight_labelled: Weight of L_lab.
        weight_healthy: Weight of L_hea, the cross-entropy of S(I_h) against zero.
        weight_mil: Weight of L_MIL.
        weight_pseudo: Weight of L_ps.
        weight_outside: Weight of L_out, the cross-entropy of S(I_d) against zero farther than `outside_margin_mm` from
            the lungs of I_d: what is known of a diseased volume without a mask. Not in the paper.
        outside_margin_mm: Distance from the lungs in mm up to which L_out says nothing, because a consolidation may
            have been taken for the chest wall when the lungs were found.
        weight_suspicion: Weight of L_sus, by which every voxel in the lungs of I_d counts as lesion. Against L_hea it
            makes M^ rise for what diseased volumes show about 1 / `weight_suspicion` times as often as healthy ones
            (0.05 is a start). Off, because what the few healthy volumes do not show becomes lesion as well.
        weight_adversarial: Weight of `BCE(D(I_s), 0)` in the S+G step; 0 takes I_s out of D's step as well.
        weight_generated: Weight of L_IgToD, in the S+G step and in D's step.
        weight_diseased: Weight of L_IdToD in D's step.
        weight_reconstruction: Weight of L_recons.
        reconstruction_loss: Mean squared error (the paper) or mean absolute error (the authors' code).
        restore_within_organ: Multiply M^ by the lung mask of the diseased volume in I_s (the authors' code; not the
            paper).
        pseudo_start: Fraction of the training after which L_ps joins (paper: 7,000 of 14,000 iterations).
        pseudo_margin: The paper's xi: M_ps is lesion from 0.5 + xi on, background up to 0.5 - xi, ignored between.
        pseudo_ignore_above: Voxels with m above this and not above 0.5 - xi are ignored as well, instead of becoming
            background although I_ps carries some of the lesion; `None` as published.
        pseudo_contrast: What S calls lesion is pasted where it is denser than the rest of its own lungs by at least
            this share of the intensity window (0.05 of 1500 HU are 75 HU); without effect for other organs. 0 for all
            of it (the paper).
        pasted_share: Patches for each of the labelled batch, beside it, in which the labelled lesions lie in a healthy
            volume, each moved and augmented in its own way: L_ps of a case whose mask is known. L_lab is the mean over
            both. Not in the paper, where it is 0.
        paste_strength: Range from which the strength of a pasted lesion is drawn, for both kinds of pasting; below 1
            the healthy tissue shines through (1 to 1: the paper, and wherever there are several classes of lesion,
            which density may tell apart).
        averaged_iterations: Iterations over which S is averaged (exponentially); the average teaches L_ps, is
            validated, saved and predicts. 1 for S as it is (the paper).
        lesion_threshold: Probability of the most probable lesion, against the background, above which a trained model
            calls a voxel lesion. The biases of S's heads carry it in every checkpoint, so that nnU-Net predicts by it;
            training is the same with any, but for the choice of `checkpoint_best`. 0.5 is nnU-Net's way.
        patches: Whether a patch holds the whole lungs ("volume") or a diseased patient is a bag of patches ("bag").
            "auto" takes "volume" for plans by `gasnet-nnunet plan` and "bag" for nnU-Net's own.
        bag_size: Patches of one patient that make a bag; at least 4 where the patches are bags.
        volumes_per_step: Diseased (and as many healthy) volumes of a step where a patch holds a volume; `None` for
            the plan's batch size.
        labelled_as_diseased: The voxel-labelled cases serve as I_d too.
        healthy_outside: Share of the healthy patches of L_hea drawn anywhere in the scan instead of around the
            lungs, because the sliding window of a prediction covers neck and abdomen as well.
        centre_jitter: Patches that hold the lungs are centred on the lung box up to this share of the patch size.
        watch_volumes: Held-out volumes of each kind on which M^ is watched after every epoch; 0 for all.
        baseline_healthy: `SupervisedBaselineTrainer` learns L_hea on the healthy volumes too, beside L_lab.
        organ: What takes the place of the lungs: "lungs", "body" (for other organs in CT) or "volume" (no mask).
        rotation_degrees: Rotations are drawn from plus and minus this angle around every axis; `None` for nnU-Net's
            own range, which is 180 degrees in plane where a patch has an axis ratio above 3.
        mirror_axes: Axes of the (Z, Y, X) patch that are mirrored in training and at test time; `None` for nnU-Net's
            own choice (all three). Chests do not stand on their heads.
        window: Lower and upper end of each channel's intensity window in nnU-Net-normalised units, which become -1
            and 1 for G and D. `None` for the clip bounds of CTNormalization, or the 0.5 and 99.5 percentiles of the
            preprocessed data where another scheme is planned.
        init_from: Checkpoint of a model of ours whose S (with its heads), G and D the training starts from, for
            instance to go on with another archive (the paper's GASNet_finetune).

    Examples:
        >>> GASNetSettings(num_epochs=5).num_epochs
        5
        >>> GASNetSettings.from_dict({"pseudo_margin": 0.2}).to_dict()["pseudo_margin"]
        0.2
    """

    num_epochs: Count = 100
    iterations_per_epoch: Count = 250
    validation_iterations_per_epoch: Count = 25
    seed: Annotated[int, Field(ge=0)] | None = None
    save_every_minutes: Annotated[float, Field(gt=0.0)] = 10.0
    gallery_every_epochs: Annotated[int, Field(ge=0)] = 5
    cpu_bfloat16: bool = False

    optimizer_s: Literal["sgd", "adam"] = "sgd"
    learning_rate_s: LearningRate = 1e-2
    weight_decay_s: Weight = 3e-5
    segmentation_loss: Literal["dice_ce", "ce"] = "dice_ce"

    learning_rate_g: LearningRate = 1e-4
    learning_rate_d: LearningRate = 1e-4
    generator_features: Count = 16
    generator_downsamplings: Count = 2
    generator_residual_blocks: Annotated[int, Field(ge=0)] = 4
    discriminator_features: Count = 16
    discriminator_layers: Count = 3
    discriminator_norm: Literal["none", "instance"] = "none"
    discriminator_gain: Annotated[float, Field(gt=0.0, le=100.0)] = 4.0
    discriminator_steps: Annotated[int, Field(ge=0)] = 5

    lambda_s: Annotated[float, Field(gt=0.0)] = 100.0
    weight_labelled: Weight = 1.0
    weight_healthy: Weight = 1.0
    weight_mil: Weight = 1.0
    weight_pseudo: Weight = 1.0
    weight_outside: Weight = 1.0
    outside_margin_mm: Annotated[float, Field(ge=0.0)] = 20.0
    weight_suspicion: Weight = 0.0
    weight_adversarial: Weight = 1.0
    weight_generated: Weight = 1.0
    weight_diseased: Weight = 1.0
    weight_reconstruction: Weight = 1.0
    reconstruction_loss: Literal["mse", "l1"] = "mse"
    restore_within_organ: bool = False

    pseudo_start: Fraction = 0.25
    pseudo_margin: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.3
    pseudo_ignore_above: Fraction | None = None
    pseudo_contrast: Fraction = 0.05
    pasted_share: Annotated[float, Field(ge=0.0, le=4.0)] = 2.0
    paste_strength: tuple[Fraction, Fraction] = (0.7, 1.0)
    averaged_iterations: Count = 1
    lesion_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8

    patches: Literal["auto", "volume", "bag"] = "auto"
    bag_size: Count = 4
    volumes_per_step: Count | None = None
    labelled_as_diseased: bool = True
    healthy_outside: Fraction = 0.2
    centre_jitter: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    watch_volumes: Annotated[int, Field(ge=0)] = 6
    baseline_healthy: bool = False
    organ: Literal["lungs", "body", "volume"] = "lungs"
    rotation_degrees: Annotated[float, Field(ge=0.0, le=180.0)] | None = 15.0
    mirror_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] | None = (2,)
    window: tuple[tuple[float, float], ...] | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        of_s = ("weight_labelled", "weight_healthy", "weight_mil", "weight_pseudo", "weight_adversarial")
        if not any(getattr(self, name) for name in of_s):
            raise ValueError(f"nothing trains S: {', '.join(of_s)} are all 0, and one of them has to be above")
        if self.patches == "bag" and self.bag_size < 4:
            raise ValueError(f"bag_size is {self.bag_size}, but a bag needs at least 4 patches to cover the lungs")
        if self.mirror_axes is not None and len(set(self.mirror_axes)) != len(self.mirror_axes):
            raise ValueError(f"mirror_axes names an axis twice: {list(self.mirror_axes)}")
        if not self.paste_strength[0] <= self.paste_strength[1]:
            raise ValueError(f"paste_strength must rise from its lower to its upper end, not {self.paste_strength}")
        if self.window == ():
            raise ValueError("window names no channel; give each one's lower and upper end, or null")
        for low, high in self.window or ():
            if not low < high:
                raise ValueError(f"window must rise from its lower to its upper end, not {low} to {high}")
        if self.pseudo_ignore_above is not None and self.pseudo_ignore_above > 0.5 - self.pseudo_margin:
            raise ValueError(
                f"pseudo_ignore_above is {self.pseudo_ignore_above}, above 0.5 - pseudo_margin = "
                f"{0.5 - self.pseudo_margin:g}, where voxels are ignored anyway"
            )

    @property
    def needs_generator(self) -> bool:
        """Whether any term of G is on."""
        return bool(self.weight_adversarial or self.weight_generated or self.weight_reconstruction)

    @property
    def needs_discriminator(self) -> bool:
        """Whether a term that D's verdict reaches is on; without one, training D would be for nothing."""
        return bool(self.weight_adversarial or self.weight_generated)

    @property
    def compares_contrast(self) -> bool:
        """Whether L_ps compares lesions with the rest of their organ, which only lungs are even enough for."""
        return bool(self.weight_pseudo and self.pseudo_contrast) and self.organ == "lungs"

    def pasted_patches(self, batch_size: int) -> int:
        """How many patches with labelled lesions in a healthy volume are added to a labelled batch of `batch_size`."""
        return round(self.pasted_share * batch_size) if self.weight_labelled else 0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all settings, in the order of their declaration."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the settings") -> GASNetSettings:
        """Validate settings as they stand in a plans or preset file.

        Args:
            values: Setting names and JSON values. What is missing takes its default.
            source: Where they were read, for the error message.

        Raises:
            UserError: No mapping, an unknown name (the valid ones are listed) or an impossible value.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"Expected {source} to be names and values in braces, found {values!r}.")
        for name in values:
            if name not in cls.names():
                raise UserError(
                    f"Unknown setting '{name}' in {source}.{hint(str(name), cls.names())} Valid settings: "
                    f"{', '.join(cls.names())}."
                )
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            problems = []
            for problem in error.errors():
                name = str(problem["loc"][0]) if problem["loc"] else ""
                found = f" (found {values[name]!r})" if name in values else ""
                problems.append(f"{name + ': ' if name else ''}{problem['msg'].removeprefix('Value error, ')}{found}")
            raise UserError(f"Impossible setting in {source}: {'; '.join(dict.fromkeys(problems))}.") from None

    @classmethod
    def of_training(cls, values: Mapping[str, Any], *, source: str) -> GASNetSettings:
        """Settings that something was trained with, perhaps before all of them were there.

        Args:
            values: As in a checkpoint or a log; the defaults if it holds none.
            source: As for `from_dict`.

        Raises:
            UserError: As `from_dict`.
        """
        known = {**NOT_YET, **values} if isinstance(values, Mapping) and values else values
        return cls.from_dict(known, source=source)

    def supervised(self) -> GASNetSettings:
        """Settings of the supervised baseline: every term that needs a diseased volume is off, nnU-Net's decision."""
        return self.replace(
            weight_healthy=self.weight_healthy if self.baseline_healthy else 0.0,
            weight_mil=0.0,
            weight_outside=0.0,
            weight_suspicion=0.0,
            weight_pseudo=0.0,
            pasted_share=0.0,
            weight_adversarial=0.0,
            weight_generated=0.0,
            weight_diseased=0.0,
            weight_reconstruction=0.0,
            lesion_threshold=0.5,
        )

    def decisive(self) -> dict[str, Any]:
        """JSON-compatible values of the settings that a model depends on.

        Those of a term that is off are left out, and so are those that stand at what was done before they were there:
        a new version of the package asks for no new training where it trains as before.
        """
        idle = {"save_every_minutes", "gallery_every_epochs", "baseline_healthy"}
        for on, names in (
            (self.needs_generator, OF_GENERATOR),
            (self.needs_discriminator, OF_DISCRIMINATOR),
            (self.weight_outside, ("outside_margin_mm",)),
            (self.weight_healthy, ("healthy_outside",)),
            (self.weight_pseudo, OF_PSEUDO),
            (self.weight_pseudo or self.pasted_share, ("paste_strength",)),
        ):
            if not on:
                idle |= set(names)
        before = json.loads(json.dumps(NOT_YET))
        values = self.to_dict()
        return {
            name: value
            for name, value in values.items()
            if name not in idle and not (name in before and value == before[name])
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values of all settings."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def replace(self, **changes: Any) -> GASNetSettings:
        """A validated copy with some settings changed.

        Raises:
            UserError: As `from_dict`.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def differences(self, other: GASNetSettings) -> list[str]:
        """One line for each setting in which `other` differs, as 'name: mine -> theirs'."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{name}: {mine[name]} -> {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Turn `key=value` words of the command line into settings; a value is JSON, or else a plain string.

    Examples:
        >>> parse_assignments(["num_epochs=5", "mirror_axes=[2]", "organ=body", "seed=null"])
        {'num_epochs': 5, 'mirror_axes': [2], 'organ': 'body', 'seed': None}

    Raises:
        UserError: A word without '='.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"--set takes key=value, found '{assignment}'. Valid keys: {', '.join(GASNetSettings.names())}."
            )
        try:
            values[name.strip()] = json.loads(text)
        except json.JSONDecodeError:
            values[name.strip()] = text
    return values


def plans_folder() -> Path:
    """Folder of the reference plans and presets, in an installed package or in a clone."""
    here = Path(__file__).resolve().parent
    return here / "plans" if (here / "plans").is_dir() else here.parent / "plans"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in plans_folder().glob("*.json"))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A reference set of planning choices and settings.

    Args:
        name: Name for `--preset`.
        description: What it is for.
        deviations: Where it differs from the paper although it follows it; empty unless it claims to.
        planning: Choices of the planner: `patch_size` (Z, Y, X), `base_features`, `max_features`, `batch_size`,
            `hu_window`, each optional.
        settings: Settings that differ from the defaults.
    """

    name: str
    description: str
    deviations: tuple[str, ...]
    planning: dict[str, Any]
    settings: GASNetSettings


def load_preset(name: str) -> Preset:
    """Read a preset of the package by its name.

    Raises:
        UserError: There is no preset of that name; the existing ones are listed.
    """
    path = plans_folder() / f"{name}.json"
    if name not in preset_names():
        raise UserError(f"There is no preset '{name}'. Presets: {', '.join(preset_names())}.")
    content = json.loads(path.read_text(encoding="utf-8"))
    return Preset(
        name=name,
        description=content["description"],
        deviations=tuple(content.get("deviations", ())),
        planning=content["planning"],
        settings=GASNetSettings.from_dict(content["settings"], source=f"the preset {name}"),
    )
