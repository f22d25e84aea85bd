"""What becomes of the options that commands share: models, devices, dtypes and numbers."""

import logging
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from ..compression.choices import listed
from ..models.bits import BITS
from ..utils.escape import prose


def load(
    source: str,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The checkpoint, loaded without a progress bar if standard error is no terminal."""
    from ..inference import checkpoint

    hide_bars()
    return checkpoint.load(
        source, torch_dtype(dtype), torch_device(device), revision, trust_remote_code
    )


def hide_bars() -> None:
    """Keep transformers' progress bars out of files."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def torch_dtype(name: str) -> Any:
    """The dtype of a name in `options.DTYPES`; None for auto."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def decoding_dtype(name: str, device: str) -> str:
    """The name of a dtype; auto becomes what the device decodes fastest in."""
    from ..inference.generate import fastest_dtype

    fastest = fastest_dtype(torch_device(device)) if name == "auto" else None
    return name if fastest is None else str(fastest).removeprefix("torch.")


def torch_device(name: str) -> Any:
    """The device of that name. Raises ValueError where it cannot be used."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def fuse(model: Any, ops: str, compile: bool) -> Any:
    """The model, with the fused ops in it if `ops`, a name in `options.OPS`, says so.

    Where "auto" would take them but cannot, it says why. Raises ValueError where "fused" cannot.
    """
    from ...kernels.install import DEVICES, install

    if ops == "fused":
        return install(model)
    if ops == "auto" and compile and model.device.type in DEVICES:
        try:
            return install(model)
        except ValueError as error:
            say(f"decoding with the reference ops: {error}")
    return model


def preparation(weights: str, ops: str, compile: bool) -> Callable[[Any], Any]:
    """A function that makes a loaded model ready to decode: weights in int8, and fused ops.

    weights: a name in `options.WEIGHTS`. ops: a name in `options.OPS`. The function can be sent to
    another process.
    """
    return partial(_prepare, weights=weights, ops=ops, compile=compile)


def _prepare(model: Any, weights: str, ops: str, compile: bool) -> Any:
    from ..inference.int8 import quantize

    return fuse(quantize(model) if weights == "int8" else model, ops, compile)


def refuse_unused(
    ctx: typer.Context, goes_with: Mapping[str, Collection[str]], asked: Mapping[str, object]
) -> None:
    """Raise ValueError for an option that was given and changes nothing.

    goes_with: by the parameter of an option, the names of which one must be asked for. asked: by
    name, a true value for what is.
    """
    for name, fitting in goes_with.items():
        if given(ctx, name) and not any(asked[x] for x in fitting):
            raise ValueError(f"--{name.replace('_', '-')} goes with {' or '.join(fitting)}")


def given(ctx: typer.Context, name: str) -> bool:
    """Whether the user gave this parameter, be it the value that it has otherwise."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def say_keys(settings: Any) -> None:
    """Say how `auto` decided to hold keys, and why; nothing if they were chosen by hand."""
    if settings.keys_note is not None:
        say(settings.keys_note)


def parse_shared(text: str, heads: int = 0) -> tuple[int, int] | None:
    """Heads per latent of keys and of values; heads: what `all` stands for, 0 if not known yet."""
    if text == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    numbers = [
        heads if part == "all" else int(part)
        for part in parts
        if part == "all" or (part.isdecimal() and int(part))
    ]
    if len(numbers) != len(parts) or len(parts) > 2:
        raise ValueError(
            f"heads per latent is {text!r}: expected auto, a number, all, or two as in all,1"
        )
    return numbers[0], numbers[-1]


def parse_refit(text: str) -> tuple[str, ...] | None:
    """The refits that a name in `options.REFIT` stands for; None for the method's own."""
    return {"auto": None, "none": ()}.get(text, (text,))


def parse_bits(text: str) -> tuple[int, ...]:
    """The bits that numbers may have: auto, or some of `BITS`, each once and falling."""
    if text == "auto":
        return BITS
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        raise ValueError(
            f"kv bits is {text!r}: expected auto, {listed(map(str, BITS))}, or some as in 8,4"
        )
    return tuple(sorted({int(word) for word in words}, reverse=True))


def parse_bytes(text: str) -> int:
    """The bytes of a size such as 80GB (of 10^9 bytes), or 80GiB (of 2^30)."""
    size = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if size is None or not float(size[1]):
        raise ValueError(
            f"memory is {text!r}: expected a size such as 80GB or 80GiB, in KB, MB, GB or TB"
        )
    unit = (1024 if size[3] else 1000) ** (1 + "KMGT".index(size[2].upper()))
    return int(float(size[1]) * unit)


def command_line() -> str:
    """The command that was typed, with files and folders by their names only."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return shlex.join(["eigenzoo", *words])


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a message of the log."""
        say(record.getMessage())


def show_log() -> None:
    """Print what the library logs, such as which text was read, to standard error."""
    log = logging.getLogger(__name__.partition(".")[0])
    if not log.handlers:
        log.addHandler(_Said())
        log.setLevel(logging.INFO)


def say(text: str) -> None:
    """Print a line to standard error: standard output is for results."""
    typer.echo(prose(text), err=True)


def show(text: str, end: str = "\n") -> None:
    """Print a text that eigenzoo did not write; a terminal shows control characters as words."""
    print(prose(text) if sys.stdout.isatty() else text, end=end, flush=True)
