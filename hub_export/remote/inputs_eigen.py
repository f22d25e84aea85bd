"""Masks, positions and options as transformers passes them, as the native model takes them.

B batch, T new tokens, S cache slots, H query heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from ...zoo.models.mask import Mask, causal_matrix, counted, decode_mask, whole_rows

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
PACKED = "FlashAttention's packed texts: pass position_ids that restart, and use_cache=False"
REFUSED = dict.fromkeys(VARLEN, PACKED) | {
    "output_attentions": "attention matrices, which are never computed",
    "output_router_logits": "the router of a mixture of experts",
}


class Call(NamedTuple):
    """The slots of one call. batch, new: tokens. slots: of the cache, the new ones included.

    past: how many slots are taken, a tensor for a static cache. fixed: whether the cache is static,
    so that the slots after the new ones are empty.
    """

    batch: int
    new: int
    past: int | Tensor
    slots: int
    fixed: bool
    pos: Tensor  # (T,), slots of the new tokens

    @property
    def checked(self) -> bool:
        """Whether values may be read: in compiled code that would break the graph."""
        return not torch.compiler.is_compiling()


def check_options(options: dict[str, object], config: PreTrainedConfig) -> None:
    """Raise ValueError for keywords that `forward` does not know, or asks for what it cannot do."""
    asked = {"output_attentions": getattr(config, "output_attentions", False)} | options
    for name, value in asked.items():
        if value is not None and value is not False and name in REFUSED:
            raise ValueError(f"{name} is not supported: this model has not {REFUSED[name]}")
    causal = options.get("is_causal")
    if (getattr(config, "is_causal", None) if causal is None else causal) is False:
        raise ValueError("is_causal=False is not supported: pass a 4-D attention_mask instead")
    known = (*REFUSED, "is_causal")
    unknown = [name for name, x in options.items() if name not in known and x is not None]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not arguments of this model; omit them")


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


def new_positions(position_ids: Tensor, call: Call) -> Tensor:
    """Positions of the new tokens, (B, T). Raises ValueError for another form."""
    x = position_ids if position_ids.dim() > 1 else position_ids[None]
    wrong = x.is_floating_point() or x.dim() != 2 or x.size(1) != call.new
    if wrong or x.size(0) not in (1, call.batch):
        raise ValueError(
            f"position_ids are {tuple(position_ids.shape)} in {position_ids.dtype}: expected whole "
            f"numbers ({call.batch}, {call.new}), the position of each new token"
        )
    return x.expand(call.batch, -1).long()


def slot_positions(
    position_ids: Tensor | None, cache: Cache | None, valid: Tensor | None, call: Call, learned: int
) -> Tensor | None:
    """Positions of all slots, (B, S), or None if they are those counted over `valid`.

    Some keys are rotated when they are read, by the positions of their slots. So positions that
    were passed are kept with the cache, as its `slot_positions`; those of a growing cache only if
    they are not the counted ones. learned: how many positions the model has, 0 for any.
    """
    kept = getattr(cache, "slot_positions", None)
    if not call.fixed and call.past == 0:
        kept = None  # of tokens that the cache holds no longer
    if position_ids is None and kept is None:
        return None
    slot = torch.arange(call.slots, device=call.pos.device)[None]
    usual = slot if valid is None else counted(valid)
    new = usual[:, call.pos] if position_ids is None else new_positions(position_ids, call)
    if call.checked:
        real = torch.ones_like(new, dtype=torch.bool) if valid is None else valid[:, call.pos]
        if kept is None and not call.fixed and ((new == usual[:, call.pos]) | ~real).all():
            return None
        _check_learned(new[real.expand_as(new)], learned)
    if learned:  # of padding, which may have any
        new = new.clamp(min=0)
    position = _merged(kept, usual, new, call)
    if cache is not None:
        cache.slot_positions = position  # type: ignore[attr-defined]
    return position


def _check_learned(position: Tensor, learned: int) -> None:
    """Raise ValueError for a position that the model has not learned. learned: 0 for any number."""
    if learned and ((position < 0) | (position >= learned)).any():
        raise ValueError(f"position_ids must be from 0 to {learned - 1}, which this model learned")


def _merged(kept: Tensor | None, usual: Tensor, new: Tensor, call: Call) -> Tensor:
    """Positions of all slots: of a static cache a buffer, which is written in place."""
    if kept is not None and kept.size(0) != call.batch:
        raise ValueError(
            f"the cache holds position_ids of {kept.size(0)} sequences, given {call.batch}: pass "
            "the tokens again, without this cache"
        )
    new = new.expand(call.batch, -1)
    if kept is not None and not call.fixed:
        return torch.cat((kept[:, : call.past], new), 1)
    if kept is None:
        kept = usual.expand(call.batch, -1).clone()
        if call.checked:
            torch._dynamo.mark_static_address(kept)  # else in-place writes prevent CUDA graphs
    return kept.index_copy_(1, call.pos, new)


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
