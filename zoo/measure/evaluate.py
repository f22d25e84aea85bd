"""What a model costs and what it is worth: perplexity, bytes of cache, decode speed."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..inference.generate import Generator, answer
from ..inference.perplexity import perplexity
from ..models.config import kv_bytes
from ..models.model import Model


def decode_speed(generators: Sequence[Generator], steps: int = 32, rounds: int = 3) -> list[float]:
    """Median tokens per second of each, decoding at the end of its cache; rounds interleave."""
    times: list[list[float]] = [[] for _ in generators]
    for _ in range(rounds):
        for generator, seconds in zip(generators, times, strict=True):
            token = torch.zeros(generator.batch, 1, dtype=torch.long, device=generator.valid.device)
            first = generator.slots - steps
            generator.advance(token, first)  # compiles, and warms up
            for slot in range(first, generator.slots):
                start = time.perf_counter()
                generator.advance(token, slot)[0, 0].item()  # waits for the device
                seconds.append(time.perf_counter() - start)
    return [g.batch / median(s) for g, s in zip(generators, times, strict=True)]


def compare(
    models: Mapping[str, Model],
    tokens: Tensor,
    windows: int,
    context: int,
    prompt: Sequence[int],
    stop: Sequence[int],
    compile: bool = True,
) -> dict[str, dict[str, Any]]:
    """Perplexity, bytes, an answer to `prompt` and decode speed of each model.

    Perplexity takes `windows` windows of 1024 of `tokens`; the cache has `context` slots.
    """
    generators = [Generator(m, 1, context, compile, False) for m in models.values()]
    rows: dict[str, dict[str, Any]] = {}
    for (name, model), generator in zip(models.items(), generators, strict=True):
        new = min(48, context - len(prompt))
        (tokens_of_answer,), *_ = answer(generator, [prompt], new, stop=stop)
        quality = perplexity(model, tokens, 1024, windows)
        rows[name] = (
            quality._asdict() | kv_bytes(model.config, model.dtype) | {"answer": tokens_of_answer}
        )
        rows[name]["cache_bytes"] = generator.cache.nbytes
    for row, speed in zip(rows.values(), decode_speed(generators), strict=True):
        row["decode_tokens_per_second"] = speed
    return rows
