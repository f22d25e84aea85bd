"""eigenzoo sweep."""

import json
import shlex
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compression.choices import BUDGETS, LATENTS
from ..compression.keys import BLOCK_TEXT, KEYS
from ..compression.methods import METHODS
from .options import (
    BLOCK_HELP,
    CALIBRATION_HELP,
    DECODING,
    FILE_HELP,
    KEEP_HELP,
    REFIT,
    TEXTS,
    AsJson,
    Device,
    DomainFiles,
    Domains,
    Dtype,
    Ops,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Source,
    Trust,
    choice,
    option,
)
from .values import fuse, load, parse_bits, parse_refit, parse_shared, say

SETTINGS = "Settings: repeat an option for more values"


def _values(flag: str, help: str, default: str, kind: str, panel: str = SETTINGS) -> Any:
    """An option that may be repeated."""
    return option(flag, help=help, default=default, panel=panel, metavar=f"<{kind}>")


def _names(flag: str, table: Collection[Any], help: str, default: str) -> Any:
    """A choice that may be repeated."""
    return choice(flag, table, help, default, SETTINGS)


def sweep(
    ctx: typer.Context,
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write, one JSON object a line.")
    ],
    keep: Annotated[
        list[float] | None,
        _values("--keep", KEEP_HELP, "0.8, 0.6", "float"),
    ] = None,
    method: Annotated[
        list[str] | None, _names("--method", [*METHODS], "As in compress.", "fisher")
    ] = None,
    kv_bits: Annotated[
        list[str] | None, _values("--kv-bits", "As in compress.", "16", "str")
    ] = None,
    keys: Annotated[list[str] | None, _names("--keys", [*KEYS], "As in compress.", "auto")] = None,
    anchor_block: Annotated[
        list[int] | None, _values("--anchor-block", BLOCK_HELP, BLOCK_TEXT, "int")
    ] = None,
    heads_per_latent: Annotated[
        list[str] | None, _values("--heads-per-latent", "As in compress.", "auto", "str")
    ] = None,
    latent: Annotated[
        list[str] | None, _names("--latent", [*LATENTS], "As in compress.", "separate")
    ] = None,
    rank_multiple: Annotated[
        list[int] | None,
        _values("--rank-multiple", "Ranks are multiples of this number.", "8", "int"),
    ] = None,
    rank_pairs: Annotated[
        list[int] | None, _values("--rank-pairs", "As in compress.", "any", "int")
    ] = None,
    refit: Annotated[
        list[str] | None, _names("--refit", [*REFIT], "As in compress.", "auto")
    ] = None,
    budget: Annotated[
        list[str] | None,
        _names("--budget", BUDGETS, "How to share ranks among layers:", "global"),
    ] = None,
    damping: Annotated[
        list[float] | None,
        _values("--damping", "Damping of the Fisher metric, above 0.", "0.3", "float"),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        _values(
            "--calibration",
            f"{CALIBRATION_HELP} Repeat for more rows.",
            "mixed",
            "str",
            TEXTS,
        ),
    ] = None,
    samples: Samples = 32,
    seq_len: SeqLen = None,
    text: Annotated[
        Path | None,
        option(
            "--text",
            help=f"File to measure perplexity on: {FILE_HELP}",
            default="Python's own help",
            panel=TEXTS,
        ),
    ] = None,
    domains: Domains = False,
    domain: DomainFiles = None,
    window: Annotated[
        int | None,
        option(
            "--window",
            min=2,
            help="Tokens in a window; windows do not overlap.",
            default="2048, or what the model can read",
            panel=TEXTS,
        ),
    ] = None,
    windows: Annotated[
        int,
        option(
            "--windows", min=0, help="Largest number of windows; 0: the whole text.", panel=TEXTS
        ),
    ] = 0,
    decode: Annotated[
        int | None,
        option(
            "--decode",
            help="Time also decoding at the end of a cache of this many slots, in turns with the "
            "uncompressed model. Neither is compiled (bench compiles), so this takes seconds. "
            "Rows in OUT without such a time are measured again.",
            default="not timed",
            panel=DECODING,
            metavar="<slots>",
        ),
    ] = None,
    ops: Ops = "fused",
    save_statistics: Annotated[
        bool,
        typer.Option(
            "--save-statistics/--no-save-statistics",
            help="Keep statistics beside OUT, so that the same command need not calibrate again.",
            rich_help_panel="Statistics",
        ),
    ] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Annotated[
        bool,
        option("--force", help="Delete OUT and its statistics first."),
    ] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress with many settings and measure each.

    Every combination of settings is compressed in memory and becomes a row
    of OUT. Settings may be given several times. After an interruption the
    same command continues: rows that are in OUT stay.
    """
    from tqdm import tqdm

    from ..inference.domains import read_domains
    from ..inference.source_texts import check_source
    from ..inference.texts import read_text
    from ..measure import tables
    from ..measure.calibrator import Calibration, check_kept
    from ..measure.evaluate import Evaluation
    from ..measure.grid import distinct, grid
    from ..measure.sweep import Sweep
    from ..measure.sweep_table import line, sections
    from ..utils.escape import printable
    from ..utils.jsonl import SWEEP
    from ..utils.output import claimed_rows

    check_kept(out)
    ctx.with_resource(claimed_rows(out, SWEEP, force))
    several = read_domains(domains, domain or ())
    if several and text:
        raise ValueError("--text goes without --domains and --domain: give it as --domain FILE")
    read_text(text)
    for source_of_text in calibration or ():
        check_source(source_of_text, samples)
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
        Calibration(c, samples, seq_len or min(1024, length), seed)
        for c in calibration or ["mixed"]
    ]
    evaluation = Evaluation(text, window or min(2048, length), windows, several)
    command = shlex.join(["eigenzoo", *sys.argv[1:]])
    work = Sweep(
        *(original, out, evaluation, calibrations, command, save_statistics, force, decode),
        ready=partial(fuse, ops=ops, compile=True),
        ops=ops,
    )
    settings = distinct(asked, config)
    if work.file:
        say(f"{len(work.file)} cells are in {out} already")
    rows, total = [], 1 + len(settings) * len(calibrations)
    for number, row in enumerate(work.rows(settings), start=1):
        rows.append(row)
        tqdm.write(f"[{number}/{total}] {printable(line(row))}", file=sys.stderr)
    if as_json:
        print(json.dumps(rows))
        return
    for section in sections(rows):
        tables.sweep(section)
    typer.echo(f"wrote {out}; next: eigenzoo report {out} --out {out.with_suffix('')}")
