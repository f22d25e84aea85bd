"""eigenzoo bench."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..compression.choices import LATENTS
from ..compression.keys import BLOCK_TEXT, KEYS
from ..models.bits import BITS
from ..utils.records import BenchOrigin
from .options import (
    BITS_HELP,
    BLOCK_HELP,
    DECODING,
    KEYS_HELP,
    LATENT_HELP,
    MORE,
    AsJson,
    Compile,
    DecodingDtype,
    Device,
    Ops,
    Revision,
    Trust,
    Weights,
    choice,
    option,
)
from .values import (
    command_line,
    decoding_dtype,
    preparation,
    refuse_unused,
    say,
    say_keys,
    torch_device,
    torch_dtype,
)

SHAPE = "Instead of checkpoints"
OF_SHAPE = ("layers", "keep", "segments", "heads_per_latent", "latent", "keys", "anchor_block")


def bench(
    ctx: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoints; the first is uncompressed, and speeds are relative to it. None with "
            "--shape.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        option(
            "--shape",
            help="Random weights in a published shape, such as opt-1.3b.",
            panel=SHAPE,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        option("--layers", help="Number of layers.", default="all", panel=SHAPE),
    ] = None,
    keep: Annotated[
        list[float] | None,
        option(
            "--keep",
            help=f"Share of the KV bytes to keep; {MORE}",
            default="0.5",
            panel=SHAPE,
            metavar="<float>",
        ),
    ] = None,
    segments: Annotated[
        list[str] | None,
        option(
            "--segments",
            help="Segments of keys and of values, as 32x8+64x4/64x4: one more compressed model; "
            f"{MORE}",
            default="none",
            panel=SHAPE,
            metavar="<text>",
        ),
    ] = None,
    heads_per_latent: Annotated[
        int,
        option("--heads-per-latent", help="How many kv heads share a latent.", panel=SHAPE, min=1),
    ] = 1,
    latent: Annotated[str, choice("--latent", LATENTS, LATENT_HELP, panel=SHAPE)] = "separate",
    keys: Annotated[str, choice("--keys", KEYS, KEYS_HELP, panel=SHAPE)] = "auto",
    anchor_block: Annotated[
        int | None,
        option("--anchor-block", help=BLOCK_HELP, default=BLOCK_TEXT, panel=SHAPE),
    ] = None,
    kv_bits: Annotated[
        list[int] | None,
        choice(
            "--kv-bits",
            BITS,
            f"Measure every model once more with these; {MORE} {BITS_HELP}",
            "none",
            DECODING,
        ),
    ] = None,
    transformers: Annotated[
        bool,
        typer.Option(
            "--transformers",
            help="Measure the first model in transformers as well: with its dynamic cache, and "
            "compiled with its static cache.",
        ),
    ] = False,
    llama_cpp: Annotated[
        str | None,
        typer.Option(
            "--llama-cpp",
            metavar="FILE.gguf|auto",
            help="Measure the first model in llama.cpp as well, from this file; auto: from the "
            "first model itself, where it is a GGUF file. Takes `llama-bench` on the PATH, else "
            "the package llama-cpp-python. On a CPU, one sequence.",
            show_default="not measured",
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            metavar="<int>", help=f"Tokens in the cache at the end; {MORE}", show_default="2048"
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="<int>", help=f"Sequences decoded together; {MORE}", show_default="1"),
    ] = None,
    buffer: Annotated[
        int, typer.Option(help="Slots in static caches, as a multiple of the context.")
    ] = 1,
    steps: Annotated[int, typer.Option(help="Decoding steps in a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds; models take turns.")] = 3,
    compile: Compile = True,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="On a GPU, replay compiled steps from CUDA graphs, which a dynamic cache has none "
            "of. Not tried on a GPU yet.",
        ),
    ] = False,
    ops: Ops = "auto",
    dtype: DecodingDtype = "auto",
    weights: Weights = "native",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for bench.jsonl, written row by row, and for plots (extra `plot`). After "
            "an interruption the same command continues."
        ),
    ] = None,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure decoding speed and memory.

    Each model runs in a process of its own, and the processes take turns.
    Each gain stands beside a bound: what fewer bytes alone can give.
    """
    from ..compression.settings import Settings
    from ..measure import tables
    from ..measure.bench_grid import BenchGrid, bench_cells, rows_left
    from ..measure.contestants import from_checkpoints, from_shape
    from ..utils.jsonl import BENCH
    from ..utils.output import claimed_rows
    from ..utils.provenance import code, device_name, versions

    grid = BenchGrid(context or [2048], batch or [1], buffer, steps, rounds)
    grid.check()
    if (shape is None) != bool(sources):
        raise ValueError(
            f"given {len(sources or [])} checkpoints and shape {shape}: expected checkpoints, or "
            "--shape alone"
        )
    refuse_unused(ctx, dict.fromkeys(OF_SHAPE, ("--shape",)), {"--shape": shape})
    if graphs and not (compile and torch_device(device).type == "cuda"):
        raise ValueError("--graphs needs a GPU and compiled steps: leave it out")
    place, kind = torch_device(device), torch_dtype(decoding_dtype(dtype, device))
    prepare = preparation(weights, ops, compile)
    if shape is None:
        contestants = from_checkpoints(sources or [], prepare, revision, trust_remote_code)
    else:
        shared = heads_per_latent, heads_per_latent
        settings = Settings(
            heads_per_latent=shared, latent=latent, keys=keys, anchor_block=anchor_block
        )
        keeps = keep or ([] if segments else [0.5])
        contestants = from_shape(
            *(shape, layers, grid.slots, keeps, settings, prepare), segments=segments or []
        )
    for settings in contestants.settings:
        say_keys(settings)
    contestants.check_length(grid.slots)
    contestants = contestants.with_bits(kv_bits or [])
    if transformers:
        contestants = contestants.with_transformers(static=graphs)
    if llama_cpp is not None:
        contestants = contestants.with_llama_cpp(llama_cpp, grid.batches, place)
    if out is not None:
        from ..measure.plots import save_decoding

        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"{out} cannot be made: {error.strerror}") from None
    file = out and out / "bench.jsonl"
    origin: BenchOrigin = {
        "ops": ops,
        "weights": weights,
        "compiled": compile,
        "command": command_line(),
        "processor": device_name(place),
        "versions": versions(),
        "code": code(),
    }
    if file is not None:
        ctx.with_resource(claimed_rows(file, BENCH))
        origin["contestants"] = contestants.content()
    rows = rows_left(file, origin, [contestant.name for contestant in contestants.all])
    if compile:
        say("compiling before each first step: a minute or two for many layers")
    cells = grid.cells(kind or contestants.dtype, place, compile, graphs)
    rows += bench_cells(contestants.all, cells, rounds, origin, rows, file)
    print(json.dumps(rows)) if as_json else tables.bench(rows)
    reasons = [row["failed"] for row in rows if "failed" in row]
    if len(reasons) == len(rows):
        raise ValueError(f"no model could be timed; the first says: {reasons[0]}")
    if out is not None:
        save_decoding(rows, contestants.title, out)
