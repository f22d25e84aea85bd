"""Linear layers. For one token of a few sequences on a CPU, each is one loop over its weights.

There a library's product of a matrix and a row or two stays far from what memory allows; what
torch.compile makes of a product and a sum comes nearer, and the fused op there (README: Weights).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 2  # compiled: from three on, a blocked product is as good


def linear_decode(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (B, 1, in) -> (B, 1, out), row by row. Not compiled, it would make the whole product first.

    weight: (out, in) in x's dtype, or in int8 with a `scale` (out,) in fp32; sums are fp32.
    """
    y = torch.stack([(weight.float() * row.float()).sum(-1)[None] for row in x])
    y = (y if scale is None else y * scale).to(x.dtype)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear whose weight may be int8, with a scale for every output: see `int8.py`."""

    scale: Tensor | None
    linear_decode: Callable[..., Tensor] = staticmethod(linear_decode)
    rows = ROWS  # that `linear_decode` is for

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
        """Whether x (B, T, in) is one token of a few sequences, for `linear_decode` on a CPU."""
        one = x.dim() == 3 and x.size(1) == 1 and x.size(0) <= self.rows
        ready = self.linear_decode is not linear_decode or torch.compiler.is_compiling()
        return one and x.device.type == "cpu" and ready
