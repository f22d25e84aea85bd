"""eigenzoo bench."""

import json
from typing import Annotated

import typer

from .options import (
    AnchorBlock,
    AsJson,
    Compile,
    Device,
    Dtype,
    Keys,
    Ops,
    Revision,
    Trust,
    fuse,
    load,
    say,
    say_keys,
    torch_device,
    torch_dtype,
)


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
    keys: Keys = "auto",
    anchor_block: AnchorBlock = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Slots, all in use; repeat for more. [default: 2048]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    steps: Annotated[int, typer.Option(help="Decoding steps in a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds; the models take turns.")] = 3,
    compile: Compile = True,
    ops: Ops = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Decode speed, uncompressed against compressed in one run, beside what memory allows."""
    from .. import report
    from ..bench import bench as measure
    from ..bench import random_model, shaped, uniform
    from ..compress import Settings

    contexts = context or [2048]
    if shape is not None and not sources:
        shared = heads_per_latent, heads_per_latent
        settings = Settings("fisher", keep, None, shared, 8, latent, keys, anchor_block)
        settings.check()
        import torch

        config = shaped(shape, layers, max(contexts))
        kind, place = torch_dtype(dtype) or torch.float32, torch_device(device)
        settings = settings.fit(config, place.type)
        say_keys(settings)
        low = uniform(config, settings)
        models = {
            "dense": random_model(config, kind, place),
            "compressed": random_model(low, kind, place),
        }
    elif shape is None and len(sources or []) == 2:
        names = ("dense", "compressed")
        models = {
            n: load(s, dtype, device, revision, trust_remote_code).model
            for n, s in zip(names, sources or [], strict=True)
        }
    else:
        raise ValueError(
            f"given {len(sources or [])} checkpoints and shape {shape}: expected two checkpoints, "
            "or --shape alone"
        )
    for model in models.values():
        fuse(model, ops, compile)
    if compile:
        say("compiling before each first step: a minute or two for many layers")
    rows = measure(models, contexts, batch, steps, rounds, compile)
    print(json.dumps(rows)) if as_json else report.bench(rows)
