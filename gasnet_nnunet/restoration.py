"""A trained model at work on a folder of CTs: masks, restored CTs, burden and reports, a case at a time."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gasnet_nnunet.burden import burden_of, find_lungs
from gasnet_nnunet.case_report import IndexRow, report_name, write_case_report, write_index
from gasnet_nnunet.cohort import abbreviate
from gasnet_nnunet.dataset_conversion.dicom_series import DicomVolume
from gasnet_nnunet.dicom_seg import label_names, write_dicom_seg
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.files import write_json, write_text
from gasnet_nnunet.inference import RESTORE_FROM, LoadedModel, Restoration, Segmentation
from gasnet_nnunet.inspection import UNLIKE_SPACINGS
from gasnet_nnunet.lung_masks import USUAL_ML
from gasnet_nnunet.lungs import HU_RANGE, Mask
from gasnet_nnunet.new_cts import ENDING, Case
from gasnet_nnunet.volumes import HIGHEST_AIR, Grid, as_image, grid_difference, read_volume, volume_name, write_volume

NETWORK_SHARE = 0.7
"""Share of a case's progress that the networks are given."""
RESTORED = ("restored", "generated", "difference")
"""Volumes that need G."""
BURDEN_FILE = "burden.json"
INDEX_FILE = "report.html"
IMPLAUSIBLE_PERCENT = 60.0
"""Share of the lungs from which on a mask is doubted."""
OUTSIDE_SHARE, OUTSIDE_ML = 0.2, 10.0
"""Share and volume of the lesions outside the lungs from which on a mask is doubted."""
HU_MARGIN = 100.0
"""Values beyond the training data by this much are told of; noise alone is less."""


