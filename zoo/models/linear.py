"""Linear layers, and their product with one token of a few sequences on a CPU.

That product is bound by memory bandwidth, of which a library's matrix product uses only a part. The
loop that torch.compile generates from a product and a sum uses more, and the fused op most.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 2  # for more rows, the library's product is as fast as the compiled loop


def linear_decode(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (B, 1, in) -> (B, 1, out), row by row. Compile it: eager, it stores all products first.

    weight: (out, in) in x's dtype, or in int8 with a `scale` (out,) in fp32; sums are in fp32.
    """
    y = torch.stack([(weight.float() * row.float()).sum(-1)[None] for row in x])
    y = (y if scale is None else y * scale).to(x.dtype)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear whose weight may be int8 with one scale per output: see `inference/int8.py`."""

    scale: Tensor | None
    linear_decode: Callable[..., Tensor] = staticmethod(linear_decode)
    rows = ROWS  # `linear_decode` is used for up to so many rows

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if self.few(x):
            return self.linear_decode(x, self.weight, self.scale, self.bias)
        if self.scale is None:
            return super().forward(x)
        y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def few(self, x: Tensor) -> bool:
        """Whether `linear_decode` is used: x (B, T, in) is one token of few sequences on a CPU."""
        one = x.dim() == 3 and x.size(1) == 1 and x.size(0) <= self.rows
        ready = self.linear_decode is not linear_decode or torch.compiler.is_compiling()
        return one and x.device.type == "cpu" and ready
