"""Attention of one or a few new tokens over keys that are lifted and rotated while they are read.

A tile of latents is lifted for one kv head. The two halves of the head are separate matrices,
because the rotation combines them. Keys stay in registers. One program reads one split for all
query heads that share both a kv head and a latent of values.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split
from .split import attend, cached, extent, load, nothing, product, store

MOST_HELD = 48 << 10  # bytes: a larger lift of a head does not stay in shared memory
LOG2E = tl.constexpr(split.LOG2E)


# fmt: off
@triton.jit
def kernel(
    q_ptr, z_ptr, v_ptr, z_scale_ptr, v_scale_ptr, span_ptr, bias_ptr, cos_ptr, sin_ptr,
    up_ptr, mean_ptr, part_ptr, weight_ptr, scale,
    z_batch, z_head, v_batch, v_head, z_scale_batch, z_scale_head, v_scale_batch, v_scale_head,
    span_batch, bias_batch, angle_batch,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, LIFTED: tl.constexpr,
    QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    K_SLOT: tl.constexpr, V_SLOT: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr, K_HALVES: tl.constexpr, V_HALVES: tl.constexpr,
    HALF: tl.constexpr, V_CHUNKS: tl.constexpr, R_CHUNK: tl.constexpr, D_CHUNKS: tl.constexpr,
    HELD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of query heads; see `launch`.

    K_SHARE: groups of a kv head; LIFTED: kv heads of a latent of keys; HALF: half the width of a
    head. The other arguments are those of `latent_decode.kernel`.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    valid = rows < QUERIES
    row = (b * tl.num_programs(0) + group) * QUERIES + rows
    dtype: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    qa = load(q_ptr, row, valid, 2 * HALF, HALF, D_CHUNKS)[0]
    qb = load(q_ptr + HALF, row, valid, 2 * HALF, HALF, D_CHUNKS)[0]
    kv = group // K_SHARE
    z_of, v_of = (kv // LIFTED).to(tl.int64), (group // V_SHARE).to(tl.int64)
    z_ptr += b * z_batch + z_of * z_head
    v_ptr += b * v_batch + v_of * v_head
    if z_scale_ptr is not None:
        z_scale_ptr += b * z_scale_batch + z_of * z_scale_head
    if v_scale_ptr is not None:
        v_scale_ptr += b * v_scale_batch + v_of * v_scale_head
    if mean_ptr is not None:
        mean_ptr += kv * 2 * HALF
    up_ptr += (kv // LIFTED) * RK * LIFTED * 2 * HALF + kv % LIFTED * 2 * HALF
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    last = end - TOKENS + rows % TOKENS  # the slot of a row's own token

    peak, total, read = nothing(ROWS, V_CHUNKS, V_HALVES)
    for start in range(low, high, TILE):
        slot, past = start + column, tl.cast(start, tl.int64)
        there = (slot >= first) & (slot < high)
        a, c = lifted(
            z_ptr + past * K_SLOT, z_scale_ptr, up_ptr, mean_ptr, slot, column, there,
            K_SLOT, K_STEP, LIFTED * 2 * HALF, RK // K_HALVES, HALF, R_CHUNK, D_CHUNKS,
            HELD, TILE, dtype, UPCAST,
        )
        at = b * angle_batch + past * HALF
        cos = load(cos_ptr + at, column, there, HALF, HALF, D_CHUNKS)[0]
        sin = load(sin_ptr + at, column, there, HALF, HALF, D_CHUNKS)[0]
        s = tl.zeros([ROWS, TILE], tl.float32)
        s = product(qa, tl.trans((a * cos - c * sin).to(qa.dtype)), s, UPCAST)
        s = product(qb, tl.trans((c * cos + a * sin).to(qa.dtype)), s, UPCAST) * (scale * LOG2E)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + b * bias_batch + slot, mask=there, other=0.0)
            s += bias[None, :] * LOG2E
        s = tl.where(there[None, :] & (slot[None, :] <= last[:, None]), s, -float("inf"))
        v = cached(v_ptr + past * V_SLOT, column, there, V_SLOT, RV // V_HALVES, V_CHUNKS, dtype)
        peak, total, read = attend(
            peak, total, read, s, v, v_scale_ptr, slot, there, V_STEP, UPCAST
        )
    store(part_ptr, weight_ptr, row, valid, peak, total, read, RV, V_HALVES)


# fmt: off
@triton.jit
def lifted(
    z_ptr, z_scale_ptr, up_ptr, mean_ptr, slot, rows, there,
    K_SLOT: tl.constexpr, K_STEP: tl.constexpr, UP_ROW: tl.constexpr, KEPT: tl.constexpr,
    HALF: tl.constexpr, R_CHUNK: tl.constexpr, D_CHUNKS: tl.constexpr, HELD: tl.constexpr,
    TILE: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Both halves of the keys of a tile, each (TILE, HALF) padded, in fp32.

    With HELD, the lift fits in shared memory: the loop over its rows is unrolled, so that the
    compiler can load the lift once, before the loop over tiles. Without, every tile reads it again.
    KEPT: elements of the cache per latent (bytes, if a byte holds two numbers).
    """
    a = tl.full([TILE, D_CHUNKS[0]], 0, tl.float32)
    c = tl.full([TILE, D_CHUNKS[0]], 0, tl.float32)
    if HELD:
        for r in tl.static_range(0, KEPT, R_CHUNK):
            a, c = lifted_more(
                a, c, r, z_ptr, up_ptr, rows, there,
                K_SLOT, UP_ROW, KEPT, HALF, R_CHUNK, D_CHUNKS, TYPE, UPCAST,
            )
    else:
        for r in range(0, KEPT, R_CHUNK):
            a, c = lifted_more(
                a, c, r, z_ptr, up_ptr, rows, there,
                K_SLOT, UP_ROW, KEPT, HALF, R_CHUNK, D_CHUNKS, TYPE, UPCAST,
            )
    if z_scale_ptr is not None:
        scale = tl.load(z_scale_ptr + slot * K_STEP, mask=there, other=0.0).to(tl.float32)
        a, c = a * scale[:, None], c * scale[:, None]
    if mean_ptr is not None:
        d = tl.arange(0, D_CHUNKS[0])
        a += tl.load(mean_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        c += tl.load(mean_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    return a, c


@triton.jit
def lifted_more(
    a, c, r, z_ptr, up_ptr, rows, there, K_SLOT: tl.constexpr, UP_ROW: tl.constexpr,
    KEPT: tl.constexpr, HALF: tl.constexpr, R_CHUNK: tl.constexpr, D_CHUNKS: tl.constexpr,
    TYPE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """Halves a and c of the keys, plus the share of R_CHUNK elements of the latents, from r on."""
    z = cached(z_ptr + r, rows, there, K_SLOT, KEPT - r, (R_CHUNK,), TYPE)
    at = r + tl.arange(0, R_CHUNK)
    known = at < KEPT
    for half in tl.static_range(len(z)):
        row = half * KEPT + at
        a = product(z[half], load(up_ptr, row, known, UP_ROW, HALF, D_CHUNKS)[0], a, UPCAST)
        c = product(z[half], load(up_ptr + HALF, row, known, UP_ROW, HALF, D_CHUNKS)[0], c, UPCAST)
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
    z_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Run `zoo.models.attention.rotary_decode` in Triton; see there for the arguments."""
    batch, heads, tokens, d = q.shape
    z, v = split.adjacent(z), split.adjacent(v)
    z_halves, v_halves = split.halves(z), split.halves(v)
    rk, rv = z.size(3) * z_halves, v.size(3) * v_halves
    lifted = up.size(2) // d  # kv heads of a latent
    shared = gcd(heads // (z.size(1) * lifted), heads // v.size(1))  # query heads of one group
    groups = heads // shared
    shape = constants(
        *(shared, tokens, rk, rv, d, q.element_size(), bool(torch.version.hip)),
        *(z_halves, v_halves),
    )
    splits = split.splits_of(batch * groups, z.size(2), shape["TILE"])
    parts = split.Parts(q, splits, rv)
    mean = None if mean is None else mean.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    kernel[(groups, splits, batch)](
        *(q.contiguous(), z, v, z_scale, v_scale, span.contiguous(), bias, cos, sin),
        *(up.contiguous(), mean, parts.part, parts.weight, scale),
        *(*z.stride()[:2], *v.stride()[:2]),
        *(*split.strides(z_scale)[:2], *split.strides(v_scale)[:2]),
        *(split.per_sequence(span), split.per_sequence(bias), split.per_sequence(cos)),
        K_SHARE=groups // (z.size(1) * lifted),
        V_SHARE=groups // v.size(1),
        LIFTED=lifted,
        K_SLOT=z.stride(2),
        V_SLOT=v.stride(2),
        K_STEP=split.strides(z_scale)[2],
        V_STEP=split.strides(v_scale)[2],
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int,
    tokens: int,
    rk: int,
    rv: int,
    head_dim: int,
    itemsize: int,
    amd: bool,
    z_halves: int = 1,
    v_halves: int = 1,
) -> dict:
    """Constants of the kernel that depend on shapes only; `aot.py` uses them too.

    amd: do not hold the lift, because AMD's compiler would hold it in registers.
    """
    queries, half = shared * tokens, max(split.LEAST_ROWS, triton.next_power_of_2(head_dim // 2))
    padded = triton.cdiv(rk // z_halves, split.LEAST_ROWS) * split.LEAST_ROWS
    return {
        "QUERIES": queries,
        "TOKENS": tokens,
        "RK": rk,
        "RV": rv,
        "HALF": head_dim // 2,
        "K_HALVES": z_halves,
        "V_HALVES": v_halves,
        "R_CHUNK": max(32, gcd(padded, 64)),
        "V_CHUNKS": split.chunks(rv // v_halves, least=32),
        "D_CHUNKS": (half,),
        "HELD": z_halves * padded * 2 * half * itemsize <= MOST_HELD and not amd,
        "ROWS": max(split.LEAST_ROWS, triton.next_power_of_2(queries)),
        "TILE": split.tile_of(rk + rv, itemsize, most=32),
        "num_warps": 4,
        "num_stages": 2,
    }