@dataclass(frozen=True)
class Options:
    """What is made of each CT.

    Args:
        threshold: M^ from which on a voxel is restored.
        restored: Whether CTs are restored; else masks, probabilities and burden alone.
        mask_only: Whether masks are all there is.
        report: Whether reports are written.
        lungs: The user's lung mask of a case, which wins over a computed one.
        overwrite: Whether cases that are there are done again.
    """

    threshold: float = RESTORE_FROM
    restored: bool = True
    mask_only: bool = False
    report: bool = True
    lungs: Mapping[str, Path] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        case: Its name.
        state: "done", "kept" (it was there already) or "failed".
        burden: Its lesion burden, where it was measured.
        warnings: What to doubt about it, one sentence each.
        problem: Why it failed, or what it lacks, one sentence; empty if nothing.
    """

    case: str
    state: str
    burden: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    problem: str = ""


def restore_cases(
    model: LoadedModel, cases: Sequence[Case], out: Path, options: Options, *, progress: bool = False
) -> list[Outcome]:
    """Work on CTs one after the other; what is there already is kept, and a broken CT does not stop the others.

    The files of a case appear under their names when all of them are written.

    Args:
        model: The model.
        cases: The CTs.
        out: Folder to write to; it is made.
        options: What is made of them.
        progress: Show a progress bar.

    Raises:
        UserError: The folder holds results of another model, or names of outputs meet.
    """
    ledger = _Ledger(out, model, options)
    _check_names(model, cases, options)
    outcomes = []
    with _bar(progress, len(cases)) as advance:
        for number, case in enumerate(cases):
            advance(number, case.name)
            expected = [out / name for name in _outputs(model, case, options)]
            if not options.overwrite and all(path.is_file() for path in expected) and ledger.has(case.name):
                outcomes.append(ledger.outcome(case.name))
                continue
            worker = _CaseWorker(model, case, out, options, partial(_within, advance, number))
            outcomes.append(worker.run(ledger))
        advance(len(cases), None)
    if options.report and not options.mask_only:
        rows = [IndexRow(one.case, one.burden or {}, one.warnings, one.problem or None) for one in outcomes]
        write_index(out / INDEX_FILE, rows)
    return outcomes


def _within(advance: Callable[[float, str | None], None], number: int, done: float) -> None:
    """Move the bar by a part of a case; reading, measuring and writing take the rest."""
    advance(number + NETWORK_SHARE * done, None)


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[float, str | None], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    remaining = (TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *remaining, disable=not shown) as bar:
        task = bar.add_task("", total=total)

        def advance(done: float, name: str | None) -> None:
            bar.update(task, completed=done, description=name)

        yield advance


def _outputs(model: LoadedModel, case: Case, options: Options) -> list[str]:
    """Names of the files that a case ends with."""
    names = [f"{case.name}{ENDING}"]
    if not options.mask_only:
        names += [f"{case.name}_{volume}{ENDING}" for volume in _volumes(model, options)]
        if case.series is not None:
            names.append(f"{case.name}_seg.dcm")
        if options.report:
            names.append(report_name(case.name))
    return names


def _volumes(model: LoadedModel, options: Options) -> tuple[str, ...]:
    return ("probability", *(RESTORED if options.restored and not model.no_restoration else ()))


def _check_names(model: LoadedModel, cases: Sequence[Case], options: Options) -> None:
    seen: dict[str, str] = {}
    for case in cases:
        for name in _outputs(model, case, options):
            if name in seen:
                raise UserError(f"The cases {seen[name]} and {case.name} would both write {name}. Rename one of them.")
            seen[name] = case.name


class _CaseWorker:
    """All that is done for one case."""

    def __init__(
        self,
        model: LoadedModel,
        case: Case,
        out: Path,
        options: Options,
        on_progress: Callable[[float], None],
    ) -> None:
        self.model, self.case, self.out, self.options = model, case, out, options
        self._on_progress = on_progress
        self._unfinished: dict[Path, Path] = {}

    def run(self, ledger: _Ledger) -> Outcome:
        """Make all files of the case or none; what one CT has wrong does not concern the next."""
        try:
            burden, warnings, problem = self._make()
            self._rename()
            if burden is not None:
                ledger.add(self.case.name, burden, warnings, problem)
        # Besides a user's mistakes: full disks and memory (torch's own is a RuntimeError).
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, OSError) and error.strerror:
                reason = f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
            return Outcome(self.case.name, "failed", problem=f"{self.case.name}: {reason}")
        finally:
            for path in self._unfinished:
                path.unlink(missing_ok=True)
        return Outcome(self.case.name, "done", burden, tuple(warnings), problem)

    def _make(self) -> tuple[dict[str, Any] | None, list[str], str]:
        values, grid = self._read()
        ct = values[0] if values.ndim == 4 else values
        result = self._predict(values, grid)
        if self.options.mask_only:
            self._write(f"{self.case.name}{ENDING}", result.mask, grid)
            return None, [], ""
        lungs, problem = self._lungs(ct, grid)
        restored = result.restored if isinstance(result, Restoration) else None
        burden = burden_of(result.mask, ct, grid, lungs=lungs, restored=restored)
        warnings = [*([problem.partition(": ")[2]] if problem else []), *warnings_of(self.model, ct, grid, burden)]
        for volume in _volumes(self.model, self.options):
            self._write(f"{self.case.name}_{volume}{ENDING}", getattr(result, volume), grid)
        self._write(f"{self.case.name}{ENDING}", result.mask, grid)
        if self.case.series is not None:
            self._write_dicom_seg(self.case.series, result.mask)
        if self.options.report:
            images = [as_image(ct, grid), as_image(result.mask, grid), None, None]
            if isinstance(result, Restoration):
                images[2:] = [as_image(result.restored, grid), as_image(result.difference, grid)]
            # The arrays of a large CT would stand beside the report's own.
            del result, restored, values, lungs, ct
            self._write_report(images, burden, warnings)
        return burden, warnings, problem

    def _read(self) -> tuple[NDArray[Any], Grid]:
        """The CT (Z, Y, X), or (C, Z, Y, X) for several channels."""
        if self.case.series is not None:
            return self.case.series.read()
        values, grid = read_volume(self.case.files[0])
        others = []
        for path in self.case.files[1:]:
            other, place = read_volume(path)
            if difference := grid_difference(place, grid):
                raise UserError(f"{path} does not lie on the grid of {self.case.files[0].name}: {difference}.")
            others.append(other)
        return (np.stack([values, *others]) if others else values), grid

    def _predict(self, values: NDArray[Any], grid: Grid) -> Segmentation:
        spacing = grid.spacing[::-1]
        if self.options.restored and not self.options.mask_only and not self.model.no_restoration:
            return self.model.restore(values, spacing, threshold=self.options.threshold, on_progress=self._on_progress)
        return self.model.segment(values, spacing, on_progress=self._on_progress)

    def _lungs(self, ct: NDArray[Any], grid: Grid) -> tuple[Mask | None, str]:
        """The lung mask and what is wrong about it; none for models of other organs."""
        path = self.options.lungs.get(self.case.name)
        if path is not None:
            values, place = read_volume(path)
            if difference := grid_difference(place, grid):
                raise UserError(f"{path} does not lie on the grid of its CT: {difference}. Resample it to that grid.")
            lungs = values > 0
        elif self.model.settings is not None and self.model.settings.organ != "lungs":
            return None, ""
        else:
            lungs = find_lungs(ct, grid)
        if lungs.any():
            return lungs, ""
        return None, (
            f"{self.case.name}: no lungs were found in it, so its burden has no shares of the lungs. Is it a CT of the "
            "chest in HU? If so, give it a lung mask with --lungs."
        )

    def _temporary(self, name: str) -> Path:
        """Hidden until the whole case is there."""
        ending = name[len(volume_name(Path(name))) :]
        path = self.out / f".{name.removesuffix(ending)}.unfinished{ending}"
        self._unfinished[path] = self.out / name
        return path

    def _write(self, name: str, array: NDArray[Any], grid: Grid) -> None:
        write_volume(self._temporary(name), array, grid)

    def _write_dicom_seg(self, series: DicomVolume, mask: NDArray[Any]) -> None:
        write_dicom_seg(
            self._temporary(f"{self.case.name}_seg.dcm"),
            mask,
            series,
            label_names(self.model.dataset_json["labels"]),
            model=self.model.folder.name,
            lungs=self.model.settings is None or self.model.settings.organ == "lungs",
        )

    def _write_report(self, images: Sequence[Any], burden: Mapping[str, Any], warnings: Sequence[str]) -> None:
        ct, mask, restored, difference = images
        write_case_report(
            self._temporary(report_name(self.case.name)),
            case=self.case.name,
            ct=ct,
            mask=mask,
            restored=restored,
            difference=difference,
            burden=burden,
            model=self.model.description,
            warnings=warnings,
        )

    def _rename(self) -> None:
        for path, final in self._unfinished.items():
            os.replace(path, final)


def warnings_of(model: LoadedModel, ct: NDArray[Any], grid: Grid, burden: Mapping[str, Any]) -> list[str]:
    """What to doubt about a case: values and voxels unlike the training data's, and an implausible burden.

    Args:
        model: The model.
        ct: CT (Z, Y, X) in HU.
        grid: Where it lies.
        burden: Result of `burden_of`.

    Returns:
        One sentence each.
    """
    warnings = []
    few = ct.ravel()[:: max(1, ct.size // 1_000_000)]
    few = few[few > HU_RANGE[0]]  # what lies below pads the field of view
    low, high = (float(value) for value in np.percentile(few, [0.5, 99.5])) if few.size else (0.0, 0.0)
    known = model.plans.foreground_intensity_properties_per_channel["0"]
    if float(ct.min()) > HIGHEST_AIR:
        warnings.append(
            f"The values run from {ct.min():g} to {ct.max():g}; HU are expected, with air near -1000. Nothing of this "
            "can be relied on."
        )
    elif low < known["min"] - HU_MARGIN or high > known["max"] + HU_MARGIN:
        warnings.append(
            f"The values run from {low:.0f} to {high:.0f} HU (0.5 and 99.5 percentiles), beyond those of the training "
            f"data, {known['min']:.0f} to {known['max']:.0f}."
        )
    least, most = training_spacings(model)
    spacing = np.array(grid.spacing[::-1])
    if (spacing > UNLIKE_SPACINGS * most).any() or (spacing < least / UNLIKE_SPACINGS).any():
        ranges = " x ".join(f"{a:.3g}-{b:.3g}" for a, b in zip(least, most, strict=True))
        found = " x ".join(f"{edge:.3g}" for edge in spacing)
        warnings.append(f"The voxels are {found} mm (Z x Y x X), unlike those of the training data, {ranges} mm.")
    lungs, percent, outside = (burden[name] for name in ("lung_ml", "lesion_percent", "lesion_outside_lung_ml"))
    if lungs is not None and not USUAL_ML[0] <= lungs <= USUAL_ML[1]:
        warnings.append(f"The lungs measure {lungs:.0f} ml; {USUAL_ML[0]:.0f} to {USUAL_ML[1]:.0f} ml are usual.")
    if percent is not None and percent > IMPLAUSIBLE_PERCENT:
        warnings.append(f"{percent:.0f} % of the lungs are called lesion; check the mask.")
    if outside is not None and outside > max(OUTSIDE_ML, OUTSIDE_SHARE * burden["lesion_ml"]):
        warnings.append(
            f"{outside:.0f} of {burden['lesion_ml']:.0f} ml of lesion lie outside the lungs that were found; check "
            "the mask, or give a lung mask with --lungs."
        )
    return warnings


def training_spacings(model: LoadedModel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest voxel size (Z, Y, X) in mm of the CTs that a model was trained on, as far as it tells."""
    path = model.folder / "dataset_fingerprint.json"
    spacings: Any = None
    if path.is_file():
        spacings = json.loads(path.read_text(encoding="utf-8")).get("spacings")
    if not spacings:
        median = model.plans.plans["original_median_spacing_after_transp"]
        spacings = [[median[axis] for axis in model.plans.transpose_backward]]
    known = np.array(spacings, dtype=float)
    return known.min(axis=0), known.max(axis=0)


