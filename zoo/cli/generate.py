"""eigenzoo generate."""

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .options import (
    DECODING,
    AsJson,
    Compile,
    DecodingDtype,
    Device,
    KeepTokens,
    KvBits,
    Ops,
    Revision,
    Seed,
    Sinks,
    Source,
    Trust,
    Weights,
    Window,
    option,
)
from .values import decoding_dtype, load, preparation, refuse_unused, say, show

DRAFTS = "Speculative decoding"


def generate(
    ctx: typer.Context,
    source: Source,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="<text>",
            help="A prompt; repeat for a batch.",
            show_default="standard input",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token; above 0, tokens are sampled.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the most likely tokens of this total probability."),
    ] = 1.0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts into the chat template of the tokenizer.",
            show_default="if it has one",
        ),
    ] = None,
    lookup: Annotated[
        int | None,
        option(
            "--lookup",
            metavar="<tokens>",
            help="Where the text repeats itself, draft this many tokens from there, and verify "
            "them in one step. The answer stays the same.",
            default="no drafts",
            panel=DRAFTS,
            min=1,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        option(
            "--draft",
            metavar="<source>",
            help="Let a smaller model with the same tokenizer draft tokens; a checkpoint.",
            default="no drafts",
            panel=DRAFTS,
        ),
    ] = None,
    draft_tokens: Annotated[
        int,
        option("--draft-tokens", help="With --draft: tokens to draft.", panel=DRAFTS, min=1),
    ] = 4,
    compile: Compile = True,
    compile_prefill: Annotated[
        bool,
        option(
            "--compile-prefill",
            help="Compile also the step that reads the prompts.",
            panel=DECODING,
        ),
    ] = False,
    ops: Ops = "auto",
    dtype: DecodingDtype = "auto",
    weights: Weights = "native",
    kv_bits: KvBits = None,
    sliding_window: Window = 0,
    sinks: Sinks = 0,
    keep_tokens: KeepTokens = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer or continue prompts.

    SOURCE may be compressed or not. The cache is static: it is allocated once.
    """
    from ..inference.checkpoint import stop_tokens
    from ..inference.data import encode_prompt
    from ..inference.evict import EvictingGenerator, check_alone
    from ..inference.generate import Generator, answer
    from ..inference.sampling import Sampling
    from ..inference.speculative import DraftModel, Lookup, check_drafts
    from ..inference.vocabulary import check_same_vocabulary
    from ..models.config import kv_bytes
    from ..models.ring import Kept
    from ..utils.memory import peak, reset_peak

    sampling = Sampling(temperature, top_k, top_p, seed)
    sampling.check()
    goes_with = {"draft_tokens": ("--draft",)}
    goes_with |= dict.fromkeys(("top_k", "top_p"), ("--temperature above 0",))
    refuse_unused(ctx, goes_with, {"--draft": draft, "--temperature above 0": temperature})
    kept = Kept(sliding_window, sinks)
    kept.check()
    prepare = preparation(weights, ops, compile)
    if lookup and draft:
        raise ValueError("given --lookup and --draft: expected one of them")
    prompts = prompt or [_stdin()]
    if keep_tokens:
        check_alone(len(prompts))
    if drafted := lookup or (draft_tokens if draft else 0):
        check_drafts(drafted, len(prompts), max_new_tokens)
    if draft:
        check_same_vocabulary(source, draft, revision, trust_remote_code)
    dtype = decoding_dtype(dtype, device)
    checkpoint = load(source, dtype, device, revision, trust_remote_code)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    ids = [encode_prompt(tokenizer, p, chat, model.config.vocab_size) for p in prompts]
    slots = max(len(i) for i in ids) + max_new_tokens
    prepare(model.keep(*kept))
    how: dict[str, Any] = {"compile": compile, "compile_prefill": compile_prefill, "bits": kv_bits}
    if keep_tokens:
        generator: Generator = EvictingGenerator(model, slots, max_new_tokens, keep_tokens, **how)
    else:
        generator = Generator(model, len(ids), slots, **how)
    drafts: Lookup | DraftModel | None = Lookup(lookup) if lookup else None
    if draft:
        smaller = load(draft, dtype, device, trust_remote_code=trust_remote_code).model
        prepare(smaller.keep(*kept))
        drafts = DraftModel(Generator(smaller, 1, slots, compile, compile_prefill), draft_tokens)
    if compile or compile_prefill:
        say("compiling at the first tokens: a minute or two, the first time")
    live = len(ids) == 1 and not as_json
    streamer = _streamer(tokenizer) if live else None
    put = (lambda tokens: streamer.put(tokens.cpu())) if streamer else None
    reset_peak(model.device)  # loading may have held more
    rows, speed, first, compiled = answer(
        generator, ids, max_new_tokens, sampling, stop_tokens(checkpoint), put, drafts
    )
    if streamer:
        streamer.end()
    result: dict[str, Any] = {
        "outputs": [tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        "new_tokens": [len(row) for row in rows],
        "decode_tokens_per_second": speed,
        "drafted_tokens": drafts.proposed if drafts else 0,
        "accepted_share": drafts.accepted / drafts.proposed if drafts and drafts.proposed else None,
        "first_token_seconds": first,
        "compile_seconds": compiled,
        "peak_memory": peak(model.device),
        "cache_slots": generator.cache.slots,
        "dropped_tokens": generator.dropped,
        "cache_bytes": generator.cache.nbytes,
        **kv_bytes(model.config, kv_bits),
    }
    if as_json:
        print(json.dumps(result))
        return
    for number, output in enumerate(result["outputs"] if not live else [], start=1):
        show(f"--- {number}\n{output}")
    say(_summary(result))


def _streamer(tokenizer: Any) -> Any:
    """Shows an answer word by word."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text, end="\n" if stream_end else "")

    return Shown(tokenizer, skip_special_tokens=True)


def _summary(x: Mapping[str, Any]) -> str:
    """How much was generated, how fast, and with how much memory, as a line."""
    speed, compiled = x["decode_tokens_per_second"], x["compile_seconds"]
    drafted, accepted = x["drafted_tokens"], x["accepted_share"]
    return (
        f"{sum(x['new_tokens'])} tokens"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + (f", {accepted:.0%} of {drafted} drafted ones accepted" if drafted else "")
        + f", the first after {x['first_token_seconds']:.1f} s"
        + (f", {compiled:.1f} s of all in the compiler" if compiled else "")
        + f"; {x['peak_memory'] / 2**20:.0f} MiB at most, {x['cache_slots']} cache slots, "
        f"{x['cache_bytes']} bytes"
        + (f", {x['dropped_tokens']} tokens of the prompt dropped" if x["dropped_tokens"] else "")
        + f"; {x['kv_share']:.1%} of an uncompressed cache of 16 bits"
    )


def _stdin() -> str:
    """The prompt on standard input, in UTF-8, as it is: only a last line end is no part of it."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt TEXT, or text on standard input")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not text in UTF-8: byte {error.start} is "
            f"{error.object[error.start]:#04x}"
        ) from None
    if not text.strip():
        raise ValueError("standard input is empty: expected a prompt")
    return text.removesuffix("\n").removesuffix("\r")
