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
    MeasuredOn,
    Method,
    Refit,
    Revision,
    Samples,
    Seed,
    SeqLen,
    ShardSize,
    Source,
    Trust,
    option,
)
from .values import (
    given,
    hide_bars,
    parse_bits,
    parse_refit,
    parse_shared,
    say,
    torch_device,
    torch_dtype,
)

LARGE = "Larger than memory"


def compress(
    ctx: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    keep: Keep = 0.25,
    kv_bits: Annotated[
        str | None,
        typer.Option(
            help=f"{BITS_HELP} One of {listed(map(str, BITS))}; or several as in 8,4,2; or auto, "
            "for all: a latent then has segments of falling bits, where its numbers matter less.",
            show_default="auto; 16 with methods that have a rank rule of their own",
        ),
    ] = None,
    method: Method = "fisher",
    keys: Keys = "auto",
    anchor_block: AnchorBlock = None,
    heads_per_latent: Annotated[
        str,
        typer.Option(
            help="How many kv heads share a latent: auto, 1, 2, ..., all; or one for keys and one "
            "for values, as in all,1."
        ),
    ] = "auto",
    latent: Latent = "separate",
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this number.")] = 8,
    rank_pairs: Annotated[
        int | None,
        typer.Option(
            help="Largest number of distinct pairs of ranks (of keys, of values) over all layers. "
            "Fewer pairs compile faster.",
            show_default="any",
        ),
    ] = None,
    error_budget: Annotated[
        float | None,
        typer.Option(
            help=f"With {methods_that(lambda m: m.searched)}, instead of --keep: the relative "
            "error that the output of each layer may have."
        ),
    ] = None,
    refit: Refit = "auto",
    calibration: Calibration = "mixed",
    samples: Samples = 32,
    seq_len: SeqLen = None,
    text: MeasuredOn = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help=f"With {methods_that(lambda m: m.merged)} on an MPT: write an ordinary checkpoint "
            "with fewer kv heads.",
        ),
    ] = False,
    stream: Annotated[
        bool | None,
        option(
            "--stream/--no-stream",
            help="Read and write one layer at a time, and keep progress beside OUT.",
            default="if the weights take more than half of the free memory",
            panel=LARGE,
        ),
    ] = None,
    resume: Annotated[
        bool,
        option("--resume", help="With --stream: continue after an interruption.", panel=LARGE),
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
    """Compress the KV cache of a checkpoint.

    SOURCE is uncompressed. OUT becomes a folder that eigenzoo and
    transformers load.
    """
    from ...hub_export import compress as library
    from ..compression.settings import Settings
    from ..measure import tables

    if error_budget is not None and given(ctx, "keep"):
        raise ValueError("given --keep and --error-budget: expected one of them")
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
        kv_bits=None if kv_bits is None else parse_bits(kv_bits),
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
    if "domains" in record["evaluation"]:
        tables.domains(record["evaluation"]["domains"])
    typer.echo(
        f"kept {record['share']:.1%} of the KV bytes; {tables.change(record['evaluation'])}\n"
        f"wrote {out}; next: eigenzoo generate {out} --prompt '...'"
    )
    if plain:
        typer.echo(
            "OUT is an ordinary MPT for llm-foundry and eigenzoo; transformers' own MPT does not "
            "support kv_n_heads and raises an error"
        )
