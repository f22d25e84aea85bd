"""The README.md of a compressed checkpoint: what was measured, and how to use it."""

from typing import Any

from ..zoo.basis import METHODS
from ..zoo.model import Config


def card(config: Config, compression: dict[str, Any]) -> str:
    """Markdown with the Hub's metadata. Every number comes from `compression` or `config`."""
    c = compression
    base = c["base_model"]
    meta = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base.count("/") == 1:  # a Hub id; of a local model only the name is kept
        meta.append(f"base_model: {base}")
    meta += ["tags:", "- eigenzoo", "- kv-cache", "- low-rank"]
    evaluated = c.get("evaluation")
    rows = [
        ("KV numbers per token", f"{config.dense_kv_width}", f"{config.kv_width}"),
        ("KV share", "1.000", f"{config.kv_width / config.dense_kv_width:.3f}"),
    ]
    if evaluated:
        rows.append(
            (
                f"perplexity ({evaluated['tokens']} tokens of {evaluated['text']})",
                f"{evaluated['dense']:.3f}",
                f"{evaluated['compressed']:.3f}",
            )
        )
    table = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in rows)
    ranks = "\n".join(
        f"| {i} | {k} | {v} |"
        for i, (k, v) in enumerate(zip(config.k_ranks, config.v_ranks, strict=True))
    )
    header = "\n".join(meta)
    made = "Made from the weights alone, without calibration."
    if text := c["calibration"]:
        made = f"Calibrated on {text['tokens']} tokens ({text['source']}), seed {c['seed']}."
        if parts := c.get("refit"):  # older checkpoints do not say
            made += f" Refitted to them after the solve: {', '.join(parts)}."
    latents = (
        f"{config.k_heads_per_latent} kv heads share a key latent, "
        f"{config.v_heads_per_latent} a value latent."
    )
    if config.joint_kv:
        latents = (
            f"One latent holds keys and values of {config.k_heads_per_latent} kv heads; its rank "
            "stands under keys."
        )
    cost = "Queries read the latents directly: no key is rebuilt."
    if config.rotary:
        cost = (
            "Compressed keys are lifted and rotated when they are read, which costs time at "
            "decoding."
        )
        if config.anchor > 1:
            cost = (
                f"Keys are anchored: one query reads each block of {config.anchor} cached tokens."
            )
        if config.pairs:
            cost = "Latents of keys are cached rotated: queries read them directly."
    if not any(config.compressed(i)[0] for i in range(config.num_hidden_layers)):
        cost = "Keys are whole: only values are compressed."
    refined = "".join(
        f"Refined for {run['best_step']} steps on {run['calibration']['source']} text: KL to the "
        f"original {run['kl_before']:.4g} -> {run['kl_after']:.4g} nats per token, held out.\n"
        for run in c.get("refined", [])
    )
    return f"""---
{header}
---

# {base.split("/")[-1]}, KV cache compressed

Made by eigenzoo {c["versions"]["eigenzoo"]} from `{base}`: {METHODS[c["method"]].source}.
The cache holds low-rank latents of keys and values and is that much smaller wherever it lives.

| | original | compressed |
|---|---|---|
{table}

{made}
{refined}
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

{latents}

| layer | key rank | value rank |
|---|---|---|
{ranks}

## Limits

Keys and values differ in width, so FlashAttention 2 and paged caches do not apply. {cost}
"""
