"""A layer's cache of its first and its last tokens: other slots are written over, in a ring.

A token that attends to the last `window` tokens needs no older ones, except the first, the sinks
of StreamingLLM (Xiao et al., arXiv 2309.17453), where there are any. Slots stay those of the text.
Slot t is kept at place t of the buffers up to the end of the page of the last sink, `head`, and
behind it at place head + (t - head) % size. The buffers are pages, so that the decoding ops find
their slots in order by a table (see `attention.py`). A prompt reads the slots before it and itself,
and overwrites old slots after that.

B batch, T new tokens, S slots of the text, L places that a step reads, P pages of them.
"""

from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import CausalMask, DecodeMask, Mask, causal_matrix, hide

PAGE = 16  # the ops read pages of a multiple of so many slots


class Ring(NamedTuple):
    """Which slots of a text a layer keeps, and where.

    window: how many of the last tokens a token attends to, itself included; sinks: how many of the
    first; page: slots of a page, a multiple of the blocks of anchored keys.
    """

    window: int
    sinks: int
    page: int

    @property
    def head(self) -> int:
        """Places of the sinks' pages."""
        return -(-self.sinks // self.page) * self.page

    @property
    def size(self) -> int:
        """Places of the ring: a page more than the window, since it seldom begins with a page."""
        return -(-self.window // self.page) * self.page + self.page

    @property
    def places(self) -> int:
        """All places of a sequence."""
        return self.head + self.size

    @property
    def spare(self) -> int:
        """How many of the last tokens may be given up, as rejected drafts are, and written anew."""
        return self.size - self.window + 1

    def behind(self, slot: Tensor) -> Tensor:
        """The places of slots that are not in the sinks' pages."""
        return self.head + (slot - self.head) % self.size

    def seen(
        self, position: Tensor, pos: Tensor, mask: Mask, batch: int
    ) -> tuple[Tensor, Tensor, Mask]:
        """What a step reads, as `Model.attention_metadata` takes it: position, pos and mask.

        The arguments are those of all slots: position (B or 1, S), successive slots pos (T,), and
        the mask. The results are those of what `cache.RingLayer.update` returns.
        """
        if isinstance(mask, DecodeMask) and len(pos) == 1:
            return self._decoding(position, pos, mask, batch)
        slot, there, old = self.read(pos, position.size(1))
        new = torch.arange(len(old), len(slot), device=pos.device)
        kept = slot.clamp(0, position.size(1) - 1)
        if isinstance(mask, Tensor):
            mask = mask[..., kept]
        else:
            valid = mask.valid if isinstance(mask, CausalMask) else _valid(mask)
            mask = causal_matrix(pos, slot, None if valid is None else valid[:, kept])
        near = (slot > pos[:, None] - self.window) | (slot < self.sinks)
        return position[:, kept], new, hide(mask, ~(near & there))

    def read(self, pos: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which slots a prompt in slots pos (T,) reads: old ones in order, then its own.

        Returns slots (L,), whether each is there (others are hidden), and the places of old ones,
        (L - T,). slots: S.
        """
        old = slots - len(pos)  # no more can precede the new ones
        first = torch.arange(min(self.head, old), device=pos.device)
        behind = torch.arange(-min(self.size, old), 0, device=pos.device) + pos[:1]
        there = torch.cat((first < pos[:1], behind >= self.head, torch.ones_like(pos) > 0))
        return torch.cat((first, behind, pos)), there, torch.cat((first, self.behind(behind)))

    def _decoding(
        self, position: Tensor, pos: Tensor, mask: DecodeMask, batch: int
    ) -> tuple[Tensor, Tensor, DecodeMask]:
        """As `seen`, for one token: the sinks' pages and those of the window, through a table."""
        head, size, page, last = self.head, self.size, self.page, position.size(1) - 1
        base = (pos + 1 - self.window).clamp(min=head) // page * page  # (1,), of the first page
        place = torch.arange(head + size + page, device=pos.device)  # (L,)
        sink = place < head
        slot = place + torch.where(sink, 0, base - head)
        kept = slot.clamp(max=last)
        new = pos - (base - head)
        # positions are counted from the page of the first one, of every sequence
        begin = position[:, base.clamp(max=last)] // page * page  # (B or 1, 1)
        shift = torch.where(sink, 0, begin - head)
        start, end = mask.span.split(1, 1)
        start = torch.maximum(start, end - self.window) - (base - head)
        bias = None if mask.bias is None else mask.bias[:, kept]
        if self.sinks:
            start = torch.zeros_like(start)
            hidden = (slot <= pos - self.window) & (slot >= self.sinks)
            bias = torch.zeros_like(slot, dtype=torch.float)[None] if bias is None else bias
            bias = bias.masked_fill(hidden, -torch.inf)
        span = torch.cat((start, (new + 1).expand_as(start)), 1)
        pages = torch.arange(0, len(place), page, device=pos.device)  # the first place of each
        pages = torch.where(pages < head, pages, self.behind(pages + base - head)) // page
        row = torch.arange(batch, device=pos.device)[:, None] * (self.places // page)
        mask = DecodeMask(span, bias, mask.slopes, (row + pages).int(), shift)
        return position[:, kept], new, mask


def _valid(mask: DecodeMask) -> Tensor | None:
    return None if mask.bias is None else mask.bias == 0


class Kept(NamedTuple):
    """Which tokens a cache keeps: the last `window` and the first `sinks`; window 0: all."""

    window: int = 0
    sinks: int = 0

    def check(self) -> None:
        """Raise ValueError for negative numbers, and for sinks without a window."""
        if self.window < 0 or self.sinks < 0:
            raise ValueError(
                f"given a window of {self.window} and {self.sinks} sinks: expected 0 or more tokens"
            )
        if self.sinks and not self.window:
            raise ValueError(
                f"given {self.sinks} sinks without a window: say how many of the last tokens to "
                "keep, too"
            )


def ring_of(own: int, slots: int, block: int = 1, kept: Kept = Kept()) -> Ring | None:  # noqa: B008
    """The ring of a layer for a text of some slots; None: it keeps all of them.

    own: the window that the layer has by itself; 0: none. block: positions in a block of anchored
    keys. kept: what is asked of all layers.
    """
    page = lcm(PAGE, block)
    if kept.window and not 0 < own <= kept.window:
        return Ring(*kept, page) if sum(kept) < slots else None
    # whole pages: the mask hides what is beyond the window, by positions
    ring = Ring(-(-own // page) * page, 0, page)
    return ring if own and ring.places < slots else None
