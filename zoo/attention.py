"""Attention over a compressed cache, in plain PyTorch. This file defines what is correct.

Shapes: B batch, T new tokens, S cache slots, H query heads, G key/value heads, D head size,
L latents per token (each shared by G / L heads), R rank: the width of one latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def lift(z: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """Latents back to heads. z: (B, L, S, R), up: (L, R, G / L * D) -> (B, G, S, D)."""
    return (z @ up).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def lift_heads(y: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """What every query head read from the value latents, back to heads.

    y: (B, H, T, R), up: (L, R, G / L * D) -> (B, H, T, D).
    """
    latents, _, width = up.shape
    heads = width // head_dim
    per_head = up.unflatten(-1, (heads, head_dim)).transpose(1, 2)  # (L, G / L, R, D)
    grouped = y.unflatten(1, (latents, heads, -1)).flatten(3, 4)  # (B, L, G / L, H / G * T, R)
    return (grouped @ per_head).unflatten(3, (-1, y.size(2))).flatten(1, 3)


def latent_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention where keys and values may differ in heads and in width.

    q: (B, H, T, D), k: (B, K, S, D), v: (B, L, S, R) -> (B, H, T, R); K and L divide H.
    mask: (B or 1, 1, T, S), true where a token looks; None means causal with T = S.
    """
    if q.size(2) > 1:  # a prompt: equal shapes keep SDPA on its flash path
        wide = F.pad(v, (0, k.size(3) - v.size(3)))
        wide = wide.repeat_interleave(k.size(1) // v.size(1), dim=1)
        y = F.scaled_dot_product_attention(
            q, k, wide, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return y[..., : v.size(3)]
    q = (q * scale).unflatten(1, (k.size(1), -1)).flatten(2, 3)  # queries of one key head together
    scores = (q @ k.mT).flatten(1, 2)[:, :, None]  # (B, H, 1, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    p = p.unflatten(1, (v.size(1), -1)).flatten(2, 3)  # and those of one value latent
    return (p @ v).flatten(1, 2)[:, :, None]
