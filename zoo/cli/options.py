"""Options that commands share. `values.py` says what becomes of them.

A choice is made from the table that the library chooses from, by `choice`. Help groups options
under titles, such as `TEXTS`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..compression.choices import LATENTS, REFITS, listed
from ..compression.keys import BLOCK_TEXT, KEYS
from ..compression.methods import METHODS
from ..inference.sources import NAMES
from ..models.bits import BITS

DTYPES = ("float32", "bfloat16", "float16")
OPS = {
    "auto": "fused where the decoding step is compiled",
    "fused": "C++ on a CPU, built at first use in half a minute; Triton on a GPU",
    "reference": "plain PyTorch",
}
WEIGHTS = {
    "native": "in the dtype of the model",
    "int8": "linear layers in int8, with one scale for each output",
}
# titles in help; options without one are the command's own
TEXTS = "Texts"
DECODING = "Decoding"
MODEL = "Model"
LARGEST = 2**63 - 1  # of torch's integers; floats beyond it have no use here


class Command(TyperCommand):
    """A command whose numbers are finite and fit torch's: Python reads nan, 1e999 and 10 ** 30."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises BadParameter, which names the option."""
        for param in self.params:
            given = ctx.params.get(param.name)
            for x in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(x, int | float) and not -LARGEST <= x <= LARGEST:  # NaN is neither
                    names = ", ".join(param.opts)
                    raise typer.BadParameter(f"{x} is no usable number", param_hint=f"'{names}'")
        return super().invoke(ctx)


def option(
    *flags: str, help: str, default: bool | str = True, panel: str | None = None, **more: Any
) -> Any:
    """An option. default: what help shows as its default, if not the value; panel: its title."""
    return typer.Option(*flags, help=help, show_default=default, rich_help_panel=panel, **more)


def choice(
    flag: str,
    table: Collection[Any],
    help: str,
    default: bool | str = True,
    panel: str | None = None,
) -> Any:
    """An option whose values are the names in `table`: help lists them, others raise an error.

    table: names, or a mapping of names to their meaning, or to what has it as `source`. Help shows
    each meaning on a line of its own.
    """

    def parse(text: Any) -> Any:
        names = {str(name): name for name in table}
        if str(text) not in names:
            raise typer.BadParameter(f"{text!r} is unknown: expected one of {', '.join(names)}")
        return names[str(text)]

    if isinstance(table, Mapping):
        meanings = (f"- {name}: {getattr(x, 'source', x)}" for name, x in table.items())
        help = "\n\n".join((help, *meanings))
    else:
        help = f"{help} One of {listed(map(str, table))}."
    return option(flag, help=help, default=default, panel=panel, parser=parse, metavar="<name>")


def _own_refits() -> str:
    """The refits of the methods that have one."""
    return ", ".join(f"{', '.join(m.refit)} with {name}" for name, m in METHODS.items() if m.refit)


