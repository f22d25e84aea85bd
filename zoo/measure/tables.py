"""Print results as tables in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ..utils.escape import printable
from ..utils.records import (
    BenchResult,
    ComparedDomains,
    DomainsRecord,
    EvaluationResult,
    LayerRecord,
    PositionRecord,
    QualityRecord,
    RetrievalRecord,
    RulerRecord,
    TaskRow,
)
from .domains import DomainTable, domain_cells, percent, table_caption, table_cells
from .evaluate import Comparison
from .plan import Plan, plan_caption, plan_cells
from .sweep_table import Section, caption, cells

BY_LAYER = {  # of a layer, and of a config
    **{"k_rank": "k_ranks", "v_rank": "v_ranks", "k_bits": "k_bits", "v_bits": "v_bits"},
    **{"k_segments": "k_segments", "v_segments": "v_segments"},
}


def _add(table: Table, *cells: object) -> None:
    """Add a row, whose cells may come from files."""
    table.add_row(*map(printable, cells))


def _show(table: Table) -> None:
    """Print a table; names in brackets or colons are no markup."""
    Console(markup=False, emoji=False).print(table)


def layers(rows: Sequence[LayerRecord]) -> None:
    """Print what every layer keeps, with errors and thresholds where there are any.

    Segments where latents are cut into such, otherwise ranks, and bars of them.
    """
    sides = (
        {"k": "keys", "v": "values"} if any(x["v_rank"] for x in rows) else {"k": "keys and values"}
    )
    kept = {f"{side}_{what}" for side in "kv" for what in ("rank", "segments")}
    extra = [name for name in rows[0] if name not in kept]
    widest = max(max(x["k_rank"], x["v_rank"]) for x in rows)
    table, by_name = Table("layer"), cast(Sequence[Mapping[str, Any]], rows)
    for side, title in sides.items():
        table.add_column(title)
        if f"{side}_segments" not in rows[0]:
            table.add_column("")
    for name in extra:
        table.add_column(printable(name))
    for i, x in enumerate(by_name):
        cells = []
        for side in sides:
            rank, segments = x[f"{side}_rank"], x.get(f"{side}_segments")
            bar = "█" * max(1, round(12 * rank / widest))
            cells += [str(rank), bar] if segments is None else [segments or f"{rank}x16"]
        _add(table, str(i), *cells, *(_cell(x[name]) for name in extra))
    _show(table)


def _cell(x: object) -> str:
    """A cell about a layer."""
    return f"{x:.4f}" if isinstance(x, float) else str(x)


def comparison(rows: Mapping[str, Comparison], context: int) -> None:
    """Print what was measured of several models side by side, the last beside the first."""
    domains([*rows.values()][-1]["domains"])
    names = {
        "kv_bytes_per_token": "KV bytes per token, 16 bits",
        "cache_bytes": f"cache bytes allocated, {context} slots",
        "decode_tokens_per_second": f"decode tokens/s, {context} slots",
        "answer": "answer",
    }
    table = Table("", *map(printable, rows))
    columns: list[Mapping[str, Any]] = [*rows.values()]
    for key, title in names.items():
        cells = [column[key] for column in columns]
        _add(table, title, *(f"{x:.2f}" if isinstance(x, float) else x for x in cells))
    _show(table)


def domains(record: DomainsRecord | ComparedDomains) -> None:
    """Print perplexity on several texts, with its increase if the original was measured too."""
    head, *body = domain_cells(record)
    table = Table(*head)
    for row in body:
        _add(table, *row)
    _show(table)


def change(quality: QualityRecord) -> str:
    """The change of perplexity in words: its mean and worst over several texts."""
    if "domains" in quality:
        spread = quality["domains"]["increase"]
        return (
            f"perplexity {percent(spread['mean'])} on average, {percent(spread['worst'])} at worst"
        )
    return (
        f"perplexity {quality['dense']:.2f} -> {quality['compressed']:.2f} on "
        f"{quality['tokens']} tokens of {quality['text']}"
    )


def changes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what a push does to each file."""
    table = Table("file", "MB", "")
    for x in rows:
        _add(table, x["path"], f"{x['size'] / 1e6:.2f}", x["state"])
    _show(table)


def bench(rows: Sequence[BenchResult]) -> None:
    """Print what `bench.bench` measured."""
    heads = ["model", "tok/s", "ms/step", "floor", "KV read", "speed", "bound", "peak MiB"]
    prompts = any("prompt_tokens_per_second" in x for x in rows)
    heads += ["prompt tok/s"] if prompts else []
    places = dict.fromkeys((x["context"], x["batch"], x["slots"]) for x in rows)
    for context, batch, slots in places:
        table, reasons = Table(*heads, title=f"context {context}, batch {batch}, {slots} slots"), []
        for x in (x for x in rows if (x["context"], x["batch"]) == (context, batch)):
            if "failed" in x:
                _add(table, x["model"], "failed")
                reasons.append(f"{x['model']} failed: {x['failed'].splitlines()[0]}")
                continue
            _add(
                table,
                x["model"],
                f"{x['tokens_per_second']:.2f}",
                f"{1e3 * x['seconds_per_step']:.2f}",
                f"{1e3 * x['floor_seconds']:.2f}",
                f"{x['kv_read_share']:.0%}",
                f"{x['speedup']:.2f}x" if "speedup" in x else "",
                f"{x['bound']:.2f}x" if "bound" in x else "",
                f"{x['peak_memory'] / 2**20:.0f}",
                f"{x['prompt_tokens_per_second']:.1f}" if "prompt_tokens_per_second" in x else "",
            )
        _show(table)
        for reason in reasons:
            print(printable(reason))
    print(
        "speed: over the first model, in turns. bound: the most that its smaller cache can give.\n"
        "KV read: share of the cache in all bytes that a step reads. floor: milliseconds for\n"
        "all of them, as a sum reads memory. peak: while decoding; on a CPU of the whole process."
    )


