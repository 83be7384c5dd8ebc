"""The commands of the README, word for word, on phantom patients."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from gasnet_nnunet.phantom import write_phantoms

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

# What makes the same commands small enough for a test on two cores.
SMALLER = {
    "gasnet-nnunet plan": (
        "--preset small --patch 12 32 32 --features 4 --num-processes 1 --set num_epochs=2 iterations_per_epoch=2 "
        "validation_iterations_per_epoch=1 gallery_every_epochs=1"
    ),
    "nnUNetv2_train": "-device cpu",
    "nnUNetv2_predict": "-device cpu -npp 1 -nps 1",
}


def commands(heading: str) -> list[str]:
    """Commands of the first shell block under a heading; a backslash continues a line."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None, f"no shell block under '{heading}'"
    lines = block.group(1).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.slow
def test_commands_for_ones_own_data(tmp_path: Path) -> None:
    write_phantoms(
        tmp_path / "phantoms",
        labelled=1,
        diseased=3,
        healthy=3,
        test_diseased=1,
        test_healthy=1,
        seed=0,
        size=(16, 48, 48),
        spacing=(12.0, 7.0, 7.0),
    )
    for source, target in (
        ("labelled/ct", "labelled/images"),
        ("labelled/mask", "labelled/masks"),
        ("diseased/ct", "diseased"),
        ("healthy/ct", "healthy"),
    ):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / "phantoms" / source).rename(tmp_path / target)
    (tmp_path / "new_cts").mkdir()
    for path in (tmp_path / "phantoms" / "test" / "ct").iterdir():
        path.rename(tmp_path / "new_cts" / path.name.replace(".nii.gz", "_0000.nii.gz"))

    environment = {**os.environ, "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    environment["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{environment['PATH']}"
    shown = commands("Your own data")
    exports = [line for line in shown if line.startswith("export ")]
    assert exports, "the README tells which folders to set"
    for name in re.findall(r"(nnUNet_\w+)=", " ".join(exports)):
        environment[name] = str(tmp_path / name)
        Path(environment[name]).mkdir()
    run = [line for line in shown if not line.startswith("export ")]
    assert [shlex.split(line)[0] for line in run] == ["gasnet-nnunet"] * 3 + ["nnUNetv2_train", "nnUNetv2_predict"]
    for line in run:
        extra = next((words for start, words in SMALLER.items() if line.startswith(start)), "")
        result = subprocess.run(
            shlex.split(f"{line} {extra}"),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"

    masks = sorted((tmp_path / "masks").glob("*.nii.gz"))
    assert len(masks) == 2
    for path in masks:
        image = sitk.ReadImage(str(tmp_path / "new_cts" / path.name.replace(".nii.gz", "_0000.nii.gz")))
        mask = sitk.ReadImage(str(path))
        assert mask.GetSize() == image.GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}


def test_links_lead_somewhere() -> None:
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
