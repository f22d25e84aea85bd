"""Rotary position embedding in GGUF files: from metadata and factors to `rope_parameters`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.rope import frequencies
from .gguf_file import GGUF

FACTORS = {  # tensors that change the rotation's frequencies
    "rope_freqs.weight": "frequencies",
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
ORIGINALS = [2**i for i in range(5, 21)]  # context lengths before an extension, to be tried


def decimal(value: Any) -> Any:
    """The shortest decimal that fp32 rounds to this value: files keep 1e-5 as 9.9999997e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def rope_parameters(
    path: Path, values: dict[str, Any], file: GGUF, sizes: dict[str, Any]
) -> dict[str, Any]:
    """`rope_parameters` of a config, from the metadata and the factors among the tensors.

    values: the metadata of the architecture, without its prefix. sizes: fields of the config.
    Raises ValueError for a scaling that is not supported, or given twice.
    """
    scaling = {
        key.removeprefix("rope.scaling."): value
        for key, value in values.items()
        if key.startswith("rope.scaling.")
    }
    factor = scaling.get("factor") or values.get("rope.scale_linear") or 1.0
    kind = scaling.get("type", "linear")  # llama.cpp's default
    rope = {"rope_type": "default", "rope_theta": decimal(values.get("rope.freq_base", 10_000.0))}
    factors = {
        name: file.tensors[key].read() for key, name in FACTORS.items() if key in file.tensors
    }
    for name, x in factors.items():
        if x.shape != (sizes["head_dim"] // 2,) or not (x.isfinite() & (x > 0)).all():
            raise ValueError(
                f"{path} holds factors of the rotation, {name}, of shape {tuple(x.shape)}: "
                f"expected {sizes['head_dim'] // 2} positive numbers"
            )
    if "frequencies" in factors:
        if kind == "none":
            factor = 1.0
        if len(factors) > 1 or factor != 1.0 or kind == "longrope":
            raise ValueError(
                f"{path} scales its rotation twice, by {kind} and by rope_freqs.weight"
            )
        return _of_factors(factors["frequencies"], rope, sizes)
    if kind == "longrope":
        return rope | _longrope(path, scaling, factors, sizes)
    if factors:
        raise ValueError(f"{path} holds rope_factors_*.weight, but its rope.scaling.type is {kind}")
    if kind == "yarn":
        return rope | _yarn(path, scaling, decimal(factor), sizes)
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{path} has rope.scaling.type = {kind!r}: expected none, linear, yarn or longrope"
        )
    if kind == "none" or factor == 1.0:
        return rope
    return rope | {"rope_type": "linear", "factor": decimal(factor)}


def _yarn(
    path: Path, scaling: dict[str, Any], factor: float, sizes: dict[str, Any]
) -> dict[str, Any]:
    """llama.cpp multiplies YaRN's own factor on cosines by attn_factor."""
    original = scaling.get("original_context_length", sizes["max_position_embeddings"])
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if f"yarn_{name}" in scaling:
            rope[name] = decimal(scaling[f"yarn_{name}"])
    own, times = scaling.get("yarn_attn_factor"), scaling.get("attn_factor")
    if own is not None and (times is not None or own == 1.0):
        raise ValueError(
            f"{path} has rope.scaling.yarn_attn_factor = {own}, which is ambiguous (the factor "
            "itself, or one on it): load the checkpoint that it was made from instead"
        )
    if own is not None:
        rope["attention_factor"] = decimal(own)
    if times is not None and times != 1.0:
        usual = frequencies(rope | {"rope_theta": 10_000.0}, sizes["head_dim"], original)[1]
        rope["attention_factor"] = times * usual
    return rope


def _longrope(
    path: Path, scaling: dict[str, Any], factors: dict[str, Tensor], sizes: dict[str, Any]
) -> dict[str, Any]:
    missing = {"long_factor", "short_factor"} - factors.keys()
    if missing or not {"original_context_length", "attn_factor"} <= scaling.keys():
        raise ValueError(
            f"{path} has rope.scaling.type = longrope: expected rope_factors_long.weight, "
            "rope_factors_short.weight, and rope.scaling.original_context_length and attn_factor"
        )
    return {
        "rope_type": "longrope",
        **{name: x.tolist() for name, x in factors.items()},
        "attention_factor": decimal(scaling["attn_factor"]),
        "original_max_position_embeddings": scaling["original_context_length"],
    }


def _of_factors(factors: Tensor, rope: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """The type of rotation whose frequencies are the default ones divided by `factors`.

    llama.cpp writes Llama 3's scaling so. Its parameters are found by trying; factors that fit
    none are kept as a longrope that does not depend on the length.
    """
    context, width = sizes["max_position_embeddings"], sizes["head_dim"]
    least, most = decimal(factors.min().item()), decimal(factors.max().item())
    if least == most:
        return rope if most == 1.0 else rope | {"rope_type": "linear", "factor": most}
    want = factors.reciprocal()
    plain = frequencies(rope, width, context)[0][0]
    for original in ORIGINALS:
        guess = rope | {
            "rope_type": "llama3",
            "factor": most,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        got = frequencies(guess, width, context)[0][0] / plain
        if torch.allclose(got, want, rtol=0, atol=1e-6):
            return guess
    return rope | {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }
