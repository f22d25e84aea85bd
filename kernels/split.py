"""What the decoding kernels share: one split of a sequence, and the merge of all splits.

A sequence is cut into splits, so that one token of one sequence still fills a GPU (Flash-Decoding,
https://pytorch.org/blog/flash-decoding). Every split keeps a softmax of its own (arXiv 1805.02867)
in base 2; the merge weighs the splits by their sums.

A width that is no power of two is read in chunks that are: `tl.arange` knows no other lengths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..zoo.cache import Packed

LOG2E = 1.4426950408889634
LEAST_ROWS = 16  # a matrix instruction takes no fewer
PROGRAMS = 512  # about four for each multiprocessor of an A100 (108), H100 (132) or B200 (148)
TILE_BYTES = 32 << 10  # of keys and values together; a loop holds more than one tile at a time


@triton.jit
def extent(span_ptr, TILE: tl.constexpr):
    """First slot of a sequence, the one behind its last, and the same of this program's split."""
    first, end = tl.load(span_ptr).to(tl.int32), tl.load(span_ptr + 1).to(tl.int32)
    start = first // TILE * TILE  # tiles lie at multiples of their size
    share = tl.cdiv(tl.cdiv(end - start, tl.num_programs(1)), TILE) * TILE
    start += tl.program_id(1) * share
    return first, end, start, tl.minimum(start + share, end)


@triton.jit
def load(ptr, rows, there, STRIDE: tl.constexpr, width, CHUNKS: tl.constexpr):
    """Rows of `width` numbers, a tuple of chunks; zeros where `there` is false."""
    parts, at = tl.tuple(()), 0
    for i in tl.static_range(len(CHUNKS)):
        column = at + tl.arange(0, CHUNKS[i])
        mask = there[:, None] & (column < width)[None, :]
        parts += (tl.load(ptr + (rows * STRIDE)[:, None] + column[None, :], mask=mask, other=0.0),)
        at += CHUNKS[i]
    return parts


