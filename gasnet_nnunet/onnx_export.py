"""The segmenter alone as ONNX, and a description of all that nnU-Net does around it.

The graph takes one patch of fixed size to logits. Whoever runs it without nnU-Net finds in the JSON file beside it how
nnU-Net makes patches of a scan and a mask of logits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gasnet_nnunet import __version__
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.export import Case, check_output
from gasnet_nnunet.files import written_whole
from gasnet_nnunet.model_card import INTENDED_USE
from gasnet_nnunet.trained_model import TrainedModel

OPSET = 18
TOLERANCE = 1e-3
"""Greatest difference of logits between torch and onnxruntime, relative to the greatest logit (or 1)."""


@dataclass(frozen=True)
class ExportedONNX:
    """An ONNX file that was written.

    Args:
        file: The graph.
        description: The JSON file beside it.
        difference: Greatest difference of a logit from torch's.
        checked_on: What was compared.
    """

    file: Path
    description: Path
    difference: float
    checked_on: str


class Ensemble(nn.Module):
    """The mean of several networks' logits, which is how nnU-Net joins folds."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        """Shape: patch (1, C, Z, Y, X) -> logits (1, K, Z, Y, X)."""
        logits = self.networks[0](patch)
        for network in list(self.networks)[1:]:
            logits = logits + network(patch)
        return logits / len(self.networks)


