"""Attention over a compressed cache, in plain PyTorch. This file defines what is correct.

Shapes: B batch, T new tokens, S cache slots, H query heads, G key/value heads, D head size,
L latents per token (each shared by G / L heads), R rank: the width of one latent.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Buffer, unpacked
from .rope import rotate

HIDDEN = -3e4  # what a score of padding is lowered by: enough, and fp16 holds it


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


def lift(z: Buffer, up: Tensor, head_dim: int) -> Tensor:
    """Latents back to heads. z: (B, L, S, R), up: (L, R, G / L * D) -> (B, G, S, D)."""
    return (unpacked(z, up.dtype) @ up).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)


def absorb(q: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """Queries that read latents as they would have read the lifted keys.

    q: (B, H, T, D), up: (L, R, G / L * D) -> (B, H, T, R), with q · lift(z) = absorb(q) · z.
    """
    return _per_head(q, up.transpose(1, 2).unflatten(1, (-1, head_dim)))


def lift_heads(y: Tensor, up: Tensor, head_dim: int) -> Tensor:
    """What every query head read from the value latents, back to heads.

    y: (B, H, T, R), up: (L, R, G / L * D) -> (B, H, T, D).
    """
    return _per_head(y, up.unflatten(-1, (-1, head_dim)).transpose(1, 2))


def _per_head(x: Tensor, maps: Tensor) -> Tensor:
    """One matrix a kv head, for all its query heads. (B, H, T, n), (L, G / L, n, m) -> (..., m)."""
    grouped = x.unflatten(1, (*maps.shape[:2], -1)).flatten(3, 4)  # (B, L, G / L, H / G * T, n)
    return (grouped @ maps).unflatten(3, (-1, x.size(2))).flatten(1, 3)


class Seen(NamedTuple):
    """Which slots one new token of every sequence sees; made once a step, for all layers.

    span: (B or 1, 2), the first slot that is read, and the one behind the last, the token's own.
    bias: (B or 1, S) in fp32, added to the scores of every head, -inf where a slot in the span
    holds padding; None adds nothing. slopes: (H,), what each head multiplies the bias by (ALiBi);
    without a bias it is how far a slot is behind the token, as a negative number.
    """

    span: Tensor
    bias: Tensor | None = None
    slopes: Tensor | None = None


def one_token(pos: Tensor, visible: Tensor | None = None) -> Seen:
    """What a token in slot pos (1,) sees: the slots up to its own where visible (B or 1, S)."""
    if visible is None:
        return Seen(torch.stack((torch.zeros_like(pos), pos + 1), dim=1))
    first = visible.int().argmax(1)
    span = torch.stack((first, (pos + 1).expand_as(first)), dim=1)
    return Seen(
        span, torch.zeros(visible.shape, device=pos.device).masked_fill(~visible, -torch.inf)
    )


class Causal(NamedTuple):
    """What new tokens in the last slots see: every slot up to their own, if it is no padding.

    valid: (B, S), false where a slot holds padding. With slopes (H,), one a head (ALiBi), a score
    falls by the slope for every position that lies between; position: (B or 1, S), whole numbers
    below 2 ** 24. A token of padding sees padding, so as not to turn into NaN.
    """

    valid: Tensor | None = None
    position: Tensor | None = None
    slopes: Tensor | None = None


Mask = Tensor | Causal | Seen  # a prompt's, as a matrix or in words, or one token's


def latent_attention(
    q: Tensor, k: Buffer, v: Buffer, mask: Tensor | Causal, scale: float
) -> Tensor:
    """Softmax attention of a prompt, where keys and values may differ in heads and in width.

    q: (B, H, T, R), k: (B, K, S, R), v: (B, L, S, W) -> (B, H, T, W); K and L divide H.
    mask: (B or 1, H or 1, T, S), true where a token looks, or in fp32 what is added to the
    scores; `Causal` says the same of the last T slots, and needs no such matrix. What is packed is
    read as the numbers that it stands for, here as in what follows.
    """
    k, v = unpacked(k, q.dtype), unpacked(v, q.dtype)
    if isinstance(mask, Causal):
        q, k = _with_columns(q, k, mask, scale)
    # equal shapes keep SDPA on its flash path; multiples of 8 are faster
    heads = math.lcm(k.size(1), v.size(1))
    width = -(-max(k.size(3), v.size(3)) // 8) * 8
    wide = _widen(q, width, q.size(1)), _widen(k, width, heads), _widen(v, width, heads)
    if isinstance(mask, Causal):
        y = _causal(*wide, scale)
    else:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(*wide, mask, scale=scale, enable_gqa=True)
    return y[..., : v.size(3)]


def _with_columns(q: Tensor, k: Tensor, seen: Causal, scale: float) -> tuple[Tensor, Tensor]:
    """q and k behind columns of which the products are what is added to the scores.

    A row of scores may be shifted as a whole, so that slope * (j - i) for slot j needs a column of
    slopes and one of j. Both are cut into parts that 16 bits hold exactly, and the first column
    takes about slope * i away, so that sums stay small where they count; counted from the last
    token they are small in whichever order a processor adds them. Factors of 256 are for the range
    of fp16.
    """
    left: list[Tensor] = []
    right: list[Tensor] = []
    if seen.slopes is not None and seen.position is not None:
        slopes = seen.slopes[:, None, None] / scale
        position = (seen.position - seen.position[:, -1:])[:, None, :, None]
        left.append(slopes * position[:, :, -q.size(2) :] / -256)
        right.append(torch.full_like(slopes[:1], 256.0))
        for slope in _parts(slopes * 256, 2, q.dtype):
            for part in _parts(position / 256, 3, k.dtype):
                left.append(slope)
                right.append(part)
    if seen.valid is not None:
        left.append(torch.full_like(q[:1, :1, :1, :1], 1 / scale))
        right.append(torch.where(seen.valid, 0.0, HIDDEN)[:, None, :, None])
    return _behind(left, q), _behind(right, k)


def _parts(x: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """So many numbers of a dtype that sum up to x as nearly as they can."""
    parts: list[Tensor] = []
    for _ in range(count):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


def _behind(columns: list[Tensor], x: Tensor) -> Tensor:
    """x (B, h, n, w) behind columns that expand to (B, h, n, 1)."""
    return torch.cat([c.to(x.dtype).expand(*x.shape[:3], 1) for c in columns] + [x], dim=3)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of T tokens in the last of S slots, each of which sees as far as itself.

    q: (B, H, T, W), k, v: (B, h, S, W) -> (B, H, T, W); h divides H.
    """
    past = k.size(2) - q.size(2)
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if q.device.type != "cpu" or q.requires_grad or k.requires_grad:
        seen = causal_mask(torch.arange(past, k.size(2), device=q.device), k.size(2))
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    # without that T x S matrix: what is past and what is new are read apart, and weighed by the
    # sums of their softmaxes, which PyTorch gives without a gradient
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    old, old_sum = flash(q, k[:, :, :past], v[:, :, :past], scale=scale)
    new, new_sum = flash(q, k[:, :, past:], v[:, :, past:], is_causal=True, scale=scale)
    weight = torch.sigmoid(new_sum - old_sum)[..., None]
    return torch.lerp(old.to(weight.dtype), new.to(weight.dtype), weight).to(q.dtype)


