"""Rotary position embedding (RoPE; RoFormer, arXiv 2104.09864), with halves as in Llama.

Frequencies follow transformers' `modeling_rope_utils.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDED = {  # fields by type, beside rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}
TYPES = tuple(NEEDED)
NUMBERS = {  # fields that are numbers, which are larger than these
    **dict.fromkeys(("rope_theta", "original_max_position_embeddings"), 1.0),
    **dict.fromkeys(("factor", "attention_factor", "beta_fast", "beta_slow"), 0.0),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "partial_rotary_factor"), 0.0),
    **dict.fromkeys(("mscale", "mscale_all_dim"), -1.0),
}


def check_rope(rope: Mapping[str, Any], head_dim: int) -> None:
    """Raise ValueError naming what is absent from `rope_parameters`, or is not a number."""
    kind = rope.get("rope_type", "default")
    needed = NEEDED.get(kind, ()) if isinstance(kind, str) else ()
    missing = [name for name in ("rope_theta", *needed) if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters of type {kind!r} lack {', '.join(missing)}")
    for name, least in NUMBERS.items():
        if rope.get(name) is not None and not _above(least, rope[name]):
            raise ValueError(f"{name} of rope_parameters is {rope[name]!r}: expected over {least}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("low_freq_factor of rope_parameters: expected less than high_freq_factor")
    for name in needed[1:] if kind == "longrope" else ():
        factors = rope[name]
        right = isinstance(factors, list | tuple) and len(factors) == head_dim // 2
        if not right or not all(_above(0.0, x) for x in factors):
            raise ValueError(
                f"{name} of rope_parameters: expected {head_dim // 2} positive numbers"
            )


def _above(least: float, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least < value < math.inf


def frequencies(rope: Mapping[str, Any], head_dim: int, context: int) -> tuple[Tensor, float]:
    """Inverse frequencies, and the factor on cosines and sines.

    rope: `rope_parameters` of a config. context: the model's `max_position_embeddings`. Returns
    (N, head_dim / 2) in fp32, in radians per position, and the factor. N is 1, or 2 for longrope:
    one row for short and one for long sequences; see `at_length`. Raises ValueError for a type not
    in `TYPES`, and for a rotation of only a part of the head.
    """
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported: expected one of {', '.join(TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        part = rope["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor {part} is not supported: expected 1")
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


def steady_length(rope: Mapping[str, Any], context: int) -> int | None:
    """The length of a text up to which angles do not depend on it; None: they never do."""
    lengths = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": context}
    return lengths.get(rope.get("rope_type", "default"))


def at_length(inv_freq: Tensor, rope: Mapping[str, Any], context: int, newest: Tensor) -> Tensor:
    """Inverse frequencies (head_dim / 2,) for a text, of which the positions `newest` are new.

    inv_freq: as `frequencies` returns it. Dynamic: by how much the text exceeds the context, the
    slowest frequency falls and the fastest stays (NTK by length).
    """
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        short = rope["original_max_position_embeddings"]
        return torch.where(newest.max() >= short, inv_freq[1], inv_freq[0])
    if kind == "dynamic":
        excess = ((newest.max() + 1) / context - 1).clamp(min=0)
        power = torch.linspace(0, 1, inv_freq.size(1), device=inv_freq.device)
        return inv_freq[0] / (1 + rope["factor"] * excess) ** power
    return inv_freq[0]


def _llama3(inv_freq: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate between."""
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / rope["factor"])


def _yarn(
    inv_freq: Tensor, rope: Mapping[str, Any], head_dim: int, context: int
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): divide low frequencies by `factor`, keep high ones, ramp between."""
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or context / original

    def dimension(turns: float) -> float:  # which dimension makes so many turns in `original`
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
    """LongRoPE (arXiv 2402.13753): one factor per dimension, for short and for long sequences."""
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or context / original
    stretch = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (stretch * rope["rope_theta"] ** exponent), scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, D) by angles with cosines and sines (..., T, D / 2); computes in fp32."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
