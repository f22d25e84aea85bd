"""Attention of one or a few new tokens over latents that queries read directly.

A program reads one split for all query heads that share both a latent of keys and a latent of
values: these heads are the rows of one matrix product. If keys and values are shared by different
numbers of heads, several programs read the latent that more heads share. They are adjacent in the
grid, so that they find it in the L2 cache.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from . import split
from .split import attend, cached, extent, load, nothing, scaled, scores, store

LOG2E = tl.constexpr(split.LOG2E)


# fmt: off
@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, span_ptr, bias_ptr, slopes_ptr,
    part_ptr, weight_ptr, scale,
    k_batch, k_head, v_batch, v_head, k_scale_batch, k_scale_head, v_scale_batch, v_scale_head,
    span_batch, bias_batch,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    K_SLOT: tl.constexpr, V_SLOT: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr, K_HALVES: tl.constexpr, V_HALVES: tl.constexpr,
    K_CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of query heads; see `launch`.

    K_SHARE, V_SHARE: groups that share a latent; QUERIES: heads of a group times TOKENS; *_SLOT,
    *_STEP: strides from one slot to the next, of numbers and of scales; *_HALVES: 2 if a byte holds
    two numbers, else 1; ROWS: QUERIES, padded.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    valid = rows < QUERIES
    row = (b * tl.num_programs(0) + group) * QUERIES + rows
    dtype: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    q = load(q_ptr, row, valid, RK, RK // K_HALVES, K_CHUNKS, K_HALVES)
    if slopes_ptr is not None:
        head = (group * QUERIES + rows) // TOKENS
        slope = tl.load(slopes_ptr + head, mask=valid, other=0.0).to(tl.float32)[:, None]
    k_of, v_of = (group // K_SHARE).to(tl.int64), (group // V_SHARE).to(tl.int64)
    k_ptr += b * k_batch + k_of * k_head
    v_ptr += b * v_batch + v_of * v_head
    if k_scale_ptr is not None:
        k_scale_ptr += b * k_scale_batch + k_of * k_scale_head
    if v_scale_ptr is not None:
        v_scale_ptr += b * v_scale_batch + v_of * v_scale_head
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    last = end - TOKENS + rows % TOKENS  # the slot of a row's own token

    peak, total, read = nothing(ROWS, V_CHUNKS, V_HALVES)
    for start in range(low, high, TILE):
        slot, past = start + column, tl.cast(start, tl.int64)
        there = (slot >= first) & (slot < high)
        k = cached(k_ptr + past * K_SLOT, column, there, K_SLOT, RK // K_HALVES, K_CHUNKS, dtype)
        s = scores(q, k, ROWS, TILE, UPCAST) * (scale * LOG2E)
        s = scaled(s, k_scale_ptr, slot, there, K_STEP)
        if bias_ptr is not None:
            far = tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)[None, :]
            s += (far if slopes_ptr is None else slope * far) * LOG2E
        elif slopes_ptr is not None:
            s += slope * (slot - end + 1).to(tl.float32)[None, :] * LOG2E
        s = tl.where(there[None, :] & (slot[None, :] <= last[:, None]), s, -float("inf"))
        v = cached(v_ptr + past * V_SLOT, column, there, V_SLOT, RV // V_HALVES, V_CHUNKS, dtype)
        peak, total, read = attend(
            peak, total, read, s, v, v_scale_ptr, slot, there, V_STEP, UPCAST
        )
    store(part_ptr, weight_ptr, row, valid, peak, total, read, RV, V_HALVES)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    scale: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Run `zoo.models.attention.latent_decode` in Triton; see there for the arguments."""
    batch, heads, tokens, rk = q.shape
    k, v = split.adjacent(k), split.adjacent(v)
    k_halves, v_halves = split.halves(k), split.halves(v)
    rv = v.size(3) * v_halves
    shared = gcd(heads // k.size(1), heads // v.size(1))  # heads of one group
    groups = heads // shared
    shape = constants(shared, tokens, rk, rv, q.element_size(), k_halves, v_halves)
    splits = split.splits_of(batch * groups, k.size(2), shape["TILE"])
    parts = split.Parts(q, splits, rv)
    kernel[(groups, splits, batch)](
        *(q.contiguous(), k, v, k_scale, v_scale, span.contiguous(), bias, slopes),
        *(parts.part, parts.weight, scale, *k.stride()[:2], *v.stride()[:2]),
        *(*split.strides(k_scale)[:2], *split.strides(v_scale)[:2]),
        *(split.per_sequence(span), split.per_sequence(bias)),
        K_SHARE=groups // k.size(1),
        V_SHARE=groups // v.size(1),
        K_SLOT=k.stride(2),
        V_SLOT=v.stride(2),
        K_STEP=split.strides(k_scale)[2],
        V_STEP=split.strides(v_scale)[2],
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int, tokens: int, rk: int, rv: int, itemsize: int, k_halves: int = 1, v_halves: int = 1
) -> dict:
    """Constants of the kernel that depend on shapes only; `aot.py` uses them too.

    shared: query heads of a group; rk, rv: widths of keys and values; itemsize: bytes per number of
    the queries. Packed caches get no larger tiles, because a tile is unpacked before it is used.
    """
    queries = shared * tokens
    return {
        "QUERIES": queries,
        "TOKENS": tokens,
        "RK": rk,
        "RV": rv,
        "K_HALVES": k_halves,
        "V_HALVES": v_halves,
        "K_CHUNKS": split.chunks(rk // k_halves),
        "V_CHUNKS": split.chunks(rv // v_halves, least=32),
        "ROWS": max(split.LEAST_ROWS, triton.next_power_of_2(queries)),
        "TILE": split.tile_of(rk + rv, itemsize),
        "num_warps": 4,
        "num_stages": 2,
    }
