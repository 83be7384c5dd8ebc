"""A model by `gasnet-nnunet export`, on a machine that has nnU-Net and nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_workspace import DATASET, Workspace
from virtual_environment import Environment, copy_of_nnunet, make_environment

pytestmark = pytest.mark.slow

INSTALL = "from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point as main; main()"
PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as main; main()"
NOTHING_OF_OURS = """
import importlib.util, os, sys
assert importlib.util.find_spec("gasnet_nnunet") is None
assert "nnUNet_extTrainer" not in os.environ
assert not [path for path in sys.path if "gasnet" in path]
"""


@pytest.fixture
def stock(tmp_path: Path) -> Environment:
    """An environment with nnU-Net and without our package."""
    made = make_environment(tmp_path / "environment")
    copy_of_nnunet(made.packages)
    made.run("-c", NOTHING_OF_OURS)
    return made


def test_stock_nnunet_installs_it_and_predicts_the_same(trained: Workspace, stock: Environment, tmp_path: Path) -> None:
    expected, found = trained.predict(tmp_path / "expected"), tmp_path / "found"
    file = tmp_path / "model.zip"
    model = ("-d", 501, "-p", "nnUNetPlans", "-c", "3d_fullres", "-tr", "GASNetTrainer", "-f", 0)
    said = trained.run("gasnet-nnunet", "export", *model, "-o", file, "--device", "cpu")
    assert f"predicted by both models: the same mask in all {16 * 48 * 48} voxels" in said

    results = tmp_path / "results"
    results.mkdir()
    stock.run("-c", INSTALL, str(file), nnUNet_results=str(results))
    (card,) = results.rglob("README.md")
    assert card.parent == results / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    # The card's own command, with what makes it small.
    (command,) = (line for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("nnUNetv2_predict"))
    words = command.replace("NEW_CTS", str(trained.raw / "imagesTs")).replace("OUT", str(found)).split()[1:]
    one_process = ("-npp", "0", "-nps", "0", "-device", "cpu", "--save_probabilities")
    stock.run("-c", PREDICT, *words, *one_process, nnUNet_results=str(results))

    for case in ("diseased_7", "healthy_7"):
        masks = [sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz"))) for folder in (expected, found)]
        assert np.array_equal(*masks)
        probabilities = [np.load(folder / f"{case}.npz")["probabilities"] for folder in (expected, found)]
        assert np.array_equal(*probabilities)
        assert probabilities[0][1].max() > probabilities[0][1].min()

    installed = "".join(
        path.read_text(encoding="utf-8") for path in results.rglob("*") if path.suffix in (".json", ".md")
    )
    splits = json.loads((trained.preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    cases = {case for split in splits for cases in split.values() for case in cases}
    assert not [secret for secret in (*cases, str(trained.root)) if secret in installed]
