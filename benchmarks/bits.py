"""Perplexity of caches with fewer numbers, fewer bits, both, and of transformers' quantized cache.

    python benchmarks/bits.py MODEL --calibration FILE --text FILE [--windows 8] [--plot bits.png]

All in memory on one calibration: perplexity on windows of 2048 tokens of the text, and the bytes
per token, scales included, as a share of those at 16 bits a number. Ranks alone, 8 and 4 bits with
the ranks that fit, and both as `compress --kv-bits auto` chooses. transformers' `QuantizedCache`
reads the same windows in parts of 32 tokens; the newest part is not quantized and not counted, and
groups of 64 numbers have a scale and a zero point of 16 bits each. It needs optimum-quanto and is
skipped without it. Prints one line of JSON per cache.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, QuantizedCache
from transformers.utils import is_optimum_quanto_available

from eigenzoo.zoo.compression.compress import compress, gather
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import Checkpoint, load
from eigenzoo.zoo.inference.data import calibration_tokens, encode
from eigenzoo.zoo.inference.perplexity import mean_perplexity, perplexity
from eigenzoo.zoo.inference.texts import read_text
from eigenzoo.zoo.models.config import kv_bytes

WINDOW, PART, GROUP = 2048, 32, 64
CACHES = {  # shares of the bytes by name and bits
    "rank": ((16,), (0.8, 0.6, 0.5, 0.4, 0.3)),
    "8 bits": ((8,), (0.55, 0.407, 0.3, 0.25)),
    "4 bits": ((4,), (0.3, 0.25, 0.2, 0.155, 0.12)),
    "auto": ((16, 8, 4), (0.407, 0.3, 0.25, 0.2, 0.155)),
}


def ours(original: Checkpoint, tokens: Tensor, text: Tensor, windows: int) -> Iterator[dict]:
    """Rows of the caches above."""
    model = original.model
    settings = Settings(refit=(), kv_bits=(16,)).fit(model.config)
    seen = gather(model, tokens, settings)
    for name, (bits, shares) in CACHES.items():
        for keep in shares:
            low = compress(model, tokens, settings._replace(keep=keep, kv_bits=bits), seen).model
            config = low.config
            yield {
                "cache": name,
                "keep": keep,
                "share": kv_bytes(config)["kv_share"],
                "perplexity": perplexity(low, text, WINDOW, windows).perplexity,
                "mean_ranks": [sum(r) / len(r) for r in (config.k_ranks, config.v_ranks)],
                "bits": {b: (config.k_bits + config.v_bits).count(b) for b in bits},
            }


@torch.inference_mode()
def losses(model: PreTrainedModel, row: Tensor, make: Callable[[], QuantizedCache]) -> Tensor:
    """Losses (T - 1,) of the tokens (T,) of a window, read in parts over a transformers cache."""
    cache, logits = make(), []
    for part in row[None, :-1].split(PART, dim=1):
        logits.append(model(part, past_key_values=cache, use_cache=True).logits[0].float())
    return torch.nn.functional.cross_entropy(torch.cat(logits), row[1:], reduction="none")


def theirs(model: PreTrainedModel, text: Tensor, windows: int) -> Iterator[dict[str, Any]]:
    """Rows of transformers' caches."""
    rows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)[:windows]
    if not is_optimum_quanto_available():
        return
    for bits in (4, 2):
        options = {"nbits": bits, "q_group_size": GROUP, "residual_length": PART}
        make = partial(QuantizedCache, "quanto", model.config, **options)
        of_windows = torch.stack([losses(model, row, make) for row in rows])
        yield {
            "cache": "transformers, quanto",
            "share": (bits + 32 / GROUP) / 16,
            "perplexity": mean_perplexity(of_windows).perplexity,
            "bits": {bits: 2 * model.config.num_hidden_layers},
        }


def draw(rows: list[dict[str, Any]], dense: float, path: Path) -> None:
    """Plot the increase of perplexity over the share of bytes, a line for every kind of cache."""
    figure = Figure(figsize=(7, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for name in dict.fromkeys(row["cache"] for row in rows):
        points = sorted((r["share"], r["increase"]) for r in rows if r["cache"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set(xlabel="share of the KV bytes that is kept", ylabel="increase of perplexity, %")
    axes.set_title(f"one model, its cache held in fewer bytes (perplexity {dense:.2f} in 16 bits)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    original = load(args.model)
    tokens = calibration_tokens(
        args.calibration, original.model, original.tokenizer, args.samples, args.seq_len
    )
    text = encode(original.tokenizer, read_text(args.text))
    dense = perplexity(original.model, text, WINDOW, args.windows).perplexity
    print(json.dumps({"cache": "dense", "share": 1.0, "perplexity": dense}), flush=True)
    path = Path(args.model)
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if gguf else path
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    rows = []
    for row in chain(theirs(hf, text, args.windows), ours(original, tokens, text, args.windows)):
        row["increase"] = 100 * (row["perplexity"] / dense - 1)
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.plot:
        draw(rows, dense, args.plot)


if __name__ == "__main__":
    main()
