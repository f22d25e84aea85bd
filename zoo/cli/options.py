"""Options that commands share, and what becomes of them."""

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[str, typer.Argument(help="Folder, GGUF file or Hugging Face id.")]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="fisher, fisher-plain, attention, pca, eigen, kv-heads, palu, lorc or kq-svd.",
    ),
]
Keep = Annotated[float, typer.Option("--keep", help="Share of the KV bytes that stay, 0 to 1.")]
Keys = Annotated[
    str,
    typer.Option(
        "--keys",
        help="With RoPE: rebuild (best), anchored (nearly, and faster), pairs or rotated (read as "
        "they are), auto; and everywhere full: only values are compressed.",
    ),
]
AnchorBlock = Annotated[
    int | None,
    typer.Option("--anchor-block", help="Slots of a block of anchored keys. [default: 16]"),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text file, hub:DATASET[:CONFIG], or self: text sampled from the model.",
    ),
]
Refit = Annotated[
    str,
    typer.Option(
        "--refit",
        help="What is fitted to the text afterwards: output, heads, inputs, several as in "
        "inputs,output, none, or auto: output with fisher, none else.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration sequences.")]
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        help="Tokens of a calibration sequence. [default: 1024, or what the model can read]",
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")
]
DecodingDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16, or auto: bfloat16 where the processor or the GPU has it, "
        "else float32 on a CPU, and on a GPU the checkpoint's.",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights", help="plain, or int8: those of linear layers, a scale for each output."
    ),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        help="Bits of a number in the cache: 16 (the model's dtype), 8 or 4. [default: as the "
        "checkpoint says]",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the tokenizer run code from the checkpoint."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Ops = Annotated[
    str,
    typer.Option(
        "--ops",
        help="Attention at decoding: fused (Triton on a GPU; C++ on a CPU, built at first use in "
        "half a minute), reference, or auto: fused where the decoding step is compiled.",
    ),
]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the decoding step.")]


def load(
    source: str,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The checkpoint, with no progress bar where nobody watches."""
    from transformers.utils import logging

    from ..inference import checkpoint

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return checkpoint.load(
        source, torch_dtype(dtype), torch_device(device), revision, trust_remote_code
    )


def torch_dtype(name: str) -> Any:
    """The dtype of that name, None for auto. Raises ValueError for other names."""
    import torch

    dtypes = {
        "auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
    }  # fmt: skip
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is unknown: expected one of {', '.join(dtypes)}")
    return dtypes[name]


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
    """The model, with the fused ops in it if `ops` says so. Raises ValueError for other names."""
    from ...kernels.install import DEVICES, install

    if ops not in ("auto", "fused", "reference"):
        raise ValueError(f"ops {ops!r} are unknown: expected auto, fused or reference")
    wanted = compile and model.device.type in DEVICES if ops == "auto" else ops == "fused"
    return install(model) if wanted else model


def preparation(weights: str, ops: str, compile: bool) -> Callable[[Any], Any]:
    """What makes a loaded model ready to decode: its weights in int8, and the fused ops.

    Raises ValueError for weights of another name.
    """
    if weights not in ("plain", "int8"):
        raise ValueError(f"weights {weights!r} are unknown: expected plain or int8")
    return partial(_prepare, weights=weights, ops=ops, compile=compile)


def _prepare(model: Any, weights: str, ops: str, compile: bool) -> Any:
    from ..inference.int8 import quantize

    return fuse(quantize(model) if weights == "int8" else model, ops, compile)


def say_keys(settings: Any) -> None:
    """What `auto` keys have become, and why; nothing if they were chosen by hand."""
    if settings.keys_reason is not None:
        block = f" in blocks of {settings.anchor_block}" * (settings.keys == "anchored")
        say(f"keys: {settings.keys}{block}, since {settings.keys_reason}")


def parse_shared(text: str, heads: int) -> tuple[int, int] | None:
    """Heads per latent of keys and of values, from what the user wrote."""
    if text == "auto":
        return None
    parts = [heads if part == "all" else part for part in text.split(",")]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(
            f"heads per latent is {text!r}: expected auto, a number, all, or two as in all,1"
        )
    return numbers[0], numbers[-1]


def parse_refit(text: str) -> tuple[str, ...] | None:
    """What to fit after the solve, from what the user wrote; None for the method's own."""
    return {"auto": None, "none": ()}.get(text, tuple(text.split(",")))


def parse_bits(text: str) -> tuple[int, ...]:
    """Bits that numbers may have, from what the user wrote."""
    from ..models.bits import BITS

    if text == "auto":
        return BITS
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        raise ValueError(f"kv bits is {text!r}: expected auto, 16, 8 or 4, or some as in 8,4")
    return tuple(map(int, words))


def command_line() -> str:
    """What the user typed, to be repeated elsewhere: of files and folders here the names only."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return shlex.join(["eigenzoo", *words])


def name_of(path: Path | str | None) -> str:
    """What a text is called in messages."""
    return "Python's own help" if path is None else Path(path).name


def say(text: str) -> None:
    """A line to standard error, beside what scripts read."""
    typer.echo(text, err=True)