# Burden files ---------------------------------------------------------------------------------------------------------


class _Ledger:
    """`burden.json` and `burden.csv`, which grow case by case."""

    def __init__(self, out: Path, model: LoadedModel, options: Options) -> None:
        self._path = out / BURDEN_FILE
        self._used = not options.mask_only
        self.model = {**model.description, "Restored from M^": f"{options.threshold:g}"}
        self.cases: dict[str, dict[str, Any]] = {}
        out.mkdir(parents=True, exist_ok=True)
        if not self._path.is_file() or not self._used:
            return
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            before, cases = content["model"], content["cases"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._path} is damaged. Move it away, or add --overwrite.") from None
        differences = [name for name in {**before, **self.model} if before.get(name) != self.model.get(name)]
        if not differences:
            self.cases = cases
        elif not options.overwrite:
            name = differences[0]
            raise UserError(
                f"{out} holds results of another model ({name}: {before.get(name)} then, {self.model.get(name)} now). "
                "Choose another folder, or add --overwrite."
            )

    def has(self, case: str) -> bool:
        return not self._used or case in self.cases

    def outcome(self, case: str) -> Outcome:
        entry = dict(self.cases.get(case, {}))
        warnings, problem = tuple(entry.pop("warnings", ())), entry.pop("problem", "")
        return Outcome(case, "kept", entry or None, warnings, problem)

    def add(self, case: str, burden: Mapping[str, Any], warnings: Sequence[str], problem: str) -> None:
        self.cases[case] = {**burden, "warnings": list(warnings), "problem": problem}
        write_json(self._path, {"model": self.model, "cases": dict(sorted(self.cases.items()))})
        write_text(self._path.with_suffix(".csv"), burden_csv(self.cases))


