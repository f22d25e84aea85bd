"""Weights of linear layers in int8, activations as they are."""

import torch
from torch import nn

from ..models.linear import Linear
from ..models.model import Model


@torch.no_grad()
def quantize(model: Model) -> Model:
    """Put the weights of every linear layer in int8, in place, and return the model.

    Symmetric, with an fp32 scale for every output: its largest weight divided by 127, so that no
    weight is off by more than half a scale. The lifts of attention and the embedding stay as they
    are; a head that shared the embedding's weight gets one of its own.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            weight = module.weight.float()
            module.scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # a row may be all zero
            whole = (weight / module.scale[:, None]).round().to(torch.int8)
            module.weight = nn.Parameter(whole, requires_grad=False)
    return model
