"""Decode speed of an uncompressed and a compressed model, beside what memory allows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from statistics import median
from typing import Any

import torch
from torch import nn

from .allocate import Ranks
from .compress import Settings
from .evaluate import decode_speed
from .families import new_model
from .fold import low_config
from .generate import Generator
from .llama import LlamaConfig
from .model import Config, Model
from .mpt import MPTConfig
from .opt import OPTConfig


def _sizes(vocab: int, width: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
    }


def _opt(width: int, layers: int, heads: int) -> Config:
    return OPTConfig(
        **_sizes(50272, width, layers, heads, heads),
        tie_word_embeddings=True,
        query_bias=True,
        key_bias=True,
        value_bias=True,
        output_bias=True,
        ffn_dim=4 * width,
        word_embed_proj_dim=width,
    )


def _mpt(width: int, layers: int, heads: int) -> Config:
    sizes = _sizes(50432, width, layers, heads, heads)
    return MPTConfig(**sizes, tie_word_embeddings=True, ffn_hidden_size=4 * width)


def _llama(width: int, layers: int, heads: int, kv: int, hidden: int, vocab: int) -> Config:
    return LlamaConfig(**_sizes(vocab, width, layers, heads, kv), intermediate_size=hidden)


SHAPES = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "mpt-7b": _mpt(4096, 32, 32),
    "mpt-30b": _mpt(7168, 48, 64),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256),
}


def shaped(name: str, layers: int | None, context: int) -> Config:
    """The config of a published model, cut to `layers`, that can read `context` tokens.

    Raises ValueError for a name that is not in `SHAPES`.
    """
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown: expected one of {', '.join(SHAPES)}")
    config = SHAPES[name]
    if layers is not None and not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}: expected 1 to {config.num_hidden_layers}")
    longest = max(context, config.max_position_embeddings)
    layers = layers or config.num_hidden_layers
    return replace(
        config,
        num_hidden_layers=layers,
        max_position_embeddings=longest,
        k_ranks=(),
        v_ranks=(),
    )


def uniform(config: Config, settings: Settings) -> Config:
    """The config of the same model with one rank everywhere, which keeps at most `settings.keep`.

    settings: fitted to the config; of the method only the shape of its latents counts. Raises
    ValueError where so little cannot be kept.
    """
    shared, keep = settings.heads_per_latent or (1, 1), settings.keep
    shares, step = (keep, keep), settings.rank_multiple
    if settings.keys == "full":
        shares = 1.0, 2 * keep - 1
        if keep <= 0.5:
            raise ValueError(f"keep is {keep}: keys that stay full are half of it, expected more")
    if settings.keys == "pairs":
        step = lcm(step, 2)
    low = partial(low_config, config, heads_per_latent=shared, joint=settings.latent == "joint-kv")
    full = low(Ranks((), ())).full_ranks
    ranks = [int(share * n) // step * step for share, n in zip(shares, full, strict=True)]
    k, v = ((rank,) * config.num_hidden_layers for rank in ranks)
    return low(Ranks(k, v), **settings.rotary(config))


def random_model(config: Config, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Model:
    """A model of random weights: its speed is that of a trained one."""
    with torch.device("meta"):
        model = new_model(config).to(dtype)
    model.to_empty(device=device)
    random = torch.Generator(device).manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02, generator=random)
    for b in model.buffers():
        b.zero_()  # any frequencies will do
    if config.tie_word_embeddings:
        model.head.weight = model.embed.weight
    model.reset_buffers()
    return model.eval().requires_grad_(False)


def read_bandwidth(device: torch.device, size: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes per second at which a sum reads memory."""
    x = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        x.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return size / median(times[1:])


def weight_bytes(model: Model) -> int:
    """Bytes of weights that a decoding step reads: all but the tables it looks up."""
    looked_up = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    looked_up.discard(model.head.weight)
    return sum(p.nbytes for p in model.parameters() if p not in looked_up)


def bench(
    models: Mapping[str, Model],
    contexts: Sequence[int],
    batch: int = 1,
    steps: int = 16,
    rounds: int = 3,
    compile: bool = True,
) -> list[dict[str, Any]]:
    """Decode steps at the end of every context, the models interleaved; medians.

    The first of `models` is what the others are compared with. One row a context and model:
    seconds per step, the floor (bytes read at the measured bandwidth), `kv_read_share`: KV bytes
    in all bytes read, `speedup` over the first model, and `speedup_of_bytes`: what fewer bytes
    alone would give.
    """
    bandwidth = read_bandwidth(next(iter(models.values())).device)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        generators = [Generator(m, batch, context, compile, False) for m in models.values()]
        speeds = decode_speed(generators, steps, rounds)
        first: dict[str, Any] | None = None
        for (name, model), generator, speed in zip(models.items(), generators, speeds, strict=True):
            weights, kv = weight_bytes(model), generator.cache.nbytes
            row: dict[str, Any] = {
                "model": name,
                "context": context,
                "batch": batch,
                "tokens_per_second": speed,
                "seconds_per_step": batch / speed,
                "floor_seconds": (weights + kv) / bandwidth,
                "weight_bytes_read": weights,
                "kv_bytes_read": kv,
                "kv_read_share": kv / (weights + kv),
                "bandwidth": bandwidth,
            }
            first = first or row
            row["speedup"] = first["seconds_per_step"] / row["seconds_per_step"]
            row["speedup_of_bytes"] = first["floor_seconds"] / row["floor_seconds"]
            rows.append(row)
    return rows
