"""Products with linear layers, which are faster for a few tokens on a CPU.

Such a product is bound by memory bandwidth, of which a library's matrix product uses only a part.
The loop that torch.compile generates from a product and a sum uses more, and the fused op most.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

ROWS = 2  # for more rows, the library's product is as fast as the compiled loop
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_decode(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (B, 1, in) -> (B, 1, out), row by row. Compile it: eager, it stores all products first.

    weight: (out, in) in x's dtype, or in int8 with a `scale` (out,) in fp32; sums are in fp32.
    """
    y = torch.stack([(weight.float() * row.float()).sum(-1)[None] for row in x])
    y = (y if scale is None else y * scale).to(x.dtype)
    return y if bias is None else y + bias


class Projector(nn.Module):
    """Base class of modules that multiply by linear layers, which they call through `linear`.

    The layers are nn.Linear itself: quantizers, adapters and hooks pass over its subclasses.
    """

    linear_decode: Callable[..., Tensor] = staticmethod(linear_decode)
    rows: int | None = ROWS  # `linear_decode` is used for up to so many rows; None: for any number

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x), by `linear_decode` if nothing has replaced, wrapped or quantized the layer."""
        if type(layer) is nn.Linear and self.few(x) and _untouched(layer):
            weight, bias = layer.weight, layer.bias
            if _plain(x, weight, bias):
                return self.by_row(x, weight, None, bias)
        return layer(x)

    def by_row(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """`linear_decode` of the tokens of x (B, T, in): (B, T, out)."""
        rows = x.flatten(0, 1)[:, None]
        return self.linear_decode(rows, weight, scale, bias).view(*x.shape[:2], -1)

    def few(self, x: Tensor) -> bool:
        """Whether `linear_decode` is used: x (B, T, in) is few tokens on a CPU."""
        if x.dim() != 3 or x.device.type != "cpu":
            return False
        if _learns(x):
            return False  # the fused op has no gradient
        if self.rows is None:
            return True
        count = x.size(0) * x.size(1)  # where it is symbolic, a condition would be a guard
        ready = self.linear_decode is not linear_decode or torch.compiler.is_compiling()
        return ready and statically_known_true(count <= self.rows) and count > 0


def _untouched(layer: nn.Linear) -> bool:
    """Whether calling the layer runs the `forward` of its class and nothing else."""
    return not (
        "forward" in vars(layer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are no tensor subclasses, and as `linear_decode` expects them."""
    return x.dtype in DTYPES and all(
        type(t) in (Tensor, nn.Parameter)
        and t.dtype == x.dtype
        and t.device == x.device
        and t.layout is torch.strided
        and not _learns(t)
        and t.stride(-1) == 1
        for t in (x, weight, *(() if bias is None else (bias,)))
    )
