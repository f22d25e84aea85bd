"""Attention over a compressed cache, in plain PyTorch. This file defines what is correct.

Shapes: B batch, T new tokens, S cache slots, H query heads, G key/value heads, D head size,
L latents per token (each shared by G / L heads), R rank: the width of one latent.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate


def causal_mask(pos: Tensor, slots: int, valid: Tensor | None = None) -> Tensor:
    """Which slots each new token sees: (B or 1, 1, T, S), true where it looks.

    pos: (T,) slots of the new tokens. valid: (B, S), false where a slot holds padding. A token
    always sees its own slot: a padding token that saw nothing would turn into NaN.
    """
    slot = torch.arange(slots, device=pos.device)
    seen = slot <= pos[:, None]  # (T, S)
    if valid is None:
        return seen[None, None]
    return ((seen & valid[:, None]) | (slot == pos[:, None]))[:, None]


def alibi_slopes(heads: int, bias_max: float = 8.0) -> Tensor:
    """Slope of every head, (heads,), as MPT spaces them (ALiBi, arXiv 2108.12409).

    Where `heads` is no power of two, every second slope of the next power comes first.
    """
    power = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** -(torch.arange(1, power + 1) * (bias_max / power))
    return slopes if power == heads else torch.cat((slopes[1::2], slopes[::2]))[:heads]


def lift(z: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """Latents back to heads. z: (B, L, S, R), up: (L, R, G / L * D) -> (B, G, S, D)."""
    return (z @ up).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def absorb(q: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """Queries that read latents as they would have read the lifted keys.

    q: (B, H, T, D), up: (L, R, G / L * D) -> (B, H, T, R), with q · lift(z) = absorb(q) · z.
    """
    return _per_head(q, up.mT.unflatten(1, (-1, head_dim)))


def lift_heads(y: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """What every query head read from the value latents, back to heads.

    y: (B, H, T, R), up: (L, R, G / L * D) -> (B, H, T, D).
    """
    return _per_head(y, up.unflatten(-1, (-1, head_dim)).transpose(1, 2))


def _per_head(x: Tensor, maps: Tensor) -> Tensor:
    """One matrix a kv head, for all its query heads. (B, H, T, n), (L, G / L, n, m) -> (..., m)."""
    grouped = x.unflatten(1, (*maps.shape[:2], -1)).flatten(3, 4)  # (B, L, G / L, H / G * T, n)
    return (grouped @ maps).unflatten(3, (-1, x.size(2))).flatten(1, 3)


def latent_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention where keys and values may differ in heads and in width.

    q: (B, H, T, R), k: (B, K, S, R), v: (B, L, S, W) -> (B, H, T, W); K and L divide H.
    mask: (B or 1, H or 1, T, S), true where a token looks, or in fp32 what is added to the
    scores; None means causal with T = S.
    """
    if q.size(2) > 1:  # a prompt: equal shapes keep SDPA on its flash path
        width, heads = max(k.size(3), v.size(3)), math.lcm(k.size(1), v.size(1))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        y = F.scaled_dot_product_attention(
            _widen(q, width, q.size(1)),
            _widen(k, width, heads),
            _widen(v, width, heads),
            mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return y[..., : v.size(3)]
    q = (q * scale).unflatten(1, (k.size(1), -1)).flatten(2, 3)  # queries of one key head together
    return _read((q @ k.mT).flatten(1, 2)[:, :, None], v, mask)


def anchored_attention(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    ahead: tuple[Tensor, Tensor],
    up: Tensor,
    mean: Tensor | None,
    block: int,
) -> Tensor:
    """Attention of one new token over keys that are cached turned within their blocks only.

    With c_b the centre of block b and i the new position, R_i q · R_j k = R_(i - c_b) q · φ_j where
    φ_j = R_(j - c_b) k_j, and φ_j = lift(z_j) + mean. So one query a block reads all its latents.
    q: (B, H, 1, D), not rotated; z: (B, L, S, R) latents of φ; v, mask: as in `latent_attention`;
    ahead: cos and sin of i - c_b, (B or 1, 1, N, D / 2) for N = ceil(S / block) blocks; up:
    (L, R, G / L * D); mean: (G, 1, D). Returns (B, H, 1, W).
    """
    blocks, slots = ahead[0].size(2), z.size(2)
    block = min(block, slots)
    turned = rotate(q.expand(-1, -1, blocks, -1), *ahead) * scale  # (B, H, N, D)
    u = absorb(turned, up, q.size(3)).unflatten(1, (z.size(1), -1)).transpose(2, 3)
    if slots % block:
        z = F.pad(z, (0, 0, 0, blocks * block - slots))
    scores = u @ z.unflatten(2, (blocks, block)).mT  # (B, L, N, H / L, block)
    if mean is not None:  # what it adds is one number a block and query
        added = (turned.unflatten(1, (len(mean), -1)) * mean[:, None]).sum(-1).flatten(1, 2)
        scores = scores + added.unflatten(1, (z.size(1), -1)).transpose(2, 3)[..., None]
    scores = scores.transpose(2, 3).flatten(3).flatten(1, 2)[:, :, None, :slots]
    return _read(scores, v, mask)


def _read(scores: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over scores (B, H, 1, S), and what it reads of v (B, L, S, W): (B, H, 1, W)."""
    if mask is not None:
        seen = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if seen else scores + mask
    p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    p = p.unflatten(1, (v.size(1), -1)).flatten(2, 3)  # and those of one value latent
    return (p @ v).flatten(1, 2)[:, :, None]


def _widen(x: Tensor, width: int, heads: int) -> Tensor:
    """x (B, h, S, w) as (B, heads, S, width): heads repeated, zeros behind what is there."""
    if x.size(3) < width:
        x = F.pad(x, (0, width - x.size(3)))
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)
