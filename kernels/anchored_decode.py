"""Attention of one new token over keys that are cached rotated within their blocks.

Every block of positions has its own queries, which one batched matrix product makes before the
kernel runs. A tile may overlap several blocks. A matrix product of few queries has unused rows;
they hold the queries of the other blocks. A row sees only the slots of its block, and the rows of a
head are joined after the whole split is read. Without padding, a slot is its position. With it,
positions are read, and the first one of a tile says which blocks the tile overlaps.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from ..zoo.models.attention import absorb
from ..zoo.models.rope import rotate
from . import split
from .split import attend, cached, extent, load, nothing, scaled, scores, store

LOG2E = tl.constexpr(split.LOG2E)
MOST_ROWS = 64  # of queries per tile; tiles shrink before they have more


# fmt: off
@triton.jit
def kernel(
    u_ptr, z_ptr, v_ptr, z_scale_ptr, v_scale_ptr, span_ptr, bias_ptr, position_ptr, added_ptr,
    part_ptr, weight_ptr,
    z_batch, z_head, v_batch, v_head, z_scale_batch, z_scale_head, v_scale_batch, v_scale_head,
    span_batch, bias_batch, position_batch, blocks,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, QUERIES: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr, K_SLOT: tl.constexpr, V_SLOT: tl.constexpr,
    K_STEP: tl.constexpr, V_STEP: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    K_HALVES: tl.constexpr, V_HALVES: tl.constexpr, K_CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of QUERIES heads; see `launch`.

    Row j * SHARED + h holds the query of head h for block j of a tile. SHARED: QUERIES, padded. The
    other arguments are those of `latent_decode.kernel`.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    within, head = rows // SHARED, rows % SHARED
    first_head = (b * tl.num_programs(0) + group) * QUERIES
    dtype: tl.constexpr = tl.float32 if UPCAST else u_ptr.dtype.element_ty
    z_of, v_of = (group // K_SHARE).to(tl.int64), (group // V_SHARE).to(tl.int64)
    z_ptr += b * z_batch + z_of * z_head
    v_ptr += b * v_batch + v_of * v_head
    if z_scale_ptr is not None:
        z_scale_ptr += b * z_scale_batch + z_of * z_scale_head
    if v_scale_ptr is not None:
        v_scale_ptr += b * v_scale_batch + v_of * v_scale_head
    first, _, low, high = extent(span_ptr + b * span_batch, TILE)

    peak, total, read = nothing(ROWS, V_CHUNKS, V_HALVES)
    for start in range(low, high, TILE):
        slot, past = start + column, tl.cast(start, tl.int64)
        there = (slot >= first) & (slot < high)
        own, low_block = slot // BLOCK, start // BLOCK
        if position_ptr is not None:
            position = position_ptr + b * position_batch
            own = tl.load(position + slot, mask=there, other=0) // BLOCK
            low_block = tl.load(position + tl.maximum(start, first)) // BLOCK
        block = low_block + within
        known = (head < QUERIES) & (block < blocks)
        query = (first_head + head) * blocks + block
        u = load(u_ptr, query, known, RK, RK // K_HALVES, K_CHUNKS, K_HALVES)
        z = cached(z_ptr + past * K_SLOT, column, there, K_SLOT, RK // K_HALVES, K_CHUNKS, dtype)
        s = scaled(scores(u, z, ROWS, TILE, UPCAST), z_scale_ptr, slot, there, K_STEP)
        if added_ptr is not None:
            s += tl.load(added_ptr + query, mask=known, other=0.0).to(tl.float32)[:, None]
        if bias_ptr is not None:
            s += tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)[None, :]
        s = tl.where(there[None, :] & (own[None, :] == block[:, None]), s * LOG2E, -float("inf"))
        v = cached(v_ptr + past * V_SLOT, column, there, V_SLOT, RV // V_HALVES, V_CHUNKS, dtype)
        peak, total, read = attend(
            peak, total, read, s, v, v_scale_ptr, slot, there, V_STEP, UPCAST
        )
    peak, total, read = join(peak, total, read, ROWS // SHARED, SHARED)
    head = tl.arange(0, SHARED)
    store(part_ptr, weight_ptr, first_head + head, head < QUERIES, peak, total, read, RV, V_HALVES)


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
    z_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Run `zoo.models.attention.anchored_decode` in Triton; see there for the arguments."""
    (batch, heads), blocks = q.shape[:2], cos.size(2)
    position = position if blocks > 1 else None  # all slots are in the only block
    turned = rotate(q.expand(-1, -1, blocks, -1), cos, sin) * scale  # (B, H, N, D)
    u = absorb(turned, up, q.size(3))  # (B, H, N, R)
    added = None
    if mean is not None:  # the mean of the keys adds one number per block and query
        added = (turned.unflatten(1, (len(mean), -1)) * mean[:, None]).sum(-1).contiguous()
    z, v = split.adjacent(z), split.adjacent(v)
    z_halves, v_halves = split.halves(z), split.halves(v)
    rv = v.size(3) * v_halves
    shared = gcd(heads // z.size(1), heads // v.size(1))  # heads of one group
    groups = heads // shared
    shape = constants(
        *(shared, block if blocks > 1 else 0, u.size(3), rv, q.element_size(), z_halves, v_halves),
        aligned=position is None,
    )
    splits = split.splits_of(batch * groups, z.size(2), shape["TILE"])
    parts = split.Parts(q, splits, rv)
    kernel[(groups, splits, batch)](
        *(u.contiguous(), z, v, z_scale, v_scale, span.contiguous(), bias, position, added),
        *(parts.part, parts.weight, *z.stride()[:2], *v.stride()[:2]),
        *(*split.strides(z_scale)[:2], *split.strides(v_scale)[:2]),
        *(split.per_sequence(span), split.per_sequence(bias), split.per_sequence(position), blocks),
        K_SHARE=groups // z.size(1),
        V_SHARE=groups // v.size(1),
        K_SLOT=z.stride(2),
        V_SLOT=v.stride(2),
        K_STEP=split.strides(z_scale)[2],
        V_STEP=split.strides(v_scale)[2],
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int, block: int, rk: int, rv: int, itemsize: int, z_halves: int = 1, v_halves: int = 1,
    aligned: bool = True,
) -> dict:
    """Constants of the kernel that depend on shapes only. block: 0 if one block holds all slots."""
    block = block or 1 << 30  # not the number of slots: a longer cache would compile again
    heads = triton.next_power_of_2(shared)
    tile = split.tile_of(rk + rv, itemsize)
    while tile > split.LEAST_ROWS and touched(block, tile, aligned) * heads > MOST_ROWS:
        tile //= 2
    rows = triton.next_power_of_2(touched(block, tile, aligned)) * heads
    return {
        "QUERIES": shared,
        "SHARED": heads,
        "BLOCK": block,
        "RK": rk,
        "RV": rv,
        "K_HALVES": z_halves,
        "V_HALVES": v_halves,
        "K_CHUNKS": split.chunks(rk // z_halves),
        "V_CHUNKS": split.chunks(rv // v_halves, least=32),
        "ROWS": max(split.LEAST_ROWS, rows),
        "TILE": tile,
        "num_warps": 4,
        "num_stages": 2,
    }


def touched(block: int, tile: int, aligned: bool = True) -> int:
    """The most blocks that a tile overlaps. aligned: tiles begin at multiples of `tile`."""
    if aligned and block % tile == 0:
        return 1
    return tile // block if aligned and tile % block == 0 else (tile - 2) // block + 2
