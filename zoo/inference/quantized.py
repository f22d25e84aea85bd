"""Quantized checkpoints as a source: their weights are dequantized as they are read.

Weights of 8 bits with one scale per tensor, row, group or block are multiplied by it here, one at
a time. Other formats that transformers can dequantize are left to it, as a whole model.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from ..utils.escape import told

FIELDS = ("quantization_config", "compression_config")  # in config.json; the second is old
SCALED = {"fp8", "fbgemm_fp8"}
SCALED_FORMATS = {"float-quantized", "int-quantized", "naive-quantized"}  # of compressed-tensors
PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
STORED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
SCALES = ("weight_scale_inv", "weight_scale")
UNUSED = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale", "output_scale")

Tensors = Iterator[tuple[str, Tensor]]


def quantization(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of the quantization of the weights; None if they are not quantized.

    Raises ValueError naming a quantization that cannot be undone, or the package it needs.
    """
    found = [raw[name] for name in FIELDS if raw.get(name)]
    if not found:
        return None
    if not isinstance(found[0], dict):
        raise ValueError(f"quantization_config is {found[0]!r}: expected an object")
    method = found[0].get("quant_method") or _bits_of_old(found[0])
    block = found[0].get("weight_block_size")
    if block is not None and not (_is_pair(block) and all(type(x) is int and x > 0 for x in block)):
        raise ValueError(f"weight_block_size is {block!r}: expected two positive integers")
    package = PACKAGES.get(method) if isinstance(method, str) else None
    scaled = _is_scaled(method, found[0])
    if not scaled and package is None:
        raise ValueError(
            f"the weights are quantized by {method!r}, which cannot be undone here: expected "
            f"{', '.join(sorted(SCALED | PACKAGES.keys()))}, or the checkpoint before quantization"
        )
    if not scaled and package and find_spec(package) is None:
        raise ValueError(
            f"the weights are quantized by {method}: pip install {method}, or use the checkpoint "
            "before quantization"
        )
    return found[0] | {"quant_method": method}


def unquantized(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json without what it says of quantization."""
    return {key: value for key, value in raw.items() if key not in FIELDS}


def dequantizer(quantization: dict[str, Any] | None) -> Callable[[Tensors], Tensors] | None:
    """What turns tensors as they are stored into plain ones; None if only transformers can."""
    if quantization is None:
        return iter  # `LayerFiles` knows by it that tensors are what they will be
    if not _is_scaled(quantization["quant_method"], quantization):
        return None
    return lambda tensors: _scaled(tensors, quantization.get("weight_block_size"))


def read_by_transformers(folder: Path, raw: dict[str, Any]) -> Tensors:
    """The tensors of a folder, dequantized by transformers. Raises ValueError if it cannot."""
    packed = (quantization(raw) or {})["quant_method"] == "compressed-tensors"
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True, **options
        )
        model, seen = loaded
        model = model if packed else model.dequantize()
    except Exception as error:  # whatever a quantizer raises
        raise ValueError(
            f"transformers cannot dequantize {folder} ({told(error)}): use the checkpoint before "
            "quantization"
        ) from error
    lost = [key for kind in ("missing_keys", "mismatched_keys") for key in seen[kind]]
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} weights, first {min(map(str, lost))}")
    yield from model.state_dict().items()


def _is_scaled(method: Any, values: dict[str, Any]) -> bool:
    if method == "compressed-tensors":
        return values.get("format") in SCALED_FORMATS and not values.get("transform_config")
    return isinstance(method, str) and method in SCALED


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _bits_of_old(values: dict[str, Any]) -> str | None:
    old = values.get("load_in_4bit") or values.get("load_in_8bit")
    return "bitsandbytes" if old else None


def _scaled(tensors: Tensors, block: Any) -> Tensors:
    """Multiply each weight of 8 bits by its scale; either may come first."""
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for key, tensor in tensors:
        stem, _, kind = key.rpartition(".")
        if kind in UNUSED:
            continue
        if kind in SCALES:
            scales[stem] = tensor
        elif tensor.dtype in STORED:
            weights[stem] = tensor
        else:
            yield key, tensor
        if stem in weights and stem in scales:
            yield f"{stem}.weight", _times(stem, weights.pop(stem), scales.pop(stem), block)
    for stem in weights.keys() | scales.keys():
        lacking = "a scale" if stem in weights else "quantized numbers"
        raise ValueError(f"weight {stem}.weight lacks {lacking}: download the checkpoint again")


def _times(stem: str, weight: Tensor, scale: Tensor, block: Any) -> Tensor:
    """weight (N, M) times scale (), (1,), (N,), (N, 1) or of blocks (n, m), in fp32."""
    if not scale.dtype.is_floating_point or weight.dim() != 2:
        raise ValueError(f"the scale of {stem}.weight is {scale.dtype}: expected floats")
    if scale.numel() == 1:
        return weight.float() * scale.float().reshape(())
    if scale.dim() == 1:
        scale = scale[:, None]
    whole = scale.float()
    for axis in (0, 1):
        size, count = weight.size(axis), scale.size(axis)
        step = block[axis] if block else -(-size // count)
        if -(-size // step) != count or (not block and size % count):
            raise ValueError(
                f"the scale of {stem}.weight has shape {tuple(scale.shape)}, which does not fit "
                f"{tuple(weight.shape)}"
            )
        whole = whole.repeat_interleave(step, axis).narrow(axis, 0, size)
    return weight.float() * whole
