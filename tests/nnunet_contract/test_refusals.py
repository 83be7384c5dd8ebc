"""A user's mistakes end `nnUNetv2_train` in one sentence, before long work, with nothing lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnunet_workspace import Workspace

Snapshot = Callable[[Path], dict[str, tuple[int, int]]]


pytestmark = pytest.mark.slow


def refusal(workspace: Workspace, configuration: str, fold: object, *arguments: object) -> str:
    """The sentence that nnUNetv2_train ends with; a SystemExit with a text has status 1."""
    names = ("-tr", "GASNetTrainer", "-device", "cpu")
    with pytest.raises(SystemExit) as caught:
        workspace.call("nnUNetv2_train", 501, configuration, fold, *names, *arguments)
    sentence = str(caught.value)
    assert sentence.startswith("Error: ")
    return sentence


def test_misspelt_setting_ends_the_command_with_one_line(trained: Workspace, snapshot: Snapshot) -> None:
    trained.write_plans("Misspelt", pseudo_stat=0.3)
    before = snapshot(trained.results)
    said = trained.train("3d_fullres", 0, "-p", "Misspelt", status=1)
    errors = [line for line in said.split("stderr:\n")[1].splitlines() if line.startswith("Error")]
    assert len(errors) == 1
    assert "Unknown setting 'pseudo_stat' in configurations.3d_fullres.gasnet of Misspelt.json" in errors[0]
    assert "Did you mean 'pseudo_start'? Valid settings: num_epochs, iterations_per_epoch" in errors[0]
    assert "Traceback" not in said
    assert snapshot(trained.results) == before


def test_model_to_go_on_from_that_is_not_there(planned: Workspace, tmp_path: Path) -> None:
    workspace = planned.with_results(tmp_path / "results")
    workspace.write_plans("Lost", init_from="/nowhere/checkpoint_final.pth")
    sentence = refusal(workspace, "3d_fullres", 0, "-p", "Lost")
    assert sentence.startswith("Error: init_from names /nowhere/checkpoint_final.pth, which is no file.")
    assert not list(workspace.results.rglob("*.pth"))


def test_unknown_configuration(trained: Workspace, snapshot: Snapshot) -> None:
    before = snapshot(trained.results)
    sentence = refusal(trained, "3d_lowres", 0)
    assert sentence.endswith("nnUNetPlans.json has no configuration '3d_lowres'; it has 2d, 3d_fullres.")
    assert snapshot(trained.results) == before


def test_fold_that_the_split_does_not_have(trained: Workspace, tmp_path: Path) -> None:
    workspace = trained.with_results(tmp_path)
    assert re.search(
        r"Fold 7 was asked for, but .*splits_final.json has 2 folds \(0 to 1\)", refusal(workspace, "3d_fullres", 7)
    )


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": ["diseased_0", "healthy_0"], "val": ["labelled_0"]}, "has no case with a mask in 'train'"),
        ({"train": ["labelled_0"], "val": ["nobody"]}, "'val' names nobody, which the dataset does not have"),
    ],
)
def test_split_of_the_users_that_cannot_be_trained(
    split: dict[str, Any], message: str, trained: Workspace, restored_split: Path, tmp_path: Path
) -> None:
    content = json.dumps([split])
    restored_split.write_text(content)
    assert message in refusal(trained.with_results(tmp_path), "3d_fullres", 0)
    assert restored_split.read_text(encoding="utf-8") == content


def test_truncated_checkpoint(copied: Workspace, snapshot: Snapshot) -> None:
    path = copied.model / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])
    before = snapshot(copied.results)
    sentence = refusal(copied, "3d_fullres", 0, "--c")
    assert "checkpoint_final.pth cannot be read" in sentence
    assert "truncated" in sentence
    after = snapshot(copied.results)
    assert {name: after[name] for name in before} == before


def test_label_values_that_dataset_json_does_not_declare(trained: Workspace, tmp_path: Path) -> None:
    """The trainer reads the labels again: they may have changed since they were preprocessed."""
    path = trained.preprocessed / "dataset.json"
    content = path.read_text(encoding="utf-8")
    dataset_json = json.loads(content)
    dataset_json["labels"] = {"background": 0, "lesion": 1}
    path.write_text(json.dumps(dataset_json))
    try:
        sentence = refusal(trained.with_results(tmp_path), "3d_fullres", 0)
    finally:
        path.write_text(content)
    assert "diseased_0" in sentence
    assert "no label 'ignore'" in sentence
