"""The folders of a study: nnU-Net finds the arms' plans and the study's own split there, and leaves its models there.

    OUT/study.yaml                      the study, resolved
    OUT/nnUNet_preprocessed/DatasetNNN  links to the preprocessed cases, plans of every arm, splits_final.json
    OUT/nnUNet_results/DatasetNNN       <trainer>__<arm>__<configuration>/fold_<number>
    OUT/test/<set>/images|masks|lungs   links to the test cases
    OUT/test/lungs                      lungs that were computed
    OUT/predictions/<arm>/<run>         what each model found
    OUT/runs/<arm>/<run>.json           what was done, how long it took, what went wrong
    OUT/logs/<arm>/<run>/<step>.txt     all that the commands said
    OUT/superseded                      results of runs whose settings have changed since, and earlier study files

The user's own folders are read only, but for `gasnet-nnunet plan` where the study asks for it: nnU-Net reads
`splits_final.json` beside the preprocessed cases and names results by plans and fold, so a study that worked in there
would replace the user's split and mix with the user's models. A fold's number stands for its content: adding arms,
masks or repeats to a study keeps the numbers, and so the models, of those that were there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from gasnet_nnunet.cohort import (
    COHORT_CACHE,
    Cohort,
    abbreviate,
    declared_labels,
    patients_of,
    raise_problems,
    read_cohort,
)
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import file_stamp, write_json, write_text
from gasnet_nnunet.organ_masks import VERSION
from gasnet_nnunet.parallel import cores, run_jobs
from gasnet_nnunet.raw_dataset import Dataset, find_dataset, read_json
from gasnet_nnunet.settings import PLANS_KEY
from gasnet_nnunet.study.definition import Study
from gasnet_nnunet.study.file import load_study
from gasnet_nnunet.study.splits import Deal, check_patterns, make_deals, read_groups
from gasnet_nnunet.volumes import grid_difference, read_grid

STUDY = "study.yaml"
SPLITS = "splits_final.json"
FOLD_NUMBERS = "folds.json"
FORMAT = 2
"""Part of every fingerprint: raise it when what a run does changes although its settings do not."""


class UnpreparedError(UserError):
    """Something is missing that the study makes itself, which takes a while."""


@dataclass(frozen=True)
class Run:
    """One model: an arm, trained on the cases of a deal.

    Args:
        arm: Key of the arm.
        deal: The cases.
        number: nnU-Net's number of the fold.
    """

    arm: str
    deal: Deal
    number: int

    @property
    def name(self) -> str:
        """How the run is called on the command line, e.g. `gasnet/masks1_repeat0_fold0`."""
        return f"{self.arm}/{self.deal.name}"


@dataclass(frozen=True)
class TestSet:
    """Test cases as nnU-Net's prediction takes them.

    Args:
        folder: Has `images`, `masks` and perhaps `lungs` in it.
        cases: Their names.
        scans: Changes when a scan does.
        stamp: Changes when a scan or a mask does, or the package would find other lungs.
    """

    folder: Path
    cases: tuple[str, ...]
    scans: str = ""
    stamp: str = ""

    @property
    def lungs(self) -> Path | None:
        """Folder of their lung masks."""
        return self.folder / "lungs" if (self.folder / "lungs").is_dir() else None


class Workspace:
    """A study, its dataset and its folder.

    Args:
        study: The study.
        out: Its folder.
        dataset: Its dataset in nnUNet_raw, preprocessed with the plans that the arms start from.
        find_lungs: Whether `test_set` computes lungs that are missing, which the login node of a cluster should not.

    Raises:
        UserError: Plans or preprocessed data are missing, or the dataset has not what the study asks for.
    """

    def __init__(self, study: Study, out: Path, dataset: Dataset, *, find_lungs: bool = True) -> None:
        self.study, self.out, self.dataset, self.find_lungs = study, out, dataset, find_lungs
        self.base = dataset.preprocessed
        self.preprocessed = out / "nnUNet_preprocessed" / dataset.name
        self.results = out / "nnUNet_results" / dataset.name
        self.plans = {arm: self._plans_of(arm) for arm in study.arms}
        self.dataset_json = read_json(self.base / "dataset.json")
        self.ending = str(self.dataset_json["file_ending"])
        self.cohort = self._read_cohort()
        self.groups = read_groups(self.cohort, study.groups, patients_of(self.dataset_json))
        self.truths = self._truths()
        self.images_ts = self._images_ts()
        self.deals = make_deals(study, self.cohort, self.groups, truths=self.truths, images_ts=self.images_ts)
        check_patterns(study, self.cohort, self.deals)
        self._numbers: dict[str, int] = {}
        self._file_sizes: dict[str, dict[str, int]] = {}
        self._test_sets: dict[str, TestSet] = {}
        self._read: set[Path] = set()
        self.preparation_seconds = 0.0

    @cached_property
    def runs(self) -> list[Run]:
        """All runs in the order in which they are made: first one of every arm, so that all are seen to work."""
        runs = []
        for deal in self.deals:
            for arm in self.study.ordered_arms():
                if deal.masks in self.study.masks_of(arm):
                    runs.append(Run(arm, deal, self._numbers[_digest(self._fold(arm, deal))]))
        return runs

    @property
    def environment(self) -> dict[str, str]:
        """nnU-Net's folders for the commands of this study."""
        return {
            "nnUNet_raw": str(self.dataset.raw.parent),
            "nnUNet_preprocessed": str(self.preprocessed.parent),
            "nnUNet_results": str(self.results.parent),
        }

    def write(self) -> None:
        """Write what the commands read, but for the plans, which a run writes when it needs them.

        What is there already is kept if it is the same. Plans that were written for all arms here would replace those
        of a run that another process has just begun, whose first training is shorter than its arm.

        Raises:
            UserError: The folder cannot be written.
        """
        self.preprocessed.mkdir(parents=True, exist_ok=True)
        self.results.mkdir(parents=True, exist_ok=True)
        self.link_preprocessed(self.preprocessed)
        self._write_splits()

    def link_preprocessed(self, folder: Path, *, but: Collection[str] = ()) -> None:
        """Make a dataset's folder of nnUNet_preprocessed whose cases are links to those of the user's.

        Args:
            folder: The folder to fill.
            but: Cases that are not linked, because the folder has its own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "dataset.json", self.dataset_json)
        for name in ("dataset_fingerprint.json", COHORT_CACHE):
            if (self.base / name).is_file() and not (but and name == COHORT_CACHE):
                shutil.copyfile(self.base / name, folder / name)
        whole = [self.base / "gasnet_organ_masks"]
        by_case = [self.base / "gt_segmentations", *self.data_folders]
        for source in [*whole, *([] if but else by_case)]:
            if source.is_dir():
                link(source, folder / source.name)
        for source in by_case if but else ():
            (folder / source.name).mkdir(exist_ok=True)
            for file in source.iterdir():
                stem = file.name.removesuffix(self.ending).removesuffix(file.suffix)
                if not {stem, stem.removesuffix("_seg")} & set(but):
                    link(file, folder / source.name / file.name)

    @property
    def data_folders(self) -> list[Path]:
        """The user's folders of preprocessed cases that the arms read."""
        configuration = self.study.configuration
        names = {plans["configurations"][configuration]["data_identifier"] for plans in self.plans.values()}
        return [self.base / str(name) for name in sorted(names)]

    def write_plans(self, folder: Path, plans: Mapping[str, Any], name: str) -> None:
        """Write plans under a name of their own, which keeps the results of arms apart."""
        write_json(folder / f"{name}.json", {**plans, "plans_name": name})

    def with_settings(self, arm: str, **settings: Any) -> dict[str, Any]:
        """The plans of an arm with other settings."""
        plans = copy.deepcopy(self.plans[arm])
        plans["configurations"][self.study.configuration][PLANS_KEY].update(settings)
        return plans

    def settings(self, arm: str) -> dict[str, Any]:
        """The settings of GASNet in an arm's plans."""
        settings: dict[str, Any] = self.plans[arm]["configurations"][self.study.configuration][PLANS_KEY]
        return settings

    def fold_folder(self, run: Run, plans_name: str) -> Path:
        """Where nnU-Net leaves the model of a run."""
        trainer = self.study.arms[run.arm].trainer
        return self.results / f"{trainer}__{plans_name}__{self.study.configuration}" / f"fold_{run.number}"

    def data_fingerprint(self, arm: str, fold: Mapping[str, Any]) -> Any:
        """What tells the preprocessed cases that an arm learns from from others: how they were made, and their sizes.

        Compressed files of another content are hardly ever of the same size, and copies keep it, unlike their times.
        What a hidden mask says is not learnt from, so only its scan counts.

        Args:
            arm: Key of the arm.
            fold: The cases, as in `splits_final.json`.
        """
        path = self.base / "gasnet_preprocessed.json"
        record = read_json(path) if path.is_file() else {}
        name = str(self.plans[arm]["configurations"][self.study.configuration]["data_identifier"])
        scans, masks = self._sizes(name, ".b2nd", ".npz"), self._sizes("gt_segmentations", self.ending)
        sizes = {case: [scans.get(case)] for kind in ("diseased", "healthy") for case in fold[kind]}
        sizes |= {case: [scans.get(case), scans.get(f"{case}_seg"), masks.get(case)] for case in fold["train"]}
        return [{name: record[name]} if name in record else None, self.dataset_json["labels"], sizes]

    def _sizes(self, folder: str, *endings: str) -> dict[str, int]:
        """Sizes in bytes of the files with these endings in a folder of preprocessed cases, by their names without."""
        if folder not in self._file_sizes:
            self._file_sizes[folder] = {
                path.name.removesuffix(ending): path.stat().st_size
                for ending in endings
                for path in (self.base / folder).glob(f"*{ending}")
            }
        return self._file_sizes[folder]

    def test_set(self, deal: Deal) -> TestSet:
        """The test cases of a run, linked and with lung masks, made when they are first asked for or have changed.

        Args:
            deal: The run's cases.

        Raises:
            UserError: A mask or a scan is missing or broken.
            UnpreparedError: Lungs are not found yet, and not to be found here.
        """
        name = _digest(list(deal.test))[:10]
        if name not in self._test_sets:
            self._test_sets[name] = self._make_test_set(self.out / "test" / name, deal.test)
        return self._test_sets[name]

    def _make_test_set(self, folder: Path, cases: tuple[str, ...]) -> TestSet:
        files = {f"masks/{case}": self._truth(case) for case in cases}
        for case in cases:
            files |= {f"images/{case}_{channel:04d}": path for channel, path in enumerate(self._images(case))}
        lungs = self._lungs(cases)
        files |= {f"lungs/{case}": path for case, path in lungs.items()}
        computed = [case for case in cases if case not in lungs] if self._can_find_lungs() else []
        # A mask that was corrected is another file under the old name.
        state: dict[str, list[Any]] = {name: [str(path.resolve()), *file_stamp(path)] for name, path in files.items()}
        state |= {f"lungs/{case}": [VERSION, self._organ()] for case in computed}
        marker = folder / "cases.json"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            # A study may have been moved, and the links to its own lungs lead nowhere then.
            whole = all((folder / "lungs" / f"{case}{self.ending}").is_file() for case in computed)
            if not whole or not marker.is_file() or read_json(marker) != state:
                place = folder.with_name(f".{folder.name}.unfinished")
                shutil.rmtree(place, ignore_errors=True)
                for name, path in files.items():
                    target = place / f"{name}{self.ending}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    link(path, target)
                self._find_lungs(place, computed)
                self._check_test_set(place, cases)
                write_json(place / marker.name, state)
                shutil.rmtree(folder, ignore_errors=True)
                place.rename(folder)
        scans = {name: entry for name, entry in state.items() if name.startswith("images/")}
        return TestSet(folder, cases, fingerprint(scans), fingerprint(state))

    def raw_images(self, case: str) -> list[Path]:
        """The scans of a training case, one a channel."""
        return [Path(image) for image in self.dataset.files[case]["images"]]

    @property
    def ignore_label(self) -> int | None:
        """The dataset's `ignore` label."""
        ignore = self.dataset_json["labels"].get("ignore")
        return None if ignore is None else int(ignore)

    def _plans_of(self, arm: str) -> dict[str, Any]:
        study = self.study
        name = study.arms[arm].plans or study.plans
        path = self.base / f"{name}.json"
        if not path.is_file():
            raise UserError(
                f"There are no plans {path} for the arm '{arm}'. Make them with: gasnet-nnunet plan -d "
                f"{self.dataset.number} --name {name}, or by nnUNetv2_plan_and_preprocess."
            )
        plans = read_json(path)
        if study.configuration not in plans["configurations"]:
            raise UserError(
                f"{path} has no configuration '{study.configuration}'; it has {', '.join(plans['configurations'])}."
            )
        configuration = plans["configurations"][study.configuration]
        if "data_identifier" not in configuration:
            raise UserError(
                f"The configuration '{study.configuration}' of {path} takes its data from another one; name one that "
                "has data of its own, such as 3d_fullres."
            )
        data = self.base / str(configuration["data_identifier"])
        if missing := sorted(set(self.dataset.files) - {path.stem for path in data.glob("*.pkl")}):
            raise UserError(
                f"{data} lacks {len(missing)} of {len(self.dataset.files)} preprocessed cases: {abbreviate(missing)}. "
                f"Make them with: nnUNetv2_preprocess -d {self.dataset.number} -plans_name {name} -c "
                f"{study.configuration}"
            )
        configuration[PLANS_KEY] = study.settings_of(arm, configuration.get(PLANS_KEY, {})).to_dict()
        segmenter = study.arms[arm].segmenter
        if segmenter is not None:
            from gasnet_nnunet.segmenters import apply_segmenter

            plans["configurations"][study.configuration] = apply_segmenter(configuration, segmenter)
        return plans

    def _read_cohort(self) -> Cohort:
        return read_cohort(
            self.base / "gt_segmentations",
            self.dataset_json,
            identifiers=sorted(path.stem for path in self.data_folders[0].glob("*.pkl")),
            cache=self.base / COHORT_CACHE,
            progress=True,
        )

    def _truths(self) -> dict[str, Path]:
        """Masks of cases that are learnt from without one: in the study's folder, or put aside by a conversion."""
        folder = self.study.truth
        found = {path.name.removesuffix(self.ending): path for path in self._files("hiddenTr")}
        if folder is not None:
            given = {path.name.removesuffix(self.ending): path for path in folder.glob(f"*{self.ending}")}
            if not given:
                raise UserError(f"truth: {folder} holds no mask <case>{self.ending}.")
            found.update(given)
        return found

    def _images_ts(self) -> set[str]:
        """Cases of imagesTs that have a mask."""
        first = f"_0000{self.ending}"
        images = {path.name.removesuffix(first) for path in self._files("imagesTs") if path.name.endswith(first)}
        masks = {path.name.removesuffix(self.ending) for path in self._files("labelsTs")}
        return images & (masks | set(self.truths)) - set(self.cohort.cases)

    def _files(self, name: str) -> list[Path]:
        return sorted((self.dataset.raw / name).glob(f"*{self.ending}"))

    def _images(self, case: str) -> list[Path]:
        if case in self.dataset.files:
            return self.raw_images(case)
        return sorted((self.dataset.raw / "imagesTs").glob(f"{case}_[0-9][0-9][0-9][0-9]{self.ending}"))

    def _truth(self, case: str) -> Path:
        if case in self.truths:
            return self.truths[case]
        folder = self.base / "gt_segmentations" if case in self.cohort.cases else self.dataset.raw / "labelsTs"
        return folder / f"{case}{self.ending}"

    def _lungs(self, cases: Sequence[str]) -> dict[str, Path]:
        """The user's lung masks of the test cases: all of them, or none where those that lack cannot be computed."""
        found = {}
        for case in cases:
            of_dataset = self.dataset.raw / ("lungsTr" if case in self.dataset.files else "lungsTs")
            found[case] = (self.study.lungs or of_dataset) / f"{case}{self.ending}"
        missing = [case for case, path in found.items() if not path.is_file()]
        if self.study.lungs is not None and missing:
            raise UserError(f"lungs: {self.study.lungs} has no mask of the test cases {abbreviate(missing)}.")
        if missing and not self._can_find_lungs():
            return {}
        return {case: path for case, path in found.items() if case not in missing}

    def _organ(self) -> str:
        return str(self.settings(next(iter(self.plans)))["organ"])

    def _can_find_lungs(self) -> bool:
        return self._organ() != "volume" and 0 in self.dataset.ct_channels

    def _find_lungs(self, folder: Path, cases: Sequence[str]) -> None:
        """Compute lung masks of test cases."""
        if not cases:
            return
        made = self.out / "test" / "lungs"
        made.mkdir(exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            record = made / "computed.json"
            known = read_json(record) if record.is_file() else {}
            images = {case: self._images(case)[0] for case in cases}
            stamps = {
                case: [VERSION, self._organ(), str(path.resolve()), *file_stamp(path)] for case, path in images.items()
            }
            targets = {case: made / f"{case}{self.ending}" for case in cases}
            left = [case for case in cases if known.get(case) != stamps[case] or not targets[case].is_file()]
            if left and not self.find_lungs:
                raise UnpreparedError(f"The lungs of {len(left)} test cases have not been found yet.")
            jobs = [(images[case], targets[case], self._organ()) for case in left]
            results = run_jobs(
                _write_lungs, jobs, num_processes=cores(), description="Lungs of the test cases" if jobs else None
            )
            raise_problems([result for result in results if result], "the test cases")
            if left:
                write_json(record, known | stamps)
        (folder / "lungs").mkdir(exist_ok=True)
        for case in cases:
            link(targets[case], folder / "lungs" / f"{case}{self.ending}")

    def _check_test_set(self, folder: Path, cases: Sequence[str]) -> None:
        """Masks that do not match their scans are better known before a training than after it."""
        from gasnet_nnunet.evaluation import check_references, check_scans

        # Choices of masks share most of their test cases: each is read once.
        scans = self._unread(sorted((folder / "images").iterdir()))
        check_scans(scans, num_processes=cores())
        problems = []
        for case in cases:
            expected = read_grid(folder / "images" / f"{case}_0000{self.ending}")
            for part in ("masks", "lungs"):
                path = folder / part / f"{case}{self.ending}"
                if path.exists() and (difference := grid_difference(read_grid(path), expected)):
                    problems.append(f"{path.resolve()} does not lie on the grid of its scan: {difference}.")
        raise_problems(problems, "the test cases")
        # The dataset's own labels have been read already.
        others = [case for case in cases if case in self.truths or case not in self.cohort.cases]
        masks = self._unread([folder / "masks" / f"{case}{self.ending}" for case in others])
        check_references(
            {path.name: path for path in masks},
            labels=declared_labels(self.dataset_json).values,
            num_processes=cores(),
        )
        self._read |= {path.resolve() for path in (*scans, *masks)}

    def _unread(self, paths: Sequence[Path]) -> list[Path]:
        return [path for path in paths if path.resolve() not in self._read]

    def _write_splits(self) -> None:
        """Number the folds, old ones as they were, and write them for nnU-Net."""
        path = self.out / FOLD_NUMBERS
        folds: list[dict[str, Any]] = list(read_json(path)["folds"]) if path.is_file() else []
        digests = [_digest(fold) for fold in folds]
        for deal in self.deals:
            for arm in self.study.arms:
                fold = self._fold(arm, deal)
                if _digest(fold) not in digests:
                    folds.append(fold)
                    digests.append(_digest(fold))
        self._numbers = {digest: number for number, digest in enumerate(digests)}
        write_json(path, {"folds": folds})
        write_json(self.preprocessed / SPLITS, folds)

    def _fold(self, arm: str, deal: Deal) -> dict[str, Any]:
        """A fold with the name of its deal: where arms learn from few volumes, two deals may have the same cases."""
        return {**deal.entry(self.study.volumes_of(arm)), "deal": deal.name}


def fingerprint(*parts: Any) -> str:
    """A short text that changes when any of the JSON-compatible parts does."""
    return _digest([FORMAT, *parts])[:20]


def open_workspace(study: Study, out: Path, *, find_lungs: bool = True) -> Workspace:
    """Check a study against its dataset and write its folder, but for `study.yaml`.

    Args:
        study: The study.
        out: Its folder.
        find_lungs: As of `Workspace`.

    Raises:
        UserError: The dataset is not there or has not what the study asks for, or the folder holds something else.
    """
    check_folder(out)
    workspace = Workspace(study, out, find_dataset(str(study.dataset)), find_lungs=find_lungs)
    workspace.write()
    return workspace


def keep_study(out: Path, study: Study) -> Path | None:
    """Write `study.yaml`, unless what stands there says the same.

    Returns:
        A copy of what stood there and said something else.
    """
    path, earlier = out / STUDY, None
    if path.is_file():
        try:
            says = load_study(str(path)).dump()
        except UserError:
            says = None
        if says == study.dump():
            return None
        earlier = superseded(out, STUDY)
        shutil.copyfile(path, earlier)
    write_text(path, study.dump())
    return earlier


def superseded(out: Path, name: str) -> Path:
    """A place for what a study leaves behind when it is changed; it may be days of work."""
    folder = out / "superseded"
    folder.mkdir(exist_ok=True)
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 0
    while (path := folder / f"{stamp}{f'-{number}' if number else ''}_{name}").exists():
        number += 1
    return path


def check_folder(out: Path) -> None:
    """Make a study's folder.

    Raises:
        UserError: It is a file, or a folder that holds anything but an earlier study.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Name a new folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / STUDY).is_file():
        raise UserError(f"{out} is not empty and holds no earlier study. Name a new folder with --out.")
    out.mkdir(parents=True, exist_ok=True)


def link(source: Path, target: Path) -> None:
    """A symbolic link, or hard links where the file system or its rights allow none; only a link is ever replaced."""
    source = source.resolve()
    if target.is_symlink() and target.resolve() != source:
        # The user's folders have been moved; the old ones may still be there, with other data.
        target.unlink(missing_ok=True)
    if target.is_symlink() or target.exists():
        return
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except FileExistsError:  # by another command that opens the same study
        return
    except (OSError, NotImplementedError):
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)


def _write_lungs(job: tuple[Path, Path, str]) -> str:
    """Find the lungs of a CT; what is wrong with it if that is impossible."""
    import numpy as np

    from gasnet_nnunet.lungs import segment_organ
    from gasnet_nnunet.volumes import read_volume, write_volume

    image, target, organ = job
    try:
        values, grid = read_volume(image)
        mask = segment_organ(values, grid.spacing[::-1], organ)
        write_volume(target, mask.astype(np.uint8), grid)
    except UserError as error:
        return str(error)
    return ""


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
