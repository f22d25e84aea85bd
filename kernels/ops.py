"""The decoding ops as PyTorch knows them: `torch.ops.eigenzoo.*`.

`zoo/models/attention.py` and `zoo/models/linear.py` define what they compute. This file declares
their arguments and the shapes of their results, and needs only torch. `install.py` chooses the
implementation for a device.
"""

import torch
from torch import Tensor

from ..zoo.models.cache import Buffer

SCHEMAS = {
    "latent_decode": (
        "Tensor q, Tensor k, Tensor v, Tensor span, float scale, Tensor? bias=None, "
        "Tensor? slopes=None, Tensor? k_scale=None, Tensor? v_scale=None"
    ),
    "anchored_decode": (
        "Tensor q, Tensor z, Tensor v, Tensor span, float scale, Tensor cos, Tensor sin, "
        "Tensor up, Tensor? mean, int block, Tensor? bias=None, Tensor? position=None, "
        "Tensor? z_scale=None, Tensor? v_scale=None"
    ),
    "rotary_decode": (
        "Tensor q, Tensor z, Tensor v, Tensor span, float scale, Tensor cos, Tensor sin, "
        "Tensor up, Tensor? mean, Tensor? bias=None, Tensor? z_scale=None, Tensor? v_scale=None"
    ),
    "linear_decode": "Tensor x, Tensor weight, Tensor? scale, Tensor? bias",
}


def _check_devices(*arguments: object) -> None:
    devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
    if len(devices) > 1:  # of which one is meta, so this would be taken for the op itself
        raise RuntimeError(f"expected arguments on one device, got {', '.join(sorted(devices))}")


def _shape(q: Tensor, k: Tensor, v: Tensor, *more: object, **named: object) -> Tensor:
    _check_devices(q, k, v, *more, *named.values())
    return q.new_empty(*q.shape[:3], v.size(3) * (2 if v.dtype == torch.uint8 else 1))


def _product(x: Tensor, weight: Tensor, *more: object) -> Tensor:
    _check_devices(x, weight, *more)
    return x.new_empty(*x.shape[:-1], weight.size(0))


for _name, _arguments in SCHEMAS.items():
    torch.library.define(f"eigenzoo::{_name}", f"({_arguments}) -> Tensor")
    torch.library.register_fake(
        f"eigenzoo::{_name}", _product if _name == "linear_decode" else _shape
    )


def _parts(x: Buffer, q: Tensor) -> tuple[Tensor, None]:
    """Numbers as they are; what is packed is unpacked first.

    Not by `isinstance(x, Packed)`: code that comes with a checkpoint has its own `Packed`.
    """
    return (x, None) if isinstance(x, Tensor) else (x.unpack(q.dtype), None)


def latent_decode(
    q: Tensor,
    k: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """The op for `zoo.models.attention.latent_decode`; see there for the arguments."""
    (k, k_scale), (v, v_scale) = _parts(k, q), _parts(v, q)
    return torch.ops.eigenzoo.latent_decode(q, k, v, span, scale, bias, slopes, k_scale, v_scale)


def anchored_decode(
    q: Tensor,
    z: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    up: Tensor,
    mean: Tensor | None,
    block: int,
    bias: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The op for `zoo.models.attention.anchored_decode`; see there for the arguments."""
    (z, z_scale), (v, v_scale) = _parts(z, q), _parts(v, q)
    return torch.ops.eigenzoo.anchored_decode(
        q, z, v, span, scale, cos, sin, up, mean, block, bias, position, z_scale, v_scale
    )


def rotary_decode(
    q: Tensor,
    z: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    up: Tensor,
    mean: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """The op for `zoo.models.attention.rotary_decode`; see there for the arguments."""
    (z, z_scale), (v, v_scale) = _parts(z, q), _parts(v, q)
    return torch.ops.eigenzoo.rotary_decode(
        q, z, v, span, scale, cos, sin, up, mean, bias, z_scale, v_scale
    )


def linear_decode(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The op for `zoo.models.linear.linear_decode`; see there for the arguments. CPUs only."""
    return torch.ops.eigenzoo.linear_decode(x, weight, scale, bias)
