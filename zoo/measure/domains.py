"""Perplexity on texts of several domains: measured of a checkpoint, and as tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..inference.checkpoint import Checkpoint
from ..inference.domains import all_rows, by_domain, digest, domain, domains_record
from ..inference.perplexity import window_losses
from ..inference.texts import Text
from ..models.config import kv_bytes
from ..models.model import Model
from ..utils.jsonl import COMPRESSION
from ..utils.records import (
    ComparedDomain,
    ComparedDomains,
    DomainRecord,
    DomainsRecord,
    EvaluationResult,
    EvaluationRow,
)
from .sweep_table import Section


class DomainTable(NamedTuple):
    """Models that were measured on the same texts, in windows of so many tokens, by label."""

    title: str
    window: int
    rows: dict[str, DomainsRecord]

    @property
    def texts(self) -> list[str]:
        """The names of the texts."""
        return [x["text"] for x in next(iter(self.rows.values()))["texts"]]


def measure_domains(
    source: str,
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    window: int | None = None,
    windows: int = 0,
    bits: int | None = None,
    original: Checkpoint | None = None,
) -> EvaluationResult:
    """Measure a checkpoint on several texts, beside its original if that is given.

    source: its name in the result. window, windows, bits: as in `quality.Probes`, of each text.
    Raises ValueError, before anything is measured, for a text that is too short or that the
    checkpoint was calibrated on, and for an original that is another model.
    """
    model = checkpoint.model
    if original is not None:
        check_original(model, original.model, original.name)
    check_unseen(source, checkpoint, texts)
    window = window or min(2048, model.config.max_position_embeddings)
    domains = [domain(x, checkpoint.tokenizer, model, window, windows) for x in texts]
    rows, dense = all_rows(domains), None
    result: EvaluationResult = {"model": source, **kv_bytes(model.config, bits), "window": window}
    if original is not None:
        result["original"] = original.name
        losses = window_losses(original.model, rows)
        dense = [x.perplexity for x in by_domain(domains, losses)]
    result["domains"] = domains_record(domains, window_losses(model, rows, bits), dense)
    return result


def check_original(low: Model, dense: Model, name: str) -> None:
    """Raise ValueError unless a model may be what `low` was made from, uncompressed."""
    sizes = [
        (kv_bytes(m.config)["kv_bytes_per_token_dense"], m.config.vocab_size) for m in (dense, low)
    ]
    if not dense.config.uncompressed:
        raise ValueError(f"{name} is compressed itself: expected the model it was made from")
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name} has {sizes[0][0]} KV bytes per token and {sizes[0][1]} kinds of tokens: "
            f"expected the model that was compressed, with {sizes[1][0]} and {sizes[1][1]}"
        )


def check_unseen(source: str, checkpoint: Checkpoint, texts: Sequence[Text]) -> None:
    """Raise ValueError for a text that the checkpoint, called `source`, was calibrated on."""
    record = checkpoint.config.get("compression")
    known = []
    if record and not COMPRESSION.problem(record):
        known = record.get("calibration_digests", [])
    for text in texts if known else []:
        if digest(text, checkpoint.tokenizer) in known:
            raise ValueError(f"{source} was calibrated on {text.name}: measure on another text")


def domain_cells(record: DomainsRecord | ComparedDomains) -> list[list[str]]:
    """The table of one model as text, its head first: a row for every text, mean and worst."""
    compared = "increase" in record
    head = [
        "text",
        "tokens",
        *(["original", "compressed", "increase"] if compared else ["perplexity"]),
    ]
    body = [[x["text"], str(x["tokens"]), *_numbers(x)] for x in record["texts"]]
    if len(body) > 1:
        for name in ("mean", "worst"):
            spread: Any = record.get("increase", record["perplexity"])
            last = percent(spread[name]) if compared else f"{spread[name]:.4f}"
            body.append([name, *[""] * (len(head) - 2), last])
    return [head, *body]


def _numbers(row: DomainRecord | ComparedDomain) -> list[str]:
    after = f"{row['perplexity']:.4f}"
    if "increase" not in row:
        return [after]
    return [f"{row['dense_perplexity']:.4f}", after, percent(row["increase"])]


def percent(share: float) -> str:
    """An increase as text."""
    return f"{100 * share:+.2f} %"


def of_evaluations(rows: Sequence[EvaluationRow]) -> list[DomainTable]:
    """Tables of what `eigenzoo evaluate --json` printed, one for those on the same texts.

    Raises ValueError for a row without domains.
    """
    tables: dict[str, DomainTable] = {}
    for row in rows:
        if "domains" not in row:
            raise ValueError(
                f"{row['model']} was measured on one text: evaluate it with --domains --json"
            )
        texts = row["domains"]["texts"]
        same = str([row["window"], *(x["digest"] for x in texts)])
        title = " and ".join(x["text"] for x in texts)
        table = tables.setdefault(same, DomainTable(title, row["window"], {}))
        name = f"{row['model']}, {row['kv_share']:.3f} of the KV bytes"
        if kept := row.get("sliding_window"):
            name += f", the last {kept[0]} tokens and the first {kept[1]}"
        table.rows[name] = row["domains"]
    return [*tables.values()]


def of_section(section: Section) -> DomainTable | None:
    """The table of a sweep that measured several texts; None of one on a single text."""
    rows = {
        f"{label}, keep {keep:g}": row["domains"]
        for label, cells in section.table.items()
        for keep, row in sorted(cells.items(), reverse=True)
        if "domains" in row
    }
    dense = section.dense
    return DomainTable(dense["model"], dense["evaluation"]["window"], rows) if rows else None


def table_cells(table: DomainTable) -> list[list[str]]:
    """A line for every model, a column for every text, mean and worst; its head first."""
    body = []
    for label, record in table.rows.items():
        spread = record.get("increase")
        cells = [_cell(x) for x in record["texts"]]
        ends: Mapping[str, Any] = spread or record["perplexity"]
        shown = percent if spread else "{:.2f}".format
        body.append([label, *cells, shown(ends["mean"]), shown(ends["worst"])])
    return [["", *table.texts, "mean", "worst"], *body]


def _cell(row: DomainRecord) -> str:
    after = f"{row['perplexity']:.2f}"
    return f"{after} ({percent(row['increase'])})" if "increase" in row else after


def table_caption(table: DomainTable) -> str:
    """What was measured, and on what."""
    counts = [
        f"{x['tokens']} tokens of {x['text']}" for x in next(iter(table.rows.values()))["texts"]
    ]
    return (
        f"Perplexity on {', '.join(counts)} in windows of {table.window}, and its increase over "
        "the uncompressed model's where that was measured; mean and worst of it over the texts."
    )


def table_json(table: DomainTable) -> dict[str, Any]:
    """The table, ready for JSON."""
    rows = [{"label": label, "domains": record} for label, record in table.rows.items()]
    return {"texts": table.texts, "window": table.window, "table": rows}
