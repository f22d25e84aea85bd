"""Reading rows of a cache in Triton, packed or not; `layouts.py` says in which chunks."""

import triton
import triton.language as tl

from ..zoo.models.bits import LEVELS
from ..zoo.models.packing import LOWEST

SCALE = tl.constexpr(LOWEST)
MIDDLES = tl.constexpr(tuple(LEVELS.get(bits, 0.0) for bits in range(5)))  # of codes, by bits


# fmt: off
@triton.jit
def begin(ptr, b, batch, latent, head, ROW: tl.constexpr):
    # fmt: on
    """Where a latent of a sequence begins, and its scales. batch, head: strides in elements."""
    if ROW.aligned > 1:
        batch = tl.multiple_of(batch, ROW.aligned)
    ptr, latent = ptr + b * batch, latent.to(tl.int64)
    return ptr + latent * head + latent * ROW.codes, ptr + ROW.scales_at + latent * ROW.scales


@triton.jit
def columns(CHUNK: tl.constexpr, start=0):
    """Which numbers of a latent a chunk holds, and whether they exist; `start` elements further."""
    c = tl.arange(0, CHUNK.size * CHUNK.parts)
    element = CHUNK.start + start + c % CHUNK.size
    return CHUNK.first + c // CHUNK.size * CHUNK.width + element, element < CHUNK.width


@triton.jit
def queries(ptr, rows, there, ROW: tl.constexpr):
    """Rows of queries, as one tensor for every chunk; zeros where `there` is false."""
    parts = tl.tuple(())
    for i in tl.static_range(len(ROW.chunks)):
        column, known = columns(ROW.chunks[i])
        at = (rows * ROW.width)[:, None] + column[None, :]
        parts += (tl.load(ptr + at, mask=there[:, None] & known[None, :], other=0),)
    return parts


@triton.jit
def numbers(ptr, rows, there, ROW: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr, start=0):
    """Numbers of a chunk, `start` elements further, not yet scaled, in TYPE: (rows, size * parts).

    TYPE must be fp32 under the interpreter, which converts integers to bf16 wrongly.
    """
    element = CHUNK.start + start + tl.arange(0, CHUNK.size)
    mask = there[:, None] & (element < CHUNK.width)[None, :]
    if CHUNK.bits == 16:
        to = (ptr + CHUNK.at).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        to += (rows * (ROW.slot // 2))[:, None] + element[None, :]
        x = tl.load(to, mask=mask, other=0).to(TYPE)
    else:
        row = ptr + CHUNK.at + (rows * ROW.slot)[:, None]
        kept = tl.load(row + element[None, :], mask=mask, other=0)
        if CHUNK.parts > 1:
            high = kept
            if CHUNK.bits == 3:
                shift = (element // (CHUNK.width // 2)).to(tl.uint8)
                to = row + CHUNK.width + (element % (CHUNK.width // 2))[None, :]
                high = tl.load(to, mask=mask, other=0) >> shift[None, :]
            x = unpacked(kept, high, CHUNK.bits, CHUNK.parts, TYPE)
        elif CHUNK.bits == 8:
            x = kept.to(tl.int8, bitcast=True).to(TYPE)
        else:
            x = kept.to(TYPE)
    return x


@triton.jit
def unpacked(kept, high, BITS: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """The numbers of bytes (rows, n): (rows, PARTS * n), all of the first part first."""
    x = beside(part(kept, high, 0, BITS, TYPE), part(kept, high, 1, BITS, TYPE))
    if PARTS == 4:
        x = beside(x, beside(part(kept, high, 2, BITS, TYPE), part(kept, high, 3, BITS, TYPE)))
    return x


@triton.jit
def part(kept, high, PART: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Numbers of one part of bytes."""
    code = (kept >> (4 if BITS == 4 else 2) * PART) & (15 if BITS == 4 else 3)
    if BITS == 3:
        code |= ((high >> 2 * PART) & 1) << 2
    return code.to(TYPE) - MIDDLES[BITS]


@triton.jit
def beside(a, b):
    """Two tensors of equal shapes as one, b to the right of a."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def scale_of(ptr, rows, there, ROW: tl.constexpr, CHUNK: tl.constexpr):
    """The scales, in fp32, of the segment of a chunk in some rows."""
    code = tl.load(ptr + rows * ROW.slot + CHUNK.scale, mask=there, other=0)
    return tl.cast((code.to(tl.int32) << 20) + SCALE, tl.float32, bitcast=True)
