"""How a kernel reads the row of a token: in chunks whose widths are powers of two.

`zoo/models/packing.py` defines the rows. A byte of 4 bits holds two numbers, and one of 3 or 2 bits
four: one of each half or quarter of its segment. A chunk of such bytes is unpacked to the numbers
of the first part, then those of the second, and so on. Queries and outputs follow that order.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..zoo.models.bits import Segment
from ..zoo.models.packing import ALIGN, Latent
from .ops import latent_of

LEAST_ROWS = 16  # the fewest rows of a matrix instruction
LEAST_VALUES = 32  # the fewest numbers of a chunk of values: 8 for each of four warps
AS_IS = 0  # in place of bits: numbers in the dtype of the cache
PARTS = {4: 2, 3: 4, 2: 4}  # numbers of a byte; the high bits of 3 are apart


class Chunk(NamedTuple):
    """Adjacent elements of a segment: bytes of codes, or numbers of 16 bits or `AS_IS`.

    start, size: of the chunk, in elements; width: elements of the segment without the high bits of
    3; first: its first number; at: its first byte; scale: the index of its scale, or -1; opens,
    closes: whether the chunk is the first, and the last, of its segment; whole: whether all of its
    elements exist.
    """

    bits: int
    parts: int
    start: int
    size: int
    width: int
    first: int
    at: int
    scale: int
    opens: bool
    closes: bool
    whole: bool


class Row(NamedTuple):
    """The layout of keys or of values in a cache.

    width: numbers of a latent; slot: elements from one slot to the next; codes: bytes of a latent;
    scales_at, scales: the first scale and the number of scales of a latent; aligned: whether
    ALIGN divides the stride from one sequence to the next; ptx: whether instructions of
    NVIDIA's GPUs unpack it, to bf16; held: whether `rows.held` is used there; page: slots of a
    page, which are there in place of sequences, or 0.
    """

    chunks: tuple[Chunk, ...]
    width: int
    slot: int
    codes: int = 0
    scales_at: int = 0
    scales: int = 0
    aligned: bool = False
    ptx: bool = False
    held: bool = True
    page: int = 0


class Cache(NamedTuple):
    """Keys or values as a kernel takes them.

    strides: from one sequence or page to the next, and from one latent to the next if it is not
    packed; slots: of a sequence.
    """

    x: Tensor
    heads: int
    row: Row
    strides: tuple[int, ...]
    slots: int


def powers(width: int, least: int = LEAST_ROWS) -> tuple[int, ...]:
    """One or two powers of two, at least `least` each, that cover `width`: 64 + 16 for 80."""
    power = max(least, 1 << (width.bit_length() - 1))
    if width <= power:
        return (power,)
    rest = max(least, triton.next_power_of_2(width - power))
    return (power, rest) if rest < power else (2 * power,)


def cache(
    x: Tensor,
    layout: Sequence[int] | None,
    q: Tensor,
    least: int = LEAST_ROWS,
    loop: bool = False,
    table: Tensor | None = None,
) -> Cache:
    """What a kernel reads of keys or values: (B, S, bytes) with a layout, or (B, L, S, R).

    q: the queries; layout, least, loop: see `row`; table: of pages, see the definitions. A cache of
    latents that are not contiguous is copied. Raises ValueError for pages of a size
    that no tile fits, and for numbers of 16 bits at odd addresses, which no GPU reads.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    ptx = q.is_cuda and q.dtype == torch.bfloat16 and not torch.version.hip
    page = 0 if table is None else x.size(-2)
    if page % LEAST_ROWS:
        raise ValueError(f"pages have {page} slots: expected a multiple of {LEAST_ROWS}")
    slots = x.size(-2) if table is None else page * table.size(1)
    if layout is None:
        kept = row(None, x.size(3), x.stride(2), least, loop)._replace(page=page)
        return Cache(x, x.size(1), kept, x.stride()[:2], slots)
    if 16 in layout[2::2] and any(n % 2 for n in (x.data_ptr(), *x.stride()[:2])):
        raise ValueError(
            f"rows of {x.size(2)} bytes with strides {x.stride()} hold numbers of 16 bits at odd "
            "addresses: expected an even start and even strides; copy the rows"
        )
    packed = row(tuple(layout), 0, x.stride(1), least, loop)
    packed = packed._replace(aligned=x.stride(0) % ALIGN == 0, ptx=ptx, page=page)
    return Cache(x, layout[0], packed, (x.stride(0), 0), slots)


@lru_cache
def row(
    layout: tuple[int, ...] | None,
    width: int,
    slot: int,
    least: int = LEAST_ROWS,
    loop: bool = False,
) -> Row:
    """The row of a layout: of heads, then widths and bits of segments; None if it is not packed.

    width: numbers of a latent that is not packed; slot: elements from one slot to the next; least:
    the fewest numbers of a chunk; loop: a segment has one chunk, of 32 or 64 numbers, and the
    kernel reads it again and again.
    """
    latent = latent_of(layout) if layout else Latent(1, width, ())
    chunks: list[Chunk] = []
    at = first = scales = 0
    for segment in latent.segments or (Segment(width, AS_IS),):
        packed = segment.bits not in (AS_IS, 16)
        chunks += _chunks(segment, at, first, scales if packed else -1, least, loop)
        at, first, scales = at + segment.nbytes, first + segment.width, scales + packed
    codes = latent.code_bytes
    return Row(tuple(chunks), first, slot, codes, latent.heads * codes, latent.scales)


def _chunks(
    segment: Segment, at: int, first: int, scale: int, least: int, loop: bool
) -> list[Chunk]:
    parts = PARTS.get(segment.bits, 1)
    width = segment.width // parts
    sizes = powers(width, least // parts)
    if loop:  # chunks of equal size: as wide as wastes little
        padded = -(-segment.width // LEAST_ROWS) * LEAST_ROWS
        sizes = (max(32, gcd(padded, 64)) // parts,)
    ends = (0, *sizes)
    return [
        Chunk(
            *(
                segment.bits,
                parts,
                ends[i],
                n,
                width,
                first,
                at,
                scale,
                i == 0,
                n == sizes[-1],
                width % n == 0 if loop else ends[i] + n <= width,
            )
        )
        for i, n in enumerate(sizes)
    ]
