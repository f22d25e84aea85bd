"""Attention of one or a few new tokens over keys that are lifted and rotated while they are read.

A tile of latents is lifted for one kv head, half a head at a time, as the rotation pairs the
halves; the keys live in registers only. One program reads one split for all query heads that share
a kv head and a latent of values.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split
from .split import attend, extent, load, nothing, product, store

MOST_HELD = 48 << 10  # bytes of the lift of one head that stay in shared memory
LOG2E = tl.constexpr(split.LOG2E)


# fmt: off
@triton.jit
def kernel(
    q_ptr, z_ptr, v_ptr, span_ptr, bias_ptr, cos_ptr, sin_ptr, up_ptr, mean_ptr,
    part_ptr, weight_ptr, scale,
    z_batch, z_head, v_batch, v_head, span_batch, bias_batch, angle_batch,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, LIFTED: tl.constexpr,
    QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    K_SLOT: tl.constexpr, V_SLOT: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    HALF: tl.constexpr, V_CHUNKS: tl.constexpr, R_CHUNK: tl.constexpr, D_CHUNKS: tl.constexpr,
    HELD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """One split of one group of query heads; see `launch`.

    K_SHARE: groups of a kv head; LIFTED: kv heads of a latent of keys; HALF: numbers of half a
    head; otherwise as in `latent_decode.kernel`.
    """
    group, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    valid = rows < QUERIES
    row = (b * tl.num_programs(0) + group) * QUERIES + rows
    qa = load(q_ptr, row, valid, 2 * HALF, HALF, D_CHUNKS)[0]
    qb = load(q_ptr + HALF, row, valid, 2 * HALF, HALF, D_CHUNKS)[0]
    kv = group // K_SHARE
    z_ptr += b * z_batch + (kv // LIFTED).to(tl.int64) * z_head
    v_ptr += b * v_batch + (group // V_SHARE).to(tl.int64) * v_head
    if mean_ptr is not None:
        mean_ptr += kv * 2 * HALF
    up_ptr += (kv // LIFTED) * RK * LIFTED * 2 * HALF + kv % LIFTED * 2 * HALF
    first, end, low, high = extent(span_ptr + b * span_batch, TILE)
    last = end - TOKENS + rows % TOKENS  # the slot of a row's own token

    peak, total, read = nothing(ROWS, V_CHUNKS)
    for start in range(low, high, TILE):
        slot, past = start + column, tl.cast(start, tl.int64)
        there = (slot >= first) & (slot < high)
        a, c = lifted(
            z_ptr + past * K_SLOT, up_ptr, mean_ptr, column, there, K_SLOT, LIFTED * 2 * HALF,
            RK, HALF, R_CHUNK, D_CHUNKS, HELD, TILE, UPCAST,
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
        v = load(v_ptr + past * V_SLOT, column, there, V_SLOT, RV, V_CHUNKS)
        peak, total, read = attend(peak, total, read, s, v, UPCAST)
    store(part_ptr, weight_ptr, row, valid, peak, total, read, RV)


# fmt: off
@triton.jit
def lifted(
    z_ptr, up_ptr, mean_ptr, rows, there, K_SLOT: tl.constexpr, UP_ROW: tl.constexpr,
    RK: tl.constexpr, HALF: tl.constexpr, R_CHUNK: tl.constexpr, D_CHUNKS: tl.constexpr,
    HELD: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Both halves of the keys of a tile, each (TILE, HALF) padded, in fp32.

    The compiler moves what does not change out of the loop over tiles. Where that is the lift, it
    stays in shared memory; HELD says that it fits. Else every tile reads it anew.
    """
    a = tl.zeros([TILE, D_CHUNKS[0]], tl.float32)
    c = tl.zeros([TILE, D_CHUNKS[0]], tl.float32)
    if mean_ptr is not None:
        d = tl.arange(0, D_CHUNKS[0])
        a += tl.load(mean_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        c += tl.load(mean_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    if HELD:
        for r in tl.static_range(0, RK, R_CHUNK):
            a, c = lifted_more(
                a, c, r, z_ptr, up_ptr, rows, there,
                K_SLOT, UP_ROW, RK, HALF, R_CHUNK, D_CHUNKS, UPCAST,
            )
    else:
        for r in range(0, RK, R_CHUNK):
            a, c = lifted_more(
                a, c, r, z_ptr, up_ptr, rows, there,
                K_SLOT, UP_ROW, RK, HALF, R_CHUNK, D_CHUNKS, UPCAST,
            )
    return a, c


@triton.jit
def lifted_more(
    a, c, r, z_ptr, up_ptr, rows, there, K_SLOT: tl.constexpr, UP_ROW: tl.constexpr,
    RK: tl.constexpr, HALF: tl.constexpr, R_CHUNK: tl.constexpr, D_CHUNKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # fmt: on
    """Halves a and c of the keys, and what R_CHUNK numbers of the latents from r on add."""
    z = load(z_ptr + r, rows, there, K_SLOT, RK - r, (R_CHUNK,))[0]
    at = r + tl.arange(0, R_CHUNK)
    a = product(z, load(up_ptr, at, at < RK, UP_ROW, HALF, D_CHUNKS)[0], a, UPCAST)
    c = product(z, load(up_ptr + HALF, at, at < RK, UP_ROW, HALF, D_CHUNKS)[0], c, UPCAST)
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
    """`zoo.attention.rotary_decode`, which says what the arguments are.

    Packed numbers, of which the scales are given, are unpacked before the kernel reads them.
    """
    batch, heads, tokens, d = q.shape
    z, v = split.numbers(z, z_scale, q), split.numbers(v, v_scale, q)
    lifted = up.size(2) // d  # kv heads of a latent
    shared = gcd(heads // (z.size(1) * lifted), heads // v.size(1))  # query heads of one group
    groups = heads // shared
    shape = constants(
        *(shared, tokens, z.size(3), v.size(3), d, z.element_size()), amd=bool(torch.version.hip)
    )
    splits = split.splits_of(batch * groups, z.size(2), shape["TILE"])
    parts = split.Parts(q, splits, v.size(3))
    mean = None if mean is None else mean.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    kernel[(groups, splits, batch)](
        *(q.contiguous(), z, v, span.contiguous(), bias, cos, sin, up.contiguous(), mean),
        *(parts.part, parts.weight, scale, *z.stride()[:2], *v.stride()[:2]),
        *(split.per_sequence(span), split.per_sequence(bias), split.per_sequence(cos)),
        K_SHARE=groups // (z.size(1) * lifted),
        V_SHARE=groups // v.size(1),
        LIFTED=lifted,
        K_SLOT=z.stride(2),
        V_SLOT=v.stride(2),
        UPCAST=not q.is_cuda,
        **shape,
    )
    return parts.merge()


def constants(
    shared: int, tokens: int, rk: int, rv: int, head_dim: int, itemsize: int, amd: bool
) -> dict:
    """What the shapes alone say; also for `aot.py`. amd: hold no lift, it would be in registers."""
    queries, half = shared * tokens, max(split.LEAST_ROWS, triton.next_power_of_2(head_dim // 2))
    padded = triton.cdiv(rk, split.LEAST_ROWS) * split.LEAST_ROWS
    return {
        "QUERIES": queries,
        "TOKENS": tokens,
        "RK": rk,
        "RV": rv,
        "HALF": head_dim // 2,
        "R_CHUNK": max(32, gcd(padded, 64)),
        "V_CHUNKS": split.chunks(rv, least=32),
        "D_CHUNKS": (half,),
        "HELD": padded * 2 * half * itemsize <= MOST_HELD and not amd,
        "ROWS": max(split.LEAST_ROWS, triton.next_power_of_2(queries)),
        "TILE": split.tile_of(rk + rv, itemsize, most=32),
        "num_warps": 4,
        "num_stages": 2,
    }