MORE = "repeat for more."
KEYS_HELP = "What the cache holds of keys:"
BLOCK_HELP = "With anchored keys: positions in a block."
LATENT_HELP = "Whether keys and values share a latent:"
BITS_HELP = "Bits of a number in the cache; 16 stands for the model's dtype."
DTYPE_HELP = "Dtype of the model; auto is that of the checkpoint. float16 is slow on a CPU."
DECODING_HELP = (
    "Dtype of the model; auto is bfloat16 where the device computes in it, else float32 on a CPU "
    "and the dtype of the checkpoint on a GPU."
)
REFIT = {"auto": f"{_own_refits()}, else none", "none": "nothing", **REFITS}
SOURCE_HELP = "Checkpoint: a folder, a GGUF file or a Hub id, org/name or org/name@revision."
FILE_HELP = (
    "plain text; or rows with a column `text`, or with `messages` for the chat template, in "
    ".jsonl, .json or .parquet."
)
CALIBRATION_HELP = (
    "Text to calibrate on: sources with commas between them, each with a share behind a colon, 1 "
    "without one, as in a.txt:2,self. A source is a file, a dataset hub:DATASET[:CONFIG], or "
    + "; ".join(f"{name}: {meaning}" for name, meaning in NAMES.items())
    + f". A file is {FILE_HELP}"
)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Method = Annotated[str, choice("--method", METHODS, "How to find bases and ranks:")]
KEEP_HELP = "Share of the KV bytes to keep, 0 to 1, of an uncompressed cache of 16 bits a number."
Keep = Annotated[float, option("--keep", help=KEEP_HELP)]
Keys = Annotated[str, choice("--keys", KEYS, KEYS_HELP)]
AnchorBlock = Annotated[
    int | None,
    option("--anchor-block", help=BLOCK_HELP, default=BLOCK_TEXT),
]
Latent = Annotated[str, choice("--latent", LATENTS, LATENT_HELP)]
Refit = Annotated[str, choice("--refit", REFIT, "What to fit to the calibration text at the end:")]
Calibration = Annotated[str, option("--calibration", help=CALIBRATION_HELP, panel=TEXTS)]
Samples = Annotated[
    int, option("--samples", min=2, help="Number of calibration sequences.", panel=TEXTS)
]
SeqLen = Annotated[
    int | None,
    option(
        "--seq-len",
        min=2,
        help="Tokens in a calibration sequence.",
        default="1024, or what the model can read",
        panel=TEXTS,
    ),
]
MeasuredOn = Annotated[
    Path | None,
    option(
        "--text",
        help=f"File to measure perplexity on: {FILE_HELP}",
        default="Python's own help and source code",
        panel=TEXTS,
    ),
]
Domains = Annotated[
    bool,
    option(
        "--domains",
        help="Measure perplexity on several texts, each a domain, with mean and worst: Python's "
        "own help and source code. `--windows` counts for each.",
        panel=TEXTS,
    ),
]
DomainFiles = Annotated[
    list[str] | None,
    option(
        "--domain",
        help="The same on a file, or with --domains on it as well; repeat for more. A domain is "
        "called as its file, or NAME.",
        default="none",
        panel=TEXTS,
        metavar="[NAME=]FILE",
    ),
]
Dtype = Annotated[str, choice("--dtype", ("auto", *DTYPES), DTYPE_HELP, panel=MODEL)]
DecodingDtype = Annotated[str, choice("--dtype", ("auto", *DTYPES), DECODING_HELP, panel=DECODING)]
Weights = Annotated[str, choice("--weights", WEIGHTS, "How to hold weights:", panel=DECODING)]
KvBits = Annotated[
    int | None, choice("--kv-bits", BITS, BITS_HELP, "as the checkpoint says", DECODING)
]
Window = Annotated[
    int,
    option(
        "--sliding-window",
        help="Keep only this many of the last tokens in the cache; 0: all.",
        panel=DECODING,
        min=0,
    ),
]
Sinks = Annotated[
    int,
    option(
        "--sinks",
        help="With --sliding-window: keep the first tokens too, so many (StreamingLLM, arXiv "
        "2309.17453).",
        panel=DECODING,
        min=0,
    ),
]
KeepTokens = Annotated[
    int | None,
    option(
        "--keep-tokens",
        metavar="<tokens>",
        help="Once a prompt is read, keep at most this many of its tokens in the cache: those that "
        "its last ones attend to most, in each layer (SnapKV, arXiv 2404.14469).",
        default="all",
        panel=DECODING,
        min=1,
    ),
]
Ops = Annotated[str, choice("--ops", OPS, "What computes attention in decoding:", panel=DECODING)]
Compile = Annotated[
    bool, option("--compile/--no-compile", help="Compile the decoding step.", panel=DECODING)
]
Device = Annotated[
    str,
    option("--device", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.", panel=MODEL),
]
Revision = Annotated[
    str | None, option("--revision", help="Branch, tag or commit of a Hub id.", panel=MODEL)
]
Trust = Annotated[
    bool,
    option(
        "--trust-remote-code",
        help="Let the tokenizer run code from the checkpoint.",
        panel=MODEL,
    ),
]
ShardSize = Annotated[str, option("--shard-size", help="Largest size of a weight file.")]
Seed = Annotated[int, option("--seed", help="Seed of all random numbers.", min=0, max=LARGEST)]
AsJson = Annotated[bool, option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, option("--force", help="Replace the output if it exists.")]
