"""The README.md of a compressed checkpoint: what was measured, and how to use it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..zoo.compression.methods import METHODS
from ..zoo.inference.checkpoint import MODEL_TYPE, native_config, read_config
from ..zoo.models.config import Config, kv_bytes

CONTEXTS = (2048, 8192, 32768, 131072)
FIGURES = "figures"  # folder of plots, in the checkpoint
CARD = "README.md"


def card(config: Config, compression: dict[str, Any], dtype: torch.dtype) -> str:
    """Markdown with the Hub's metadata. Every number comes from `compression` or `config`.

    dtype: of the weights, and so of the cache.
    """
    c, base = compression, compression["base_model"]
    source = METHODS[c["method"]].source
    title = f"{base.split('/')[-1]}, KV cache compressed"
    return f"""---
{_metadata(c, title)}
---

# {title}

Made by eigenzoo {c["versions"]["eigenzoo"]} from `{base}`{_licence(c)}: {source}.
The cache holds low-rank latents of keys and values and is that much smaller wherever it lives.

{_sizes(config, c, dtype)}

{_made(c)}
{_measured(c.get("measured", {}))}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

With eigenzoo installed: `eigenzoo generate . --prompt "…"` (compiled, static cache).

## Ranks

{_latents(config)}

{_ranks(config)}

## Limits

