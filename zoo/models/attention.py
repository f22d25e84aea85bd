"""Attention over a compressed cache in plain PyTorch: the definition that fused ops must match.

Shapes: B batch, T new tokens, S cache slots, H query heads, G kv heads, D head size, L latents per
token (each shared by G / L kv heads), R rank: the width of a latent.

Arguments k, v and z may be `Packed`: they are unpacked to the dtype of the queries first.

With a `table` (B, P), in int32 and contiguous, a decoding op reads a cache in pages: k, v and z are
(pages, heads, page, width), or rows (pages, page, bytes), where `page` is a multiple of 16. Slot t
of sequence b is slot t % page of page table[b, t // page]. span, bias and position count slots t,
of which there are S = P * page. Entries for pages without a slot of the span may be anything.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Buffer, unpacked
from .mask import CausalMask, add_mask_columns, causal_matrix
from .packing import Packed
from .rope import rotate


def lift(z: Buffer, up: Tensor, head_dim: int) -> Tensor:
    """Decode latents to heads: z (B, L, S, R), up (L, R, G / L * D) -> (B, G, S, D)."""
    return (unpacked(z, up.dtype) @ up).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def absorb(q: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """Apply the key decoder to the queries instead of the keys: q · lift(z) = absorb(q) · z.

    q: (B, H, T, D), up: (L, R, G / L * D) -> (B, H, T, R).
    """
    return _per_head(q, up.transpose(1, 2).unflatten(1, (-1, head_dim)))


def lift_heads(y: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """Decode the output of attention over value latents, one vector per query head.

    y: (B, H, T, R), up: (L, R, G / L * D) -> (B, H, T, D).
    """
    return _per_head(y, up.unflatten(-1, (-1, head_dim)).transpose(1, 2))


def _per_head(x: Tensor, maps: Tensor) -> Tensor:
    """Multiply by the matrix of each query head's kv head.

    x: (B, H, T, n), maps: (L, G / L, n, m) -> (B, H, T, m).
    """
    grouped = x.unflatten(1, (*maps.shape[:2], -1)).flatten(3, 4)  # (B, L, G / L, H / G * T, n)
    return (grouped @ maps).unflatten(3, (-1, x.size(2))).flatten(1, 3)


def latent_attention(
    q: Tensor, k: Buffer, v: Buffer, mask: Tensor | CausalMask, scale: float
) -> Tensor:
    """Softmax attention of a prompt. Keys and values may differ in number of heads and in width.

    q: (B, H, T, R), k: (B, K, S, R), v: (B, L, S, W) -> (B, H, T, W); K and L divide H.
    mask: `CausalMask`, or a matrix (B or 1, H or 1, T, S): bool, true where a token attends, or
    fp32, added to the scores.
    """
    k, v = unpacked(k, q.dtype), unpacked(v, q.dtype)
    if isinstance(mask, CausalMask):
        q, k = add_mask_columns(q, k, mask, scale)
    # SDPA takes its flash path only if k and v have equal shapes; multiples of 8 are faster
    heads = math.lcm(k.size(1), v.size(1))
    width = -(-max(k.size(3), v.size(3)) // 8) * 8
    wide = _widen(q, width, q.size(1)), _widen(k, width, heads), _widen(v, width, heads)
    if isinstance(mask, CausalMask):
        y = _causal(*wide, scale)
    else:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(*wide, mask, scale=scale, enable_gqa=True)
    return y[..., : v.size(3)]


def attention_weights(q: Tensor, k: Buffer, mask: Tensor | CausalMask, scale: float) -> Tensor:
    """The weights by which `latent_attention` averages values: (B, H, T, S) in fp32.

    q, k, mask: as there. For few tokens: all weights are held at once.
    """
    k = unpacked(k, q.dtype)
    if isinstance(mask, CausalMask):
        q, k = add_mask_columns(q, k, mask, scale)
        slots = k.size(2)
        mask = causal_matrix(torch.arange(slots - q.size(2), slots, device=q.device), slots)
    scores = _scores(q * scale, k).float()
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (scores + mask).softmax(-1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of q (B, H, T, R) and k (B, K, S, R): (B, H, T, S)."""
    grouped = q.unflatten(1, (k.size(1), -1)).flatten(2, 3)  # queries of one key head
    # not k.mT: to a layer that is compiled separately it would be a second input that aliases k
    scores = grouped @ k.transpose(2, 3)
    return scores.unflatten(2, (-1, q.size(2))).flatten(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of T tokens in the last T of S slots.

    q: (B, H, T, W), k, v: (B, h, S, W) -> (B, H, T, W); h divides H.
    """
    past = k.size(2) - q.size(2)
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if q.device.type != "cpu" or q.requires_grad or k.requires_grad:
        mask = causal_matrix(torch.arange(past, k.size(2), device=q.device), k.size(2))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    # To avoid the T x S matrix, attend to past and new slots separately and combine the two by
    # their log-sum-exps. This op returns them, but without a gradient.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    old, old_lse = flash(q, k[:, :, :past], v[:, :, :past], scale=scale)
    new, new_lse = flash(q, k[:, :, past:], v[:, :, past:], is_causal=True, scale=scale)
    weight = torch.sigmoid(new_lse - old_lse)[..., None]
    return torch.lerp(old.to(weight.dtype), new.to(weight.dtype), weight).to(q.dtype)


def latent_decode(
    q: Tensor,
    k: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Causal attention of one or a few new tokens over the slots of `span` in a static cache.

    q: (B, H, T, R), k: (B, K, S, R), v: (B, L, S, W) -> (B, H, T, W); K and L divide H.
    span, bias, slopes: see `DecodeMask`. The T tokens are in the last T slots of the span. table:
    of pages, see above.
    """
    k, v = (unpacked(_in_order(x, span, table), q.dtype) for x in (k, v))
    return _weighted_values(_scores(q * scale, k), v, span, bias, slopes)


def anchored_decode(
    q: Tensor,
    z: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    up: Tensor,
    mean: Tensor | None,
    block: int,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Attention of one or a few new tokens over keys rotated relative to their block's center.

    Let c be the center of a block and i the position of a new token. For a key k_j in the block,
    R_i q · R_j k_j = R_(i - c) q · φ_j with φ_j = R_(j - c) k_j = lift(z_j) + mean. So one rotated
    and absorbed query per block reads all latents of the block.
    q: (B, H, T, D), not rotated; z: (B, L, S, R) latents of φ; v, span, bias, table: as in
    `latent_decode`; cos, sin: of the angles of i - c, (B or 1, T, N, D / 2) for N = ceil(S / block)
    blocks; up: (L, R, G / L * D); mean: (G, 1, D); position: (B or 1, S) in int32, below N * block,
    only for T = 1: the positions of the slots, where padding makes them differ from 0, 1, 2...:
    slot j is in block position[j] // block. Fused ops expect that, inside the span, positions never
    fall, and rise by at most 1 from slot to slot. Returns (B, H, T, W).
    """
    z, v = (_in_order(x, span, table) for x in (z, v))
    if position is not None:  # a block's slots may be anywhere: R_(i - c) q · φ = q · R_(c - i) φ
        own = (position // block).long()[:, None, :, None]
        cos, sin = (x.take_along_dim(own, 2) for x in (cos, sin))  # (B or 1, 1, S, D / 2)
        return latent_decode(q, rebuild(z, cos, -sin, up, mean), v, span, scale, bias)
    z, v = unpacked(z, q.dtype), unpacked(v, q.dtype)
    blocks, slots = cos.size(2), z.size(2)
    block = min(block, slots)
    each = q[:, :, :, None].expand(-1, -1, -1, blocks, -1)
    turned = (rotate(each, cos[:, None], sin[:, None]) * scale).flatten(1, 2)  # (B, H * T, N, D)
    u = absorb(turned, up, q.size(3)).unflatten(1, (z.size(1), -1)).transpose(2, 3)
    if slots % block:
        z = F.pad(z, (0, 0, 0, blocks * block - slots))
    scores = u @ z.unflatten(2, (blocks, block)).mT  # (B, L, N, H / L * T, block)
    if mean is not None:  # it adds one number per block and query
        added = (turned.unflatten(1, (len(mean), -1)) * mean[:, None]).sum(-1).flatten(1, 2)
        scores = scores + added.unflatten(1, (z.size(1), -1)).transpose(2, 3)[..., None]
    scores = scores.transpose(2, 3).flatten(3).flatten(1, 2).unflatten(1, q.shape[1:3])
    return _weighted_values(scores[..., :slots], v, span, bias)


def rotary_decode(
    q: Tensor,
    z: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    up: Tensor,
    mean: Tensor | None,
    bias: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Attention of one or a few new tokens over latents of keys, which are lifted and rotated here.

    q: (B, H, T, D), rotated; z: (B, L, S, R) latents of keys before the rotation; v, span, bias,
    table: as in `latent_decode`; cos, sin: of the angles of all slots, (B or 1, 1, S, D / 2); up:
    (L, R, G / L * D); mean: (G, 1, D), added before the rotation. Returns (B, H, T, W).
    """
    z, v = (_in_order(x, span, table) for x in (z, v))
    return latent_decode(q, rebuild(z, cos, sin, up, mean), v, span, scale, bias)


def _in_order(x: Buffer, span: Tensor, table: Tensor | None) -> Buffer:
    """A cache without a table, from one with it. Slots outside of the span are copies of its ends,
    so that nothing else is read."""
    if table is None:
        return x
    pages = x.rows[:, None] if isinstance(x, Packed) else x  # (pages, heads, page, ...)
    page = pages.size(2)
    slot = torch.arange(table.size(1) * page, device=pages.device)
    slot = slot.clamp(span[:, :1], span[:, 1:] - 1)  # (B or 1, S)
    y = pages[table.take_along_dim(slot // page, 1).long(), :, slot % page].transpose(1, 2)
    return x._replace(rows=y[:, 0]) if isinstance(x, Packed) else y


def rebuild(z: Buffer, cos: Tensor, sin: Tensor, up: Tensor, mean: Tensor | None) -> Tensor:
    """Rotated keys (B, G, S, D) from their latents. Arguments as in `rotary_decode`."""
    k = lift(z, up, 2 * cos.size(-1))
    return rotate(k if mean is None else k + mean, cos, sin)


def _weighted_values(
    scores: Tensor, v: Tensor, span: Tensor, bias: Tensor | None, slopes: Tensor | None = None
) -> Tensor:
    """Softmax of scores (B, H, T, S) times v (B, L, S, W): (B, H, T, W)."""
    new, slots = scores.shape[2:]
    slot = torch.arange(slots, device=v.device)
    last = span[:, 1:] - new + torch.arange(new, device=v.device)  # (B or 1, T)
    seen = (slot >= span[:, :1, None]) & (slot <= last[..., None])  # (B or 1, T, S)
    if slopes is not None and bias is None:
        bias = (slot - span[:, 1:] + 1).float()
    if bias is not None:
        scores = scores + bias[:, None, None] * (1 if slopes is None else slopes[:, None, None])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    p = p.unflatten(1, (v.size(1), -1)).flatten(2, 3)  # the query heads of one value latent
    return (p @ v).unflatten(2, (-1, new)).flatten(1, 2)


def _widen(x: Tensor, width: int, heads: int) -> Tensor:
    """x (B, h, S, w) as (B, heads, S, width): zeros are appended and heads repeated."""
    if x.size(3) < width:
        x = F.pad(x, (0, width - x.size(3)))
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)
