"""Switch a model from the attention that defines decoding to the fused ops."""

from typing import TypeVar

import torch

from ..zoo import attention
from ..zoo.model import Model
from . import ops

FUSED = {  # what defines an op, and the op
    attention.latent_decode: ops.latent_decode,
    attention.anchored_decode: ops.anchored_decode,
    attention.rotary_decode: ops.rotary_decode,
}
AnyModel = TypeVar("AnyModel", bound=Model)


def register_cpu() -> None:
    """On the CPU an op is its definition."""
    for definition, op in FUSED.items():
        torch.library.impl(f"eigenzoo::{op.__name__}", "CPU", definition)


def register_cuda() -> None:
    """On a GPU, NVIDIA's or AMD's, an op is a Triton kernel. Raises ValueError without Triton."""
    try:
        from . import anchored_decode, latent_decode, rotary_decode
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise ValueError(
            "on a GPU the fused ops need Triton: pip install 'eigenzoo[triton]'"
        ) from None
    for kernel in (latent_decode, anchored_decode, rotary_decode):
        name = kernel.__name__.rpartition(".")[2]
        torch.library.impl(f"eigenzoo::{name}", "CUDA", kernel.launch)


def install(model: AnyModel) -> AnyModel:
    """Let every layer of a model decode by the fused ops; prompts go the way they went.

    Returns the model. A second time changes nothing.
    """
    for layer in model.layers:
        for definition, op in FUSED.items():
            if getattr(type(layer.attn), definition.__name__, None) is definition:
                setattr(layer.attn, op.__name__, op)
    return model


register_cpu()
if torch.cuda.is_available():
    register_cuda()
