"""Figures of sweeps and benches. Draws without a screen and without pyplot's global state.

Importing this raises ValueError without matplotlib (extra `plot`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TABLEAU_COLORS, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
except ModuleNotFoundError:
    raise ValueError("plots need matplotlib: pip install 'eigenzoo[plot]'") from None

from ..compression.cuts import NOISE
from ..utils.records import BenchRow, CompressedRow, TimedRow
from .domains import DomainTable
from .sweep_table import Section, increase

AS_WRITTEN = rc_context({"text.parse_math": False})  # a $ in a name begins no formula
COLORS, MARKS = list(TABLEAU_COLORS.values()), "osD^vPX"


@AS_WRITTEN
def figures(sections: Sequence[Section], tables: Sequence[DomainTable] = ()) -> dict[str, Figure]:
    """All figures of a report by title."""
    drawn = {}
    for section in sections:
        name = section.dense["model"]
        several = sum(s.dense["model"] == name for s in sections) > 1
        if several:
            name += f" on {section.dense['evaluation']['text']}"
        if not section.table:
            continue
        drawn[f"{name}: quality"] = quality(section, name)
        for keep in section.keeps:
            if len(_timed(section, keep)) > 1:
                heading = f"{name}: quality and decode cost at {keep:g}"
                drawn[heading] = cost(section, keep, f"{name}, keep {keep:g}")
        best = {keep: section.best(keep) for keep in section.keeps}
        for keep, (label, row) in best.items():
            drawn[f"{name}: ranks at {keep:g}"] = ranks(row, f"{name}, {label}, keep {keep:g}")
        for label, row in dict(best.values()).items():
            keep = row["settings"]["keep"]
            title = f"{name}, {label}; dots: ranks at keep {keep:g}"
            drawn[f"{name}: errors of {label}"] = errors(row, title)
    for table in tables:
        if any("increase" in record for record in table.rows.values()):
            drawn[f"{table.title}: domains"] = domains(table)
    return drawn


def domains(table: DomainTable) -> Figure:
    """Increase of the perplexity in per cent: a group of bars for every text, one a model."""
    known = {label: x for label, x in table.rows.items() if "increase" in x}
    groups, width = [*table.texts, "mean"], 0.8 / len(known)
    size = (1 + len(groups) * max(1.5, 0.3 * len(known)), 4.5 + 0.2 * len(known))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.subplots()
    for i, (label, x) in enumerate(known.items()):
        shares = [*(row["increase"] for row in x["texts"]), x["increase"]["mean"]]
        places = [group - 0.4 + (i + 0.5) * width for group in range(len(groups))]
        color = COLORS[i % len(COLORS)]
        bars = axes.bar(places, [100 * share for share in shares], width, label=label, color=color)
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.set_yscale("symlog", linthresh=1)  # linear up to one per cent, so that bars begin at 0
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylim(bottom=min(0, 2 * axes.dataLim.y0), top=max(1, 1.3 * axes.dataLim.y1))
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title=table.title, ylabel="increase of perplexity over uncompressed, %")
    figure.legend(loc="outside lower center")
    return figure


def quality(section: Section, title: str) -> Figure:
    """Increase of the perplexity in per cent against the share of the KV bytes that is kept."""
    figure = Figure(figsize=(7, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    lowest = 1.0
    for i, (label, cells) in enumerate(section.table.items()):
        points = sorted((row["kv_share"], 100 * increase(row)) for row in cells.values())
        color, mark = COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=label, color=color, marker=mark)
        lowest = min(lowest, *y)
    _scale(axes, lowest)
    axes.set(title=title, xlabel="share of the KV bytes that is kept")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _scale(axes: Axes, lowest: float) -> None:
    """Of increases of the perplexity in per cent: log where all, down to `lowest`, are positive."""
    if lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(LogFormatter())  # 6, not 6 x 10^0, within a decade
    else:  # no change, or better than uncompressed: linear up to a tenth of a per cent
        axes.set_yscale("symlog", linthresh=0.1)
        axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("increase of perplexity over uncompressed, %")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)


def _timed(section: Section, keep: float) -> dict[str, CompressedRow]:
    """The rows at a share, by label, of which decoding was timed."""
    column = {label: cells[keep] for label, cells in section.table.items() if keep in cells}
    return {label: row for label, row in column.items() if "decode" in row}


def cost(section: Section, keep: float, title: str) -> Figure:
    """Increase of the perplexity in per cent against the speed of decoding, at a share kept."""
    figure = Figure(figsize=(7, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    rows, order = _timed(section, keep), list(section.table)
    for label, row in rows.items():
        i = order.index(label)  # looks as in `quality`
        color, mark = COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]
        x, y = row["decode"]["speedup"], 100 * increase(row)
        axes.plot(x, y, label=label, color=color, marker=mark, linestyle="none")
    axes.axvline(1, color="grey", linewidth=0.8)
    _scale(axes, min(increase(row) for row in rows.values()))
    speed = f"decode speed relative to uncompressed, {section.slots} slots, not compiled"
    axes.set(title=title, xlabel=speed)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def ranks(row: CompressedRow, title: str) -> Figure:
    """A heat map of the ranks of keys and values in every layer."""
    fulls = [n for n in row["full_ranks"] if n]
    numbers = [row["k_ranks"], row["v_ranks"]][: len(fulls)]  # of joint latents only the first
    shares = [[rank / full for rank in side] for side, full in zip(numbers, fulls, strict=True)]
    layers = len(numbers[0])
    figure = Figure(figsize=(max(6, 2 + 0.35 * layers), 2.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    most = max(map(max, shares))
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=most, cmap="viridis")
    for y, side in enumerate(numbers):
        for x, rank in enumerate(side):
            color = "white" if shares[y][x] < 0.6 * most else "black"
            axes.text(x, y, str(rank), ha="center", va="center", color=color, fontsize=7)
    names = ["keys", "values"] if len(numbers) > 1 else ["keys and values"]
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set(title=title, xlabel="layer")
    figure.colorbar(image, label=f"rank / {' or '.join(map(str, sorted(set(fulls))))}")
    return figure


def errors(row: CompressedRow, title: str) -> Figure:
    """The share of each layer's error that is left at a rank, as the method counts it."""
    curves, layers = row["curves"], row["layers"]
    sides = [("keys", curves["k"], [(x["k_rank"], x["k_error"]) for x in layers])]
    if "v" in curves:
        sides.append(("values", curves["v"], [(x["v_rank"], x["v_error"]) for x in layers]))
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(sides), squeeze=False, sharey=True)[0]
    depth, colors = Normalize(0, max(1, len(layers) - 1)), colormaps["viridis"]
    for axes, (name, curve, dots) in zip(panels, sides, strict=True):
        for layer, (left, dot) in enumerate(zip(curve["left"], dots, strict=True)):
            color = colors(depth(layer))
            axes.plot(curve["ranks"], left, color=color, linewidth=1)
            axes.plot(*dot, "o", color=color)
        axes.set_yscale("log", nonpositive="mask")  # at full rank nothing is left
        title_of_panel = name if len(sides) > 1 else "keys and values"
        axes.set(ylim=(NOISE, 2), title=title_of_panel, xlabel="rank of a latent")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of the error left")
    figure.suptitle(title)
    figure.colorbar(ScalarMappable(depth, colors), ax=list(panels), label="layer")
    return figure


