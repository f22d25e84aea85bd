"""Attention of one or a few new tokens over latents that queries read directly.

A program reads one split for all query heads that share both a latent of keys and a latent of
values: these heads are the rows of one matrix product. If keys and values are shared by different
numbers of heads, several programs read the latent that more heads share. They are adjacent in the
grid, so that they find it in the L2 cache.
"""

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layouts, split
from .layouts import Row
from .rows import begin, next_tile, pages, queries, tile_at
from .split import attend, extent, nothing, scores, store

MOST_NARROW = 256  # numbers of keys and values
LOG2E = tl.constexpr(split.LOG2E)


# fmt: off
@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, bias_ptr, slopes_ptr, table_ptr,
    part_ptr, weight_ptr, scale,
    k_batch, k_head, v_batch, v_head, span_batch, bias_batch, table_batch,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of query heads; see `launch`.

    K_SHARE, V_SHARE: groups that share a latent; QUERIES: heads of a group times TOKENS; K, V:
    `layouts.Row`; ROWS: QUERIES, padded.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    valid = rows < QUERIES
    row = (b * tl.num_programs(0) + group) * QUERIES + rows
    dtype: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    q = queries(q_ptr, row, valid, K)
    if slopes_ptr is not None:
        head = (group * QUERIES + rows) // TOKENS
        slope = tl.load(slopes_ptr + head, mask=valid, other=0.0).to(tl.float32)[:, None]
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    if table_ptr is not None:
        table_ptr += b * table_batch
    k_ptr, k_scales = begin(k_ptr, b, k_batch, group // K_SHARE, k_head, low, K)
    v_ptr, v_scales = begin(v_ptr, b, v_batch, group // V_SHARE, v_head, low, V)
    last = end - TOKENS + rows % TOKENS  # the slot of a row's own token

    peak, total, read = nothing(ROWS, V)
    for start in range(low, high, TILE):
        slot = start + column
        there = (slot >= first) & (slot < high)
        page = pages(table_ptr, start, there, K.page, TILE)
        k_at, k_scales_at = tile_at(k_ptr, k_scales, page, k_batch, start, K, TILE)
        v_at, v_scales_at = tile_at(v_ptr, v_scales, page, v_batch, start, V, TILE)
        s = scores(q, k_at, k_scales_at, column, there, K, ROWS, TILE, dtype, UPCAST)
        s *= scale * LOG2E
        if bias_ptr is not None:
            far = tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)[None, :]
            s += (far if slopes_ptr is None else slope * far) * LOG2E
        elif slopes_ptr is not None:
            s += slope * (slot - end + 1).to(tl.float32)[None, :] * LOG2E
        s = tl.where(there[None, :] & (slot[None, :] <= last[:, None]), s, -float("inf"))
        peak, total, read = attend(
            peak, total, read, s, v_at, v_scales_at, column, there, V, dtype, UPCAST
        )
        k_ptr, k_scales = next_tile(k_ptr, k_scales, K, TILE)
        v_ptr, v_scales = next_tile(v_ptr, v_scales, V, TILE)
    store(part_ptr, weight_ptr, row, valid, peak, total, read, V)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    scale: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    k_layout: Sequence[int] | None = None,
    v_layout: Sequence[int] | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Run `zoo.models.attention.latent_decode` in Triton; see there for the arguments.

    A layout is that of rows of bytes, (B, S, bytes), in place of (B, L, S, R): heads, then width
    and bits of every segment.
    """
    batch, heads, tokens, _ = q.shape
    keys = layouts.cache(k, k_layout, q, table=table)
    values = layouts.cache(v, v_layout, q, layouts.LEAST_VALUES, table=table)
    shared = gcd(heads // keys.heads, heads // values.heads)  # heads of one group
    groups, rows = heads // shared, (keys.row, values.row)
    shape = constants(shared, tokens, *rows, q.element_size(), bool(torch.version.hip))
    splits = split.splits_of(batch * groups, keys.slots, shape["TILE"])
    parts = split.Parts(q, splits, values.row.width)
    kernel[(groups, splits, batch)](
        *(q.contiguous(), keys.x, values.x, span.contiguous(), bias, slopes, table),
        *(parts.part, parts.weight, scale, *keys.strides, *values.strides),
        *(split.per_sequence(span), split.per_sequence(bias), split.per_sequence(table)),
        K_SHARE=groups // keys.heads,
        V_SHARE=groups // values.heads,
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int, tokens: int, k: Row, v: Row, itemsize: int, amd: bool = False
) -> dict:
    """Constants of the kernel that depend on shapes only; `aot.py` uses them too.

    shared: query heads of a group; itemsize: bytes per number of the queries. Tiles of narrow
    packed latents are twice as large, not more: a tile is unpacked before it is used. amd: not
    there, where such tiles take half again as many registers.
    """
    queries, numbers = shared * tokens, k.width + v.width
    narrow = k.codes > 0 and v.codes > 0 and numbers <= MOST_NARROW
    narrow = narrow and not k.page and not amd  # several pages a tile cost more
    return {
        "QUERIES": queries,
        "TOKENS": tokens,
        "K": k,
        "V": v,
        "ROWS": max(layouts.LEAST_ROWS, triton.next_power_of_2(queries)),
        "TILE": split.tile_of(numbers, itemsize // 2 if narrow else itemsize),
        "num_warps": 4,
        "num_stages": 2,
    }
