"""Lets a clone, and so an editable install, find the top-level `dataset_conversion` folder under its installed name.

A module with a `__path__` is a package. The wheel leaves this file out, because it holds the folder itself here.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "dataset_conversion")]
