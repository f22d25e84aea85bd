"""Linear layers. Compiled for one token on a CPU, each is one loop that reads every weight once.

There a library's product of a matrix and a row or two stays far from what memory allows; what
torch.compile makes of a product and a sum comes near it (README: Weights).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 2  # from three on, a blocked product is as good


class Linear(nn.Linear):
    """nn.Linear whose weight may be int8, with a scale for every output: see `int8.py`."""

    scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if few(x):
            y = row_by_row(x, self.weight)
        elif self.scale is None:
            return super().forward(x)
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        y = (y if self.scale is None else y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def few(x: Tensor) -> bool:
    """Whether x (B, T, in) is one token of a sequence or two, in a step compiled for a CPU."""
    one = x.dim() == 3 and x.size(1) == 1 and x.size(0) <= ROWS
    return one and x.device.type == "cpu" and torch.compiler.is_compiling()


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, 1, in) times the transposed weight (out, in): (B, 1, out), in fp32.

    Not compiled, it would make the whole product first.
    """
    weight = weight.float()
    return torch.stack([(weight * row.float()).sum(-1)[None] for row in x])
