"""Observe what a model computes before its logits."""

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eigenzoo.zoo.models.model import Model


def outputs(model, x, name: str) -> torch.Tensor:
    """Queries, keys or values of layer 1 for tokens x, one row per token, in fp64."""
    seen = []
    source = model.layers[1].attn.source(name.removesuffix("_proj"))
    hook = source.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def made(low: Model, slots: int) -> list[torch.Size]:
    """Shapes of all tensors that a decoding step creates, with a cache of `slots` slots."""
    cache = low.new_cache(1, slots)
    low(tiny.tokens(1, 30), torch.arange(30), cache)
    stored = {x.untyped_storage().data_ptr() for x in cache.keys + cache.values}
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in stored:
                    shapes.append(x.shape)
            return out

    with Watch():
        low(tiny.tokens(1, 1), torch.tensor([30]), cache)
    return shapes
