"""Time and memory of calibration, compared with the forward and backward passes that it needs.

    python benchmarks/calibration.py MODEL [--method fisher] [--samples 24] [--seq-len 1024]

Half of the bare passes run before `calibrate` and half after it, on the same tokens of Python's own
help, so that a machine that becomes busier slows both. Peak memory is counted above the loaded
model. Linux only: it alone can reset the peak of a process.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eigenzoo.zoo.compression.compress import gather
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.python_texts import python_help
from eigenzoo.zoo.models.model import Model


def passes(model: Model, tokens: torch.Tensor) -> None:
    """Forward and backward over tokens (N, T), one sequence at a time, to activations only."""
    hook = model.embed.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    with torch.enable_grad():
        for row in tokens:
            loss = F.cross_entropy(model(row[None, :-1])[0].float(), row[1:], reduction="sum")
            loss.backward()
    hook.remove()


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at the peak since `measured` began (`VmHWM`)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measured(work: Callable[..., Any], *args: Any) -> tuple[Any, float, float, int]:
    """The result of `work`, its seconds, its processor seconds, and the peak of memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(*args)
    return result, time.perf_counter() - wall, time.process_time() - cpu, resident("VmHWM")


def cost(model: Model, tokens: torch.Tensor, method: str) -> dict[str, float]:
    """Ratios of time, MiB at the peak above the loaded model, and MiB of the sums."""
    settings = Settings(method, kv_bits=(16,)).fit(model.config)
    half, base = len(tokens) // 2, resident()
    _, *before = measured(passes, model, tokens[:half])
    layers, wall, cpu, peak = measured(gather, model, tokens, settings)
    _, *after = measured(passes, model, tokens[half:])
    sums = [x.nbytes for layer in layers for m in layer.moments.values() for x in vars(m).values()]
    return {
        "seconds": wall,
        "passes_seconds": before[0] + after[0],
        "ratio": wall / (before[0] + after[0]),
        "ratio_of_processor_time": cpu / (before[1] + after[1]),
        "peak_mib": (peak - base) / 2**20,
        # of the passes before it: during those after it, the sums are in memory too
        "passes_peak_mib": (before[2] - base) / 2**20,
        "sums_mib": sum(sums) / 2**20,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--method", default="fisher", help="one that takes gradients")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=1024)
    asked = parser.parse_args()
    model, tokenizer, *_ = load(asked.model, torch.float32)
    words = encode(tokenizer, python_help(held_out=False))[: asked.samples * asked.seq_len]
    passes(model, words[None, :64])  # warms up
    print(json.dumps(cost(model, words.view(asked.samples, -1), asked.method), indent=1))
