"""Attention of one or a few new tokens over keys that are cached rotated within their blocks.

Every block of positions has its own queries, which one batched matrix product makes before the
kernel runs. A tile may overlap several blocks. A matrix product of few queries has unused rows;
they hold the queries of the other blocks. A row sees only the slots of its block, and the rows of a
head are joined after the whole split is read. Without padding, a slot is its position. With it,
positions are read, and the first one of a tile says which blocks the tile overlaps.
"""

from collections.abc import Sequence
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from ..zoo.models.attention import absorb
from ..zoo.models.rope import rotate
from . import layouts, split
from .layouts import Row
from .rows import begin, next_tile, pages, queries, tile_at
from .split import attend, extent, nothing, scores, store

LOG2E = tl.constexpr(split.LOG2E)
MOST_ROWS = 64  # of queries per tile; tiles shrink before they have more


# fmt: off
@triton.jit
def kernel(
    u_ptr, z_ptr, v_ptr, span_ptr, bias_ptr, position_ptr, added_ptr, table_ptr,
    part_ptr, weight_ptr,
    z_batch, z_head, v_batch, v_head, span_batch, bias_batch, position_batch, table_batch, blocks,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of QUERIES queries, TOKENS of every head; see `launch`.

    Row j * SHARED + h holds query h for block j of a tile. SHARED: QUERIES, padded. The
    other arguments are those of `latent_decode.kernel`.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    within, head = rows // SHARED, rows % SHARED
    first_head = (b * tl.num_programs(0) + group) * QUERIES
    dtype: tl.constexpr = tl.float32 if UPCAST else u_ptr.dtype.element_ty
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    if table_ptr is not None:
        table_ptr += b * table_batch
    last = end - TOKENS + head % TOKENS  # the slot of a row's own token
    z_ptr, z_scales = begin(z_ptr, b, z_batch, group // K_SHARE, z_head, low, K)
    v_ptr, v_scales = begin(v_ptr, b, v_batch, group // V_SHARE, v_head, low, V)

    peak, total, read = nothing(ROWS, V)
    for start in range(low, high, TILE):
        slot = start + column
        there = (slot >= first) & (slot < high)
        page = pages(table_ptr, start, there, K.page, TILE)
        z_at, z_scales_at = tile_at(z_ptr, z_scales, page, z_batch, start, K, TILE)
        v_at, v_scales_at = tile_at(v_ptr, v_scales, page, v_batch, start, V, TILE)
        own, low_block = slot // BLOCK, start // BLOCK
        if position_ptr is not None:
            position = position_ptr + b * position_batch
            own = tl.load(position + slot, mask=there, other=0) // BLOCK
            low_block = tl.load(position + tl.maximum(start, first)) // BLOCK
        block = low_block + within
        known = (head < QUERIES) & (block < blocks)
        query = (first_head + head) * blocks + block
        u = queries(u_ptr, query, known, K)
        s = scores(u, z_at, z_scales_at, column, there, K, ROWS, TILE, dtype, UPCAST)
        if added_ptr is not None:
            s += tl.load(added_ptr + query, mask=known, other=0.0).to(tl.float32)[:, None]
        if bias_ptr is not None:
            s += tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)[None, :]
        seen = there[None, :] & (own[None, :] == block[:, None]) & (slot[None, :] <= last[:, None])
        s = tl.where(seen, s * LOG2E, -float("inf"))
        peak, total, read = attend(
            peak, total, read, s, v_at, v_scales_at, column, there, V, dtype, UPCAST
        )
        z_ptr, z_scales = next_tile(z_ptr, z_scales, K, TILE)
        v_ptr, v_scales = next_tile(v_ptr, v_scales, V, TILE)
    peak, total, read = join(peak, total, read, ROWS // SHARED, SHARED)
    head = tl.arange(0, SHARED)
    store(part_ptr, weight_ptr, first_head + head, head < QUERIES, peak, total, read, V)


@triton.jit
def join(peak, total, read, BLOCKS: tl.constexpr, SHARED: tl.constexpr):
    """One row per head, from (BLOCKS * SHARED,) rows that have each read other blocks."""
    peak = tl.reshape(peak, [BLOCKS, SHARED])
    top = tl.max(peak, 0)
    w = tl.exp2(peak - top[None, :])
    whole = tl.tuple(())
    for i in tl.static_range(len(read)):
        y = tl.reshape(read[i], [BLOCKS, SHARED, read[i].shape[1]])
        whole += (tl.sum(y * w[:, :, None], 0),)
    return top, tl.sum(tl.reshape(total, [BLOCKS, SHARED]) * w, 0), whole


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
    block: int,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    z_layout: Sequence[int] | None = None,
    v_layout: Sequence[int] | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Run `zoo.models.attention.anchored_decode` in Triton; see there for the arguments.

    Layouts: see `latent_decode.launch`.
    """
    (batch, heads, tokens), blocks = q.shape[:3], cos.size(2)
    position = position if blocks > 1 else None  # all slots are in the only block
    each = q[:, :, :, None].expand(-1, -1, -1, blocks, -1)
    turned = (rotate(each, cos[:, None], sin[:, None]) * scale).flatten(1, 2)  # (B, H * T, N, D)
    u = absorb(turned, up, q.size(3))  # (B, H * T, N, R)
    added = None
    if mean is not None:  # the mean of the keys adds one number per block and query
        added = (turned.unflatten(1, (len(mean), -1)) * mean[:, None]).sum(-1).contiguous()
    keys = layouts.cache(z, z_layout, q, table=table)
    values = layouts.cache(v, v_layout, q, layouts.LEAST_VALUES, table=table)
    shared = gcd(heads // keys.heads, heads // values.heads)  # heads of one group
    groups, rows = heads // shared, (keys.row, values.row)
    shape = constants(
        *(shared * tokens, block if blocks > 1 else 0, *rows, q.element_size()),
        aligned=position is None,
        tokens=tokens,
    )
    splits = split.splits_of(batch * groups, keys.slots, shape["TILE"])
    parts = split.Parts(q, splits, values.row.width)
    kernel[(groups, splits, batch)](
        *(u.contiguous(), keys.x, values.x, span.contiguous(), bias, position, added, table),
        *(parts.part, parts.weight),
        *(*keys.strides, *values.strides),
        *(split.per_sequence(span), split.per_sequence(bias), split.per_sequence(position)),
        *(split.per_sequence(table), blocks),
        K_SHARE=groups // keys.heads,
        V_SHARE=groups // values.heads,
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int,
    block: int,
    k: Row,
    v: Row,
    itemsize: int,
    aligned: bool = True,
    tokens: int = 1,
) -> dict:
    """Constants of the kernel that depend on shapes only.

    shared: queries of a group, `tokens` of every head. block: 0 if one block holds all slots.
    """
    block = block or 1 << 30  # not the number of slots: a longer cache would compile again
    heads = triton.next_power_of_2(shared)
    tile = split.tile_of(k.width + v.width, itemsize)
    while tile > layouts.LEAST_ROWS and touched(block, tile, aligned) * heads > MOST_ROWS:
        tile //= 2
    rows = triton.next_power_of_2(touched(block, tile, aligned)) * heads
    return {
        "QUERIES": shared,
        "TOKENS": tokens,
        "SHARED": heads,
        "BLOCK": block,
        "K": k._replace(held=False),  # fewer instructions, but too many registers
        "V": v._replace(held=False),
        "ROWS": max(layouts.LEAST_ROWS, rows),
        "TILE": tile,
        "num_warps": 4,
        "num_stages": 2,
    }


def touched(block: int, tile: int, aligned: bool = True) -> int:
    """The most blocks that a tile overlaps. aligned: tiles begin at multiples of `tile`."""
    if aligned and block % tile == 0:
        return 1
    return tile // block if aligned and tile % block == 0 else (tile - 2) // block + 2