def export_onnx(
    model: TrainedModel, output: Path, *, case: Case | None = None, overwrite: bool = False
) -> ExportedONNX:
    """Write S as ONNX, with a JSON file of the same name beside it.

    Args:
        model: The model; its folds are averaged in the graph.
        output: The graph, a `.onnx`.
        case: A case whose middle patch is compared as well as one of noise.
        overwrite: Replace files that exist.

    Raises:
        UserError: The packages are not installed, a file exists or cannot be written, the network cannot be translated,
            or onnxruntime and torch disagree.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch translates with
    except ImportError as error:
        raise UserError(
            f"--onnx needs the package {error.name}. Install it: pip install 'gasnet-nnunet[onnx]'"
        ) from None
    description = output.with_suffix(".json")
    check_output(output, ".onnx", overwrite=overwrite)
    check_output(description, ".json", overwrite=overwrite)
    predictor = model.predictor(torch.device("cpu"))
    patch_size = [int(size) for size in predictor.configuration_manager.patch_size]
    channels = len(model.dataset_json.get("channel_names", model.dataset_json.get("modality", {})))
    network = _network(model, predictor.network)
    patches = [torch.randn(1, channels, *patch_size, generator=torch.Generator().manual_seed(0))]
    if case is not None:
        patches.append(_middle(case.load(predictor)[0], patch_size))
    with written_whole(output, description) as (graph, text):
        try:
            _translate(network, patches[0], graph)
            program = onnx.load(graph)
            _forget_places(program)
            onnx.checker.check_model(program)
            onnx.save(program, graph)
        except OSError as error:
            raise UserError(
                f"{output} could not be written: {error.strerror}. Make room there, or correct -o."
            ) from None
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        difference = max(_difference(network, session, patch, model) for patch in patches)
        content = describe(model, output.name, hashlib.sha256(graph.read_bytes()).hexdigest())
        text.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    checked_on = "a patch of noise" + ("" if case is None else f" and the middle of {case.name}")
    return ExportedONNX(output, description, difference, checked_on)


def describe(model: TrainedModel, file: str, sha256: str) -> dict[str, Any]:
    """What nnU-Net does before and after the network, for whoever runs the graph without it.

    Args:
        model: The model.
        file: Name of the graph's file.
        sha256: Its checksum.
    """
    manager = model.manager
    configuration = manager.get_configuration(model.configuration)
    labels = manager.get_label_manager(model.dataset_json)
    names = {json.dumps(value): name for name, value in model.dataset_json["labels"].items()}
    heads = labels.foreground_regions if labels.has_regions else labels.all_labels
    head_names = [
        names.get(json.dumps(list(head) if isinstance(head, tuple) else int(head)), str(head)) for head in heads
    ]
    shape = [int(size) for size in configuration.patch_size]
    channels = model.dataset_json.get("channel_names", model.dataset_json.get("modality", {}))
    axes = ["z", "y", "x"][-len(shape) :]
    if labels.has_regions:
        decide = {
            "step": "decide",
            "how": "sigmoid of each head; from the first head to the last, where it is above 0.5 the voxel gets that "
            "head's value, which overwrites earlier ones; elsewhere 0. The heads carry the threshold of the training",
            "values": list(model.dataset_json["regions_class_order"]),
        }
    else:
        decide = {
            "step": "decide",
            "how": "the label of the head with the greatest logit; the softmax over heads gives probabilities. The "
            "heads carry the threshold of the training",
            "values": [int(label) for label in heads],
        }
    resize = (
        "each channel in double precision by scikit-image's resize of this order (mode 'edge', anti_aliasing=False), "
        "all axes at once. But where force_separate_z is null and the greatest of the old spacings, or else of the new "
        "ones, is over 3 times the least and no other equals it, slices across that axis are resized one by one in "
        "plane, and then along that axis the whole by scipy.ndimage.map_coordinates of order_z (mode 'nearest') at "
        "scale * (index + 0.5) - 0.5"
    )
    return {
        "format": "gasnet-nnunet ONNX description 1",
        "file": file,
        "sha256": sha256,
        "opset": OPSET,
        "intended_use": INTENDED_USE,
        "made_by": {name: version(name) for name in ("nnunetv2", "torch", "onnx")} | {"gasnet-nnunet": __version__},
        "model": f"{model.plans['dataset_name']} {model.trainer} {model.plans['plans_name']} {model.configuration}",
        "folds": [fold.name for fold in model.folds],
        "ensemble": "the graph returns the mean of the logits of these folds",
        "input": {
            "name": "patch",
            "dtype": "float32",
            "shape": [1, len(channels), *shape],
            "axes": ["batch", "channel", *axes],
            "channels": list(channels.values()),
        },
        "output": {
            "name": "logits",
            "dtype": "float32",
            "shape": [1, len(heads), *shape],
            "axes": ["batch", "head", *axes],
            "heads": head_names,
        },
        "labels": model.dataset_json["labels"],
        "preprocessing": [
            {
                "step": "read",
                "how": "voxels as SimpleITK's GetArrayFromImage gives them, (Z, Y, X) in the file's own orientation, "
                "CT in HU; spacing in the same order, in mm",
                "nnunet_reader": manager.plans["image_reader_writer"],
            },
            {"step": "transpose", "axes": list(manager.transpose_forward)},
            {
                "step": "crop",
                "how": "to the bounding box of the voxels that are not 0 in some channel",
            },
            {
                "step": "normalise",
                "channels": [
                    _normalisation(
                        scheme,
                        bool(masked),
                        manager.foreground_intensity_properties_per_channel.get(str(channel), {}),
                    )
                    for channel, (scheme, masked) in enumerate(
                        zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
                    )
                ],
            },
            {
                "step": "resample",
                "spacing": list(configuration.spacing),
                "size": "round(size * old spacing / new spacing), half to even",
                "how": resize,
                "function": configuration.configuration["resampling_fn_data"],
                **configuration.configuration["resampling_fn_data_kwargs"],
            },
            {
                "step": "pad",
                "to": shape,
                "value": 0.0,
                "how": "axes that are shorter than the patch, on both sides alike; an odd voxel at the end",
            },
        ],
        "sliding_window": {
            "step_size": 0.5,
            "how": "along each axis ceil((size - patch) / (patch * step_size)) + 1 patches, their starts spread evenly "
            "from 0 to size - patch and rounded half to even. The logits of each patch are weighted and added up, and "
            "divided by the sum of the weights",
            "weights": "a Gaussian around voxel patch // 2 with sigma = patch / 8 (scipy.ndimage.gaussian_filter of a "
            "single 1, mode 'constant'), divided by its maximum; where it is 0, its least other value",
            "mirror_axes": list(model.folds[0].mirroring_axes or ()),
            "mirroring": "the logits of a patch are the mean over all subsets of these axes (0 is the patch's first): "
            "patch mirrored along them, logits mirrored back",
        },
        "postprocessing": [
            {"step": "unpad"},
            {
                "step": "resample",
                "how": "the logits to the size after the crop; " + resize,
                "function": configuration.configuration["resampling_fn_probabilities"],
                **configuration.configuration["resampling_fn_probabilities_kwargs"],
            },
            decide,
            {"step": "uncrop", "value": 0},
            {"step": "transpose", "axes": list(manager.transpose_backward)},
        ],
    }


def _normalisation(scheme: str, masked: bool, intensities: dict[str, float]) -> dict[str, Any]:
    if scheme == "CTNormalization":
        return {
            "scheme": scheme,
            "clip": [intensities["percentile_00_5"], intensities["percentile_99_5"]],
            "subtract": intensities["mean"],
            "divide": max(intensities["std"], 1e-8),
        }
    how = {
        "ZScoreNormalization": "subtract the channel's mean and divide by its standard deviation",
        "NoNormalization": "as it is",
        "RescaleTo01Normalization": "subtract the channel's minimum and divide by the maximum after that",
        "RGBTo01Normalization": "divide by 255",
    }.get(scheme, f"see {scheme} in nnunetv2.preprocessing.normalization")
    if masked:
        how += ", both over the voxels that are not 0 alone; the others stay 0"
    return {"scheme": scheme, "how": how}


def _network(model: TrainedModel, network: nn.Module) -> nn.Module:
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    networks = []
    for fold in model.folds:
        one = copy.deepcopy(network)
        one.load_state_dict(fold.weights)
        networks.append(one)
    return (networks[0] if len(networks) == 1 else Ensemble(networks)).cpu().eval()


def _middle(image: torch.Tensor, patch_size: list[int]) -> torch.Tensor:
    if image.ndim > len(patch_size) + 1:  # a plan of slices
        image = image[:, image.shape[1] // 2]
    missing = [max(0, patch - size) for size, patch in zip(image.shape[1:], patch_size, strict=True)]
    padded = np.pad(image.numpy(), [(0, 0), *((count // 2, count - count // 2) for count in missing)])
    starts = [(size - patch) // 2 for size, patch in zip(padded.shape[1:], patch_size, strict=True)]
    cut = (slice(None), *(slice(start, start + size) for start, size in zip(starts, patch_size, strict=True)))
    return torch.from_numpy(np.ascontiguousarray(padded[cut]))[None]


def _translate(network: nn.Module, patch: torch.Tensor, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own parts
            torch.onnx.export(
                network,
                (patch,),
                str(path),
                input_names=["patch"],
                output_names=["logits"],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except OSError:
        raise
    # Whatever the network does that ONNX has no word for.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"torch cannot translate this segmenter to ONNX: {type(error).__name__}: {reason[:500]}"
        ) from None


def _forget_places(program: Any) -> None:
    """Take out where the exporting machine keeps which line of the network."""
    program.doc_string = ""
    program.graph.doc_string = ""
    graphs = [program.graph, *program.functions]
    for part in (program, *graphs, *(node for graph in graphs for node in graph.node)):
        part.doc_string = ""
        del part.metadata_props[:]
    for graph in graphs:
        for value in graph.value_info:
            value.doc_string = ""
            del value.metadata_props[:]
    for value in (*program.graph.input, *program.graph.output, *program.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def _difference(network: nn.Module, session: Any, patch: torch.Tensor, model: TrainedModel) -> float:
    with torch.inference_mode():
        expected = network(patch).numpy()
    (found,) = session.run(["logits"], {"patch": patch.numpy()})
    difference = float(np.abs(found - expected).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:
        raise UserError(
            f"Nothing was written: the logits of {model.folder} by onnxruntime differ from torch's by up to "
            f"{difference:.3g}, and {allowed:.3g} is rounding. Another version of torch, onnx or onnxruntime may do "
            "better; the zip archive (without --onnx) does not depend on them."
        )
    return difference
