"""Options that commands share, and what becomes of them.

A choice is made from the table that the library chooses from, by `choice`.
"""

import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compression.choices import LATENTS, REFITS, listed
from ..compression.keys import BLOCK, KEYS
from ..compression.methods import METHODS
from ..models.bits import BITS

DTYPES = ("float32", "bfloat16", "float16")
OPS = {
    "auto": "fused where the decoding step is compiled",
    "fused": "Triton on a GPU; C++ on a CPU, built at first use in half a minute",
    "reference": "plain PyTorch, which defines attention",
}
WEIGHTS = {
    "native": "as loaded",
    "int8": "those of linear layers, with a scale for each output",
}


def choice(
    flag: str, table: Collection[Any], help: str = "", show_default: bool | str = True
) -> Any:
    """An option whose values are the names in `table`: help lists them, others are refused.

    table: names, or a mapping of names to their meaning, or to what has it as `source`.
    """

    def parse(text: Any) -> Any:
        names = {str(name): name for name in table}
        if str(text) not in names:
            raise typer.BadParameter(f"{text!r} is unknown: expected one of {', '.join(names)}")
        return names[str(text)]

    if isinstance(table, Mapping):
        meanings = (f"{name}: {getattr(x, 'source', x)}" for name, x in table.items())
        help = f"{help} {'; '.join(meanings)}.".lstrip()
    else:
        help = f"{help} One of {listed(map(str, table))}."
    return typer.Option(flag, parser=parse, metavar="<name>", help=help, show_default=show_default)


def _own_refits() -> str:
    """The refits of the methods that have one."""
    return ", ".join(f"{', '.join(m.refit)} with {name}" for name, m in METHODS.items() if m.refit)


BITS_HELP = "Bits of a number in the cache; 16 stands for the model's dtype."
REFIT = {"auto": f"{_own_refits()}, else none", "none": "nothing", **REFITS}
Source = Annotated[str, typer.Argument(help="Folder, GGUF file or Hugging Face id.")]
Method = Annotated[str, choice("--method", METHODS)]
Keep = Annotated[float, typer.Option("--keep", help="Share of the KV bytes that stay, 0 to 1.")]
Keys = Annotated[str, choice("--keys", KEYS, "How keys are held.")]
AnchorBlock = Annotated[
    int | None,
    typer.Option(
        "--anchor-block", help="Slots of a block of anchored keys.", show_default=str(BLOCK)
    ),
]
Latent = Annotated[str, choice("--latent", LATENTS)]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text file, hub:DATASET[:CONFIG], or self: text sampled from the model.",
    ),
]
Refit = Annotated[
    str, choice("--refit", REFIT, "What is fitted to the calibration text afterwards.")
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration sequences.")]
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        help="Tokens of a calibration sequence.",
        show_default="1024, or what the model can read",
    ),
]
Dtype = Annotated[str, choice("--dtype", ("auto", *DTYPES), "auto is that of the checkpoint.")]
DecodingDtype = Annotated[
    str,
    choice(
        "--dtype",
        ("auto", *DTYPES),
        "auto is bfloat16 where the processor or the GPU has it, else float32 on a CPU, and on a "
        "GPU the checkpoint's.",
    ),
]
Weights = Annotated[str, choice("--weights", WEIGHTS, "How weights are held.")]
KvBits = Annotated[
    int | None, choice("--kv-bits", BITS, BITS_HELP, show_default="as the checkpoint says")
]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Largest weight file.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the tokenizer run code from the checkpoint."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random numbers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Ops = Annotated[str, choice("--ops", OPS, "Attention at decoding.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the decoding step.")]


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
    """The dtype of a name in `DTYPES`; None for auto."""
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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def fuse(model: Any, ops: str, compile: bool) -> Any:
    """The model, with the fused ops in it if `ops`, a name in `OPS`, says so."""
    from ...kernels.install import DEVICES, install

    wanted = compile and model.device.type in DEVICES if ops == "auto" else ops == "fused"
    return install(model) if wanted else model


def preparation(weights: str, ops: str, compile: bool) -> Callable[[Any], Any]:
    """A function that makes a loaded model ready to decode: weights in int8, and fused ops.

    weights: a name in `WEIGHTS`. ops: a name in `OPS`. The function can be sent to a process.
    """
    return partial(_prepare, weights=weights, ops=ops, compile=compile)


def _prepare(model: Any, weights: str, ops: str, compile: bool) -> Any:
    from ..inference.int8 import quantize

    return fuse(quantize(model) if weights == "int8" else model, ops, compile)


def say_keys(settings: Any) -> None:
    """Say how `auto` decided to hold keys, and why; nothing if they were chosen by hand."""
    if settings.keys_note is not None:
        say(settings.keys_note)


def parse_shared(text: str, heads: int = 0) -> tuple[int, int] | None:
    """Heads per latent of keys and of values; heads: what `all` stands for, 0 if not known yet."""
    if text == "auto":
        return None
    parts = text.split(",")
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
    """The refits that a name in `REFIT` stands for; None for the method's own."""
    return {"auto": None, "none": ()}.get(text, (text,))


def parse_bits(text: str) -> tuple[int, ...]:
    """The bits that numbers may have: auto, or some of `BITS`."""
    if text == "auto":
        return BITS
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        raise ValueError(
            f"kv bits is {text!r}: expected auto, {listed(map(str, BITS))}, or some as in 8,4"
        )
    return tuple(map(int, words))


def command_line() -> str:
    """The command that was typed, with files and folders by their names only."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return shlex.join(["eigenzoo", *words])


def name_of(path: Path | str | None) -> str:
    """The name of a text in messages."""
    return "Python's own help" if path is None else Path(path).name


def say(text: str) -> None:
    """Print a line to standard error: standard output is for results."""
    typer.echo(text, err=True)
