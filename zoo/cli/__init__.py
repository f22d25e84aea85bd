"""Command line: one function a command, one file each, each a plain sentence of library calls."""

from importlib.metadata import version
from typing import Annotated

import typer

from ..utils.interrupt import interruptible
from . import (
    bench,
    card,
    compress,
    demo,
    evaluate,
    generate,
    inspect,
    pull,
    push,
    refine,
    report,
    sweep,
)
from .options import Command
from .values import show_log

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    compress.compress,
    refine.refine,
    evaluate.evaluate,
    generate.generate,
    inspect.inspect,
    bench.bench,
    sweep.sweep,
    report.report,
    card.card,
    push.push,
    pull.pull,
    demo.demo,
):
    app.command(cls=Command)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"eigenzoo {version('eigenzoo')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Compress the KV cache of language models, and run and measure the result."""


def main() -> None:
    """Run the command line. Bad input ends in one line and exit code 2, Ctrl-C in 130."""
    show_log()
    try:
        with interruptible():
            code = app(standalone_mode=False)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except typer.Abort:
        raise SystemExit(1) from None
    except typer.TyperException as error:
        raise SystemExit(_refuse(error.format_message(), error.exit_code)) from None
    except ValueError as error:
        raise SystemExit(_refuse(str(error))) from None
    raise SystemExit(code)


def _refuse(message: str, code: int = 2) -> int:
    if message:  # none where a missing command has printed help
        typer.echo(f"error: {message}", err=True)
    return code
