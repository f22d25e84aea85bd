"""Masks of calls, as transformers passes them and as the native model takes them.

B batch, T new tokens, S cache slots, H query heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from ...zoo.models.mask import Mask, causal_matrix, decode_mask, whole_rows
from .inputs_eigen import Call, new_positions


def read_mask(mask: Tensor | None, call: Call, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """The slots without padding, (B or 1, S), of a 2-D mask, and the matrix of a 4-D mask.

    Conventions are transformers': a mask (B or 1, S) has 0 at padding. A mask (B or 1, 1 or H, T or
    1, S) is bool, true where a token attends, or floats that are added to the scores; integers 0
    and 1 are read as bool. A 4-D mask says all, so causal order too. Raises ValueError for others.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {form}: expected (batch, slots), or a 4-D mask")
    if call.checked:
        _check_values(mask)
    return (_padding(mask, call), None) if mask.dim() == 2 else (None, _matrix(mask, call, heads))


def _check_values(mask: Tensor) -> None:
    """Raise ValueError for numbers that can be read in two ways."""
    if mask.dtype == torch.bool:
        return
    ones = ((mask == 0) | (mask == 1)).all()
    if mask.dim() == 4 and mask.is_floating_point():
        if ones and mask.any():
            raise ValueError(
                "attention_mask is 4-D with floats 0 and 1, but floats are added to the scores: "
                "pass mask.bool(), or 0 where a token attends and -inf elsewhere"
            )
    elif not ones:
        raise ValueError(
            "attention_mask has other values than 0 and 1: mark padding by 0; for packed texts "
            "pass a 4-D mask, or position_ids that restart and use_cache=False"
        )


def _padding(mask: Tensor, call: Call) -> Tensor:
    """False at padding, (B or 1, slots); slots of a static cache after the mask's are empty."""
    batch, length = mask.shape
    least = call.slots
    if call.fixed:
        least = int(call.past) + call.new if call.checked else 0
    if batch not in (1, call.batch) or not least <= length <= call.slots:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}: expected ({call.batch}, {least}), one number "
            "for each token in the cache and in the input"
        )
    return F.pad(mask.bool(), (0, call.slots - length))


def _matrix(mask: Tensor, call: Call, heads: int) -> Tensor:
    """A 4-D mask in bool or fp32, in which every token attends to some slot."""
    wanted = ((1, call.batch), (1, heads), (1, call.new), (call.slots,))
    if not all(n in allowed for n, allowed in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}: expected ({call.batch}, 1 or {heads}, "
            f"{call.new}, {call.slots}), from each new token to each slot of the cache"
        )
    return whole_rows(mask if mask.is_floating_point() else mask.bool(), call.pos)


def packed_matrix(position_ids: Tensor | None, call: Call) -> Tensor | None:
    """The matrix (B, 1, T, T) of texts whose positions restart, as transformers detects them."""
    if position_ids is None:
        return None
    text = find_packed_sequence_indices(new_positions(position_ids, call))
    if text is None:  # one text
        return None
    return (text[:, :, None] == text[:, None])[:, None] & causal_matrix(call.pos, call.slots)


def mask_of_call(
    matrix: Tensor | None,
    valid: Tensor | None,
    position: Tensor | None,
    cache: Cache | None,
    call: Call,
    anchor: int,
) -> Mask | None:
    """The mask for the native model; None: it makes one from `valid`.

    For one token that is the mask of the decoding ops, or a matrix for what these cannot do:
    floats, a mask for each head, and anchored keys unless positions follow one another as their
    slots do. (Compiled code cannot look: it takes the last call's word, which the cache keeps.)
    """
    follow = True
    if anchor > 1 and position is not None:
        follow = getattr(cache, "positions_follow", False)
        if call.checked:
            follow = _follow(position, matrix, valid, call)
        if cache is not None:
            cache.positions_follow = follow  # type: ignore[attr-defined]
    if call.new > 1:
        return matrix
    if matrix is None:
        return None if follow else causal_matrix(call.pos, call.slots, valid)
    if not follow or matrix.dtype != torch.bool or matrix.size(1) > 1:
        return matrix
    return decode_mask(call.pos, matrix[:, 0, 0])


def _follow(position: Tensor, matrix: Tensor | None, valid: Tensor | None, call: Call) -> bool:
    """Whether the slots that the last token sees have successive positions, none above the slot."""
    last = call.pos[-1:]
    rows = causal_matrix(last, call.slots, valid) if matrix is None else matrix[:, :, -1:]
    seen = (rows if rows.dtype == torch.bool else rows > -torch.inf).any(1)[:, 0]
    shift = position - torch.arange(call.slots, device=position.device)
    return not (((shift != shift[:, last]) | (shift > 0)) & seen).any()
