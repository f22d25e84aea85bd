"""The report of the bench: a file of JSON, tables, and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .setup import Row

NAME = "bench"  # of the files, with .json and .png


def save(report: Row, out: Path) -> None:
    """Write the report to `out`, a folder."""
    (out / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n")


def checked(rows: Sequence[Row]) -> str:
    """How many checks passed, and those that did not."""
    bad = [row for row in rows if not row["passed"]]
    lines = [f"{len(rows) - len(bad)} of {len(rows)} checks passed"]
    return "\n".join(lines + [f"  FAILED {x['case']}: {_why(x)}" for x in bad])


def _why(row: Row) -> str:
    return str(row.get("failed", f"an error of {row.get('error')}"))


def timed(rows: Sequence[Row]) -> str:
    """A table of ops: microseconds, and the share of the read bandwidth."""
    cells = list(dict.fromkeys((row["slots"], row["batch"]) for row in rows))
    heads = [
        f"{slots // 1024}k x {batch}" if slots >= 1024 else f"{slots} x {batch}"
        for slots, batch in cells
    ]
    lines = [["slots x batch: us, share of bandwidth", *heads]]
    for name in dict.fromkeys(row["case"] for row in rows):
        found = {(x["slots"], x["batch"]): x for x in rows if x["case"] == name}
        lines.append([name, *(_time(found.get(cell)) for cell in cells)])
    failed = {f"{x['case']}: {x['failed']}" for x in rows if "failed" in x}
    return "\n".join([_table(lines), *sorted(failed)])


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    if "failed" in row:
        return "failed"
    return f"{1e6 * row['seconds']:.0f} {row['share']:.0%}"


def decoded(rows: Sequence[Row]) -> str:
    """A table of models: tokens per second, and the speed relative to the first model."""
    lines = [["context x batch", "model", "tokens/s", "speedup", "bound"]]
    for x in rows:
        cell = [f"{x['context']} x {x['batch']}", x.get("model", "all")]
        if "failed" in x:
            lines.append([*cell, f"failed: {x['failed']}", "", ""])
        else:
            ratios = (f"{x[name]:.2f}" if name in x else "-" for name in ("speedup", "bound"))
            lines.append([*cell, f"{x['tokens_per_second']:.0f}", *ratios])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(report: Row, out: Path) -> None:
    """Draw the share of the bandwidth by slots, a panel a batch size, and the speed of models.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("plots need matplotlib: pip install 'eigenzoo[plot]'") from None
    rows = [row for row in report["ops"] if "share" in row]
    models = [row for row in report["models"] if "tokens_per_second" in row]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4 * len(batches) + 4, 5), layout="constrained", dpi=150)
    *panels, last = figure.subplots(1, len(batches) + 1, squeeze=False)[0]
    names, named = list(dict.fromkeys(row["case"] for row in rows)), set[str]()
    for axes, batch in zip(panels, batches, strict=True):
        for i, name in enumerate(names):
            here = [x for x in rows if (x["batch"], x["case"]) == (batch, name)]
            points = sorted((x["slots"], 100 * x["share"]) for x in here)
            label = name if points and name not in named else None
            named |= {name} if points else set()
            style: dict[str, Any] = {"color": f"C{i % 10}", "marker": "os^vD"[i // 10 % 5]}
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(title=f"one layer, batch {batch}", xlabel="slots")
        axes.grid(alpha=0.3)
    if panels:
        panels[0].set_ylabel("% of the bandwidth at which a sum reads")
        figure.legend(loc="outside lower center", ncols=4)
    titles = [f"{x['model']}\n{x['context']} x {x['batch']}".replace("/", "/\n") for x in models]
    last.barh(titles, [x["tokens_per_second"] for x in models])
    last.set(title="whole models", xlabel="tokens per second")
    last.invert_yaxis()
    figure.suptitle(report["device"])
    figure.savefig(out / f"{NAME}.png")
