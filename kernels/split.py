"""What the decoding kernels share: reading one split of a sequence, and merging all splits.

A sequence is cut into splits, so that one token of one sequence still fills a GPU (Flash-Decoding,
https://pytorch.org/blog/flash-decoding). Every split has its own online softmax (arXiv 1805.02867),
in base 2. The merge weights the splits by the sums of their softmaxes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layouts import LEAST_ROWS
from .rows import columns, numbers, scale_of

LOG2E = 1.4426950408889634
PROGRAMS = 512  # about four per multiprocessor of an A100 (108), H100 (132) or B200 (148)
TILE_BYTES = 32 << 10  # of keys and values together; a pipelined loop holds several tiles


@triton.jit
def extent(span_ptr, TILE: tl.constexpr):
    """First slot and end (exclusive) of a sequence, and of this program's split."""
    first, end = tl.load(span_ptr).to(tl.int32), tl.load(span_ptr + 1).to(tl.int32)
    start = first // TILE * TILE  # tiles begin at multiples of their size
    share = tl.cdiv(tl.cdiv(end - start, tl.num_programs(1)), TILE) * TILE
    start += tl.program_id(1) * share
    return first, end, start, tl.minimum(start + share, end)


@triton.jit
def load(ptr, rows, there, STRIDE: tl.constexpr, width, SIZE: tl.constexpr):
    """Rows of `width` numbers, padded to SIZE; zeros where `there` is false."""
    column = tl.arange(0, SIZE)
    mask = there[:, None] & (column < width)[None, :]
    return tl.load(ptr + (rows * STRIDE)[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def product(a, b, c, UPCAST: tl.constexpr):
    """c + a @ b, with a cast to the type of b.

    UPCAST is for the interpreter, which multiplies bf16 wrongly: it takes the bits as integers.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")  # the default rounds fp32 to tf32


# fmt: off
@triton.jit
def scores(
    q, ptr, scales, rows, there, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TYPE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """q @ k.T (ROWS, TILE) in fp32, with q in chunks. ptr, scales: those of the first row."""
    s = tl.zeros([ROWS, TILE], tl.float32)
    one = s  # of a segment
    for i in tl.static_range(len(K.chunks)):
        k = tl.trans(numbers(ptr, rows, there, K, K.chunks[i], TYPE))
        if K.chunks[i].scale < 0:
            s = product(q[i], k, s, UPCAST)
        else:
            if K.chunks[i].opens:
                one = tl.zeros([ROWS, TILE], tl.float32)
            one = product(q[i], k, one, UPCAST)
            if K.chunks[i].closes:
                s += one * scale_of(scales, rows, there, K, K.chunks[i])[None, :]
    return s


@triton.jit
def nothing(ROWS: tl.constexpr, V: tl.constexpr):
    """Initial state of a softmax: peak and sum (ROWS,), and values in chunks.

    The peak is finite, because a row may see no slot of a tile, and -inf - -inf is NaN.
    """
    read = tl.tuple(())
    for i in tl.static_range(len(V.chunks)):
        read += (tl.full([ROWS, V.chunks[i].size * V.chunks[i].parts], 0, tl.float32),)
    return tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32), read


# fmt: off
@triton.jit
def attend(
    peak, total, read, s, ptr, scales, rows, there, V: tl.constexpr, TYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # fmt: on
    """The state after one more tile: scores s (ROWS, TILE) in base 2, and its rows of values."""
    top = tl.maximum(peak, tl.max(s, 1))
    p, decay = tl.exp2(s - top[:, None]), tl.exp2(peak - top)
    weight = p
    more = tl.tuple(())
    for i in tl.static_range(len(V.chunks)):
        v = numbers(ptr, rows, there, V, V.chunks[i], TYPE)
        if V.chunks[i].opens and V.chunks[i].scale >= 0:
            weight = p * scale_of(scales, rows, there, V, V.chunks[i])[None, :]
        elif V.chunks[i].opens:
            weight = p
        more += (product(weight, v, read[i] * decay[:, None], UPCAST),)
    return top, total * decay + tl.sum(p, 1), more


@triton.jit
def store(part_ptr, weight_ptr, row, valid, peak, total, read, V: tl.constexpr):
    """Write the result of this split for rows `row` of the output, and the logarithm of its sum."""
    at = row * tl.num_programs(1) + tl.program_id(1)
    some = total > 0
    weight = tl.where(some, peak + tl.log2(total), -float("inf"))
    tl.store(weight_ptr + at, weight, mask=valid)
    for i in tl.static_range(len(V.chunks)):
        column, known = columns(V.chunks[i])
        to = part_ptr + (at * V.width)[:, None] + column[None, :]
        tl.store(to, read[i] / total[:, None], mask=(valid & some)[:, None] & known[None, :])


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
        mask = (w > 0)[:, None] & (column < WIDTH)[None, :]  # an empty split stored no part
        at = part_ptr + (split * WIDTH)[:, None] + column[None, :]
        y += tl.sum(w[:, None] * tl.load(at, mask=mask, other=0.0), 0)
    tl.store(out_ptr + row * WIDTH + column, y / total, mask=column < WIDTH)


def tile_of(numbers: int, itemsize: int, most: int = 128) -> int:
    """Slots per tile, if a slot has `numbers` numbers of `itemsize` bytes; at most `most`."""
    tile = most
    while tile > LEAST_ROWS and tile * numbers * itemsize > TILE_BYTES:
        tile //= 2
    return tile


def splits_of(programs: int, slots: int, tile: int) -> int:
    """The number of splits of `slots` slots; programs: sequences times groups of heads.

    A power of two that depends on shapes only, because only the device knows the length.
    """
    fill = triton.next_power_of_2(triton.cdiv(PROGRAMS, programs))
    longest = triton.next_power_of_2(triton.cdiv(slots, 4 * tile))  # enough tiles to pipeline
    return min(fill, longest, 128)


class Parts:
    """Memory for the results of all splits and for the merged output."""

    def __init__(self, q: Tensor, splits: int, width: int):
        """q: (B, H, T, ...); every row has `splits` parts of `width` numbers."""
        rows = q.shape[:3]
        self.out = q.new_empty(*rows, width)
        self.part = q.new_empty(*rows, splits, width, dtype=torch.float32)
        self.weight = q.new_empty(*rows, splits, dtype=torch.float32)

    def merge(self) -> Tensor:
        """The weighted sum of all parts: (B, H, T, width)."""
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


def per_sequence(x: Tensor | None) -> int:
    """Stride of the first dimension; 0 if all sequences share one row."""
    return 0 if x is None or x.size(0) == 1 else x.stride(0)
