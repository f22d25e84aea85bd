"""Quantize the weights of linear layers to int8; activations keep their dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.linear import Projector
from ..models.model import Model


class Int8Linear(Projector):
    """A linear layer whose weight is int8, with one scale in fp32 for each output."""

    scale: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # a row may be all zero
        codes = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if self.few(x):
            return self.by_row(x, self.weight, self.scale, self.bias)
        y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: Model) -> Model:
    """Quantize the weights of every linear layer to int8, in place, and return the model.

    Quantization is symmetric with one fp32 scale per output: its largest absolute weight divided by
    127. So the error of a weight is at most half a scale. The decoders of latents and the embedding
    are not quantized; a head tied to the embedding gets a weight of its own.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear(module))
    return model
