"""The networks that may take the place of S: built, trained and used for prediction by nnU-Net, from plans alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dataset
import torch
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from gasnet_nnunet.decision import head_biases
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.estimate import _feature_maps
from gasnet_nnunet.segmenters import SEGMENTERS, apply_segmenter, needs_this_package, segmenter_of
from gasnet_nnunet.trainers import GASNetTrainer

DATASET = "Dataset501_Tiny"
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
"""One down-sampling of Z, three of Y and X."""
TOPOLOGY = {
    "n_stages": 4,
    "features_per_stage": [4, 8, 8, 8],
    "strides": STRIDES,
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "n_conv_per_stage": [1, 1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1, 1],
}
ANISOTROPIC = {
    **tiny_dataset.ARCHITECTURE,
    "arch_kwargs": {**tiny_dataset.ARCHITECTURE["arch_kwargs"], **TOPOLOGY},
}
SHAPES = [(12, 32, 32), (12, 16, 16), (6, 8, 8)]


def build(segmenter: str, *, deep_supervision: bool, classes: int = 2) -> Any:
    architecture = apply_segmenter({"architecture": ANISOTROPIC}, segmenter)["architecture"]
    kwargs, imports = architecture["arch_kwargs"], architecture["_kw_requires_import"]
    name = architecture["network_class_name"]
    return get_network_from_plans(name, kwargs, imports, 1, classes, True, deep_supervision)


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_network_is_replaced_and_all_else_stays(segmenter: str) -> None:
    configuration = tiny_dataset.plans(DATASET)["configurations"]["3d_fullres"]
    before = copy.deepcopy(configuration)

    new = apply_segmenter(configuration, segmenter)

    assert configuration == before
    assert {**new, "architecture": None} == {**before, "architecture": None}
    assert segmenter_of(new) == segmenter
    assert needs_this_package(new) == (segmenter in ("vbnet", "unetpp"))
    kept = ("n_stages", "features_per_stage", "strides", "kernel_sizes", "norm_op", "nonlin")
    for name in kept:
        assert new["architecture"]["arch_kwargs"][name] == before["architecture"]["arch_kwargs"][name]
    assert json.loads(json.dumps(new)) == new
    # From any of them to any other.
    assert apply_segmenter(apply_segmenter(new, "unetpp"), segmenter) == new


def test_unknown_segmenter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no segmenter 'unet\+\+'\. Segmenters: plain, resenc, vbnet, unetpp"):
        apply_segmenter({"architecture": ANISOTROPIC}, "unet++")


def test_architecture_without_a_topology_is_refused() -> None:
    with pytest.raises(UserError, match="does not tell n_stages, features_per_stage"):
        apply_segmenter({"architecture": {"arch_kwargs": {"patch_embed_size": 8}}}, "vbnet")


@pytest.mark.parametrize(("segmenter", "planner"), [("plain", ExperimentPlanner), ("resenc", ResEncUNetPlanner)])
def test_blocks_and_memory_are_those_of_nnunets_planners(
    segmenter: str, planner: type[ExperimentPlanner], nnunet_folders: Path
) -> None:
    tiny_dataset.write_raw(nnunet_folders / "raw" / DATASET, ["labelled_0"])
    (nnunet_folders / "preprocessed" / DATASET).mkdir()
    (nnunet_folders / "preprocessed" / DATASET / "dataset_fingerprint.json").write_text("{}")
    theirs = planner(DATASET)
    ours = SEGMENTERS[segmenter]
    kwargs = apply_segmenter({"architecture": ANISOTROPIC}, segmenter)["architecture"]["arch_kwargs"]

    assert ours.network is theirs.UNet_class
    assert ours.feature_maps_in_8_gb == theirs.UNet_reference_val_3d
    assert (theirs.UNet_reference_val_corresp_GB, theirs.UNet_reference_val_corresp_bs_3d) == (8, 2)
    assert kwargs[ours.convolutions] == list(theirs.UNet_blocks_per_stage_encoder[:4])
    assert kwargs["n_conv_per_stage_decoder"] == list(theirs.UNet_blocks_per_stage_decoder[:3])


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_output_follows_the_switch_of_nnunets_trainer(segmenter: str) -> None:
    network = build(segmenter, deep_supervision=True, classes=3).eval()
    x = torch.randn(2, 1, *tiny_dataset.PATCH)

    levels = network(x)
    network.decoder.deep_supervision = False
    finest = network(x)

    assert [tuple(level.shape) for level in levels] == [(2, 3, *shape) for shape in SHAPES]
    assert torch.equal(levels[0], finest)


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_every_weight_learns_under_deep_supervision(segmenter: str) -> None:
    torch.manual_seed(0)
    network = build(segmenter, deep_supervision=True)
    with torch.no_grad():
        for parameter in network.parameters():
            # Residual branches start at zero, behind which no gradient passes.
            parameter.add_(0.1 * torch.randn_like(parameter))
    sum(level.square().mean() for level in network(torch.randn(2, 1, *tiny_dataset.PATCH))).backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert not still


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_every_head_can_carry_the_threshold(segmenter: str) -> None:
    biases = head_biases(build(segmenter, deep_supervision=True, classes=3).state_dict())
    assert [len(bias) for bias in biases.values()] == [3, 3, 3]


def test_deeper_stages_of_vbnet_are_bottlenecks() -> None:
    network = build("vbnet", deep_supervision=False)
    squeezed = [all(isinstance(b, BottleneckD) for b in stage.blocks) for stage in network.encoder.stages]
    assert squeezed == [False, False, True, True]
    # From the coarsest level, which is the third, to the finest.
    assert [isinstance(stage.blocks[0], BottleneckD) for stage in network.decoder.stages] == [True, False, False]
    assert {b.bottleneck_channels for b in network.encoder.stages[2].blocks} == {8 // 4}


def test_nodes_of_unetpp_join_all_before_them_on_their_level() -> None:
    network = build("unetpp", deep_supervision=False).eval()
    assert [len(level) for level in network.decoder.nodes] == [3, 2, 1]
    skips = network.encoder(torch.randn(1, 1, *tiny_dataset.PATCH))
    assert [node.convs[0].input_channels for node in network.decoder.nodes[0]] == [2 * 4, 3 * 4, 4 * 4]
    expected = network.decoder(skips)
    # A coarse skip reaches the finest nodes by more than one way: without the direct one the output still changes.
    changed = network.decoder([*skips[:2], skips[2] + 1, skips[3]])
    assert not torch.equal(expected, changed)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_feature_maps_of_unetpp_are_counted_as_nnunet_counts_them(deep_supervision: bool) -> None:
    with torch.device("meta"):
        network = build("unetpp", deep_supervision=deep_supervision)
    assert network.compute_conv_feature_map_size(tiny_dataset.PATCH) == _feature_maps(network, 1, tiny_dataset.PATCH)


# In nnU-Net -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folders with a tiny dataset, preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    raw, folder = root / "raw" / DATASET, root / "preprocessed" / DATASET
    tiny_dataset.write_raw(raw, tiny_dataset.names(2, 1, 2))
    tiny_dataset.preprocess(raw, folder, tiny_dataset.plans(DATASET))
    return root


TWO_EPOCHS = {"num_epochs": 2, "pseudo_start": 0.5}


@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_nnunet_trains_it_and_predicts_with_it(
    segmenter: str, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(preprocessed / name))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = tiny_dataset.plans(DATASET, settings={**tiny_dataset.SETTINGS, **TWO_EPOCHS})
    configuration = {**plans["configurations"]["3d_fullres"], "architecture": ANISOTROPIC}
    plans["configurations"]["3d_fullres"] = apply_segmenter(configuration, segmenter)
    plans["continue_training"] = False
    dataset_json = json.loads((preprocessed / "preprocessed" / DATASET / "dataset.json").read_text(encoding="utf-8"))
    trainer = GASNetTrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.on_train_start()
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.on_train_epoch_start()
    for _ in range(2):
        losses = trainer.train_step(next(trainer.dataloader_train))
        assert np.isfinite(losses["loss"])
    changed = [name for name, weight in trainer.network.state_dict().items() if not torch.equal(weight, before[name])]
    assert any("seg_layers" in name for name in changed)
    assert any("encoder" in name for name in changed)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))

    predictor = nnUNetPredictor(tile_step_size=0.5, use_mirroring=False, device=torch.device("cpu"), verbose=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    ct = tiny_dataset.patient("diseased_0").ct[None].astype(np.float32)
    mask = predictor.predict_single_npy_array(ct, {"spacing": list(tiny_dataset.SPACING)})

    assert type(predictor.network) is SEGMENTERS[segmenter].network
    assert not predictor.network.decoder.deep_supervision
    assert mask.shape == tiny_dataset.SIZE
    fresh = build(segmenter, deep_supervision=True)
    heads = fresh.state_dict()
    load_pretrained_weights(fresh, str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    trained = trainer.network.state_dict()
    for name, weight in fresh.state_dict().items():
        same = heads if ".seg_layers." in name else trained
        assert torch.equal(weight, same[name]), name
