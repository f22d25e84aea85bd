"""Tokens, positions and options, as transformers passes them and as the native model takes them.

B batch, T new tokens, S cache slots, H query heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ...zoo.models.mask import counted

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


def call_of(tokens: Tensor, cache: Cache | None) -> Call:
    """The slots of a call."""
    batch, new = tokens.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    pos = torch.arange(new, device=tokens.device) + past
    if cache is not None and cache.is_compileable:
        return Call(batch, new, past, cache.get_max_length(), True, pos)
    return Call(batch, new, past, past + new, False, pos)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under either name: transformers 5.24 renamed past_key_values, in outputs too."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one input: pass only one")
    return past_key_values if cache is None else cache


def one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Ids (B, T), or embeddings (B, T, width). Raises ValueError for both or none."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected either input_ids or inputs_embeds, given both or none")
    tokens, ndim = (inputs_embeds, 3) if input_ids is None else (input_ids, 2)
    assert tokens is not None
    if tokens.dim() != ndim:
        name = "inputs_embeds (batch, tokens, width)" if ndim == 3 else "input_ids (batch, tokens)"
        raise ValueError(f"given a tensor of shape {tuple(tokens.shape)}: expected {name}")
    return tokens


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
    position_ids: Tensor | None,
    cache: Cache | None,
    valid: Tensor | None,
    matrix: Tensor | None,
    call: Call,
    learned: int,
) -> Tensor | None:
    """Positions of all slots, (B, S), or None if they are those counted over `valid`.

    Some keys are rotated when they are read, by the positions of their slots. So positions are kept
    with the cache, as its `slot_positions`. As long as all were counted, they are counted again, so
    a user may select rows of the cache; its `positions_counted` tells. By default positions are
    counted over a 2-D mask; with a 4-D mask they go on where counted ones ended, and else are the
    slots. learned: how many positions the model has, 0 for any.
    """
    kept = getattr(cache, "slot_positions", None)
    counting = getattr(cache, "positions_counted", True)
    if (call.checked or not call.fixed) and call.past == 0:
        kept, counting = None, True  # of tokens that the cache holds no longer
    given = [x for x in (position_ids, kept, valid, matrix) if x is not None]
    if not given or (cache is None and position_ids is None):
        return None
    slot = torch.arange(call.slots, device=call.pos.device)[None]
    usual = slot if valid is None else counted(valid)
    if position_ids is not None:
        new = new_positions(position_ids, call)
    elif counting and matrix is not None and kept is not None:
        new = kept[:, call.pos[:1] - 1] + 1 + slot[:, : call.new]
    else:
        new = (usual if counting else slot)[:, call.pos]
    counting = counting and matrix is None and (position_ids is None or call.checked)
    if call.checked:
        real = torch.ones_like(new, dtype=torch.bool) if valid is None else valid[:, call.pos]
        _check_learned(new[real.expand_as(new)], learned)
        counting = counting and bool(((new == usual[:, call.pos]) | ~real).all())
    if counting and not call.fixed:
        position, kept = None, None if valid is None else usual
    else:
        position = kept = _merged(kept, usual, new.clamp(min=0) if learned else new, call)
    if cache is not None:
        cache.slot_positions = kept  # type: ignore[attr-defined]
        if call.checked:
            cache.positions_counted = counting  # type: ignore[attr-defined]
    return position


def _check_learned(position: Tensor, learned: int) -> None:
    """Raise ValueError for a position that the model has not learned. learned: 0 for any number."""
    if learned and ((position < 0) | (position >= learned)).any():
        raise ValueError(
            f"position_ids (given or counted) reach {int(position.max())}, but this model learned "
            f"0 to {learned - 1}: use fewer tokens"
        )


def _merged(kept: Tensor | None, usual: Tensor, new: Tensor, call: Call) -> Tensor:
    """Positions of all slots: of a static cache a buffer, which is written in place."""
    if kept is not None and kept.size(0) not in (1, call.batch):
        raise ValueError(
            f"the cache holds position_ids of {kept.size(0)} sequences, given {call.batch}: pass "
            "the tokens again, without this cache"
        )
    new = new.expand(call.batch, -1)
    if not call.fixed:
        past = (usual if kept is None else kept)[:, : call.past].expand(call.batch, -1)
        return torch.cat((past, new), 1)
    if kept is None:
        kept = usual.expand(call.batch, -1).clone()
        if call.checked:
            torch._dynamo.mark_static_address(kept)  # else in-place writes prevent CUDA graphs
    return kept.index_copy_(1, call.pos, new)
