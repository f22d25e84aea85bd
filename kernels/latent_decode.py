"""Attention of one or a few new tokens over latents that queries read directly.

A program reads one split for all query heads that share a latent of keys and one of values, as rows
of one matrix product. Where keys and values are shared by different numbers of heads, the coarser
latent is read by several programs, which lie side by side in the grid to meet in the L2 cache.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from . import split
from .split import attend, extent, load, nothing, scores, store

LOG2E = tl.constexpr(split.LOG2E)


# fmt: off
@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, bias_ptr, slopes_ptr, part_ptr, weight_ptr, scale,
    k_batch, k_head, v_batch, v_head, span_batch, bias_batch,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    K_SLOT: tl.constexpr, V_SLOT: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    K_CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of query heads; see `launch`.

    K_SHARE, V_SHARE: groups that share a latent; QUERIES: heads of a group times TOKENS; *_SLOT:
    stride from slot to slot; ROWS: QUERIES padded.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    valid = rows < QUERIES
    row = (b * tl.num_programs(0) + group) * QUERIES + rows
    q = load(q_ptr, row, valid, RK, RK, K_CHUNKS)
    if slopes_ptr is not None:
        head = (group * QUERIES + rows) // TOKENS
        slope = tl.load(slopes_ptr + head, mask=valid, other=0.0).to(tl.float32)[:, None]
    k_ptr += b * k_batch + (group // K_SHARE).to(tl.int64) * k_head
    v_ptr += b * v_batch + (group // V_SHARE).to(tl.int64) * v_head
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    last = end - TOKENS + rows % TOKENS  # the slot of a row's own token

    peak, total, read = nothing(ROWS, V_CHUNKS)
    for start in range(low, high, TILE):
        slot, past = start + column, tl.cast(start, tl.int64)
        there = (slot >= first) & (slot < high)
        k = load(k_ptr + past * K_SLOT, column, there, K_SLOT, RK, K_CHUNKS)
        s = scores(q, k, ROWS, TILE, UPCAST) * (scale * LOG2E)
        if bias_ptr is not None:
            far = tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)[None, :]
            s += (far if slopes_ptr is None else slope * far) * LOG2E
        elif slopes_ptr is not None:
            s += slope * (slot - end + 1).to(tl.float32)[None, :] * LOG2E
        s = tl.where(there[None, :] & (slot[None, :] <= last[:, None]), s, -float("inf"))
        v = load(v_ptr + past * V_SLOT, column, there, V_SLOT, RV, V_CHUNKS)
        peak, total, read = attend(peak, total, read, s, v, UPCAST)
    store(part_ptr, weight_ptr, row, valid, peak, total, read, RV)


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
    """`zoo.attention.latent_decode`, which says what the arguments are.

    Packed numbers, of which the scales are given, are unpacked before the kernel reads them.
    """
    batch, heads, tokens, rk = q.shape
    k, v = split.numbers(k, k_scale, q), split.numbers(v, v_scale, q)
    shared = gcd(heads // k.size(1), heads // v.size(1))  # heads of one group
    groups = heads // shared
    shape = constants(shared, tokens, rk, v.size(3), k.element_size())
    splits = split.splits_of(batch * groups, k.size(2), shape["TILE"])
    parts = split.Parts(q, splits, v.size(3))
    kernel[(groups, splits, batch)](
        *(q.contiguous(), k, v, span.contiguous(), bias, slopes, parts.part, parts.weight, scale),
        *(*k.stride()[:2], *v.stride()[:2], split.per_sequence(span), split.per_sequence(bias)),
        K_SHARE=groups // k.size(1),
        V_SHARE=groups // v.size(1),
        K_SLOT=k.stride(2),
        V_SLOT=v.stride(2),
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(shared: int, tokens: int, rk: int, rv: int, itemsize: int) -> dict:
    """What the shapes alone say: widths, their chunks, and sizes of tiles; also for `aot.py`."""
    queries = shared * tokens
    return {
        "QUERIES": queries,
        "TOKENS": tokens,
        "RK": rk,
        "RV": rv,
        "K_CHUNKS": split.chunks(rk),
        "V_CHUNKS": split.chunks(rv, least=32),
        "ROWS": max(split.LEAST_ROWS, triton.next_power_of_2(queries)),
        "TILE": split.tile_of(rk + rv, itemsize),
        "num_warps": 4,
        "num_stages": 2,
    }
