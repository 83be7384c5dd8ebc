"""Tables in which a user says what each scan is: CSV files and Excel sheets, read row by row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from gasnet_nnunet.cohort import Kind, raise_problems
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.volumes import volume_name

from .sources import Source

TEST = "test"
KINDS: Mapping[str, Kind | None] = {**{kind.value: kind for kind in Kind}, TEST: None}
"""What a manifest may call a case; `None` for a test case."""
FOLDER_COLUMNS = ("image", "kind", "mask", "lungs", "patient", "case")


@dataclass(frozen=True)
class Row:
    """A row of a manifest.

    Args:
        named: How messages name it: the file's name and the row's number, as a spreadsheet counts them.
        cells: Its cells in the columns that mean something here, by those columns' names; empty ones are left out.
        rest: Its other cells, by the names of their columns as the file has them; empty ones are left out.
    """

    named: str
    cells: Mapping[str, str]
    rest: Mapping[str, str]


def read_manifest(path: Path, columns: Sequence[str], required: Sequence[str]) -> list[Row]:
    """Read a manifest.

    Capitals, blanks and `_` in the names of columns do not matter. All cells are text.

    Args:
        path: A `.csv` file (separated by commas, semicolons or tabs) or an `.xlsx` file, whose first sheet is read.
        columns: The columns that mean something.
        required: Those of them that must be there.

    Raises:
        UserError: It cannot be read, has no rows, lacks a column or has one twice.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "cases.csv"
        >>> _ = path.write_text("Image,kind,age\\na.nii.gz,healthy,\\n")
        >>> read_manifest(path, ["image", "kind"], ["image"])
        [Row(named='cases.csv row 2', cells={'image': 'a.nii.gz', 'kind': 'healthy'}, rest={})]
    """
    header, *lines = _read_cells(path)
    known = {_plain(column): column for column in columns}
    names = [known.get(_plain(name), name) for name in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column '{twice[0]}' twice. Rename or delete one of them.")
    missing = [column for column in required if column not in names]
    if missing:
        raise UserError(
            f"{path} has no column '{missing[0]}'; its first row holds {', '.join(filter(None, header))}. The columns "
            f"are {', '.join(columns)}."
        )
    rows = []
    for number, line in enumerate(lines, start=2):
        cells = {name: cell.strip() for name, cell in zip(names, line, strict=True) if name and cell.strip()}
        if cells:
            ours = {name: cell for name, cell in cells.items() if name in columns}
            rest = {name: cell for name, cell in cells.items() if name not in columns}
            rows.append(Row(f"{path.name} row {number}", ours, rest))
    if not rows:
        raise UserError(f"{path} has no rows below its first one, which names the columns.")
    return rows


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


def _read_cells(path: Path) -> list[list[str]]:
    import pandas as pd

    if not path.is_file():
        raise UserError(f"--manifest: there is no file {path}.")
    try:
        if path.suffix.lower() == ".xlsx":
            table = pd.read_excel(path, header=None, dtype=str, na_filter=False)
        elif path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig") as file:
                first = file.readline()
            separator = max(",;\t", key=first.count)
            table = pd.read_csv(
                path,
                sep=separator,
                header=None,
                dtype=str,
                na_filter=False,
                encoding="utf-8-sig",
                skip_blank_lines=False,
            )
        else:
            raise UserError(f"--manifest: {path} ends in '{path.suffix}'; a .csv or .xlsx file is expected.")
    except UnicodeDecodeError:
        raise UserError(f"--manifest: {path} is not UTF-8 text. Save it as 'CSV UTF-8' or as .xlsx.") from None
    except (
        ValueError,
        KeyError,
        BadZipFile,
        ImportError,
    ) as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        raise UserError(f"--manifest: {path} cannot be read as a table: {' '.join(str(error).split())}") from None
    if table.empty:
        raise UserError(f"--manifest: {path} is empty; its first row names the columns.")
    return [[str(cell) for cell in line] for line in table.itertuples(index=False)]


def locate(text: str, folders: Iterable[Path]) -> Path | None:
    """The path that a cell names, relative to the first of some folders in which it exists."""
    for folder in folders:
        path = folder / Path(text).expanduser()
        if path.exists():
            return path
    return None


def manifest_sources(path: Path) -> list[Source]:
    """The cases that a manifest of images names.

    Args:
        path: CSV or XLSX file with the columns `image` and `kind` (labelled, diseased, healthy or test), and if wanted
            `mask`, `lungs`, `patient` and `case`. Relative paths start at its folder. Further columns become details.

    Raises:
        UserError: The file cannot be used; all mistakes are named with their rows.
    """
    rows = read_manifest(path, FOLDER_COLUMNS, ("image", "kind"))
    problems: list[str] = []
    images = [Path(row.cells["image"]) for row in rows if "image" in row.cells]
    channels = all(volume_name(image).endswith("_0000") for image in images)
    sources: list[Source] = []
    seen: dict[Path, str] = {}
    for row in rows:
        kind, files, mistakes = _check(row, path)
        if "image" in files:
            first = seen.setdefault(files["image"].resolve(), row.named)
            if first is not row.named:
                mistakes.append(f"{row.named}: {files['image']} stands in {first} already. Delete one of the rows.")
        problems += mistakes
        if mistakes:
            continue
        name = volume_name(files["image"])
        name = name.removesuffix("_0000") if channels else name
        sources.append(
            Source(
                row.cells.get("case") or re.sub(r"[^A-Za-z0-9_.-]+", "_", name),
                kind,
                (files["image"],),
                files.get("mask"),
                files.get("lungs"),
                patient=row.cells.get("patient"),
                details={**row.rest, **({"patient": row.cells["patient"]} if "patient" in row.cells else {})},
                named_by=row.named,
            )
        )
    raise_problems(problems, str(path))
    return sources


def _check(row: Row, manifest: Path) -> tuple[Kind | None, dict[str, Path], list[str]]:
    """The kind and the files of a row, and what is wrong with it."""
    mistakes = [
        f"{row.named}: the cell '{column}' is empty." for column in ("image", "kind") if column not in row.cells
    ]
    files: dict[str, Path] = {}
    for column in ("image", "mask", "lungs"):
        if column in row.cells:
            found = locate(row.cells[column], (manifest.parent,))
            if found is None:
                mistakes.append(
                    f"{row.named}: there is no {column} {row.cells[column]} (relative paths start at "
                    f"{manifest.parent})."
                )
            else:
                files[column] = found
    word = row.cells.get("kind", TEST).lower()
    if word not in KINDS:
        mistakes.append(f"{row.named}: kind is '{row.cells['kind']}'; expected {', '.join(KINDS)}.")
    kind = KINDS.get(word)
    if kind is Kind.LABELLED and "mask" not in row.cells:
        mistakes.append(f"{row.named}: a labelled case needs a mask. Is it diseased?")
    case = row.cells.get("case", "")
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", case):
        mistakes.append(f"{row.named}: case is '{case}'; expected letters, digits, '_', '-' and '.' only.")
    return kind, files, mistakes


def missing_kinds(sources: Iterable[Source]) -> list[str]:
    """A remark on kinds of case without which nothing can be trained, if there are none of them."""
    kinds = {source.kind for source in sources}
    missing = [kind.value for kind in (Kind.LABELLED, Kind.HEALTHY) if kind not in kinds]
    if not missing:
        return []
    return [f"there is no {' and no '.join(missing)} case, which training needs: bring them from another dataset."]
