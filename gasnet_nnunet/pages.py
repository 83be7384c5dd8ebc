"""HTML pages of one file each: the frame, the style, the escaping and the small pictures that all reports share."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gasnet_nnunet import __version__
from gasnet_nnunet.files import write_text

PICTURE_WIDTH = 240

Colour = tuple[int, int, int]


def write_page(path: Path, template: str, **content: Any) -> None:
    """Render a template of this package into one file that needs no other, whole or not at all.

    Everything in `content` is escaped; the page's own policy forbids it every request to a network.

    Args:
        path: The page to write.
        template: Name of the template, which extends `page.html`.
        content: What the template shows, `title` at least.
    """
    write_text(path, _environment().get_template(template).render(version=__version__, **content))


def inline(picture: bytes, kind: str = "png") -> str:
    """A picture as an address that holds it.

    Examples:
        >>> inline(b"...")
        'data:image/png;base64,Li4u'
    """
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def slice_picture(
    values: NDArray[Any],
    window: tuple[float, float],
    outlines: Sequence[tuple[NDArray[np.bool_], Colour]] = (),
    aspect: float = 1.0,
) -> bytes:
    """A small PNG of a slice.

    Args:
        values: Intensities (Y, X).
        window: Intensities shown as black and as white.
        outlines: Masks (Y, X) and the colours of their outlines; the later cover the earlier.
        aspect: Height of a pixel over its width.
    """
    height, width = values.shape
    size = (PICTURE_WIDTH, max(1, round(PICTURE_WIDTH * aspect * height / width)))
    grey = np.clip((values - window[0]) / (window[1] - window[0]), 0, 1) * 255
    shown = np.array(Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.BOX).convert("RGB"))
    for mask, colour in outlines:
        inside = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        padded = np.pad(inside, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        shown[inside & ~core] = colour
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


@functools.cache
def _environment() -> jinja2.Environment:
    folder = Path(__file__).resolve().parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment
