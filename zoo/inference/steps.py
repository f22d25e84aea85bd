"""The steps that generation runs and compiles: prefill, and decoding one token per sequence."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from ..models.cache import LayerCache, StaticCache
from ..models.mask import decode_mask
from ..models.model import Model


def prefill(
    model: Model, tokens: Tensor, past: Tensor, cache: StaticCache, valid: Tensor | None
) -> Tensor:
    """Process tokens (B, T) of a prompt; logits (B, vocabulary) of the last one.

    past: (n,), where n slots precede the tokens; its values do not matter. It is a tensor because
    torch.compile would compile a number into the graph. valid: as in `Model.forward`. Slots after
    the tokens are not read.
    """
    end = past.size(0) + tokens.size(1)
    valid = None if valid is None else valid[:, :end]
    return model(tokens, None, cache.first(end), valid, last=1)[:, -1]


def decode_step(
    model: Model, tokens: Tensor, pos: Tensor, cache: StaticCache, valid: Tensor | None
) -> Tensor:
    """Process tokens (B, 1) at slot pos (1,); logits (B, vocabulary)."""
    return model(tokens, pos, cache, valid, last=1)[:, -1]


def decode_by_layer(
    model: Model, tokens: Tensor, pos: Tensor, cache: StaticCache, valid: Tensor | None
) -> Tensor:
    """As `decode_step`, in a form that torch.compile compiles once per kind of layer."""
    return _by_layer(model, cache, *model.begin(tokens, pos, cache, valid))[:, -1]


def verify_by_layer(model: Model, tokens: Tensor, pos: Tensor, cache: StaticCache) -> Tensor:
    """Process a few tokens (1, T) at slots pos (T,), as decoding does; logits (T, vocabulary)."""
    return _by_layer(model, cache, *model.begin(tokens, pos, cache, mask=decode_mask(pos)))[0]


def _by_layer(model: Model, cache: StaticCache, x: Tensor, pos: Tensor, metadata: Any) -> Tensor:
    for i, layer in enumerate(model.layers):
        x = layer_step(layer, x, pos, metadata, cache.layer(i))
    return model.linear(model.head, model.finish(x))


# all layers of equal shapes share one compiled region; the number of kinds is not limited
@torch.compiler.nested_compile_region(max_reuse_entries=sys.maxsize)
def layer_step(
    layer: nn.Module, x: Tensor, pos: Tensor, attn_metadata: Any, cache: LayerCache
) -> Tensor:
    """A layer's forward pass, which torch.compile compiles once per kind of layer."""
    return layer(x, pos, attn_metadata, cache)


def check_compiler() -> None:
    """Raise ValueError if torch.compile would not find a C++ compiler for the CPU."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "torch.compile needs a C++ compiler, and there is none: install g++ or clang, or pass "
            "--no-compile"
        ) from None


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process, including reads from its cache."""
    return calculate_time_spent()["total_wall_time"]
