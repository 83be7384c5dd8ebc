"""Virtual environments for tests of what is installed and what is not.

Nothing of the environment that runs the tests can stand in for what is tested: it lends its other packages as links,
but neither nnU-Net nor ours.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

NOT_LENT = ("nnunetv2", "gasnet", "_gasnet", "__editable__", "__pycache__")


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds neither nnU-Net nor our package until a test installs them."""

    folder: Path

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, *arguments: str, **variables: str) -> str:
        """Run its Python with a clean environment and return what it prints.

        Args:
            arguments: The interpreter's arguments.
            variables: Environment variables to set.
        """
        kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        variables = {**kept, "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", **variables}
        command = [str(self.folder / "bin" / "python"), *arguments]
        ended = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=variables, cwd=self.folder, check=False
        )
        assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def install(self, *what: str) -> None:
        """Install with pip, without dependencies and without a network."""
        self.run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *what)

    def uninstall(self) -> None:
        """Uninstall our package with pip."""
        self.run("-m", "pip", "uninstall", "--quiet", "--yes", "gasnet-nnunet")

    def files(self) -> set[str]:
        """Everything in it but the byte code of others; lent packages as their links only."""
        found = set()
        for folder, folders, files in os.walk(self.folder):
            place = os.path.relpath(folder, self.folder)
            found.update(os.path.join(place, name) for name in [*folders, *files])
        return {path for path in found if "__pycache__" not in path or "gasnet" in path}


def make_environment(folder: Path) -> Environment:
    """Make an environment in a new folder."""
    made = Environment(folder)
    venv.create(made.folder, symlinks=True)
    for place in (Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")):
        for entry in place.iterdir():
            link = made.packages / entry.name
            if not entry.name.startswith(NOT_LENT) and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    return made


def copy_of_nnunet(folder: Path) -> Path:
    """Copy the package nnunetv2 into a folder."""
    spec = importlib.util.find_spec("nnunetv2")
    assert spec is not None
    assert spec.submodule_search_locations
    shutil.copytree(spec.submodule_search_locations[0], folder / "nnunetv2")
    return folder
