"""Attention of one or a few new tokens over keys that are lifted and rotated while they are read.

A tile of latents is lifted for one kv head. The two halves of the head are separate matrices,
because the rotation combines them. Keys stay in registers. One program reads one split for all
query heads that share both a kv head and a latent of values.
"""

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layouts, split
from .layouts import Row
from .rows import begin, columns, next_tile, numbers, pages, scale_of, tile_at
from .split import attend, extent, load, nothing, product, store

MOST_HELD = 48 << 10  # bytes: a larger lift of a head does not stay in shared memory
LOG2E = tl.constexpr(split.LOG2E)


# fmt: off
@triton.jit
def kernel(
    q_ptr, z_ptr, v_ptr, span_ptr, bias_ptr, cos_ptr, sin_ptr, up_ptr, mean_ptr,
    table_ptr, part_ptr, weight_ptr, scale,
    z_batch, z_head, v_batch, v_head, span_batch, bias_batch, angle_batch, table_batch,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, LIFTED: tl.constexpr, QUERIES: tl.constexpr,
    TOKENS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    HELD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of query heads; see `launch`.

    K_SHARE: groups of a kv head; LIFTED: kv heads of a latent of keys; HALF: half the width of a
    head; D: HALF, padded. The other arguments are those of `latent_decode.kernel`.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    valid = rows < QUERIES
    row = (b * tl.num_programs(0) + group) * QUERIES + rows
    dtype: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    qa = load(q_ptr, row, valid, 2 * HALF, HALF, D)
    qb = load(q_ptr + HALF, row, valid, 2 * HALF, HALF, D)
    kv = group // K_SHARE
    if mean_ptr is not None:
        mean_ptr += kv * 2 * HALF
    up_ptr += (kv // LIFTED) * K.width * LIFTED * 2 * HALF + kv % LIFTED * 2 * HALF
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    if table_ptr is not None:
        table_ptr += b * table_batch
    z_ptr, z_scales = begin(z_ptr, b, z_batch, kv // LIFTED, z_head, low, K)
    v_ptr, v_scales = begin(v_ptr, b, v_batch, group // V_SHARE, v_head, low, V)
    last = end - TOKENS + rows % TOKENS  # the slot of a row's own token

    angle = b * angle_batch + low.to(tl.int64) * HALF
    peak, total, read = nothing(ROWS, V)
    for start in range(low, high, TILE):
        slot = start + column
        there = (slot >= first) & (slot < high)
        page = pages(table_ptr, start, there, K.page, TILE)
        z_at, z_scales_at = tile_at(z_ptr, z_scales, page, z_batch, start, K, TILE)
        v_at, v_scales_at = tile_at(v_ptr, v_scales, page, v_batch, start, V, TILE)
        a, c = lifted(
            z_at, z_scales_at, up_ptr, mean_ptr, column, there,
            K, LIFTED * 2 * HALF, HALF, D, HELD, TILE, dtype, UPCAST,
        )
        cos = load(cos_ptr + angle, column, there, HALF, HALF, D)
        sin = load(sin_ptr + angle, column, there, HALF, HALF, D)
        s = tl.zeros([ROWS, TILE], tl.float32)
        s = product(qa, tl.trans((a * cos - c * sin).to(qa.dtype)), s, UPCAST)
        s = product(qb, tl.trans((c * cos + a * sin).to(qa.dtype)), s, UPCAST) * (scale * LOG2E)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)
            s += bias[None, :] * LOG2E
        s = tl.where(there[None, :] & (slot[None, :] <= last[:, None]), s, -float("inf"))
        peak, total, read = attend(
            peak, total, read, s, v_at, v_scales_at, column, there, V, dtype, UPCAST
        )
        z_ptr, z_scales = next_tile(z_ptr, z_scales, K, TILE)
        v_ptr, v_scales = next_tile(v_ptr, v_scales, V, TILE)
        angle += TILE * HALF
    store(part_ptr, weight_ptr, row, valid, peak, total, read, V)


# fmt: off
@triton.jit
def lifted(
    z, scales, up_ptr, mean_ptr, rows, there,
    K: tl.constexpr, UP_ROW: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    HELD: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Both halves of the keys of a tile, each (TILE, HALF) padded, in fp32.

    With HELD, the lift fits in shared memory: the loop over its rows is unrolled, so that the
    compiler can load the lift once, before the loop over tiles. Without, every tile reads it again.
    """
    a = tl.full([TILE, D], 0, tl.float32)
    c = tl.full([TILE, D], 0, tl.float32)
    for i in tl.static_range(len(K.chunks)):
        a, c = lifted_segment(
            a, c, z, scales, up_ptr, rows, there,
            K, K.chunks[i], UP_ROW, HALF, D, HELD, TYPE, UPCAST,
        )
    if mean_ptr is not None:
        d = tl.arange(0, D)
        a += tl.load(mean_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        c += tl.load(mean_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    return a, c


@triton.jit
def lifted_segment(
    a, c, z, scales, up_ptr, rows, there, K: tl.constexpr, CHUNK: tl.constexpr,
    UP_ROW: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
    TYPE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Halves a and c of the keys, plus the share of a segment of the latents."""
    width: tl.constexpr = CHUNK.width
    size: tl.constexpr = CHUNK.size
    if HELD:
        for r in tl.static_range(0, width, size):
            a, c = lifted_more(
                a, c, r, z, scales, up_ptr, rows, there, K, CHUNK, UP_ROW, HALF, D, TYPE, UPCAST
            )
    else:
        for r in range(0, width, size):
            a, c = lifted_more(
                a, c, r, z, scales, up_ptr, rows, there, K, CHUNK, UP_ROW, HALF, D, TYPE, UPCAST
            )
    return a, c


@triton.jit
def lifted_more(
    a, c, r, z, scales, up_ptr, rows, there, K: tl.constexpr, CHUNK: tl.constexpr,
    UP_ROW: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # fmt: on
    """Halves a and c of the keys, plus the share of a chunk of the latents that begins at r."""
    x = numbers(z, rows, there, K, CHUNK, TYPE, r)
    if CHUNK.scale >= 0:  # with up to 4 bits the product is exact in bf16
        x *= scale_of(scales, rows, there, K, CHUNK).to(TYPE)[:, None]
    at, known = columns(CHUNK, r)
    a = product(x, load(up_ptr, at, known, UP_ROW, HALF, D), a, UPCAST)
    c = product(x, load(up_ptr + HALF, at, known, UP_ROW, HALF, D), c, UPCAST)
    return a, c


def launch(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    span: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    up: Tensor,
    mean: Tensor | None,
    bias: Tensor | None = None,
    z_layout: Sequence[int] | None = None,
    v_layout: Sequence[int] | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Run `zoo.models.attention.rotary_decode` in Triton; see there for the arguments.

    Layouts: see `latent_decode.launch`.
    """
    batch, heads, tokens, d = q.shape
    keys = layouts.cache(z, z_layout, q, table=table, loop=True)
    values = layouts.cache(v, v_layout, q, layouts.LEAST_VALUES, table=table)
    lifted = up.size(2) // d  # kv heads of a latent
    shared = gcd(heads // (keys.heads * lifted), heads // values.heads)  # query heads of one group
    groups, rows = heads // shared, (keys.row, values.row)
    shape = constants(shared, tokens, *rows, d, q.element_size(), bool(torch.version.hip))
    splits = split.splits_of(batch * groups, keys.slots, shape["TILE"])
    parts = split.Parts(q, splits, values.row.width)
    mean = None if mean is None else mean.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    kernel[(groups, splits, batch)](
        *(q.contiguous(), keys.x, values.x, span.contiguous(), bias, cos, sin),
        *(up.contiguous(), mean, table, parts.part, parts.weight, scale),
        *(*keys.strides, *values.strides),
        *(split.per_sequence(span), split.per_sequence(bias), split.per_sequence(cos)),
        split.per_sequence(table),
        K_SHARE=groups // (keys.heads * lifted),
        V_SHARE=groups // values.heads,
        LIFTED=lifted,
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int, tokens: int, k: Row, v: Row, head_dim: int, itemsize: int, amd: bool
) -> dict:
    """Constants of the kernel that depend on shapes only; `aot.py` uses them too.

    amd: do not hold the lift, because AMD's compiler would hold it in registers.
    """
    queries, half = shared * tokens, max(layouts.LEAST_ROWS, triton.next_power_of_2(head_dim // 2))
    padded = sum(triton.cdiv(c.width, c.size) * c.size * c.parts for c in k.chunks)
    return {
        "QUERIES": queries,
        "TOKENS": tokens,
        "K": k,
        "V": v,
        "HALF": head_dim // 2,
        "D": half,
        "HELD": padded * 2 * half * itemsize <= MOST_HELD and not amd,
        "ROWS": max(layouts.LEAST_ROWS, triton.next_power_of_2(queries)),
        "TILE": split.tile_of(k.width + v.width, itemsize, most=32),
        "num_warps": 4,
        "num_stages": 2,
    }
