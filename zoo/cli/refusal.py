"""What becomes of errors: bad input is one line, a bug stays a traceback."""

import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import typer

from ..utils.escape import printable

LONGEST = 2000  # characters of a message
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def reason(error: BaseException) -> str | None:
    """What is wrong with the input, or with the machine; None if only a bug raises such an error.

    This is the last net. What a file or an option holds is best refused where it is read, with a
    ValueError that says what to do.
    """
    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        names = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join((error.strerror, *map(str, names)))
    if isinstance(error, MemoryError) or _no_memory(error):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    known = isinstance(error, (ValueError, OSError)) or _missing(error) or _foreign(error)
    return str(error) or type(error).__name__ if known else None


def _no_memory(error: BaseException) -> bool:
    """Whether torch could not allocate: of a CPU and of CUDA's libraries it is a RuntimeError."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _missing(error: BaseException) -> bool:
    """Whether a package of others is missing."""
    name = error.name or "" if isinstance(error, ImportError) else "eigenzoo"
    return name.partition(".")[0] != "eigenzoo"


def _foreign(error: BaseException) -> bool:
    """Whether it is the error of a library for a damaged file, a template or a connection."""
    from huggingface_hub.errors import HTTPError, StrictDataclassError
    from jinja2 import TemplateError
    from safetensors import SafetensorError
    from yaml import YAMLError

    kinds = (HTTPError, StrictDataclassError, TemplateError, SafetensorError, YAMLError)
    return isinstance(error, kinds)


def one_line(text: str) -> str:
    """The text in one line, without characters that a terminal obeys, and not endless."""
    line, half = printable(" ".join(text.split())), LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} [...] {line[-half:]}"


def refuse(message: str, code: int = 2) -> int:
    """Say what is wrong in one line, if there is something to say; returns the exit code."""
    if message:  # none where a missing command has printed help
        with suppress(OSError):  # standard error may be what is full
            typer.echo(f"error: {one_line(message)}", err=True)
    return code


def reader_is_gone() -> bool:
    """Whether nobody reads what is printed, as after `| head`; then nothing more is printed."""
    gone = [name for name in ("stdout", "stderr") if _is_broken(getattr(sys, name))]
    for name in gone:  # else Python would complain when it empties its buffers
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, stays open to the end
    return bool(gone)


def _is_broken(stream: TextIO | None) -> bool:
    try:
        pipe = select.poll()
        if stream is not None:
            pipe.register(stream, 0)  # errors are told in any case
        return any(event & select.POLLERR for _, event in pipe.poll(0))
    except (OSError, ValueError):  # no file, or closed
        return False


def flush(stream: TextIO | None) -> None:
    """Write what is still in the buffer of a stream, which may be closed."""
    if stream is not None:
        stream.flush()
