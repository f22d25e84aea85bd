"""eigenzoo compress."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..utils.interrupt import interruptible
from .options import (
    AnchorBlock,
    AsJson,
    Calibration,
    Device,
    Dtype,
    Force,
    Keep,
    Keys,
    Method,
    Refit,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Source,
    Trust,
    load,
    parse_bits,
    parse_refit,
    parse_shared,
    say,
    say_keys,
    torch_device,
    torch_dtype,
)


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
    keys: Keys = "auto",
    anchor_block: AnchorBlock = None,
    latent: Annotated[
        str,
        typer.Option(
            help="separate, or joint-kv: one latent for keys and values (models without rotation)."
        ),
    ] = "separate",
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    rank_pairs: Annotated[
        int | None,
        typer.Option(
            help="At most so many distinct pairs of ranks, of keys and of values, over the layers: "
            "fewer compile faster. [default: any]"
        ),
    ] = None,
    kv_bits: Annotated[
        str,
        typer.Option(
            help="Bits of a number in the cache: 16 (the model's dtype), 8 or 4, for which latents "
            "are mixed so that rounding costs least; or auto: what --keep buys most with, layer by "
            "layer, for keys and values."
        ),
    ] = "16",
    refit: Refit = "auto",
    calibration: Calibration = "self",
    samples: Samples = 32,
    seq_len: SeqLen = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File to measure perplexity on. [default: held-out calibration text]"),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="kv-heads of an MPT: an ordinary checkpoint, fewer kv heads."),
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read and write one layer at a time, for models larger than memory; progress is "
            "kept beside OUT. [default: where the weights take more than half of what is free]",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="With --stream: go on with what an interruption left."),
    ] = False,
    shard_size: Annotated[
        str, typer.Option(help="Largest weight file. With --stream a file holds a layer.")
    ] = "5GB",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress the KV cache of SOURCE and write a checkpoint to OUT."""
    from ...hub_export.compress import compress_checkpoint
    from ...hub_export.export import check_free
    from ...hub_export.stream import check_partial, partial_folder, stream_checkpoint
    from ..compression.settings import Settings
    from ..inference.checkpoint import open_layers, weight_bytes
    from ..inference.data import read_text
    from ..measure import tables as report
    from ..utils.memory import available

    settings = Settings(
        method,
        keep,
        error_budget,
        rank_multiple=rank_multiple,
        latent=latent,
        keys=keys,
        anchor_block=anchor_block,
        refit=parse_refit(refit),
        rank_pairs=rank_pairs,
        kv_bits=parse_bits(kv_bits),
    )
    settings.check()
    check_free(out, force)
    check_partial(out, resume, force)
    if text is not None:
        read_text(text)  # a missing file is found before the long work
    place = torch_device(device)
    if stream is None:
        size = weight_bytes(source, torch_dtype(dtype), revision)
        stream = resume or (size > available(place) // 2 and not plain)
        if stream and not resume:
            say(f"the weights take {size / 1e9:.1f} GB: reading them layer by layer (--stream)")
    if resume and not stream:
        raise ValueError("only work that was streamed can go on: leave --no-stream out")
    if stream and plain:
        raise ValueError("an ordinary checkpoint is made in memory: leave --stream or --plain out")
    if stream:
        kind = torch_dtype(dtype)
        original, files = open_layers(source, kind, place, revision, trust_remote_code)
    else:
        original = load(source, dtype, device, revision, trust_remote_code)
    model = original.model
    shared = parse_shared(heads_per_latent, model.config.num_key_value_heads)
    settings = settings._replace(heads_per_latent=shared).fit(model.config, model.device.type)
    say_keys(settings)
    texts = calibration, samples, seq_len, text, seed, force
    try:
        with interruptible():
            if stream:
                record = stream_checkpoint(original, files, out, settings, *texts, resume)
            else:
                record = compress_checkpoint(original, out, settings, *texts, shard_size, plain)
    except KeyboardInterrupt:
        left = partial_folder(out)
        say(
            f"stopped; the same command with --resume goes on from {left}"
            if left.exists()
            else "stopped, and nothing was written; what is compressed with --stream can go on"
        )
        raise
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
    if plain:
        typer.echo(
            "it is an ordinary MPT for llm-foundry and eigenzoo; transformers' own MPT knows no "
            "kv_n_heads and refuses it"
        )
