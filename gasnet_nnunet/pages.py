"""HTML pages of one file each: the frame, the style and the escaping that all reports share."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import Any

import jinja2

from gasnet_nnunet import __version__
from gasnet_nnunet.files import write_text


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
