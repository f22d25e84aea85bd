"""Switch a model from the reference ops, in plain PyTorch, to the fused ops."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from ..zoo.models import attention
from ..zoo.models.linear import linear_decode
from ..zoo.models.packing import pack, unpack
from . import cpu, ops

FUSED = {  # definition: fused op
    attention.latent_decode: ops.latent_decode,
    attention.anchored_decode: ops.anchored_decode,
    attention.rotary_decode: ops.rotary_decode,
}
FUSED_ON_CPUS = {attention.lift_heads: ops.lift_heads, pack: ops.pack, unpack: ops.unpack}
DEVICES = ("cpu", "cuda")  # devices with fused ops
AnyModel = TypeVar("AnyModel", bound=nn.Module)


@cache
def register(device: str) -> None:
    """Register the implementations of the ops: C++ for "cpu", Triton for "cuda" (NVIDIA, AMD).

    Raises ValueError for another device, and if the compiler or Triton is missing.
    """
    if device == "cpu":
        cpu.load()
        return
    if device != "cuda":
        raise ValueError(
            f"there are no fused ops for {device}: expected one of {', '.join(DEVICES)}; use the "
            "reference ops on other devices"
        )
    try:
        from . import anchored_decode, latent_decode, rotary_decode
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise ValueError(
            "on a GPU the fused ops need Triton: pip install 'eigenzoo[triton]', or use the "
            "reference ops"
        ) from None
    for kernel in (latent_decode, anchored_decode, rotary_decode):
        name = kernel.__name__.rpartition(".")[2]
        torch.library.impl(f"eigenzoo::{name}", "CUDA", kernel.launch)


def install(model: AnyModel) -> AnyModel:
    """Make every layer of a model decode with the fused ops. On CPUs, prompts are packed by them.

    Returns the model, changed in place; a second call changes nothing. On a CPU, the first call
    compiles the ops, which takes half a minute. Raises ValueError for a device or a dtype (float64)
    that has no fused ops, and if the compiler or Triton is missing.
    """
    if any(p.dtype == torch.float64 for p in model.parameters()):
        remove(model)
        raise ValueError("there are no fused ops for float64: use the reference ops in it")
    devices = {p.device.type for p in model.parameters()} - {"meta"}  # meta: offloaded to disk
    for device in devices:
        register(device)
    rows = _rows(model)
    for module in model.modules():
        for definition, op in FUSED.items():
            if _calls(module, definition):
                setattr(module, op.__name__, op)
        if "cpu" in devices and _calls(module, linear_decode):
            vars(module).update(linear_decode=ops.linear_decode, rows=rows)
        for definition, op in FUSED_ON_CPUS.items():
            if "cpu" in devices and _calls(module, definition):
                setattr(module, op.__name__, op)
    return model


def _rows(model: nn.Module) -> int | None:
    """For up to how many rows `linear_decode` is faster on this CPU; None: for any number.

    As `few_rows` in cpp/tensors.h.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return 8
    return None if {p.element_size() for p in model.parameters()} == {2} else 32


def remove(model: nn.Module) -> None:
    """Make a model decode with the reference ops again."""
    for module in model.modules():
        for definition in (*FUSED, *FUSED_ON_CPUS, linear_decode):
            if _calls(module, definition):
                vars(module).pop(definition.__name__, None)
        if _calls(module, linear_decode):
            vars(module).pop("rows", None)


def _calls(module: nn.Module, definition: Callable[..., Any]) -> bool:
    """Whether a module calls `definition`, or a function of the same name and first arguments.

    Code that comes with a checkpoint has its own copy of a definition, maybe an older one, which
    lacks what was added at the end: ops without that do as it does.
    """
    called = getattr(type(module), definition.__name__, None)
    if called is None:
        return False
    theirs, ours = ([*signature(x).parameters] for x in (called, definition))
    return theirs == ours[: len(theirs)]
