"""Attention of one new token over keys that are cached turned within their blocks.

Every block of slots has a query of its own, made before the kernel by one batched product. A tile
may touch several blocks: the rows that a matrix product of few queries leaves empty take the
queries of all of them, each row sees the slots of its block, and the rows of a head are joined once
the split is read.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from ..zoo.attention import absorb
from ..zoo.rope import rotate
from . import split
from .split import attend, extent, load, nothing, scores, store

LOG2E = tl.constexpr(split.LOG2E)
MOST_ROWS = 64  # of one tile's queries, where smaller tiles can avoid more


# fmt: off
@triton.jit
def kernel(
    u_ptr, z_ptr, v_ptr, span_ptr, bias_ptr, added_ptr, part_ptr, weight_ptr,
    z_batch, z_head, v_batch, v_head, span_batch, bias_batch, blocks,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, QUERIES: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr, K_SLOT: tl.constexpr, V_SLOT: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr, K_CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of QUERIES heads; see `launch`.

    Row j * SHARED + h holds the query of head h for the j-th block of a tile. SHARED: QUERIES
    padded; otherwise as in `latent_decode.kernel`.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    within, head = rows // SHARED, rows % SHARED
    first_head = (b * tl.num_programs(0) + group) * QUERIES
    z_ptr += b * z_batch + (group // K_SHARE).to(tl.int64) * z_head
    v_ptr += b * v_batch + (group // V_SHARE).to(tl.int64) * v_head
    first, _, low, high = extent(span_ptr + b * span_batch, TILE)

    peak, total, read = nothing(ROWS, V_CHUNKS)
    for start in range(low, high, TILE):
        slot, past = start + column, tl.cast(start, tl.int64)
        there = (slot >= first) & (slot < high)
        block = start // BLOCK + within
        known = (head < QUERIES) & (block < blocks)
        query = (first_head + head) * blocks + block
        u = load(u_ptr, query, known, RK, RK, K_CHUNKS)
        z = load(z_ptr + past * K_SLOT, column, there, K_SLOT, RK, K_CHUNKS)
        s = scores(u, z, ROWS, TILE, UPCAST)
        if added_ptr is not None:
            s += tl.load(added_ptr + query, mask=known, other=0.0).to(tl.float32)[:, None]
        if bias_ptr is not None:
            s += tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)[None, :]
        own = (slot // BLOCK)[None, :] == block[:, None]
        s = tl.where(there[None, :] & own, s * LOG2E, -float("inf"))
        v = load(v_ptr + past * V_SLOT, column, there, V_SLOT, RV, V_CHUNKS)
        peak, total, read = attend(peak, total, read, s, v, UPCAST)
    peak, total, read = join(peak, total, read, ROWS // SHARED, SHARED)
    head = tl.arange(0, SHARED)
    store(part_ptr, weight_ptr, first_head + head, head < QUERIES, peak, total, read, RV)


@triton.jit
def join(peak, total, read, BLOCKS: tl.constexpr, SHARED: tl.constexpr):
    """One row a head, of rows (BLOCKS * SHARED,) that have each read the slots of some blocks."""
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
    z_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`zoo.attention.anchored_decode`, which says what the arguments are.

    Packed numbers, of which the scales are given, are unpacked before the kernel reads them.
    """
    (batch, heads), blocks = q.shape[:2], cos.size(2)
    turned = rotate(q.expand(-1, -1, blocks, -1), cos, sin) * scale  # (B, H, N, D)
    u = absorb(turned, up, q.size(3))  # (B, H, N, R)
    added = None
    if mean is not None:  # what the mean of the keys adds to the scores of a block
        added = (turned.unflatten(1, (len(mean), -1)) * mean[:, None]).sum(-1).contiguous()
    z, v = split.numbers(z, z_scale, q), split.numbers(v, v_scale, q)
    shared = gcd(heads // z.size(1), heads // v.size(1))  # heads of one group
    groups = heads // shared
    shape = constants(shared, block if blocks > 1 else 0, u.size(3), v.size(3), z.element_size())
    splits = split.splits_of(batch * groups, z.size(2), shape["TILE"])
    parts = split.Parts(q, splits, v.size(3))
    kernel[(groups, splits, batch)](
        *(u.contiguous(), z, v, span.contiguous(), bias, added, parts.part, parts.weight),
        *(*z.stride()[:2], *v.stride()[:2], split.per_sequence(span), split.per_sequence(bias)),
        blocks,
        K_SHARE=groups // z.size(1),
        V_SHARE=groups // v.size(1),
        K_SLOT=z.stride(2),
        V_SLOT=v.stride(2),
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(shared: int, block: int, rk: int, rv: int, itemsize: int) -> dict:
    """What the shapes alone say; also for `aot.py`. block: 0 where one block holds all slots."""
    block = block or 1 << 30  # and so a longer cache compiles nothing anew
    heads = triton.next_power_of_2(shared)
    tile = split.tile_of(rk + rv, itemsize)
    while tile > split.LEAST_ROWS and touched(block, tile) * heads > MOST_ROWS:
        tile //= 2
    rows = triton.next_power_of_2(touched(block, tile)) * heads
    return {
        "QUERIES": shared,
        "SHARED": heads,
        "BLOCK": block,
        "RK": rk,
        "RV": rv,
        "K_CHUNKS": split.chunks(rk),
        "V_CHUNKS": split.chunks(rv, least=32),
        "ROWS": max(split.LEAST_ROWS, rows),
        "TILE": tile,
        "num_warps": 4,
        "num_stages": 2,
    }


def touched(block: int, tile: int) -> int:
    """How many blocks a tile of slots touches at most, if tiles begin at multiples of `tile`."""
    if block % tile == 0:
        return 1
    return tile // block if tile % block == 0 else (tile - 2) // block + 2
