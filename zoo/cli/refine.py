"""eigenzoo refine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..compression.choices import PRECISIONS
from .options import (
    TEXTS,
    AsJson,
    Calibration,
    Device,
    Force,
    MeasuredOn,
    Revision,
    Samples,
    Seed,
    ShardSize,
    Trust,
    choice,
    option,
)
from .values import load, say


def refine(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Compressed checkpoint: folder or Hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    original: Annotated[
        str | None,
        typer.Option(help="The uncompressed model.", show_default="the Hub id that SOURCE names"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Largest number of steps.")] = 200,
    minutes: Annotated[float | None, typer.Option(help="Stop training after this time.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 2,
    lr: Annotated[
        float, typer.Option(help="Largest learning rate, as a share of each weight's size.")
    ] = 5e-5,
    warmup: Annotated[
        float, typer.Option(help="Share of the run in which the learning rate rises.")
    ] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    every: Annotated[
        int,
        typer.Option(help="Steps between measurements; each one also saves progress."),
    ] = 20,
    patience: Annotated[
        int, typer.Option(help="Stop after this many measurements without a new best.")
    ] = 5,
    precision: Annotated[
        str,
        choice("--precision", PRECISIONS, "Dtype of the arithmetic; weights stay in float32:"),
    ] = "auto",
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Compute activations twice instead of keeping them."),
    ] = False,
    calibration: Calibration = "mixed",
    samples: Samples = 128,
    seq_len: Annotated[
        int | None,
        option(
            "--seq-len",
            min=2,
            help="Tokens in a calibration sequence.",
            default="512, or what the model can read",
            panel=TEXTS,
        ),
    ] = None,
    text: MeasuredOn = None,
    shard_size: ShardSize = "5GB",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a checkpoint towards its original.

    The compressed model learns the predictions of the original. OUT gets the
    weights that are best on held-out text. Progress is kept beside OUT: after
    an interruption the same command continues.
    """
    from ...hub_export.export import check_shard_size
    from ...hub_export.refine import original_of, refine_checkpoint, state_file
    from ..compression.record import measured_on
    from ..compression.refine import RefineSettings
    from ..inference.domains import check_apart
    from ..inference.source_texts import check_source
    from ..inference.sources import files
    from ..measure import tables
    from ..utils.output import check_folder

    settings = RefineSettings(
        *(steps, batch, lr, warmup, weight_decay, clip, every, patience, minutes),
        *(precision, recompute, seed),
    )
    settings.check()
    check_shard_size(shard_size)
    check_folder(out, force, (source, original, text, *files(calibration)))
    check_source(calibration, samples)
    check_apart(measured_on(text), [calibration])
    low = load(source, "auto", device, revision, trust_remote_code)
    kind = str(low.model.dtype).removeprefix("torch.")
    dense = load(original or original_of(low), kind, device, None, trust_remote_code).model
    state = state_file(out)
    say(f"going on from {state}" if state.exists() else f"progress is kept in {state}")
    record = refine_checkpoint(
        low, dense, out, settings, calibration, samples, seq_len, text, force, shard_size
    )
    if as_json:
        print(json.dumps({"out": str(out)} | record))
        return
    run, measured = record["refined"][-1], record["evaluation"]
    if "domains" in measured:
        tables.domains(measured["domains"])
    typer.echo(
        f"KL to the original {run['kl_before']:.4g} -> {run['kl_after']:.4g} nats per token on "
        f"held-out text, best at step {run['best_step']}; {run['stopped']}\n"
        f"perplexity {run['perplexity_before']:.2f} -> {run['perplexity_after']:.2f}, "
        f"uncompressed {measured['dense']:.2f}, on {measured['tokens']} tokens of "
        f"{measured['text']}\nwrote {out}; next: eigenzoo generate {out} --prompt '...'"
    )
