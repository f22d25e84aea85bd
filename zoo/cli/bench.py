"""eigenzoo bench."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.bits import BITS
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
    import torch

    from ..compression.settings import Settings
    from ..inference.checkpoint import inspect, locate, native_config, read_config
    from ..measure import tables as report
    from ..measure.bench import bench as measure
    from ..measure.contestants import Cell, Contestant, Native, Transformers
    from ..measure.shapes import shaped, uniform
    from ..models.cache import check_bits
    from ..utils.jsonl import append
    from ..utils.provenance import device_name, versions

    contexts, batches, sources = context or [2048], batch or [1], sources or []
    if min(contexts) < steps + 2 or min(*contexts, *batches, buffer, steps, rounds) < 1:
        raise ValueError(
            f"contexts {contexts}, batches {batches}, buffer {buffer}, {rounds} rounds of {steps} "
            "steps: expected at least 1 of each, and contexts at least two tokens longer"
        )
    if (shape is None) != bool(sources):
        raise ValueError(
            f"given {len(sources)} checkpoints and shape {shape}: expected checkpoints, or --shape "
            "alone"
        )
    place, kind = torch_device(device), torch_dtype(decoding_dtype(dtype, device))
    prepare = preparation(weights, ops, compile)
    models: list[Native] = []
    first: Any
    if shape is not None:
        first = shaped(shape, layers, buffer * max(contexts))
        dense = native_config(first.to_dict())
        configs = {"dense": dense}
        for share in keep or [0.5]:
            shared = heads_per_latent, heads_per_latent
            settings = Settings("fisher", share, None, shared, 8, latent, keys, anchor_block)
            settings.check()
            settings = settings.fit(dense, place.type)
            say_keys(settings)
            configs[f"keep {share:g}"] = uniform(dense, settings)
        models += [Native(name, config, prepare) for name, config in configs.items()]
        title = shape + (f", {layers} layers" if layers else "")
    else:
        first = sources[0]
        names = [Path(s).name for s in sources]
        names = names if len(set(names)) == len(names) else sources
        configs = {
            n: native_config(read_config(locate(s, revision)))
            for n, s in zip(names, sources, strict=True)
        }
        kind = kind or getattr(torch, inspect(first, revision)["dtype"])
        models += [
            Native(n, s, prepare, revision, trust_remote_code)
            for n, s in zip(names, sources, strict=True)
        ]
        title = names[0]
    for config in configs.values():
        config.check_length(buffer * max(contexts))
    latents = [
        x for c in configs.values() for i in range(c.num_hidden_layers) for x in c.latents(i)
    ]
    for bits in kv_bits or []:
        for width in {x.width for x in latents}:
            check_bits(bits, width)
    models += [
        replace(m, name=f"{m.name}, {bits} bits", kv_bits=bits)
        for bits in kv_bits or []
        for m in models
    ]
    others = ("dynamic", "static") if transformers else ()
    contestants: list[Contestant] = [
        *models,
        *(Transformers(f"transformers {x}", first, x == "static", revision) for x in others),
    ]
    if out is not None:
        try:
            from ..measure.plots import decoding
        except ModuleNotFoundError:
            raise ValueError("plots need matplotlib: pip install 'eigenzoo[plot]'") from None
        out.mkdir(exist_ok=True)
    file, command = out and out / "bench.jsonl", command_line()
    rows = _done(file, command)
    how = {"ops": ops, "weights": weights, "compiled": compile, "command": command}
    how |= {"processor": device_name(place), "versions": versions()}
    if compile:
        say("compiling before each first step: a minute or two for many layers")
    for count in batches:
        for length in contexts:
            if any((x["context"], x["batch"]) == (length, count) for x in rows):
                continue
            cell = Cell(
                *(length, count, buffer * length, steps, kind or torch.float32, place, compile)
            )
            for row in measure(contestants, cell, rounds):
                rows.append(row | how)
                if file:
                    append(file, rows[-1])
    if out:
        for name, figure in decoding(rows, title).items():
            figure.savefig(out / f"{name}.png")
    print(json.dumps(rows)) if as_json else report.bench(rows)


def _done(file: Path | None, command: str) -> list[dict[str, Any]]:
    """The rows that the same command left behind; a last line that is not whole does not count."""
    if file is None or not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0] + b"\n"
    file.write_bytes(whole.lstrip())
    try:
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        return [row for row in rows if row["command"] == command]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds something else than rows of eigenzoo bench: {error}"
        ) from error
