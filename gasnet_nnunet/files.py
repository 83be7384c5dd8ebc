"""Files that matter, read and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gasnet_nnunet.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is no readable JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a JSON object is expected.")
    return content


def file_stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns, which tell a file from another one under its name."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 so that a reader sees the old or the new content, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # As it is: pandas ends lines of a CSV as the system does, which Windows would do once more.
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_whole(*outputs: Path) -> Iterator[list[Path]]:
    """Temporary names to write to, which become the final ones if nothing was raised; else nothing is left of them."""
    temporary = [path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in outputs]
    try:
        yield temporary
        for written, path in zip(temporary, outputs, strict=True):
            with written.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(written, path)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_figure(path: Path, figure: Figure, *, dpi: int = 120) -> None:
    """Draw a figure as PNG, under its name when it is whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with written_whole(path) as (temporary,):
        # Packing harder takes longer than drawing.
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=dpi, pil_kwargs={"compress_level": 3})