def latent_decode(
    q: Tensor,
    k: Buffer,
    v: Buffer,
    span: Tensor,
    scale: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attention of one or a few new tokens over a static cache, of which only `span` counts.

    q: (B, H, T, R), k: (B, K, S, R), v: (B, L, S, W) -> (B, H, T, W); K and L divide H.
    span, bias, slopes: see `Seen`. The span ends behind the last of the T tokens, and each sees
    as far as itself.
    """
    k, v = unpacked(k, q.dtype), unpacked(v, q.dtype)
    grouped = (q * scale).unflatten(1, (k.size(1), -1)).flatten(2, 3)  # queries of one key head
    # k.mT would be one more input of a layer compiled by itself, beside the k it aliases
    scores = (
        (grouped @ k.transpose(2, 3)).unflatten(2, (-1, q.size(2))).flatten(1, 2)
    )  # (B, H, T, S)
    return _read(scores, v, span, bias, slopes)


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
) -> Tensor:
    """Attention of one new token over keys that are cached turned within their blocks only.

    With c_b the centre of block b and i the new position, R_i q · R_j k = R_(i - c_b) q · φ_j where
    φ_j = R_(j - c_b) k_j, and φ_j = lift(z_j) + mean. So one query a block reads all its latents.
    q: (B, H, 1, D), not rotated; z: (B, L, S, R) latents of φ; v, span, bias: as in
    `latent_decode`; cos, sin: of the angles of i - c_b, (B or 1, 1, N, D / 2) for
    N = ceil(S / block) blocks; up: (L, R, G / L * D); mean: (G, 1, D). Returns (B, H, 1, W).
    """
    z, v = unpacked(z, q.dtype), unpacked(v, q.dtype)
    blocks, slots = cos.size(2), z.size(2)
    block = min(block, slots)
    turned = rotate(q.expand(-1, -1, blocks, -1), cos, sin) * scale  # (B, H, N, D)
    u = absorb(turned, up, q.size(3)).unflatten(1, (z.size(1), -1)).transpose(2, 3)
    if slots % block:
        z = F.pad(z, (0, 0, 0, blocks * block - slots))
    scores = u @ z.unflatten(2, (blocks, block)).mT  # (B, L, N, H / L, block)
    if mean is not None:  # what it adds is one number a block and query
        added = (turned.unflatten(1, (len(mean), -1)) * mean[:, None]).sum(-1).flatten(1, 2)
        scores = scores + added.unflatten(1, (z.size(1), -1)).transpose(2, 3)[..., None]
    scores = scores.transpose(2, 3).flatten(3).flatten(1, 2)[:, :, None, :slots]
    return _read(scores, v, span, bias)


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
) -> Tensor:
    """Attention of one or a few new tokens over latents of keys that are lifted, then rotated.

    q: (B, H, T, D), rotated; z: (B, L, S, R) latents of keys before the rotation; v, span, bias: as
    in `latent_decode`; cos, sin: of the angles of all slots, (B or 1, 1, S, D / 2); up:
    (L, R, G / L * D); mean: (G, 1, D), added before the rotation. Returns (B, H, T, W).
    """
    return latent_decode(q, rebuild(z, cos, sin, up, mean), v, span, scale, bias)


def rebuild(z: Buffer, cos: Tensor, sin: Tensor, up: Tensor, mean: Tensor | None) -> Tensor:
    """Rotated keys (B, G, S, D) from their latents. Arguments as in `rotary_decode`."""
    k = lift(z, up, 2 * cos.size(-1))
    return rotate(k if mean is None else k + mean, cos, sin)


def _read(
    scores: Tensor, v: Tensor, span: Tensor, bias: Tensor | None, slopes: Tensor | None = None
) -> Tensor:
    """Softmax over scores (B, H, T, S), and what it reads of v (B, L, S, W): (B, H, T, W)."""
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
    p = p.unflatten(1, (v.size(1), -1)).flatten(2, 3)  # queries of one value latent together
    return (p @ v).unflatten(2, (-1, new)).flatten(1, 2)


def _widen(x: Tensor, width: int, heads: int) -> Tensor:
    """x (B, h, S, w) as (B, heads, S, width): heads repeated, zeros behind what is there."""
    if x.size(3) < width:
        x = F.pad(x, (0, width - x.size(3)))
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)
