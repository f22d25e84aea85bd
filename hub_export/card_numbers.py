"""The numbers of a card that say how good a checkpoint is: perplexity, on every text, and tasks."""

from typing import Any

from huggingface_hub import EvalResult

from ..zoo.utils.escape import printable
from ..zoo.utils.records import ComparedDomain, CompressionRecord, EvaluationRow, QualityRecord


def results(c: CompressionRecord) -> list[EvalResult]:
    """What was measured of the compressed model, as the Hub's metadata has it."""
    found = [(x["text"], "perplexity", x["perplexity"]) for x in _texts(c.get("evaluation"))]
    for row in c.get("measured", {}).get("evaluations", []):
        if row["kv_share"] < 1:
            if "perplexity" in row:
                found.append((row["text"], "perplexity", row["perplexity"]))
            for x in row["domains"]["texts"] if "domains" in row else []:
                found.append((x["text"], "perplexity", x["perplexity"]))
            found += _task_cells(row)
    return [_result(*one) for one in found]


def _result(text: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=printable(text),
        metric_type=printable(metric),
        metric_value=round(value, 4),
    )


def before_and_after(quality: QualityRecord | None) -> list[tuple[str, str, str]]:
    """Rows of perplexity before and after: of every text, and the mean and worst increase."""
    rows = [
        (
            f"perplexity ({x['tokens']} tokens of {x['text']})",
            f"{x['dense_perplexity']:.3f}",
            f"{x['perplexity']:.3f}",
        )
        for x in _texts(quality)
    ]
    if quality and "domains" in quality:
        increase = quality["domains"]["increase"]
        rows.append(("increase of perplexity, mean", "", f"{increase['mean']:+.2%}"))
        rows.append(("increase of perplexity, worst", "", f"{increase['worst']:+.2%}"))
    return rows


def _texts(quality: QualityRecord | None) -> list[ComparedDomain]:
    """Perplexity before and after on every text; the record of one text is no list."""
    if not quality:
        return []
    if "domains" in quality:
        return quality["domains"]["texts"]
    numbers = {"dense_perplexity": quality["dense"], "perplexity": quality["compressed"]}
    one: Any = {"text": quality["text"], "tokens": quality["tokens"], **numbers}
    return [one]


def cells(row: EvaluationRow) -> list[tuple[str, str, float]]:
    """Text or task, metric and value of all that was measured in one evaluation."""
    found = []
    if "perplexity" in row:
        found.append((f"{row['tokens']} tokens of {row['text']}", "perplexity", row["perplexity"]))
    return found + _domain_cells(row) + _task_cells(row)


def _domain_cells(row: EvaluationRow) -> list[tuple[str, str, float]]:
    """The perplexity on every text, and its mean and worst increase over the original's."""
    if "domains" not in row:
        return []
    record = row["domains"]
    found = [
        (f"{x['tokens']} tokens of {x['text']}", "perplexity", x["perplexity"])
        for x in record["texts"]
    ]
    if spread := record.get("increase"):
        name = f"{len(found)} texts, over {row['original']}"
        found.append((name, "mean increase of perplexity, %", 100 * spread["mean"]))
        found.append((name, "worst increase of perplexity, %", 100 * spread["worst"]))
    return found


def _task_cells(row: EvaluationRow) -> list[tuple[str, str, float]]:
    """Task, metric and value, without standard errors and without what is no metric."""
    return [
        (task, metric.partition(",")[0], value)
        for task, metrics in row.get("tasks", {}).items()
        for metric, value in metrics.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, float)
    ]
