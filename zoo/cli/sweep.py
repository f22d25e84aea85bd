"""eigenzoo sweep."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..compression.choices import BUDGETS, LATENTS
from ..compression.keys import BLOCK, KEYS
from ..compression.methods import METHODS
from .options import (
    REFIT,
    AsJson,
    Device,
    Dtype,
    Ops,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Source,
    Trust,
    choice,
    fuse,
    load,
    parse_bits,
    parse_refit,
    parse_shared,
    say,
)

MORE = "repeat for more."


def sweep(
    source: Source,
    out: Annotated[Path, typer.Argument(help="File for the results, one JSON object a line.")],
    keep: Annotated[
        list[float] | None,
        typer.Option(help=f"Share of the KV bytes that stay; {MORE}", show_default="0.8, 0.6"),
    ] = None,
    method: Annotated[
        list[str] | None, choice("--method", METHODS, MORE.capitalize(), "fisher")
    ] = None,
    heads_per_latent: Annotated[
        list[str] | None, typer.Option(help=f"As in compress; {MORE}", show_default="auto")
    ] = None,
    keys: Annotated[
        list[str] | None, choice("--keys", KEYS, f"How keys are held; {MORE}", "auto")
    ] = None,
    anchor_block: Annotated[
        list[int] | None,
        typer.Option(help=f"Slots of a block of anchored keys; {MORE}", show_default=str(BLOCK)),
    ] = None,
    latent: Annotated[
        list[str] | None, choice("--latent", LATENTS, MORE.capitalize(), "separate")
    ] = None,
    rank_multiple: Annotated[
        list[int] | None, typer.Option(help=f"As in compress; {MORE}", show_default="8")
    ] = None,
    rank_pairs: Annotated[
        list[int] | None, typer.Option(help=f"As in compress; {MORE}", show_default="any")
    ] = None,
    kv_bits: Annotated[
        list[str] | None, typer.Option(help=f"As in compress; {MORE}", show_default="16")
    ] = None,
    budget: Annotated[
        list[str] | None, choice("--budget", BUDGETS, MORE.capitalize(), "global")
    ] = None,
    damping: Annotated[
        list[float] | None,
        typer.Option(help=f"Of the Fisher metric; {MORE}", show_default="0.3"),
    ] = None,
    refit: Annotated[
        list[str] | None, choice("--refit", REFIT, f"As in compress; {MORE}", "auto")
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help=f"As in compress; {MORE}", show_default="self")
    ] = None,
    samples: Samples = 32,
    seq_len: SeqLen = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File to measure perplexity on.", show_default="Python's own help"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="As in evaluate.", show_default="2048, or what the model can read"),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows; 0 for all of the text.")] = 0,
    decode: Annotated[
        int | None,
        typer.Option(
            metavar="<slots>",
            help="Time decoding at the end of a cache of this many slots, in turns with the "
            "uncompressed model. Neither is compiled (bench compiles), so a cell takes seconds. "
            "Rows in OUT without it are measured again.",
            show_default="not timed",
        ),
    ] = None,
    ops: Ops = "fused",
    save_statistics: Annotated[
        bool,
        typer.Option(
            help="Keep statistics beside OUT, so that a resumed sweep does not calibrate."
        ),
    ] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Annotated[
        bool, typer.Option("--force", help="Delete OUT and its statistics first.")
    ] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress SOURCE to every combination of settings, in memory, and measure each.

    Results go to OUT as they come; what is there already is not done again.
    """
    from tqdm import tqdm

    from ..inference.data import read_text
    from ..measure import tables
    from ..measure.calibrator import Calibration
    from ..measure.evaluate import Evaluation
    from ..measure.grid import distinct, grid
    from ..measure.sweep import Sweep
    from ..measure.sweep_table import line, sections
    from ..utils.jsonl import SWEEP, read_rows

    if out.exists() and not force:
        read_rows(out, SWEEP)  # fails for any other file before the model is loaded
    if text is not None:
        read_text(text)
    original = load(source, dtype, device, revision, trust_remote_code)
    config = original.model.config
    length = config.max_position_embeddings
    asked = grid(
        {
            "method": method or ["fisher"],
            "keep": keep or [0.8, 0.6],
            "heads_per_latent": [
                parse_shared(x, config.num_key_value_heads) for x in heads_per_latent or ["auto"]
            ],
            "keys": keys or ["auto"],
            "anchor_block": anchor_block or [None],
            "latent": latent or ["separate"],
            "rank_multiple": rank_multiple or [8],
            "rank_pairs": rank_pairs or [None],
            "kv_bits": [parse_bits(x) for x in kv_bits or ["16"]],
            "budget": budget or ["global"],
            "damping": damping or [None],
            "refit": [parse_refit(x) for x in refit or ["auto"]],
        }
    )
    calibrations = [
        Calibration(c, samples, seq_len or min(1024, length), seed) for c in calibration or ["self"]
    ]
    evaluation = Evaluation(text, window or min(2048, length), windows)
    command = shlex.join(["eigenzoo", *sys.argv[1:]])
    work = Sweep(
        *(original, out, evaluation, calibrations, command, save_statistics, force, decode),
        ready=partial(fuse, ops=ops, compile=True),
    )
    settings = distinct(asked, config)
    if work.file:
        say(f"{len(work.file)} cells are in {out} already")
    rows, total = [], 1 + len(settings) * len(calibrations)
    for number, row in enumerate(work.rows(settings), start=1):
        rows.append(row)
        tqdm.write(f"[{number}/{total}] {line(row)}", file=sys.stderr)
    if as_json:
        print(json.dumps(rows))
        return
    for section in sections(rows):
        tables.sweep(section)
    typer.echo(f"wrote {out}; next: eigenzoo report {out} --out {out.with_suffix('')}")
