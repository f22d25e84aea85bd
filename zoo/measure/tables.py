"""Results as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .summary import Section, caption, cells


def layers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the ranks of every layer as bars, with errors and thresholds where there are any."""
    titles = {"k_rank": "keys", "v_rank": "values"}
    if not any(x["v_rank"] for x in rows):
        titles = {"k_rank": "keys and values"}
    widest = max(x[name] for x in rows for name in titles)
    extra = [name for name in rows[0] if name not in ("k_rank", "v_rank")]
    heads = [head for title in titles.values() for head in (title, "")]
    table = Table("layer", *heads, *extra)
    for i, x in enumerate(rows):
        cells = []
        for rank in (x[name] for name in titles):
            cells += [str(rank), "█" * max(1, round(12 * rank / widest))]
        more = (f"{n:.4f}" if isinstance(n := x[name], float) else str(n) for name in extra)
        table.add_row(str(i), *cells, *more)
    Console().print(table)


def comparison(rows: Mapping[str, Mapping[str, Any]], context: int, text: str) -> None:
    """Print what was measured of several models side by side."""
    names = {
        "perplexity": f"perplexity on {text}",
        "kv_bytes_per_token": "KV bytes per token",
        "cache_bytes": f"cache bytes allocated, {context} slots",
        "decode_tokens_per_second": f"decode tokens/s, {context} slots",
        "answer": "answer",
    }
    table = Table("", *rows)
    for key, title in names.items():
        cells = [row[key] for row in rows.values()]
        table.add_row(title, *(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
    Console().print(table)


def changes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what a push does to every file."""
    table = Table("file", "MB", "")
    for x in rows:
        table.add_row(x["path"], f"{x['size'] / 1e6:.2f}", x["state"])
    Console().print(table)


def bench(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `bench.bench` measured."""
    heads = "model", "tok/s", "ms/step", "floor", "KV read", "speed", "bound", "peak MiB"
    places = dict.fromkeys((x["context"], x["batch"], x["slots"]) for x in rows)
    for context, batch, slots in places:
        table, reasons = Table(*heads, title=f"context {context}, batch {batch}, {slots} slots"), []
        for x in (x for x in rows if (x["context"], x["batch"]) == (context, batch)):
            if "failed" in x:
                table.add_row(x["model"], "failed")
                reasons.append(f"{x['model']} failed: {x['failed'].splitlines()[0]}")
                continue
            table.add_row(
                x["model"],
                f"{x['tokens_per_second']:.2f}",
                f"{1e3 * x['seconds_per_step']:.2f}",
                f"{1e3 * x['floor_seconds']:.2f}",
                f"{x['kv_read_share']:.0%}",
                f"{x['speedup']:.2f}x" if "speedup" in x else "",
                f"{x['bound']:.2f}x" if "bound" in x else "",
                f"{x['peak_memory'] / 2**20:.0f}",
            )
        Console().print(table)
        for reason in reasons:
            print(reason)
    print(
        "speed: over the first model, in turns. bound: the most that its smaller cache can give.\n"
        "KV read: share of the cache in all bytes that a step reads. floor: milliseconds for\n"
        "all of them, as a sum reads memory. peak: while decoding; on a CPU of the whole process."
    )


def evaluation(found: Mapping[str, Any]) -> None:
    """Print what `eigenzoo evaluate` found: of perplexity, positions, retrieval, tasks."""
    if "perplexity" in found:
        print(
            f"perplexity {found['perplexity']:.4f} on {found['tokens']} tokens of {found['text']} "
            f"in windows of {found['window']}"
        )
    print(
        f"{found['kv_bytes_per_token']} KV bytes per token, {found['kv_share']:.1%} of the "
        f"uncompressed {found['kv_bytes_per_token_dense']}"
    )
    if "by_position" in found:
        positions(found["by_position"])
    if "retrieval" in found:
        retrieval(found["retrieval"])
    if "tasks" in found:
        tasks(found["tasks"])


def positions(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `probe.by_position` measured."""
    table = Table("tokens before", "predicted", "loss in nats", "perplexity")
    for x in rows:
        place = f"{x['start']} to {x['stop'] - 1}"
        table.add_row(place, str(x["tokens"]), f"{x['loss']:.4f}", f"{x['perplexity']:.4f}")
    Console().print(table)


def retrieval(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `probe.retrieval` measured, one line a length and one column a depth."""
    depths = sorted({x["depth"] for x in rows})
    table = Table("tokens", *(f"depth {depth:.0%}" for depth in depths))
    for length in sorted({x["length"] for x in rows}):
        cells = {x["depth"]: x for x in rows if x["length"] == length}
        found = [cells[depth] for depth in depths]
        table.add_row(str(length), *(f"{x['right']:.0%} {x['loglikelihood']:.2f}" for x in found))
    Console().print(table)
    print(
        f"share of {rows[0]['facts']} facts that greedy decoding gives, and mean log-likelihood of "
        "their tokens in nats"
    )


def tasks(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what `tasks.run_tasks` measured."""
    table = Table("task", "documents", "shots", "metric", "value", "standard error")
    for name, row in rows.items():
        for metric in (key for key in row if "," in key and "_stderr," not in key):
            cells = (row[metric], row.get(metric.replace(",", "_stderr,"), ""))
            shown = (f"{x:.4f}" if isinstance(x, float) else str(x) for x in cells)
            table.add_row(name, str(row["sample_len"]), str(row["shots"]), metric, *shown)
    Console().print(table)


def sweep(section: Section) -> None:
    """Print the table of a sweep."""
    head, *body = cells(section)
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    Console().print(table)
    print(caption(section))


def checkpoint(found: Mapping[str, Any]) -> None:
    """Print what `checkpoint.inspect` found."""
    table = Table(show_header=False)
    for key, value in {**found, **(found["compression"] or {})}.items():
        by_layer = ("k_ranks", "v_ranks", "k_bits", "v_bits")
        hidden = (*by_layer, "compression", "layers", "refined", "measured")
        if key not in hidden and value is not None:
            table.add_row(key, str(value))
    for run in (found["compression"] or {}).get("refined", []):
        kl = f"KL {run['kl_before']:.4g} -> {run['kl_after']:.4g} nats per token"
        table.add_row("refined", f"{run['best_step']} steps, {kl}")
    Console().print(table)
    names = {"k_rank": "k_ranks", "v_rank": "v_ranks", "k_bits": "k_bits", "v_bits": "v_bits"}
    columns = {name: found[key] for name, key in names.items() if found[key]}
    rows = zip(*columns.values(), strict=True)
    layers([dict(zip(columns, row, strict=True)) for row in rows])
