"""The command `gasnet-nnunet`: one module a sub-command, registered here.

The modules import torch, nnU-Net and SimpleITK inside their functions only, so that `--help` stays quick.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet import __version__
from gasnet_nnunet.errors import UserError

app = typer.Typer(
    name="gasnet-nnunet",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gasnet-nnunet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """GASNet for nnU-Net: lesion segmentation from one voxel-labelled CT and many that are only diagnosed."""


def main() -> None:
    """Run the command line: a user's mistake ends in one message and status 1, Ctrl-C in one line and status 130."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        app(standalone_mode=True)
    except UserError as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        raise SystemExit(130) from None
