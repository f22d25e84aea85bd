"""Perplexity on four kinds of text, and bytes, of our caches and of rivals', one line a cache.

    python benchmarks/rivals.py MODEL --wiki FILE --speech FILE --cache FOLDER [--only NAME]
        [--plot PNG] [--rows EARLIER.jsonl]

Measured on windows of 2048 tokens of the second half of both files (from the middle character on),
of modules of Python, and of its help; `increase` is in % over the uncompressed model. Whatever
needs data is calibrated on 16 x 1024 tokens: a quarter each of both first halves, of other modules
of Python, and of the model's own text. Bytes are a share of those at 16 bits a number. Scales and
zero points are counted, and a window of tokens in 16 bits at its full length of 2048; over all
positions of a window of text its share is larger, which favors such caches.

What is calibrated is kept in FOLDER, and the uncompressed model's figures. `--only` takes a name in
the output, such as kivi, or all that comes before its bits or share. transformers' caches need
optimum-quanto and hqq: without, they are left out.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rival_bench import Bench, Domains, arguments
from rival_caches import Rival, kivi, oscar, rotated, squat
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from eigenzoo.zoo.cli.values import parse_bits
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.perplexity import mean_perplexity

OURS = {  # settings and shares by name
    "ours": (Settings(kv_bits=parse_bits("auto"), refit=()), (0.6, 0.4, 0.355, 0.25, 0.16, 0.12)),
    "ranks": (Settings(refit=(), kv_bits=(16,)), (0.8, 0.6, 0.4, 0.25)),
    "eigen": (Settings("eigen", kv_bits=(16,)), (0.8, 0.6, 0.4)),
    "kv-heads": (Settings("kv-heads", kv_bits=(16,)), (1 / 2, 1 / 3, 1 / 4)),
    "clover": (Settings("clover", kv_bits=(16,)), (0.8, 0.6)),
}


class Case(NamedTuple):
    """A cache: its name, its bits or share, and what measures its share of bytes and its losses."""

    name: str
    setting: str
    measure: Callable[[], tuple[float, Domains]]


def cases(bench: Bench) -> Iterator[Case]:
    """All caches, rivals first."""
    heads, size = bench.model.config.num_key_value_heads, bench.model.config.head_dim
    rivals: list[tuple[str, int, Callable[[], Rival]]] = [
        *(("rotated", b, partial(rotated, b, heads, size)) for b in (8, 4, 3, 2)),
        *(("kivi", b, partial(kivi, b, size)) for b in (4, 2)),
        *(("squat", b, lambda b=b: squat(b, bench.readers["queries"])) for b in (4, 2)),
        ("oscar", 2, lambda: oscar(2, **bench.readers)),
    ]
    for name, bits, make in rivals:
        yield Case(name, f"{bits} bits", partial(bench.rival, make))
    there = {"quanto": is_optimum_quanto_available(), "hqq": is_hqq_available()}
    for backend, bits in ((x, b) for x in there for b in (4, 2)):
        if there[backend]:
            yield Case(backend, f"{bits} bits", partial(bench.quantized, backend, bits))
        else:
            print(f"{backend} is not installed: its cache is left out", file=sys.stderr)
    for name, (settings, shares) in OURS.items():
        for keep in shares:
            measure = partial(bench.compressed, settings._replace(keep=keep))
            yield Case(name, f"keep {keep:.3g}", measure)


def figures(losses: Domains, dense: Domains) -> dict[str, Any]:
    """Perplexity of every text, its increase in %, and their mean and worst."""
    perplexity = {x: mean_perplexity(y).perplexity for x, y in losses.items()}
    before = {x: mean_perplexity(y).perplexity for x, y in dense.items()}
    increase = {x: 100 * (perplexity[x] / before[x] - 1) for x in perplexity}
    mean, worst = sum(increase.values()) / len(increase), max(increase.values())
    return {"perplexity": perplexity, "increase": increase, "mean": mean, "worst": worst}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the increase over the share of bytes: a panel for every text, a line a cache.

    Whatever costs more than ten times the perplexity is left out.
    """
    rows = [row for row in rows if row["cache"] != "dense" and row["worst"] < 900]
    figure = Figure(figsize=(10, 8), layout="constrained", dpi=120)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for text, axes in zip(rows[0]["increase"], panels.flat, strict=True):
        for name in dict.fromkeys(row["cache"] for row in rows):
            points = sorted((r["share"], r["increase"][text]) for r in rows if r["cache"] == name)
            wide = 2.5 if name == "ours" else 1
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=wide, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:.2g}")
        axes.set_title(text)
        axes.grid(alpha=0.3)
    figure.supxlabel("share of the KV bytes that is kept")
    figure.supylabel("increase of perplexity, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)


def main() -> None:
    """Measure, print, draw."""
    parser = arguments(__doc__)
    parser.add_argument("--only", action="append", help="a cache; again for more")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=Path, help="output of an earlier run, to be drawn as well")
    args = parser.parse_args()

    bench = Bench(args)
    rows = [{"cache": "dense", "setting": "", "share": 1.0} | figures(bench.dense, bench.dense)]
    print(json.dumps(rows[0]), flush=True)
    for name, setting, measure in cases(bench):
        if args.only and not {name, f"{name} {setting}"} & {*args.only}:
            continue
        try:
            share, losses = measure()
        except ValueError as error:
            print(f"{name} {setting} is left out: {error}", file=sys.stderr)
            continue
        rows.append({"cache": name, "setting": setting, "share": share})
        rows[-1] |= figures(losses, bench.dense)
        print(json.dumps(rows[-1]), flush=True)
    if args.rows:
        rows += map(json.loads, args.rows.read_text(encoding="utf-8").splitlines())
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
