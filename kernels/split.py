"""What the decoding kernels share: reading one split of a sequence, and merging all splits.

A sequence is cut into splits, so that one token of one sequence still fills a GPU (Flash-Decoding,
https://pytorch.org/blog/flash-decoding). Every split has its own online softmax (arXiv 1805.02867),
in base 2. The merge weights the splits by the sums of their softmaxes.

`tl.arange` takes powers of two only, so other widths are read in chunks. A byte that holds two
4-bit numbers has one from each half of a row (`zoo.models.cache.Packed`): chunks of the first half
come before those of the second, in queries and outputs too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..zoo.models.bits import LEVELS

LOG2E = 1.4426950408889634
MIDDLE = tl.constexpr(LEVELS[4])  # 4-bit code n stands for n - MIDDLE
LEAST_ROWS = 16  # the fewest rows of a matrix instruction
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


# fmt: off
@triton.jit
def load(
    ptr, rows, there, STRIDE: tl.constexpr, width, CHUNKS: tl.constexpr, HALVES: tl.constexpr = 1
):
    # fmt: on
    """Rows of HALVES * `width` numbers, as a tuple of chunks; zeros where `there` is false."""
    parts = tl.tuple(())
    for half in tl.static_range(HALVES):
        at = 0
        for i in tl.static_range(len(CHUNKS)):
            column = at + tl.arange(0, CHUNKS[i])
            mask = there[:, None] & (column < width)[None, :]
            row = ptr + half * width + (rows * STRIDE)[:, None]
            parts += (tl.load(row + column[None, :], mask=mask, other=0),)
            at += CHUNKS[i]
    return parts


# fmt: off
@triton.jit
def cached(
    ptr, rows, there, STRIDE: tl.constexpr, width, CHUNKS: tl.constexpr, TYPE: tl.constexpr
):
    # fmt: on
    """Rows of a cache as numbers of TYPE, not yet scaled; `width`: elements of the cache per row.

    TYPE must be fp32 under the interpreter, which converts integers to bf16 wrongly.
    """
    kept = load(ptr, rows, there, STRIDE, width, CHUNKS)
    parts = tl.tuple(())
    if ptr.dtype.element_ty == tl.uint8:
        for shift in tl.static_range(0, 8, 4):
            for i in tl.static_range(len(CHUNKS)):
                parts += (((kept[i] >> shift) & 15).to(TYPE) - MIDDLE,)
    else:
        for i in tl.static_range(len(CHUNKS)):
            parts += (kept[i].to(TYPE),)
    return parts


@triton.jit
def scaled(x, scale_ptr, rows, there, STRIDE: tl.constexpr):
    """x (ROWS, TILE) times the scales of the slots of a tile, if the cache has scales."""
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + rows * STRIDE, mask=there, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def product(a, b, c, UPCAST: tl.constexpr):
    """c + a @ b, with a cast to the type of b.

    UPCAST is for the interpreter, which multiplies bf16 wrongly: it takes the bits as integers.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")  # the default rounds fp32 to tf32


@triton.jit
def scores(q, k, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr):
    """q @ k.T (ROWS, TILE) in fp32, with q and k in chunks."""
    s = tl.zeros([ROWS, TILE], tl.float32)
    for i in tl.static_range(len(q)):
        s = product(q[i], tl.trans(k[i]), s, UPCAST)
    return s


@triton.jit
def nothing(ROWS: tl.constexpr, CHUNKS: tl.constexpr, HALVES: tl.constexpr):
    """Initial state of a softmax: peak and sum (ROWS,), and values in chunks.

    The peak is finite, because a row may see no slot of a tile, and -inf - -inf is NaN.
    """
    read = tl.tuple(())
    for i in tl.static_range(HALVES * len(CHUNKS)):
        read += (tl.full([ROWS, CHUNKS[i % len(CHUNKS)]], 0, tl.float32),)
    return tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32), read


# fmt: off
@triton.jit
def attend(
    peak, total, read, s, v, scale_ptr, rows, there, STRIDE: tl.constexpr, UPCAST: tl.constexpr
):
    # fmt: on
    """The state after one more tile: scores s (ROWS, TILE) in base 2, and values v in chunks."""
    top = tl.maximum(peak, tl.max(s, 1))
    p, decay = tl.exp2(s - top[:, None]), tl.exp2(peak - top)
    weight = scaled(p, scale_ptr, rows, there, STRIDE)
    more = tl.tuple(())
    for i in tl.static_range(len(v)):
        more += (product(weight, v[i], read[i] * decay[:, None], UPCAST),)
    return top, total * decay + tl.sum(p, 1), more


# fmt: off
@triton.jit
def store(
    part_ptr, weight_ptr, row, valid, peak, total, read, WIDTH: tl.constexpr, HALVES: tl.constexpr
):
    # fmt: on
    """Write the result of this split for rows `row` of the output, and the logarithm of its sum."""
    at = row * tl.num_programs(1) + tl.program_id(1)
    some = total > 0
    weight = tl.where(some, peak + tl.log2(total), -float("inf"))
    tl.store(weight_ptr + at, weight, mask=valid)
    for half in tl.static_range(HALVES):
        column = 0
        for i in tl.static_range(len(read) // HALVES):
            part = read[half * (len(read) // HALVES) + i]
            c = column + tl.arange(0, part.shape[1])
            mask = (valid & some)[:, None] & (c < WIDTH // HALVES)[None, :]
            to = part_ptr + half * (WIDTH // HALVES) + (at * WIDTH)[:, None]
            tl.store(to + c[None, :], part / total[:, None], mask=mask)
            column += part.shape[1]


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


def chunks(width: int, least: int = LEAST_ROWS) -> tuple[int, ...]:
    """One or two powers of two, at least `least` each, that cover `width`: 64 + 16 for 80."""
    power = max(least, 1 << (width.bit_length() - 1))
    if width <= power:
        return (power,)
    rest = max(least, triton.next_power_of_2(width - power))
    return (power, rest) if rest < power else (2 * power,)


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


def adjacent(x: Tensor) -> Tensor:
    """Keys or values with contiguous latents; those of a cache are returned as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def halves(x: Tensor) -> int:
    """Numbers per element of a cache: 2 for bytes of two 4-bit numbers, else 1."""
    return 2 if x.dtype == torch.uint8 else 1


def strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides of scales (B, heads, S, 1): from one sequence, head and slot to the next."""
    return (0, 0, 1) if scale is None else scale.stride()[:3]


def per_sequence(x: Tensor | None) -> int:
    """Stride of the first dimension; 0 if all sequences share one row."""
    return 0 if x is None or x.size(0) == 1 else x.stride(0)
