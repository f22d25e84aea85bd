"""eigenzoo compress."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..compression.choices import listed
from ..compression.methods import methods_that
from ..models.bits import BITS
from .options import (
    BITS_HELP,
    AnchorBlock,
    AsJson,
    Calibration,
    Device,
    Dtype,
    Force,
    Keep,
    Keys,
    Latent,
    Method,
    Refit,
    Revision,
    Samples,
    Seed,
    SeqLen,
    ShardSize,
    Source,
    Trust,
    hide_bars,
    parse_bits,
    parse_refit,
    parse_shared,
    say,
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
        typer.Option(
            help=f"{methods_that(lambda m: m.searched)}: relative output error that a layer may "
            "have, instead of --keep."
        ),
    ] = None,
    keys: Keys = "auto",
    anchor_block: AnchorBlock = None,
    latent: Latent = "separate",
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    rank_pairs: Annotated[
        int | None,
        typer.Option(
            help="Largest number of distinct pairs of ranks, of keys and of values, over the "
            "layers: fewer compile faster.",
            show_default="any",
        ),
    ] = None,
    kv_bits: Annotated[
        str,
        typer.Option(
            help=f"{BITS_HELP} {listed(map(str, BITS))}; several as in 8,4, or auto for all: each "
            "layer gets those that reduce the error most per byte of --keep. Below 16, latents are "
            "mixed so that rounding costs least."
        ),
    ] = "16",
    refit: Refit = "auto",
    calibration: Calibration = "self",
    samples: Samples = 32,
    seq_len: SeqLen = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="File to measure perplexity on.", show_default="held-out calibration text"
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help=f"{methods_that(lambda m: m.merged)} of an MPT: write an ordinary checkpoint with "
            "fewer kv heads.",
        ),
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read and write one layer at a time, in one file each, for models larger than "
            "memory; progress is kept beside OUT.",
            show_default="if the weights take more than half of the free memory",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="With --stream: continue after an interruption."),
    ] = False,
    shard_size: ShardSize = "5GB",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress the KV cache of SOURCE and write a checkpoint to OUT."""
    from ...hub_export import compress as library
    from ..compression.settings import Settings
    from ..measure import tables

    settings = Settings(
        method,
        keep,
        error_budget,
        parse_shared(heads_per_latent),
        rank_multiple,
        latent,
        keys,
        anchor_block,
        refit=parse_refit(refit),
        rank_pairs=rank_pairs,
        kv_bits=parse_bits(kv_bits),
    )
    model = library.Source(
        source, torch_dtype(dtype), torch_device(device), revision, trust_remote_code
    )
    hide_bars()
    record = library.compress_source(
        *(model, out, settings, calibration, samples, seq_len, text, seed, force),
        *(shard_size, plain, stream, resume, say),
    )
    if as_json:
        print(json.dumps({"out": str(out)} | record))
        return
    tables.layers(record["layers"])
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
