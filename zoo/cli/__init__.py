"""Command line: one function a command, one file each, each a plain sentence of library calls."""

import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..utils.interrupt import interruptible
from . import (
    bench,
    card,
    compress,
    demo,
    evaluate,
    generate,
    inspect,
    plan,
    pull,
    push,
    refine,
    report,
    serve,
    sweep,
)
from .options import Command
from .refusal import flush, reader_is_gone, reason, refuse
from .values import show_log

READER_IS_GONE = 1  # the code with which typer and rich leave


class Door(TyperGroup):
    """All commands. Errors of input leave as one line and exit code 2, bugs as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            with interruptible():
                return super().invoke(ctx)
        except Exception as error:
            raise typer.Exit(_leave(error, ctx.params["debug"])) from None


def _leave(error: Exception, debug: bool) -> int:
    """The exit code of a command that raised an error; raises those that say more as they are."""
    if isinstance(error, BrokenPipeError) and reader_is_gone():
        return READER_IS_GONE
    if isinstance(error, (typer.Exit, typer.Abort, typer.TyperException)):
        raise error
    message = reason(error)
    if message is None:
        error.add_note("this is a bug in eigenzoo: please report it, with these lines")
        raise error
    if debug:
        traceback.print_exception(error)
    return refuse(message)


app = typer.Typer(
    cls=Door,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    plan.plan,
    compress.compress,
    refine.refine,
    evaluate.evaluate,
    generate.generate,
    serve.serve,
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
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of every error.", envvar="EIGENZOO_DEBUG"),
    ] = False,
) -> None:
    """Compress the KV cache of language models, and run and measure the result."""


def main() -> None:
    """Run the command line. Bad input ends in one line and exit code 2, Ctrl-C in 130."""
    show_log()
    try:
        code = app(standalone_mode=False)
        flush(sys.stdout)  # a full disk, or a pipe that nobody reads, may be noticed only here
    except KeyboardInterrupt:
        code = 130
    except typer.TyperException as error:
        code = refuse(error.format_message(), error.exit_code)
    except OSError as error:
        code = _leave(error, debug=False)
    raise SystemExit(code)
