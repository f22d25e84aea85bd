"""Masks: which cache slots a new token attends to, and what ALiBi adds to its scores.

B batch, T new tokens, S cache slots, H query heads, D width of queries and keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -3e4  # added to the scores of padding: large enough to hide it, and within fp16's range


class CausalMask(NamedTuple):
    """The mask of T new tokens in the last T slots: each attends to all slots up to its own.

    valid: (B, S), false at slots that hold padding, which only padding tokens attend to (a token
    that attends to nothing would become NaN); None: no padding. slopes: (H,), with ALiBi; a score
    falls by the head's slope for every position between the two tokens. position: (B or 1, S),
    whole numbers below 2 ** 24, given with slopes.
    """

    valid: Tensor | None = None
    position: Tensor | None = None
    slopes: Tensor | None = None


class DecodeMask(NamedTuple):
    """The mask of one or a few new tokens per sequence, made once per step for all layers.

    span: (B or 1, 2), the first slot that is read and the slot after the last one. The T tokens are
    in the last T slots of the span, and none attends to a later one. bias: (B or 1, S) in fp32,
    added to the scores of every head, -inf where a slot inside the span holds padding; None adds
    nothing. slopes: (H,), with ALiBi; each head multiplies the bias by its slope. If bias is None,
    it is minus the distance in slots to the last token. table: (B, P), the pages of each sequence
    if the cache is in pages, as the decoding ops take it. shift: (B or 1, S), with a table of a
    ring: by how much positions in each page are ahead of those at its place in the table.
    """

    span: Tensor
    bias: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    shift: Tensor | None = None


# a tensor (B or 1, H or 1, T, S) is bool, true where a token attends, or fp32, added to the scores
Mask = Tensor | CausalMask | DecodeMask


def causal_matrix(pos: Tensor, slots: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """The causal mask as a matrix (B or 1, 1, T, S) of bool, true where a token attends.

    pos: (T,) slots of the new tokens. slots: how many there are, or which, (S,). valid: (B, S),
    false at slots that hold padding. A token always attends to its own slot: a padding token that
    attends to nothing would become NaN.
    """
    slot = slots if isinstance(slots, Tensor) else torch.arange(slots, device=pos.device)
    seen = slot <= pos[:, None]  # (T, S)
    if valid is None:
        return seen[None, None]
    return ((seen & valid[:, None]) | (slot == pos[:, None]))[:, None]


def at(x: Tensor, pos: Tensor) -> Tensor:
    """Of x (B or 1, S) the slots pos, (T,) for all sequences or (B, T): (B or 1, T)."""
    return x[:, pos] if pos.dim() == 1 else x.expand(len(pos), -1).gather(1, pos)


def counted(valid: Tensor) -> Tensor:
    """Positions (B, S), counted over the slots that hold no padding, from valid (B, S)."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def whole_rows(mask: Tensor, pos: Tensor) -> Tensor:
    """A mask matrix in which every token attends to some slot: its own if it is hidden from all.

    (A token that attends to nothing would become NaN, and so would all that read its latents.)
    mask: (B or 1, H or 1, T or 1, S), bool or floats that are added to scores; floats below
    `HIDDEN`, such as the least number of a dtype, hide. pos: (T,), slots of the tokens. Returns
    bool or fp32.
    """
    own = torch.arange(mask.size(3), device=mask.device) == pos[:, None]
    if mask.dtype == torch.bool:
        return mask | (own & ~mask.any(3, keepdim=True))
    mask = mask.float().masked_fill(mask < HIDDEN, -torch.inf)
    return mask.masked_fill(own & (mask == -torch.inf).all(3, keepdim=True), 0.0)


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask matrix, bool or added to scores, that also hides slots: hidden is bool."""
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, -torch.inf)


def decode_mask(pos: Tensor, visible: Tensor | None = None) -> DecodeMask:
    """The mask of tokens in successive slots pos (T,), which attend to the slots up to their own.

    visible: (B or 1, S), false at slots that are hidden from all; None hides none.
    """
    end = pos[-1:] + 1
    if visible is None:
        return DecodeMask(torch.stack((torch.zeros_like(end), end), dim=1))
    first = visible.int().argmax(1)
    span = torch.stack((first, end.expand_as(first)), dim=1)
    bias = torch.zeros(visible.shape, device=pos.device).masked_fill(~visible, -torch.inf)
    return DecodeMask(span, bias)


def alibi_slopes(heads: int, bias_max: float = 8.0) -> Tensor:
    """Slopes of the heads, (heads,), as MPT computes them (ALiBi, arXiv 2108.12409).

    If `heads` is not a power of two, the slopes are taken from those of the next power of two:
    every second one first, then the others.
    """
    power = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** -(torch.arange(1, power + 1) * (bias_max / power))
    return slopes if power == heads else torch.cat((slopes[1::2], slopes[::2]))[:heads]


def add_mask_columns(q: Tensor, k: Tensor, mask: CausalMask, scale: float) -> tuple[Tensor, Tensor]:
    """Queries (B, H, T, D) and keys (B, h, S, D) with columns whose products add mask and ALiBi.

    So no (T, S) matrix is needed. Softmax is invariant to a constant added to a row of scores, so
    slope * (j - i) for token i and slot j needs only a column of slopes and a column of j. Both are
    split into parts that 16 bits hold exactly. Positions are counted from the last token, and the
    first column subtracts about slope * i: both keep the sums small where the softmax is large.
    The factors of 256 keep the parts within fp16's range.
    """
    left: list[Tensor] = []
    right: list[Tensor] = []
    if mask.slopes is not None and mask.position is not None:
        slopes = mask.slopes[:, None, None] / scale
        position = (mask.position - mask.position[:, -1:])[:, None, :, None]
        left.append(slopes * position[:, :, -q.size(2) :] / -256)
        right.append(torch.full_like(slopes[:1], 256.0))
        for slope in _parts(slopes * 256, 2, q.dtype):
            for part in _parts(position / 256, 3, k.dtype):
                left.append(slope)
                right.append(part)
    if mask.valid is not None:
        left.append(torch.full_like(q[:1, :1, :1, :1], 1 / scale))
        right.append(torch.where(mask.valid, 0.0, HIDDEN)[:, None, :, None])
    return _prepend(left, q), _prepend(right, k)


def _parts(x: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """`count` tensors of a dtype whose sum is as near to x as they can be."""
    parts: list[Tensor] = []
    for _ in range(count):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


def _prepend(columns: list[Tensor], x: Tensor) -> Tensor:
    """Columns that expand to (B, h, n, 1), then x (B, h, n, w), side by side."""
    return torch.cat([c.to(x.dtype).expand(*x.shape[:3], 1) for c in columns] + [x], dim=3)
