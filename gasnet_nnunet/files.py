"""Files that matter, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new content, never a part of it."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, so that a reader sees the old or the new content, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