@triton.jit
def product(a, b, c, UPCAST: tl.constexpr):
    """c + a @ b, a in the type of b. The interpreter multiplies the bits of bf16: UPCAST there."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")  # else fp32 would become tf32


@triton.jit
def scores(q, k, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr):
    """q @ k.T (ROWS, TILE) in fp32, both in chunks."""
    s = tl.zeros([ROWS, TILE], tl.float32)
    for i in tl.static_range(len(q)):
        s = product(q[i], tl.trans(k[i]), s, UPCAST)
    return s


@triton.jit
def nothing(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """State of a softmax that has read nothing: peak and sum (ROWS,), values in chunks.

    The peak is finite: a row that sees nothing for some tiles must not subtract infinities.
    """
    read = tl.tuple(())
    for i in tl.static_range(len(CHUNKS)):
        read += (tl.zeros([ROWS, CHUNKS[i]], tl.float32),)
    return tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32), read


@triton.jit
def attend(peak, total, read, s, v, UPCAST: tl.constexpr):
    """The state after one more tile: scores s (ROWS, TILE) in base 2, values v in chunks."""
    top = tl.maximum(peak, tl.max(s, 1))
    p, decay = tl.exp2(s - top[:, None]), tl.exp2(peak - top)
    more = tl.tuple(())
    for i in tl.static_range(len(v)):
        more += (product(p, v[i], read[i] * decay[:, None], UPCAST),)
    return top, total * decay + tl.sum(p, 1), more


@triton.jit
def store(part_ptr, weight_ptr, row, valid, peak, total, read, WIDTH: tl.constexpr):
    """What this split read for rows `row` of the output, and the logarithm of its sum."""
    at = row * tl.num_programs(1) + tl.program_id(1)
    some = total > 0
    weight = tl.where(some, peak + tl.log2(total), -float("inf"))
    tl.store(weight_ptr + at, weight, mask=valid)
    column = 0
    for i in tl.static_range(len(read)):
        c = column + tl.arange(0, read[i].shape[1])
        mask = (valid & some)[:, None] & (c < WIDTH)[None, :]
        tl.store(part_ptr + (at * WIDTH)[:, None] + c[None, :], read[i] / total[:, None], mask=mask)
        column += read[i].shape[1]


# fmt: off
@triton.jit
def _merge(
    part_ptr, weight_ptr, out_ptr,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):
    # fmt: on
    row = tl.program_id(0).to(tl.int64)  # SPLITS is a power of two
    weight_ptr += row * SPLITS
    part_ptr += row * SPLITS * WIDTH
    weights = tl.load(weight_ptr + tl.arange(0, SPLITS))
    top = tl.max(weights, 0)
    total = tl.sum(tl.exp2(weights - top), 0)
    column = tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SPLITS, TILE):
        split = start + tl.arange(0, TILE)
        w = tl.exp2(tl.load(weight_ptr + split) - top)
        mask = (w > 0)[:, None] & (column < WIDTH)[None, :]  # an empty split has stored no part
        at = part_ptr + (split * WIDTH)[:, None] + column[None, :]
        y += tl.sum(w[:, None] * tl.load(at, mask=mask, other=0.0), 0)
    tl.store(out_ptr + row * WIDTH + column, y / total, mask=column < WIDTH)


def chunks(width: int, least: int = LEAST_ROWS) -> tuple[int, ...]:
    """One or two powers of two, none below `least`, that cover `width`: 80 is 64 + 16."""
    power = max(least, 1 << (width.bit_length() - 1))
    if width <= power:
        return (power,)
    rest = max(least, triton.next_power_of_2(width - power))
    return (power, rest) if rest < power else (2 * power,)


def tile_of(numbers: int, itemsize: int, most: int = 128) -> int:
    """How many slots one tile has, if a slot has so many numbers."""
    tile = most
    while tile > LEAST_ROWS and tile * numbers * itemsize > TILE_BYTES:
        tile //= 2
    return tile


def splits_of(programs: int, slots: int, tile: int) -> int:
    """Into how many splits to cut `slots`, where one split takes so many programs.

    A power of two, chosen from shapes alone: the length is known to the device only.
    """
    fill = triton.next_power_of_2(triton.cdiv(PROGRAMS, programs))
    longest = triton.next_power_of_2(triton.cdiv(slots, 4 * tile))  # tiles enough to be pipelined
    return min(fill, longest, 128)


class Parts:
    """Room for what every split reads, and for the output of all of them."""

    def __init__(self, q: Tensor, splits: int, width: int):
        """q: (B, H, T, ...), of whose rows each gets `splits` parts of `width` numbers."""
        rows = q.shape[:3]
        self.out = q.new_empty(*rows, width)
        self.part = q.new_empty(*rows, splits, width, dtype=torch.float32)
        self.weight = q.new_empty(*rows, splits, dtype=torch.float32)

    def merge(self) -> Tensor:
        """Weigh the parts of all splits: (B, H, T, width)."""
        splits, width = self.part.shape[3:]
        block = triton.next_power_of_2(width)
        _merge[(self.weight[..., 0].numel(),)](
            *(self.part, self.weight, self.out),
            SPLITS=splits,
            WIDTH=width,
            BLOCK=block,
            TILE=min(splits, 16),
        )
        return self.out


def numbers(x: Tensor, scale: Tensor | None, q: Tensor) -> Tensor:
    """Keys or values as a kernel reads them: the numbers of a latent one behind another.

    Those of a cache lie so; packed ones, with a scale, are unpacked to the dtype of q.
    """
    if scale is not None:
        return Packed(x, scale).unpack(q.dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def per_sequence(x: Tensor | None) -> int:
    """Stride of the first dimension, 0 where one row is meant for every sequence."""
    return 0 if x is None or x.size(0) == 1 else x.stride(0)
