"""`gasnet-nnunet splits`: which masks are learnt from, validated on and hidden in each fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from gasnet_nnunet.cohort import Cohort

LISTED = 4


def splits(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset id or name.")],
    folds: Annotated[
        int | None, typer.Option(min=2, help="Folds; if left out, one for each patient with masks, at most 5.")
    ] = None,
    labelled: Annotated[
        int | None, typer.Option(min=1, help="Masks that each fold learns from; the others are hidden.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="With --labelled: folds that differ in the choice of these masks.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the dealing.")] = 12345,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another split; a copy of it is kept.")
    ] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Label files read at a time.")] = 2,
) -> None:
    """Write splits_final.json: folds over the voxel-labelled cases, with all cases of a patient on one side.

    Either each mask is validated on in one of the folds, or, with --labelled 1 --repeats 3, each fold learns from
    another mask and all validate on the same cases. Before or after planning, which keeps the file. nnU-Net's own
    trainers read it too.

    Raises:
        UserError: There is no such dataset, too few masks, or another split that is in use.
    """
    from gasnet_nnunet.cohort import abbreviate
    from gasnet_nnunet.splits import check_splits, make_repeats, make_splits, replace_splits

    if folds is not None and (labelled is not None or repeats is not None):
        raise UserError("--folds validates on each mask once, --labelled and --repeats do not: give either.")
    if repeats is not None and labelled is None:
        raise UserError("--repeats needs --labelled N, the number of masks that each fold learns from.")
    console = Console(highlight=False, soft_wrap=True)
    with console.status("Loading nnU-Net"):
        from gasnet_nnunet.inspection import find_cohort, trained_folds
    folder, cohort, remarks = find_cohort(dataset, num_processes=num_processes, progress=True)
    if labelled is None:
        dealt = make_splits(cohort, folds=folds, seed=seed)
    else:
        dealt = make_repeats(cohort, labelled=labelled, repeats=repeats or 1, seed=seed)
    path = folder / "splits_final.json"
    trained = trained_folds(folder.name)
    old = replace_splits(path, dealt, trained=trained, overwrite=overwrite)
    check_splits(path, cohort)
    console.print(_table(dealt, cohort, folder))
    console.print(f"Split: {escape(str(path))}")
    if old:
        remarks.append(f"the split that was there before is now {old}.")
        if trained:
            names = abbreviate([str(trained_fold) for trained_fold in trained], LISTED)
            remarks.append(f"trained on the old split, to which their validation belongs: {names}.")
    for remark in [*remarks, *_remarks(dealt, cohort, shared=labelled is not None)]:
        console.print(f"[yellow]Note:[/] {escape(remark)}")
    planned = (folder / "GASNetPlans.json").is_file()
    number = int(folder.name[len("Dataset") :].split("_")[0])
    command = f"nnUNetv2_train {number} 3d_fullres 0 -tr GASNetTrainer -p GASNetPlans"
    console.print(f"Next: [bold]{command if planned else f'gasnet-nnunet plan -d {number}'}[/]")


def _table(dealt: Sequence[Mapping[str, Sequence[str]]], cohort: Cohort, folder: Path) -> Table:
    from gasnet_nnunet.cohort import Kind, abbreviate

    columns = ("fold", "train", "val", "masks hidden", "diseased", "healthy", "diseased watched", "healthy watched")
    table = Table(*columns, title=f"Split of {folder.name}", title_justify="left")
    for number, fold in enumerate(dealt):
        hidden = [case for case in fold["diseased"] if cohort.cases[case].kind is Kind.LABELLED]
        counts = [len(hidden), len(fold["diseased"]) - len(hidden)]
        counts += [len(fold[key]) for key in ("healthy", "val_diseased", "val_healthy")]
        names = (f"{len(fold[key])}: {abbreviate(fold[key], LISTED)}" for key in ("train", "val"))
        table.add_row(str(number), *map(escape, names), *map(str, counts))
    return table


def _remarks(dealt: Sequence[Mapping[str, Sequence[str]]], cohort: Cohort, *, shared: bool) -> list[str]:
    known = [case.patient for case in cohort.cases.values() if case.patient is not None]
    remarks = []
    if not known:
        remarks.append("dataset.json names no patients, so each case was taken for a patient of its own.")
    elif len(known) < len(cohort.cases):
        remarks.append(
            f"dataset.json names the patients of {len(known)} of {len(cohort.cases)} cases; the others were each taken "
            "for a patient of their own."
        )
    if any(set(fold["train"]) & set(fold["val"]) for fold in dealt):
        remarks.append(
            "all masks are of one patient, who is trained AND validated on; the validation Dice says little about "
            "others."
        )
    if shared and len(dealt) > 1:
        remarks.append(
            "all folds validate on the same cases. nnUNetv2_find_best_configuration and "
            "nnUNetv2_accumulate_crossval_results want each case validated in one fold only: give them one fold "
            "(-f 0), and compare the folds by their validation/summary.json."
        )
    elif len(dealt) != 5:
        listed = " ".join(map(str, range(len(dealt))))
        remarks.append(f"nnUNetv2_find_best_configuration expects 5 folds unless it is given -f {listed}.")
    return remarks
