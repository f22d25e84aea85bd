"""Switch a model from the attention that defines decoding to the fused ops."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from ..zoo.models import attention
from ..zoo.models.linear import linear_decode
from . import cpu, ops

FUSED = {  # what defines an op, and the op
    attention.latent_decode: ops.latent_decode,
    attention.anchored_decode: ops.anchored_decode,
    attention.rotary_decode: ops.rotary_decode,
}
LINEAR_ROWS = 8  # of linear layers; a library's product is as good for more
DEVICES = ("cpu", "cuda")  # for which there are fused ops
AnyModel = TypeVar("AnyModel", bound=nn.Module)


@cache
def register(device: str) -> None:
    """Give the ops what runs on a kind of device: C++ for the CPU, Triton for NVIDIA's and AMD's.

    Raises ValueError where there is nothing for it, or a compiler or Triton is missing.
    """
    if device == "cpu":
        cpu.load()
        return
    if device != "cuda":
        raise ValueError(
            f"there are no fused ops for {device}: expected one of {', '.join(DEVICES)}, or leave "
            "the reference ops"
        )
    try:
        from . import anchored_decode, latent_decode, rotary_decode
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise ValueError(
            "on a GPU the fused ops need Triton: pip install 'eigenzoo[triton]', or leave the "
            "reference ops"
        ) from None
    for kernel in (latent_decode, anchored_decode, rotary_decode):
        name = kernel.__name__.rpartition(".")[2]
        torch.library.impl(f"eigenzoo::{name}", "CUDA", kernel.launch)


def install(model: AnyModel) -> AnyModel:
    """Let every layer of a model decode by the fused ops; prompts go the way they went.

    Returns the model. A second time changes nothing. On a CPU the ops are built when they are
    wanted first, which takes half a minute. Raises ValueError as `register` does.
    """
    devices = {p.device.type for p in model.parameters()} - {"meta"}  # those stay on disk
    for device in devices:
        register(device)
    for module in model.modules():
        for definition, op in FUSED.items():
            if _calls(module, definition):
                setattr(module, op.__name__, op)
        if "cpu" in devices and _calls(module, linear_decode):
            vars(module).update(linear_decode=ops.linear_decode, rows=LINEAR_ROWS)
    return model


def _calls(module: nn.Module, definition: Callable[..., Any]) -> bool:
    """Whether a module calls `definition`, or what has its name and arguments in a checkpoint.

    The classes that come with a checkpoint have functions of their own, maybe of another version.
    """
    found = getattr(type(module), definition.__name__, None)
    return found is not None and [*signature(found).parameters] == [
        *signature(definition).parameters
    ]
