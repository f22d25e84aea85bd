"""eigenzoo bench."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..models.bits import BITS
from ..utils.records import BenchOrigin
from .options import (
    BITS_HELP,
    AnchorBlock,
    AsJson,
    Compile,
    DecodingDtype,
    Device,
    Keys,
    Latent,
    Ops,
    Revision,
    Trust,
    Weights,
    choice,
    command_line,
    decoding_dtype,
    preparation,
    say,
    say_keys,
    torch_device,
    torch_dtype,
)


def bench(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoints; speeds are relative to the first, the uncompressed one. Or none, "
            "with --shape."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in a published shape, such as opt-1.3b.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="With --shape: number of layers.", show_default="all")
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="With --shape: share of the KV bytes kept; repeat for more.", show_default="0.5"
        ),
    ] = None,
    heads_per_latent: Annotated[
        int, typer.Option(help="With --shape: kv heads that share a latent.")
    ] = 1,
    latent: Latent = "separate",
    keys: Keys = "auto",
    anchor_block: AnchorBlock = None,
    kv_bits: Annotated[
        list[int] | None,
        choice("--kv-bits", BITS, f"Every model also with this. {BITS_HELP} Repeat for more."),
    ] = None,
    transformers: Annotated[
        bool,
        typer.Option(
            "--transformers",
            help="The first model in transformers as well: with the dynamic cache, and with a "
            "static cache, compiled.",
        ),
    ] = False,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens in the cache at the end; repeat for more.", show_default="2048"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences decoded together; repeat for more.", show_default="1"),
    ] = None,
    buffer: Annotated[
        int, typer.Option(help="Slots of static caches, as a multiple of the context.")
    ] = 1,
    steps: Annotated[int, typer.Option(help="Decoding steps in a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds; the models take turns.")] = 3,
    compile: Compile = True,
    ops: Ops = "auto",
    dtype: DecodingDtype = "auto",
    weights: Weights = "native",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for bench.jsonl, written row by row, and plots (extra `plot`). The same "
            "command resumes after an interruption."
        ),
    ] = None,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Decode speed and memory of models side by side, beside what memory allows.

    Each model is in a process of its own, and they take turns.
    """
    from ..compression.settings import Settings
    from ..measure import tables
    from ..measure.bench_grid import BenchGrid, bench_cells, rows_left
    from ..measure.contestants import from_checkpoints, from_shape
    from ..utils.provenance import device_name, versions

    grid = BenchGrid(context or [2048], batch or [1], buffer, steps, rounds)
    grid.check()
    if (shape is None) != bool(sources):
        raise ValueError(
            f"given {len(sources or [])} checkpoints and shape {shape}: expected checkpoints, or "
            "--shape alone"
        )
    place, kind = torch_device(device), torch_dtype(decoding_dtype(dtype, device))
    prepare = preparation(weights, ops, compile)
    if shape is None:
        contestants = from_checkpoints(sources or [], prepare, revision, trust_remote_code)
    else:
        shared = heads_per_latent, heads_per_latent
        settings = Settings(
            heads_per_latent=shared, latent=latent, keys=keys, anchor_block=anchor_block
        )
        contestants = from_shape(shape, layers, grid.slots, keep or [0.5], settings, place, prepare)
    for settings in contestants.settings:
        say_keys(settings)
    contestants.check_length(grid.slots)
    contestants = contestants.with_bits(kv_bits or [])
    if transformers:
        contestants = contestants.with_transformers()
    if out is not None:
        from ..measure.plots import save_decoding

        out.mkdir(exist_ok=True)
    file = out and out / "bench.jsonl"
    origin: BenchOrigin = {
        "ops": ops,
        "weights": weights,
        "compiled": compile,
        "command": command_line(),
        "processor": device_name(place),
        "versions": versions(),
    }
    rows = rows_left(file, origin["command"])
    if compile:
        say("compiling before each first step: a minute or two for many layers")
    cells = grid.cells(kind or contestants.dtype, place, compile)
    rows += bench_cells(contestants.all, cells, rounds, origin, rows, file)
    if out is not None:
        save_decoding(rows, contestants.title, out)
    print(json.dumps(rows)) if as_json else tables.bench(rows)
