"""The card of a compressed checkpoint, its README.md: what was measured, and how to use it."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCardData

from ..zoo.compression.methods import METHODS
from ..zoo.models.config import Config, cache_bytes, kept_slots, kv_bytes
from ..zoo.utils.escape import code_block, code_span, markdown, printable
from ..zoo.utils.records import CompressionRecord, Measurements, TimedRow
from .card_numbers import before_and_after, cells, results

CONTEXTS = (2048, 8192, 32768, 131072)
FIGURES = "figures"  # folder of plots, in the checkpoint


def card(config: Config, compression: CompressionRecord) -> str:
    """Markdown with the Hub's metadata. Every number comes from `compression` or `config`."""
    c, base = compression, compression["base_model"]
    source = METHODS[c["method"]].source
    title = printable(f"{base.split('/')[-1]}, KV cache compressed")
    return f"""---
{_metadata(c, title)}
---

# {markdown(title)}

Made by eigenzoo {markdown(c["versions"]["eigenzoo"])} from {code_span(base)}{_license(c)}:
{source}.
The cache holds low-rank latents of keys and values, which take fewer bytes in memory.

{_sizes(config, c)}

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


def _metadata(c: CompressionRecord, title: str) -> str:
    """Metadata for the Hub, as YAML."""
    base, measured = c["base_model"], results(c)
    known = base.count("/") == 1  # a Hub id; of a local model only the name is kept
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=printable(c["base_license"]) if c.get("base_license") else None,
        base_model=printable(base) if known else None,
        base_model_relation="finetune" if known else None,
        tags=["eigenzoo", "kv-cache", "low-rank"],
        model_name=title if measured else None,
        eval_results=measured or None,
    )
    return data.to_yaml()


def _license(c: CompressionRecord) -> str:
    return f" (license: {markdown(c['base_license'])})" if c.get("base_license") else ""


def _sizes(config: Config, c: CompressionRecord) -> str:
    """The table of cache sizes and perplexity, before and after."""
    size = kv_bytes(config)
    before, after = size["kv_bytes_per_token_dense"], size["kv_bytes_per_token"]
    rows = [
        ("KV numbers per token", f"{config.dense_kv_width}", f"{config.kv_width}"),
        ("KV bytes per token, 16 bits", f"{before}", f"{after}"),
        ("share of the KV bytes", "1.000", f"{size['kv_share']:.3f}"),
    ]
    for context in CONTEXTS:
        if context <= config.max_position_embeddings:
            dense, low = (f"{context * n / 2**20:.1f} MiB" for n in (before, after))
            rows.append((f"cache of {context} tokens", dense, low))
            slots = kept_slots(config, context)
            if sum(slots) < context * len(slots):  # transformers' caches keep all slots
                share = sum(slots) / len(slots) / context
                ringed = before * share * context, cache_bytes(config, context)
                dense, low = (f"{n / 2**20:.1f} MiB" for n in ringed)
                rows.append(("the same in eigenzoo, of layers' windows only", dense, low))
    rows += before_and_after(c.get("evaluation"))
    return _table(("", "original", "compressed"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[markdown(cell) for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _made(c: CompressionRecord) -> str:
    made = "Made from the weights alone, without calibration."
    if text := c["calibration"]:
        made = f"Calibrated on {text['tokens']} tokens ({text['source']}), seed {c['seed']}."
        if parts := c.get("refit"):  # old checkpoints do not say
            made += f" Refitted to them after the solve: {', '.join(parts)}."
    versions = ", ".join(f"{name} {number}" for name, number in c["versions"].items())
    lines = [f"{made} With {versions}."]
    lines += [
        f"Refined for {run['best_step']} steps on {run['calibration']['tokens']} tokens "
        f"({run['calibration']['source']}): KL to the original {run['kl_before']:.4g} -> "
        f"{run['kl_after']:.4g} nats per token, held out."
        for run in c.get("refined", [])
    ]
    return "".join(f"{markdown(line)}\n" for line in lines)


def _measured(measured: Measurements) -> str:
    """The section of evaluations, speed and plots, with the commands; empty without any."""
    evaluations, timed = measured.get("evaluations", []), measured.get("speed", [])
    parts, rows = [], []
    for x in evaluations:
        name = "original" if x["kv_share"] == 1 else f"{x['kv_share']:.2f} of the KV bytes"
        rows += [(name, task, metric, f"{value:.4f}") for task, metric, value in cells(x)]
    if rows:
        parts.append(_table(("", "measured on", "metric", "value"), rows))
    if timed:
        parts.append(_speed(timed))
    parts += [
        f"![{markdown(Path(name).stem)}]({FIGURES}/{quote(name)})"
        for name in measured.get("figures", [])
    ]
    commands = dict.fromkeys(row["command"] for row in (*evaluations, *timed))
    if commands:
        parts.append(code_block(commands))
    return "".join(f"\n{part}\n" for part in ["## Measured", *parts]) if parts else ""


def _speed(timed: Sequence[TimedRow]) -> str:
    """The table of decode speed."""
    head = ("", "context", "batch", "slots", "tokens/s", "peak MiB")
    rows = [
        (
            x["model"],
            *map(str, (x["context"], x["batch"], x["slots"])),
            f"{x['tokens_per_second']:.2f}",
            f"{x['peak_memory'] / 2**20:.0f}",
        )
        for x in timed
    ]
    first = timed[0]
    processor = f", {first['processor']}" if "processor" in first else ""  # older rows have none
    heading = markdown(f"Decoding in {first['dtype']}{processor}:")
    return f"{heading}\n\n{_table(head, rows)}"


def _latents(config: Config) -> str:
    if config.joint_kv:
        return (
            f"One latent holds keys and values of {config.k_heads_per_latent} kv heads; its rank "
            "is listed under keys."
        )
    shared = (
        f"{config.k_heads_per_latent} kv heads share a key latent, "
        f"{config.v_heads_per_latent} a value latent."
    )
    if config.k_segments or config.v_segments:
        shared += (
            " A latent is cut into segments of falling bits: 16x8+96x4 are 16 numbers of 8 bits, "
            "and 96 of 4."
        )
    if config.least_bits == 16:
        return shared
    return (
        f"{shared} Numbers of fewer than 16 bits have one scale per token and segment, of one "
        "byte, which the bytes above include."
    )


def _ranks(config: Config) -> str:
    columns: dict[str, Sequence[object]]
    columns = {"key rank": config.k_ranks, "value rank": config.v_ranks}
    columns |= {"key bits": config.k_bits, "value bits": config.v_bits}
    columns |= {"key segments": config.k_segments, "value segments": config.v_segments}
    columns = {name: cells for name, cells in columns.items() if cells}
    # a latent without segments is in the dtype of the model
    rows = [
        [str(i), *("16 bits" if cell == "" else str(cell) for cell in row)]
        for i, row in enumerate(zip(*columns.values(), strict=True))
    ]
    return _table(("layer", *columns), rows)


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
