"""The decoding ops as PyTorch knows them: `torch.ops.eigenzoo.*`.

`attention.py`, `linear.py` and `packing.py` in zoo/models define what they compute. This file
declares their arguments and the shapes of their results, and needs only torch. `install.py` chooses
the implementation for a device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..zoo.models.bits import Segment
from ..zoo.models.cache import Buffer
from ..zoo.models.packing import Latent, Packed

READ: dict[str, list[int]] = {}  # layouts that were read
SCHEMAS = {
    "latent_decode": (
        "Tensor q, Tensor k, Tensor v, Tensor span, float scale, Tensor? bias=None, "
        "Tensor? slopes=None, int[]? k_layout=None, int[]? v_layout=None, Tensor? table=None"
    ),
    "anchored_decode": (
        "Tensor q, Tensor z, Tensor v, Tensor span, float scale, Tensor cos, Tensor sin, "
        "Tensor up, Tensor? mean, int block, Tensor? bias=None, Tensor? position=None, "
        "int[]? z_layout=None, int[]? v_layout=None, Tensor? table=None"
    ),
    "rotary_decode": (
        "Tensor q, Tensor z, Tensor v, Tensor span, float scale, Tensor cos, Tensor sin, "
        "Tensor up, Tensor? mean, Tensor? bias=None, int[]? z_layout=None, int[]? v_layout=None, "
        "Tensor? table=None"
    ),
    "linear_decode": "Tensor x, Tensor weight, Tensor? scale, Tensor? bias",
    "lift_heads": "Tensor y, Tensor up, int head_dim",
    "pack": "Tensor x, int[] layout",
    "unpack": "Tensor rows, int[] layout, ScalarType dtype",
}


def _check_devices(*arguments: object) -> None:
    devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
    if len(devices) > 1:  # of which one is meta, so this would be taken for the op itself
        raise RuntimeError(f"expected arguments on one device, got {', '.join(sorted(devices))}")


def _attended(op: str) -> Callable[..., Tensor]:
    """What an op of attention returns, without its numbers."""
    names = [part.split("=")[0].split()[-1] for part in SCHEMAS[op].split(", ")]

    def shape(*arguments: object, **named: object) -> Tensor:
        _check_devices(*arguments, *named.values())
        given: dict[str, Any] = dict(zip(names, arguments, strict=False)) | named
        layout, q = given.get("v_layout"), given["q"]
        width = given["v"].size(3) if layout is None else sum(layout[1::2])
        return q.new_empty(*q.shape[:3], width)

    return shape


def _product(x: Tensor, weight: Tensor, *more: object) -> Tensor:
    _check_devices(x, weight, *more)
    return x.new_empty(*x.shape[:-1], weight.size(0))


def _rows(x: Tensor, layout: list[int]) -> Tensor:
    nbytes = latent_of(layout).nbytes(x.dtype)
    return x.new_empty(x.size(0), x.size(2), nbytes, dtype=torch.uint8)


def _numbers_of(rows: Tensor, layout: list[int], dtype: torch.dtype) -> Tensor:
    latent = latent_of(layout)
    return rows.new_empty(rows.size(0), latent.heads, rows.size(1), latent.width, dtype=dtype)


def _lifted(y: Tensor, up: Tensor, head_dim: int) -> Tensor:
    _check_devices(y, up)
    return y.new_empty(*y.shape[:3], head_dim)


SHAPES: dict[str, Callable[..., Tensor]] = {
    "linear_decode": _product,
    "lift_heads": _lifted,
    "pack": _rows,
    "unpack": _numbers_of,
}
for _name, _arguments in SCHEMAS.items():
    torch.library.define(f"eigenzoo::{_name}", f"({_arguments}) -> Tensor")
    torch.library.register_fake(f"eigenzoo::{_name}", SHAPES.get(_name) or _attended(_name))


def _parts(x: Buffer, q: Tensor) -> tuple[Tensor, list[int] | None]:
    """What the ops read, and the layout of its rows: heads, then width and bits of each segment.

    Not by `isinstance(x, Packed)`: code that comes with a checkpoint has its own `Packed`. An older
    one holds no rows, and is unpacked first.
    """
    if isinstance(x, Tensor):
        return x, None
    if not hasattr(x, "rows"):
        return x.unpack(q.dtype), None
    return x.rows, _read(x.layout)


def latent_of(layout: Sequence[int]) -> Latent:
    """The latent of a layout as the ops take it: heads, then width and bits of each segment."""
    heads, *pairs = layout
    segments = tuple(Segment(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True))
    return Latent(heads, sum(s.width for s in segments), segments)


def _numbers(latent: Latent) -> list[int]:
    return [latent.heads, *(number for s in latent.segments for number in s)]


def _read(layout: str) -> list[int]:
    """The numbers of a layout that is a text. Compiled code reads it once, and takes no cache."""
    known = {} if torch.compiler.is_compiling() else READ
    if layout not in known:
        known[layout] = _numbers(Latent.of_layout(layout))
    return known[layout]


def latent_decode(
    q: Tensor,
    k: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """The op for `zoo.models.attention.latent_decode`; see there for the arguments."""
    (k, k_layout), (v, v_layout) = _parts(k, q), _parts(v, q)
    return torch.ops.eigenzoo.latent_decode(
        q, k, v, span, scale, bias, slopes, k_layout, v_layout, table
    )


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
    table: Tensor | None = None,
) -> Tensor:
    """The op for `zoo.models.attention.anchored_decode`; see there for the arguments."""
    (z, z_layout), (v, v_layout) = _parts(z, q), _parts(v, q)
    return torch.ops.eigenzoo.anchored_decode(
        q, z, v, span, scale, cos, sin, up, mean, block, bias, position, z_layout, v_layout, table
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
    table: Tensor | None = None,
) -> Tensor:
    """The op for `zoo.models.attention.rotary_decode`; see there for the arguments."""
    (z, z_layout), (v, v_layout) = _parts(z, q), _parts(v, q)
    return torch.ops.eigenzoo.rotary_decode(
        q, z, v, span, scale, cos, sin, up, mean, bias, z_layout, v_layout, table
    )


def linear_decode(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The op for `zoo.models.linear.linear_decode`; see there for the arguments. CPUs only."""
    return torch.ops.eigenzoo.linear_decode(x, weight, scale, bias)


def lift_heads(y: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """The op for `zoo.models.attention.lift_heads`; see there for the arguments. CPUs only."""
    return torch.ops.eigenzoo.lift_heads(y, up, head_dim)


def pack(x: Tensor, latent: Latent) -> Packed:
    """The op for `zoo.models.packing.pack`; see there for the arguments. CPUs only."""
    return Packed(torch.ops.eigenzoo.pack(x, _numbers(latent)), latent.layout)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The op for `zoo.models.packing.unpack`; see there for the arguments. CPUs only."""
    return torch.ops.eigenzoo.unpack(packed.rows, _read(packed.layout), dtype)