Keys and values differ in width, so FlashAttention 2 and paged caches do not apply. {_cost(config)}
"""


def _metadata(c: dict[str, Any], title: str) -> str:
    """The Hub's YAML."""
    base, results = c["base_model"], []
    if found := c.get("evaluation"):
        results.append(_result(found["text"], "perplexity", found["compressed"]))
    for found in c.get("measured", {}).get("evaluations", []):
        if found["kv_share"] < 1:
            if "perplexity" in found:
                results.append(_result(found["text"], "perplexity", found["perplexity"]))
            results += [_result(*cell) for cell in _task_cells(found)]
    known = base.count("/") == 1  # a Hub id; of a local model only the name is kept
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=c.get("base_license"),
        base_model=base if known else None,
        base_model_relation="finetune" if known else None,
        tags=["eigenzoo", "kv-cache", "low-rank"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _result(text: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=text,
        metric_type=metric,
        metric_value=round(value, 4),
    )


def _task_cells(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Task, metric and value, without errors and facts."""
    return [
        (task, metric.partition(",")[0], value)
        for task, row in found.get("tasks", {}).items()
        for metric, value in row.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, float)
    ]


def _licence(c: dict[str, Any]) -> str:
    return f" (licence: {c['base_license']})" if c.get("base_license") else ""


def _sizes(config: Config, c: dict[str, Any], dtype: torch.dtype) -> str:
    """What the cache takes, and what was lost at compression."""
    size = kv_bytes(config, dtype)
    names = "kv_bytes_per_token_dense", "kv_bytes_per_token"
    before, after = (size[name] for name in names)
    rows = [
        ("KV numbers per token", f"{config.dense_kv_width}", f"{config.kv_width}"),
        (f"KV bytes per token, {str(dtype).removeprefix('torch.')}", f"{before}", f"{after}"),
        ("KV share", "1.000", f"{size['kv_share']:.3f}"),
    ]
    for context in CONTEXTS:
        if context <= config.max_position_embeddings:
            dense, low = (f"{context * n / 2**20:.1f} MiB" for n in (before, after))
            rows.append((f"cache of {context} tokens", dense, low))
    if found := c.get("evaluation"):
        text = f"perplexity ({found['tokens']} tokens of {found['text']})"
        rows.append((text, f"{found['dense']:.3f}", f"{found['compressed']:.3f}"))
    return _table(("", "original", "compressed"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _made(c: dict[str, Any]) -> str:
    made = "Made from the weights alone, without calibration."
    if text := c["calibration"]:
        made = f"Calibrated on {text['tokens']} tokens ({text['source']}), seed {c['seed']}."
        if parts := c.get("refit"):  # older checkpoints do not say
            made += f" Refitted to them after the solve: {', '.join(parts)}."
    versions = ", ".join(f"{name} {number}" for name, number in c["versions"].items())
    made += f" With {versions}.\n"
    return made + "".join(
        f"Refined for {run['best_step']} steps on {run['calibration']['source']} text: KL to the "
        f"original {run['kl_before']:.4g} -> {run['kl_after']:.4g} nats per token, held out.\n"
        for run in c.get("refined", [])
    )


def _measured(found: dict[str, Any]) -> str:
    """What `add` has put there: evaluations and speed, with commands, and plots."""
    parts, rows = [], []
    for x in found.get("evaluations", []):
        cells = _task_cells(x)
        if "perplexity" in x:
            text = f"{x['tokens']} tokens of {x['text']}"
            cells = [(text, "perplexity", x["perplexity"]), *cells]
        name = "original" if x["kv_share"] == 1 else f"{x['kv_share']:.2f} of the KV bytes"
        rows += [(name, task, metric, f"{value:.4f}") for task, metric, value in cells]
    if rows:
        parts.append(_table(("", "measured on", "metric", "value"), rows))
    if speed := found.get("speed"):
        head = ("", "context", "batch", "slots", "tokens/s", "peak MiB")
        rows = [
            (
                x["model"],
                *(str(x[name]) for name in ("context", "batch", "slots")),
                f"{x['tokens_per_second']:.2f}",
                f"{x['peak_memory'] / 2**20:.0f}",
            )
            for x in speed
        ]
        x = speed[0]
        parts.append(f"Decoding in {x['dtype']}, {x['processor']}:\n\n{_table(head, rows)}")
    parts += [f"![{Path(name).stem}]({FIGURES}/{name})" for name in found.get("figures", [])]
    commands = dict.fromkeys(
        x["command"] for kind in ("evaluations", "speed") for x in found.get(kind, [])
    )
    if commands:
        parts.append("```bash\n" + "\n".join(commands) + "\n```")
    return "".join(f"\n{part}\n" for part in ["## Measured", *parts]) if parts else ""


def _latents(config: Config) -> str:
    if config.joint_kv:
        return (
            f"One latent holds keys and values of {config.k_heads_per_latent} kv heads; its rank "
            "stands under keys."
        )
    shared = (
        f"{config.k_heads_per_latent} kv heads share a key latent, "
        f"{config.v_heads_per_latent} a value latent."
    )
    if not config.k_bits:
        return shared
    return (
        f"{shared} Where its numbers have fewer than 16 bits in the cache, a latent has a scale "
        "per token, of 16 bits, which the bytes above include."
    )


def _ranks(config: Config) -> str:
    columns = {"key rank": config.k_ranks, "value rank": config.v_ranks}
    columns |= {"key bits": config.k_bits, "value bits": config.v_bits}
    columns = {name: numbers for name, numbers in columns.items() if numbers}
    rows = [map(str, (i, *row)) for i, row in enumerate(zip(*columns.values(), strict=True))]
    return _table(("layer", *columns), [list(row) for row in rows])


def _cost(config: Config) -> str:
    """How decoding reads keys."""
    if not any(config.compressed(i)[0] for i in range(config.num_hidden_layers)):
        return "Keys are whole: only values are compressed."
    if not config.rotary:
        return "Queries read the latents directly: no key is rebuilt."
    if config.pairs:
        return "Latents of keys are cached rotated: queries read them directly."
    if config.anchor > 1:
        return f"Keys are anchored: one query reads each block of {config.anchor} cached tokens."
    return (
        "Compressed keys are lifted and rotated when they are read, which costs time at decoding."
    )


def add(folder: Path, files: Sequence[Path]) -> str:
    """Write measurements into a checkpoint's config.json and its card anew; returns the card.

    files: what `eigenzoo evaluate --json` printed, of the checkpoint or of its original, and
    bench.jsonl as `eigenzoo bench --out` wrote it, whose plots come along. What was there of the
    same kind is replaced. Raises ValueError for a file of another kind, and a folder that is no
    compressed checkpoint.
    """
    raw = read_config(folder)
    if raw.get("model_type") != MODEL_TYPE or not raw.get("compression"):
        raise ValueError(f"{folder} was not written by eigenzoo compress: expected such a folder")
    found = dict(raw["compression"].get("measured", {}))
    fresh: dict[str, list[Any]] = {"evaluations": [], "speed": [], "figures": []}
    plots: list[Path] = []
    for file in files:
        for row in _rows(file):
            kind = "evaluations" if "kv_share" in row else "speed"
            if "failed" not in row:
                fresh[kind].append(row)
        if file.suffix == ".jsonl":
            plots += sorted(file.parent.glob("*.png"))
    fresh["figures"] = [plot.name for plot in plots]
    found |= {kind: rows for kind, rows in fresh.items() if rows}
    raw["compression"]["measured"] = found
    for plot in plots:
        (folder / FIGURES).mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / FIGURES / plot.name)
    dtype = getattr(torch, raw.get("dtype") or raw["torch_dtype"])
    text = card(native_config(raw), raw["compression"], dtype)
    for name, content in (("config.json", json.dumps(raw, indent=2) + "\n"), (CARD, text)):
        beside = folder / f".{name}.new"
        beside.write_text(content)
        beside.replace(folder / name)
    return text


def _rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of measurements."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as lines of JSON: {error}") from error
    for row in rows:
        keys = row.keys() if isinstance(row, dict) else set()
        if not ({"kv_share", "command"} <= keys or {"context", "batch", "command"} <= keys):
            raise ValueError(
                f"{file} is none of `eigenzoo evaluate --json` or bench.jsonl of `eigenzoo bench`"
            )
    return rows
