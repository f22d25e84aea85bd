"""Quantize the weights of linear layers to int8; activations keep their dtype."""

import torch
from torch import nn

from ..models.linear import Linear
from ..models.model import Model


@torch.no_grad()
def quantize(model: Model) -> Model:
    """Quantize the weights of every linear layer to int8, in place, and return the model.

    Quantization is symmetric with one fp32 scale per output: its largest absolute weight divided by
    127. So the error of a weight is at most half a scale. The decoders of latents and the embedding
    are not quantized; a head tied to the embedding gets a weight of its own.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            weight = module.weight.float()
            module.scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # a row may be all zero
            codes = (weight / module.scale[:, None]).round().to(torch.int8)
            module.weight = nn.Parameter(codes, requires_grad=False)
    return model
