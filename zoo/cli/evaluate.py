"""eigenzoo evaluate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Device, Dtype, Revision, Source, Trust, load, name_of


def evaluate(
    source: Source,
    text: Annotated[
        Path | None, typer.Option(help="Text file. [default: the text of Python's own help]")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens that are read together. [default: 2048, or what the model can read]"
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows; 0 for all of the text.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of SOURCE, dense or compressed, on a text."""
    from ..allocate import kv_bytes
    from ..data import encode, python_docs, read_text
    from ..evaluate import perplexity

    words = python_docs() if text is None else read_text(text)
    model, tokenizer, *_ = load(source, dtype, device, revision, trust_remote_code)
    tokens = encode(tokenizer, words).to(model.device)
    window = window or min(2048, model.config.max_position_embeddings)
    found = perplexity(model, tokens, window, windows)._asdict() | kv_bytes(
        model.config, model.dtype
    )
    if as_json:
        print(json.dumps(found | {"model": source, "text": name_of(text), "window": window}))
        return
    typer.echo(
        f"perplexity {found['perplexity']:.4f} on {found['tokens']} tokens of {name_of(text)} in "
        f"windows of {window}\n{found['kv_bytes_per_token']} KV bytes per token, "
        f"{found['kv_share']:.1%} of the uncompressed {found['kv_bytes_per_token_dense']}"
    )
