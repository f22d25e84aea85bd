"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the halves convention of Llama.

Frequencies follow the definitions of transformers' `modeling_rope_utils.py`, so that a checkpoint
means the same here and there.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def frequencies(rope: Mapping[str, Any], head_dim: int, context: int) -> tuple[Tensor, float]:
    """Inverse frequencies and the factor on cos and sin, for one `rope_parameters` of a config.

    Returns (N, head_dim / 2) in fp32, radians per position, and the factor. N is 1, or 2 for
    longrope: one row for short and one for long sequences. `context` is the model's
    `max_position_embeddings`. Raises ValueError for a type that is not in `TYPES`.
    """
    kind = rope.get("rope_type", "default")
    if kind not in TYPES:
        raise ValueError(
            f"rope_type {kind!r} is not supported: expected one of {', '.join(TYPES)}. "
            + ("Its angles change with the length." if kind == "dynamic" else "")
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported for Llama")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / rope["rope_theta"] ** exponent
    if kind == "linear":
        return (inv_freq / rope["factor"])[None], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, rope)[None], 1.0
    if kind == "yarn":
        return _yarn(inv_freq, rope, head_dim, context)
    if kind == "longrope":
        return _longrope(rope, exponent, context)
    return inv_freq[None], 1.0


def _llama3(inv_freq: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long wavelengths slowed by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / rope["factor"])


def _yarn(
    inv_freq: Tensor, rope: Mapping[str, Any], head_dim: int, context: int
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, ramp between."""
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or context / original

    def dimension(turns: float) -> float:  # the dimension that turns so often within `original`
        ratio = math.log(original / (turns * 2 * math.pi))
        return head_dim * ratio / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2) - low) / (high - low if high != low else 1e-3)
    slow = ramp.clamp(0, 1)

    def temperature(weight: Any) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        both = mscale and all_dim
        scale = temperature(mscale) / temperature(all_dim) if both else temperature(1.0)
    return (inv_freq / factor * slow + inv_freq * (1 - slow))[None], scale


def _longrope(rope: Mapping[str, Any], exponent: Tensor, context: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): one searched factor per dimension, for short and for long."""
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or context / original
    stretch = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (stretch * rope["rope_theta"] ** exponent), scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., T, D) by the angles whose cosines and sines are (..., T, D / 2), in fp32."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