def save_decoding(rows: Sequence[BenchRow], title: str, folder: Path) -> None:
    """Write speed.png and memory.png into the folder."""
    for name, figure in decoding(rows, title).items():
        figure.savefig(folder / f"{name}.png")


@AS_WRITTEN
def decoding(rows: Sequence[BenchRow], title: str) -> dict[str, Figure]:
    """What `bench.bench` measured, against the context: tokens per second, and peak memory."""
    timed = [row for row in rows if "failed" not in row]
    return {
        "speed": _against_context(timed, title, "tokens per second", "tokens_per_second", 1),
        "memory": _against_context(timed, title, "peak memory, GiB", "peak_memory", 2**-30),
    }


def _against_context(
    rows: Sequence[TimedRow],
    title: str,
    label: str,
    key: Literal["tokens_per_second", "peak_memory"],
    scale: float,
) -> Figure:
    """One panel a batch size, one line a model."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = list(dict.fromkeys(row["model"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(1 + 3.5 * len(batches), 4.5), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for i, name in enumerate(names):
            cells = [x for x in rows if (x["batch"], x["model"]) == (batch, name)]
            points = sorted((x["context"], scale * x[key]) for x in cells)
            color, mark = COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]
            handle = name if batch == batches[0] else None
            axes.plot(*zip(*points, strict=True), label=handle, color=color, marker=mark)
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, contexts)
        axes.set_ylim(bottom=0)
        axes.set(title=f"batch {batch}", xlabel="context, tokens")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