def evaluation(result: EvaluationResult) -> None:
    """Print what `eigenzoo evaluate` measured."""
    if "domains" in result:
        domains(result["domains"])
    if "perplexity" in result:
        print(
            f"perplexity {result['perplexity']:.4f} on {result['tokens']} tokens of "
            f"{printable(result['text'])} in windows of {result['window']}"
        )
    print(
        f"{result['kv_bytes_per_token']} KV bytes per token, {result['kv_share']:.1%} of the "
        f"{result['kv_bytes_per_token_dense']} of an uncompressed cache of 16 bits"
    )
    if kept := result.get("sliding_window"):
        print(f"the cache kept the last {kept[0]} tokens and the first {kept[1]}")
    if "by_position" in result:
        positions(result["by_position"])
    if "retrieval" in result:
        retrieval(result["retrieval"])
    if "ruler" in result:
        ruler(result["ruler"])
    if "tasks" in result:
        tasks(result["tasks"])


def positions(rows: Sequence[PositionRecord]) -> None:
    """Print what `probe.by_position` measured."""
    table = Table("tokens before", "predicted", "loss in nats", "perplexity")
    for x in rows:
        place = f"{x['start']} to {x['stop'] - 1}"
        _add(table, place, str(x["tokens"]), f"{x['loss']:.4f}", f"{x['perplexity']:.4f}")
    _show(table)


def retrieval(rows: Sequence[RetrievalRecord]) -> None:
    """Print what `probe.retrieval` measured, one line a length and one column a depth."""
    depths = sorted({x["depth"] for x in rows})
    table = Table("tokens", *(f"depth {depth:.0%}" for depth in depths))
    for length in sorted({x["length"] for x in rows}):
        cells = {x["depth"]: x for x in rows if x["length"] == length}
        row = [cells[depth] for depth in depths]
        _add(table, str(length), *(f"{x['right']:.0%} {x['loglikelihood']:.2f}" for x in row))
    _show(table)
    print(
        f"share of {rows[0]['facts']} facts that greedy decoding gives, and mean log-likelihood of "
        "their tokens in nats"
    )


def ruler(rows: Sequence[RulerRecord]) -> None:
    """Print what `ruler.ruler` measured."""
    table = Table("tokens", "task", "recall", "standard error")
    for x in rows:
        for name, score in {**x["tasks"], "mean": x["mean"]}.items():
            error = score["standard_error"]
            shown = "" if error is None else f"{error:.1%}"
            _add(table, str(x["length"]), name, f"{score['recall']:.1%}", shown)
    _show(table)
    form = "in the chat template" if rows[0]["chat"] else "without a chat template"
    print(f"{rows[0]['samples']} questions of each task, {form}; recall: what answers name of it")


def tasks(rows: Mapping[str, TaskRow]) -> None:
    """Print what `lm_eval_tasks.run_tasks` measured."""
    table = Table("task", "documents", "shots", "metric", "value", "standard error")
    for name, row in rows.items():
        for metric in (key for key in row if "," in key and "_stderr," not in key):
            cells = (row[metric], row.get(metric.replace(",", "_stderr,"), ""))
            shown = (f"{x:.4f}" if isinstance(x, float) else str(x) for x in cells)
            _add(table, name, str(row["sample_len"]), str(row["shots"]), metric, *shown)
    _show(table)


def sweep(section: Section) -> None:
    """Print the table of a sweep."""
    head, *body = cells(section)
    table = Table(*map(printable, head))
    for row in body:
        _add(table, *row)
    _show(table)
    print(printable(caption(section)))


def models_by_domain(models: DomainTable) -> None:
    """Print the table of several models on the same texts."""
    head, *body = table_cells(models)
    table = Table(*map(printable, head))
    for row in body:
        _add(table, *row)
    _show(table)
    print(printable(table_caption(models)))


def plan(made: Sequence[Plan]) -> None:
    """Print what `plan.plans` tells."""
    head, *body = plan_cells(made)
    table = Table()
    for name in head:
        table.add_column(printable(name), overflow="fold")
    for row in body:
        _add(table, *row)
    _show(table)
    print("\n".join(map(printable, plan_caption(made))))


def checkpoint(about: Mapping[str, Any]) -> None:
    """Print what `checkpoint.inspect` returned.

    Layers keep their windows only, so caches of long texts take less than bytes times tokens.
    """
    table = Table(show_header=False)
    compression = about["compression"] or {}
    for key, value in {**about, **compression}.items():
        hidden = (*BY_LAYER.values(), "compression", "layers", "refined", "measured", "evaluation")
        if key not in hidden and value not in (None, []):
            _add(table, key, str(value))
    if quality := compression.get("evaluation"):
        _add(table, "evaluation", change(quality))
    for run in compression.get("refined", []):
        kl = f"KL {run['kl_before']:.4g} -> {run['kl_after']:.4g} nats per token"
        _add(table, "refined", f"{run['best_step']} steps, {kl}")
    _show(table)
    if domain_rows := (compression.get("evaluation") or {}).get("domains"):
        domains(domain_rows)
    columns = {name: about[key] for name, key in BY_LAYER.items() if about[key]}
    rows = zip(*columns.values(), strict=True)
    layers([cast(LayerRecord, dict(zip(columns, row, strict=True))) for row in rows])