def burden_csv(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of burdens, a row a case; what is not defined is empty.

    Examples:
        >>> print(burden_csv({"a": {"lesion_ml": 1.25, "lesion_percent": None, "warnings": ["odd."]}}))
        case,lesion_ml,lesion_percent,warnings
        a,1.25,,odd.
        <BLANKLINE>
    """
    columns = [name for name in next(iter(cases.values()), {}) if name not in ("component_ml", "warnings", "problem")]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", *columns, "warnings"])
    for name, entry in sorted(cases.items()):
        cells = [entry.get(column) for column in columns]
        rounded = [round(cell, 4) if isinstance(cell, float) else cell for cell in cells]
        writer.writerow([name, *rounded, " ".join(entry.get("warnings", ()))])
    return table.getvalue()


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: how many cases are done, kept and failed.

    Examples:
        >>> summary([Outcome("a", "done"), Outcome("b", "kept"), Outcome("c", "failed", problem="c: broken")])
        '1 done, 1 kept, 1 failed (c).'
    """
    groups = {state: [one.case for one in outcomes if one.state == state] for state in ("done", "kept", "failed")}
    parts = [f"{len(names)} {state}" for state, names in groups.items()]
    return f"{', '.join(parts)} ({abbreviate(groups['failed'])})." if groups["failed"] else f"{', '.join(parts)}."
