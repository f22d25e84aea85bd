"""eigenzoo plan."""

import json
from typing import Annotated

import typer

from .options import DTYPES, KEEP_HELP, MORE, AsJson, Revision, choice, option
from .values import parse_bytes, torch_dtype


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Published shapes, such as llama-3.1-8b, or checkpoints: folders, GGUF files or "
            "Hub ids. Only configs are read.",
        ),
    ],
    memory: Annotated[
        str, option("--memory", help="Memory for weights and caches, in GB or GiB.")
    ] = "80GB",
    context: Annotated[
        list[int] | None,
        option(
            "--context",
            help=f"Tokens in a sequence; {MORE}",
            default="8192 and 131072",
            metavar="<int>",
            min=1,
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        option(
            "--keep", help=f"{KEEP_HELP[:-1]}; {MORE}", default="0.25 and 0.16", metavar="<float>"
        ),
    ] = None,
    dtype: Annotated[
        str, choice("--dtype", DTYPES, "Dtype of the weights, and of an uncompressed cache.")
    ] = "bfloat16",
    as_json: AsJson = False,
    revision: Revision = None,
) -> None:
    """Tell what models need before any weights are there.

    Bytes of the weights and of the cache, sequences that fit a memory, and an
    estimate of the hours to compress.
    """
    size = parse_bytes(memory)
    from ..measure import tables
    from ..measure.plan import plans

    contexts, keeps = context or [8192, 131072], keep or [0.25, 0.16]
    made = plans(models, size, contexts, keeps, torch_dtype(dtype), revision)
    print(json.dumps(made)) if as_json else tables.plan(made)
