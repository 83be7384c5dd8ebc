"""The command `gasnet-nnunet`: one module a sub-command, registered here.

The modules import torch, nnU-Net and SimpleITK inside their functions only, so that `--help` stays quick.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gasnet_nnunet import __version__
from gasnet_nnunet.cli import (
    check,
    compare,
    convert,
    demo,
    doctor,
    export,
    extend,
    lungs,
    plan,
    report,
    restore,
    splits,
    study,
)
from gasnet_nnunet.cli.variadic import VariadicCommand
from gasnet_nnunet.errors import FILES_REFUSED, UserError

INTERRUPTED = 130

app = typer.Typer(
    name="gasnet-nnunet",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(no_args_is_help=True, help="Make an nnU-Net dataset out of other data.")


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


def _register(group: typer.Typer, command: Callable[..., None], **options: Any) -> None:
    # The sections of a docstring are for readers of the code; typer makes the options' help from their annotations.
    text = re.split(r"\n\n(?:Args|Examples|Raises|Returns):", inspect.getdoc(command) or "")[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    group.command(help=escape("\n\n".join(paragraphs)), **options)(command)


_register(app, doctor.doctor)
_register(app, demo.demo)
app.add_typer(convert_app, name="convert")
for _command in (convert.folders, convert.covid19_ct_seg, convert.medseg, convert.mosmed, convert.merge):
    _register(convert_app, _command, cls=VariadicCommand)
_register(convert_app, convert.dicom)
_register(app, extend.extend)
_register(app, check.check)
_register(app, lungs.lungs)
_register(app, splits.splits)
_register(app, plan.plan, cls=VariadicCommand)
_register(app, export.export, cls=VariadicCommand)
_register(app, restore.restore, cls=VariadicCommand)
_register(app, study.study)
_register(app, compare.compare, cls=VariadicCommand)
_register(app, report.report)


def main() -> None:
    """Run the command line: what a user can mend ends in one message and status 1, Ctrl-C in a line and status 130."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app()
    except UserError as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}")
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in FILES_REFUSED:
            raise
        place = error.filename2 or error.filename or "A file"
        message = f"{place} cannot be read or written: {error.strerror}. Mend that, then repeat the command."
        errors.print(f"[bold red]Error:[/] {escape(message)}")
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's translation of KeyboardInterrupt
            errors.print("Interrupted.")
        raise
