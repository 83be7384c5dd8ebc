"""A round of iterative pseudo-labels: predictions of the diseased volumes become masks to learn from.

Done by `nnUNetv2_preprocess` on a raw dataset of those volumes and their predictions; the other cases are links.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from gasnet_nnunet.files import write_json
from gasnet_nnunet.study.workspace import SPLITS, Run, Workspace, link


def preprocess_command(workspace: Workspace, plans_name: str, processes: int) -> tuple[str, ...]:
    """nnU-Net's command that preprocesses the predicted cases."""
    return (
        *("nnUNetv2_preprocess", "-d", str(workspace.dataset.number), "-plans_name", plans_name),
        *("-c", workspace.study.configuration, "-np", str(processes)),
    )


def label_dataset(
    workspace: Workspace,
    run: Run,
    folder: Path,
    plans_name: str,
    preprocess: Callable[[Mapping[str, str]], None],
) -> None:
    """Make the dataset of a round: the masks of the run, and the predictions as masks of its diseased volumes.

    A diseased volume in which nothing was found is known to be wrong, so it stays a volume without a mask.

    Args:
        workspace: The study.
        run: The run.
        folder: Of the round; `predicted` in it holds the predictions.
        plans_name: Plans of the round.
        preprocess: Runs `preprocess_command` with these variables.
    """
    name = workspace.dataset.name
    raw, preprocessed = folder / "nnUNet_raw" / name, folder / "nnUNet_preprocessed" / name
    for old in (raw, preprocessed):
        shutil.rmtree(old, ignore_errors=True)
    entry = run.deal.entry(workspace.study.volumes_of(run.arm))
    found = [case for case in entry["diseased"] if _shows_lesion(folder / "predicted" / f"{case}{workspace.ending}")]
    environment = {
        **workspace.environment,
        "nnUNet_raw": str(raw.parent),
        "nnUNet_preprocessed": str(preprocessed.parent),
    }
    preprocessed.mkdir(parents=True)
    workspace.write_plans(preprocessed, workspace.plans[run.arm], plans_name)
    if found:
        for part in ("imagesTr", "labelsTr"):
            (raw / part).mkdir(parents=True)
        for case in found:
            for channel, image in enumerate(workspace.raw_images(case)):
                link(image, raw / "imagesTr" / f"{case}_{channel:04d}{workspace.ending}")
            link(folder / "predicted" / f"{case}{workspace.ending}", raw / "labelsTr" / f"{case}{workspace.ending}")
        content = {key: value for key, value in workspace.dataset_json.items() if key not in ("dataset", "gasnet")}
        write_json(raw / "dataset.json", {**content, "numTraining": len(found)})
        write_json(preprocessed / "dataset.json", content)
        preprocess(environment)
    workspace.link_preprocessed(preprocessed, but=found or ("",))
    # Where dataset.json hides the mask of a case, it has one in this round.
    content = copy.deepcopy(workspace.dataset_json)
    overruled = content.get("gasnet", {}).get("cohort", {})
    for case in set(found) & set(overruled):
        del overruled[case]
    write_json(preprocessed / "dataset.json", content)
    splits = json.loads((workspace.preprocessed / SPLITS).read_text(encoding="utf-8"))
    splits[run.number] = {
        **entry,
        "train": sorted([*entry["train"], *found]),
        "diseased": [case for case in entry["diseased"] if case not in found],
    }
    write_json(preprocessed / SPLITS, splits)


def _shows_lesion(path: Path) -> bool:
    import SimpleITK as sitk

    # A copy: a view would outlive its image.
    return bool((sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0).any())
