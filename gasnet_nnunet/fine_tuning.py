"""Going on with a trained model on other data: the paper's GASNet_finetune (its section IV.B).

nnU-Net's `-pretrained_weights` skips S's heads and knows no G and D. The setting `init_from` names a checkpoint of
ours, and a training with it starts from all three networks, with fresh optimisers at epoch 0. That presumes the
network, the intensities and the spacing they were trained with: `gasnet-nnunet plan --init-from` takes them over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._dynamo import OptimizedModule

from gasnet_nnunet.adversary import Adversary
from gasnet_nnunet.checkpoints import CHECKPOINT_KEY, read_checkpoint
from gasnet_nnunet.decision import weights_in_training
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.settings import PLANS_KEY, GASNetSettings

TAKE_OVER = "Plan the new dataset with: gasnet-nnunet plan -d N --init-from {}"
IGNORE = "ignore"
WINDOW_KEYS = ("percentile_00_5", "percentile_99_5", "mean", "std")
"""nnU-Net's intensity properties that its CTNormalization uses."""


@dataclass(frozen=True)
class Origin:
    """A trained model to go on from.

    Args:
        path: Its checkpoint.
        trainer: Name of the trainer that wrote it.
        plans: Plans it was trained with.
        configuration: The configuration of these plans, whatever it inherits included.
        dataset_json: Of the dataset it was trained on.
        weights: Weights of S with its heads, without the threshold in them; of its average where S was averaged,
            because that is what predicts.
        adversary: State of G, D and their optimisers; `None` where the checkpoint holds none.
    """

    path: Path
    trainer: str
    plans: dict[str, Any]
    configuration: dict[str, Any]
    dataset_json: dict[str, Any]
    weights: dict[str, Any]
    adversary: dict[str, Any] | None

    @property
    def settings(self) -> GASNetSettings:
        """The settings it was trained with; the defaults where another trainer wrote it.

        Raises:
            UserError: It has settings that this version does not know.
        """
        return GASNetSettings.of_training(self.configuration.get(PLANS_KEY, {}), source=f"the plans in {self.path}")

    def check_dataset(self, dataset_json: Mapping[str, Any]) -> None:
        """Refuse a dataset on which its S cannot go on.

        Raises:
            UserError: Other lesion labels or image channels. The ignore label is no output of S and may differ.
        """
        differences = []
        for name, part in (("labels", _outputs), ("channel_names", _channels)):
            mine, theirs = part(self.dataset_json), part(dataset_json)
            if mine != theirs:
                differences.append(f"{name} {_compact(mine)} there, {_compact(theirs)} here")
        if differences:
            raise UserError(
                f"The model in {self.path} was trained on other outputs or inputs than this dataset has: "
                f"{'; '.join(differences)}. They have to be the same, names and values; make them so in dataset.json "
                "if they mean the same, or start without init_from."
            )

    def check_network(self, configuration: Mapping[str, Any]) -> None:
        """Refuse plans of another network.

        Raises:
            UserError: The architecture differs; all differences are listed.
        """
        mine, theirs = self.configuration["architecture"], configuration["architecture"]
        names = {"network_class_name": (mine["network_class_name"], theirs["network_class_name"])}
        for name in dict.fromkeys([*mine["arch_kwargs"], *theirs["arch_kwargs"]]):
            names[name] = (mine["arch_kwargs"].get(name), theirs["arch_kwargs"].get(name))
        differences = [
            f"{name} {_compact(one)} there, {_compact(other)} here"
            for name, (one, other) in names.items()
            if _plain(one) != _plain(other)
        ]
        if differences:
            raise UserError(
                f"The model in {self.path} has another architecture than the plans: {'; '.join(differences)}. "
                f"{TAKE_OVER.format(self.path)}"
            )

    def check_adversary(self, settings: GASNetSettings) -> None:
        """Refuse settings that need a network which the checkpoint does not hold.

        Raises:
            UserError: As said.
        """
        needed = {"generator": settings.needs_generator, "discriminator": settings.needs_discriminator}
        missing = [name for name, is_needed in needed.items() if is_needed and name not in (self.adversary or {})]
        if missing:
            raise UserError(
                f"{self.path} holds no {' and no '.join(missing)}: it was written by {self.trainer} or exported. Name "
                "a checkpoint of GASNetTrainer, or take S alone, without its heads, by nnU-Net's -pretrained_weights."
            )

    def preprocessing_differences(self, plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> list[str]:
        """In what the new data look different to S from those it was trained on, one line each."""
        values = {
            name: (self.configuration[name], configuration[name])
            for name in ("spacing", "patch_size", "normalization_schemes")
        }
        properties = "foreground_intensity_properties_per_channel"
        for channel, scheme in enumerate(configuration["normalization_schemes"]):
            if scheme == "CTNormalization":
                mine, theirs = (
                    {key: content[properties][str(channel)][key] for key in WINDOW_KEYS}
                    for content in (self.plans, plans)
                )
                values[f"intensities of channel {channel}"] = (mine, theirs)
        return [
            f"{name}: {_compact(mine)} -> {_compact(theirs)}"
            for name, (mine, theirs) in values.items()
            if _plain(mine) != _plain(theirs)
        ]

    def load_into(self, network: nn.Module, adversary: Adversary) -> None:
        """Give S, G and D the weights; optimisers and schedules stay as they are.

        Args:
            network: S, compiled or not.
            adversary: G and D, as far as the training has them.

        Raises:
            UserError: It holds no G or D, although this training has them, or networks of other sizes.
        """
        self.check_adversary(adversary.settings)
        self._load(
            network._orig_mod if isinstance(network, OptimizedModule) else network, self.weights, "segmenter", {}
        )
        for name, target in (("generator", adversary.generator), ("discriminator", adversary.discriminator)):
            if target is not None:
                assert self.adversary is not None
                sizes = {
                    key: value for key, value in adversary.settings.to_dict().items() if key.startswith(f"{name}_")
                }
                self._load(target, self.adversary[name], name, sizes)

    def _load(self, network: nn.Module, weights: dict[str, Any], name: str, sizes: Mapping[str, Any]) -> None:
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            trained = self.configuration.get(PLANS_KEY, {})
            differences = [
                f"{key}: {trained.get(key)} -> {sizes[key]}" for key in sizes if trained.get(key) != sizes[key]
            ]
            reason = "; ".join(differences) or " ".join(str(error).split())[:300]
            raise UserError(
                f"The {name} in {self.path} is of another size than the plans say ({reason}). "
                f"{TAKE_OVER.format(self.path)}"
            ) from None


def read_origin(checkpoint: str | Path) -> Origin:
    """Read the model to go on from.

    Args:
        checkpoint: A checkpoint of GASNetTrainer or SupervisedBaselineTrainer.

    Raises:
        UserError: The file is missing, truncated or no checkpoint of nnU-Net's.
    """
    path = Path(checkpoint).expanduser().resolve()
    if not path.is_file():
        raise UserError(
            f"init_from names {path}, which is no file. Name a checkpoint of a trained model, such as "
            ".../fold_0/checkpoint_final.pth."
        )
    content = read_checkpoint(path)
    if "init_args" not in content:
        raise UserError(f"{path} does not tell the plans it was trained with, so it is no checkpoint of nnU-Net's.")
    arguments = content["init_args"]
    plans = arguments["plans"]
    return Origin(
        path=path,
        trainer=str(content.get("trainer_name")),
        plans=plans,
        configuration=PlansManager(plans).get_configuration(arguments["configuration"]).configuration,
        dataset_json=arguments["dataset_json"],
        weights=weights_in_training(content),
        adversary=content.get(CHECKPOINT_KEY, {}).get("adversary"),
    )


def _outputs(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """What S's heads stand for: labels or regions, and their order, but not the ignore label."""
    labels = {name: value for name, value in dataset_json["labels"].items() if name != IGNORE}
    order = dataset_json.get("regions_class_order")
    return {**labels, **({"regions_class_order": order} if order else {})}


def _channels(dataset_json: Mapping[str, Any]) -> list[str]:
    names = dataset_json["channel_names"]
    return [str(names[channel]).casefold() for channel in sorted(names, key=int)]


def _plain(value: Any) -> Any:
    """As JSON has it, where tuples are lists."""
    return json.loads(json.dumps(value))


def _compact(value: Any) -> str:
    return json.dumps(value)
