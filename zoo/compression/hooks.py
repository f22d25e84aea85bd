"""Hooks that feed what the projections of attention give, and its gradients, to statistics."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.model import Model
from ..models.rope import rotate
from .moments import Lengths, Moments, Statistics

# for `k` and for `v` of a layer: the lengths of rows, and of gradients
LayerLengths = dict[str, tuple[Lengths, Lengths]]


def moments_of(s: Statistics, name: str) -> list[Any]:
    """The moments of `k` or of `v`: rows, gradients, and both weighted."""
    return [getattr(s, name + end) for end in ("", "_grad", "_weighted", "_grad_weighted")]


class _Feed:
    """Adds rows, and their gradients, to moments once all parts of a row are here."""

    def __init__(self, layer: Statistics, lengths: LayerLengths, name: str, parts: int):
        self.x, self.grad, self.x_weighted, self.grad_weighted = moments_of(layer, name)
        self.lengths: Any = lengths.get(name)
        self.parts = parts
        self.held: dict[int, Tensor] = {}
        self.last: Any = None

    def put(self, part: int, x: Tensor) -> None:
        """Take in one part of the rows, (..., blocks * width / parts)."""
        if (rows := self._whole(part, x)) is not None:
            self.x.add(rows)
            self.last = rows if self.x_weighted else None

    def put_grad(self, part: int, grad: Tensor) -> None:
        """Take in one part of the gradients of the rows that came last."""
        if (grads := self._whole(part, grad)) is None:
            return
        if self.grad:
            self.grad.add(grads)
        if self.x_weighted:
            of_rows, of_grads = self.lengths
            self.x_weighted.add(self.last, of_grads.of(grads))
            self.grad_weighted.add(grads, of_rows.of(self.last))
            self.last = None

    @property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return bool(self.grad or self.x_weighted)

    def _whole(self, part: int, x: Tensor) -> Tensor | None:
        self.held[part] = x.detach().unflatten(-1, (len(self.x.gram), -1))
        if len(self.held) < self.parts:
            return None
        rows = [self.held.pop(i) for i in range(self.parts)]
        return (torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]).flatten(-2)


@contextmanager
def feeding(
    model: Model,
    blocks: Sequence[Any],
    layers: Sequence[Statistics],
    lengths: Sequence[LayerLengths],
    anchor: int,
) -> Iterator[None]:
    """While this is open, what `blocks` compute goes to `layers`, one `Statistics` a block.

    lengths: what weighted sums are weighted by, one a block; empty where nothing is weighted.
    anchor: as in `calibrate`. Only gradients of activations, and of weights where `layers` have
    moments for them, are computed; all flags are as before afterwards.
    """

    def same(x: Tensor) -> Tensor:
        return x

    @cache  # the same for all sequences, and for layers with the same window
    def angles(length: int, window: int) -> Any:
        return model.offset(torch.arange(length, device=model.device)[None], anchor, window)

    def turned(window: int, x: Tensor) -> Tensor:  # keys, and their gradients alike
        heads = x.detach().unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
        return rotate(heads, *angles(x.size(1), window)).transpose(1, 2).flatten(2)

    def feed(to: _Feed, part: int = 0, change: Callable = same):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            to.put(part, change(out))
            if to.backward:
                out.register_hook(lambda grad: to.put_grad(part, change(grad)))

        return hook

    def queries(to: Moments):
        return lambda module, args, out: to.add(out)

    def taken(moments: Moments) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            if weight.grad is not None:
                moments.add(weight.grad[..., None])
            weight.grad = None  # freed before the next layer's is made

        return hook

    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    hooks = []
    for block, s, of_layer in zip(blocks, layers, lengths, strict=True):
        parts = 2 if s.v is None else 1
        k = _Feed(s, of_layer, "k", parts)
        v = k if s.v is None else _Feed(s, of_layer, "v", 1)
        attn = block.attn
        keys = feed(k, change=partial(turned, attn.window) if anchor > 1 else same)
        hooks.append(attn.source("k").register_forward_hook(keys))
        hooks.append(attn.source("v").register_forward_hook(feed(v, parts - 1)))
        if s.q is not None:
            hooks.append(attn.source("q").register_forward_hook(queries(s.q)))
        for weight, moments in (
            (attn.k_proj.weight, s.k_weight),
            (attn.v_proj.weight, s.v_weight),
        ):
            if moments is not None:
                weight.requires_grad_(True)
                hooks.append(weight.register_post_accumulate_grad_hook(taken(moments)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
