"""The compressed KV cache: fixed buffers, written in place, safe for CUDA graphs."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import check_bits
from .packing import Latent, Packed, pack
from .ring import Ring

Buffer = Tensor | Packed
Pack = Callable[[Tensor, Latent], Packed]


def unpacked(x: Buffer, dtype: torch.dtype) -> Tensor:
    """The numbers of a buffer, (B, heads, S, width). dtype: of the result if x is packed."""
    return x.unpack(dtype) if isinstance(x, Packed) else x


def as_bytes(x: Tensor, latent: Latent, pack: Pack = pack) -> Tensor:
    """Vectors x (B, heads, T, width) as rows of bytes (B, T, n): packed, or in their dtype."""
    if latent.segments:
        return pack(x, latent).rows
    row = x.transpose(1, 2).flatten(2).contiguous()
    return row.view(torch.uint8) if latent.width else row.to(torch.uint8)


def of_bytes(rows: Tensor, latent: Latent, dtype: torch.dtype) -> Buffer:
    """The inverse of `as_bytes`, without unpacking: rows (B, S, n) as the ops read them."""
    if latent.segments:
        return Packed(rows, latent.layout)
    numbers = rows.view(dtype) if latent.width else rows.to(dtype)
    return numbers.unflatten(-1, (latent.heads, -1)).transpose(1, 2)


class LayerCache(NamedTuple):
    """The buffers of one layer. It has no layer index, so layers of equal shapes compile once."""

    keys: Buffer
    values: Buffer

    def update(self, pos: Tensor, k: Tensor, v: Tensor, pack: Pack = pack) -> tuple[Buffer, Buffer]:
        """Write k and v (B, heads, T, width) to slots pos (T,); return the buffers."""
        return _write(self.keys, pos, k, pack), _write(self.values, pos, v, pack)


class RingLayer(NamedTuple):
    """The buffers of one layer, as pages of all sequences: see `attention.py`. slots: S."""

    keys: Buffer
    values: Buffer
    ring: Ring
    slots: int

    def update(self, pos: Tensor, k: Tensor, v: Tensor, pack: Pack = pack) -> tuple[Buffer, Buffer]:
        """Write k and v (B, heads, T, width) to successive slots pos (T,); return what they read.

        That is the buffers for one token, and for more the old slots and new ones: `Ring.read`.
        """
        return self._write(self.keys, pos, k, pack), self._write(self.values, pos, v, pack)

    def _write(self, buffer: Buffer, pos: Tensor, x: Tensor, pack: Pack) -> Buffer:
        ring, page = self.ring, self.ring.page
        if isinstance(buffer, Packed):  # rows are vectors of one head
            x = pack(x, Latent.of_layout(buffer.layout)).rows[:, None]
        pages = buffer.rows[:, None] if isinstance(buffer, Packed) else buffer
        pages = pages.unflatten(0, (len(x), -1))  # (B, n, heads, page, width)
        if len(pos) == 1:
            place = torch.where(pos < ring.head, pos, ring.behind(pos))
            pages[:, place // page, :, place % page] = x.permute(2, 0, 1, 3)
            return buffer
        _, _, place = ring.read(pos, self.slots)
        kept = pages[:, place // page, :, place % page].permute(1, 2, 0, 3)
        read = torch.cat((kept, x), 2)  # a copy, so old slots may be written now
        place = torch.arange(ring.places, device=pos.device)
        slot = torch.where(place < ring.head, place, pos[-1:] - (pos[-1:] - place) % ring.size)
        fresh = (slot >= pos[:1]) & (slot <= pos[-1:]) & (slot >= place.clamp(max=ring.head))
        new = x.index_select(2, torch.where(fresh, slot - pos[:1], 0))
        new = new.unflatten(2, (-1, page)).transpose(1, 2)
        pages.copy_(torch.where(fresh.view(-1, 1, page, 1), new, pages))
        return buffer._replace(rows=read[:, 0]) if isinstance(buffer, Packed) else read


class WatchedLayer(NamedTuple):
    """A layer's cache that notes which slots the last tokens of a prompt attend to.

    seen: (B, S) in fp32, for the mean weight that the last `window` of the new tokens give to each
    slot, over these tokens and all query heads.
    """

    cache: LayerCache | RingLayer
    window: int
    seen: Tensor

    def update(self, pos: Tensor, k: Tensor, v: Tensor, pack: Pack = pack) -> tuple[Buffer, Buffer]:
        """As `LayerCache`."""
        return self.cache.update(pos, k, v, pack)


class ServedLayer:
    """A layer's cache that a server keeps. It may hold many texts, so it attends by itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """Keep the latents k and v (1, heads, T, width) of new tokens, and return what they read.

        That is the result of `LatentAttention.read` for their queries q (1, H, T, width).
        """
        raise NotImplementedError


class Rounding(NamedTuple):
    """A layer's cache for training: it keeps nothing, and gives numbers back as a cache would.

    Gradients pass as if nothing were rounded (straight-through, arXiv 1308.3432).
    """

    keys: Latent
    values: Latent

    def update(self, pos: Tensor, k: Tensor, v: Tensor, pack: Pack = pack) -> tuple[Tensor, Tensor]:
        """k and v (B, heads, T, width), rounded; they must be all that is attended to."""
        return _straight_through(k, self.keys, pack), _straight_through(v, self.values, pack)


def _straight_through(x: Tensor, latent: Latent, pack: Pack) -> Tensor:
    if not latent.segments:
        return x
    rounded = pack(x.detach(), latent).unpack(x.dtype)
    return x + (rounded - x.detach())


def _write(buffer: Buffer, pos: Tensor, x: Tensor, pack: Pack) -> Buffer:
    if not isinstance(buffer, Packed):
        return buffer.index_copy_(2, pos, x)
    new = pack(x, Latent.of_layout(buffer.layout))
    return buffer._replace(rows=buffer.rows.index_copy_(1, pos, new.rows))


class StaticCache:
    """Buffers for the keys and values of every layer, allocated once.

    They are (B, heads, S, width), or `Packed` where a latent has segments. A token writes its slot
    before any token reads it, so a cache serves the next prompt without being cleared: what the
    previous prompt wrote is never read. Layers with a ring keep fewer slots: see `RingLayer`.
    """

    def __init__(
        self,
        latents: Sequence[tuple[Latent, Latent]],
        batch: int,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        bits: int | None = None,
        windows: Sequence[int] = (),
        rings: Mapping[int, Ring] | None = None,
    ):
        """bits: for all numbers, one of `bits.BITS`; None: as each latent says.

        windows: of every layer, 0 if it has none. rings: by window; other layers keep all slots.

        Raises ValueError for other bits, and for a width that does not fill whole bytes.
        """

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            # not empty: slots that are not attended to enter as 0 * v, and 0 * NaN is NaN
            x = torch.zeros(*shape, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(x)  # otherwise in-place writes prevent CUDA graphs
            return x

        def buffer(latent: Latent, ring: Ring | None) -> Buffer:
            check_bits(bits, latent.width)
            kept = latent if bits is None else latent.rounded(bits)
            count, each = batch, slots  # of sequences, or of pages
            if ring:
                count, each = batch * ring.places // ring.page, ring.page
            if not kept.segments:
                return zeros(count, kept.heads, each, kept.width, dtype=dtype)
            rows = zeros(count, each, kept.nbytes(dtype), dtype=torch.uint8)
            return Packed(rows, kept.layout)

        self.batch, self.slots = batch, slots
        self.rings = dict(rings or {})
        self.windows = tuple(windows) or (0,) * len(latents)
        self._rings = [self.rings.get(window) for window in self.windows]
        pairs = list(zip(latents, self._rings, strict=True))
        self.keys = [buffer(k, ring) for (k, _), ring in pairs]
        self.values = [buffer(v, ring) for (_, v), ring in pairs]

    def layer(self, index: int) -> LayerCache | RingLayer:
        """The buffers of one layer."""
        keys, values, ring = self.keys[index], self.values[index], self._rings[index]
        return RingLayer(keys, values, ring, self.slots) if ring else LayerCache(keys, values)

    def first(self, slots: int) -> "StaticCache":
        """A view of the first slots as a cache: writes to it are writes to this cache.

        Attention of a prompt reads all slots of the cache it is given. So for a part of a prompt,
        pass only the slots up to its end. Rings stay whole.
        """

        def cut(x: Buffer, ring: Ring | None) -> Buffer:
            if ring:
                return x
            if isinstance(x, Packed):
                return x._replace(rows=x.rows[:, :slots])
            return x[:, :, :slots]

        view = copy(self)
        view.slots = slots
        view.keys = [cut(x, ring) for x, ring in zip(self.keys, self._rings, strict=True)]
        view.values = [cut(x, ring) for x, ring in zip(self.values, self._rings, strict=True)]
        return view

    def check(self, tokens: Tensor, pos: Tensor) -> None:
        """Raise ValueError unless tokens (B, T) at slots pos (T,) fit; compiled code skips this."""
        if torch.compiler.is_compiling():
            return  # reading pos would break the graph, and `Generator` has checked the slots
        if tokens.size(0) != self.batch:
            raise ValueError(
                f"given {tokens.size(0)} sequences: expected {self.batch}, the batch of the cache; "
                "make a cache for this batch"
            )
        if int(pos.max()) >= self.slots or int(pos.min()) < 0:
            raise ValueError(
                f"slots {int(pos.min())} to {int(pos.max())} do not fit a cache of {self.slots}: "
                "make a larger cache or pass fewer tokens"
            )

    @property
    def spare(self) -> int:
        """How many of the last tokens may be given up, and their slots written anew."""
        return min((ring.spare for ring in self.rings.values()), default=self.slots)

    def check_start(self, start: int, filled: int) -> None:
        """Raise ValueError if tokens from slot `start` on would read slots that are overwritten.

        filled: how many slots were written since slot 0 was.
        """
        most = min((ring.places for ring in self.rings.values()), default=filled)
        if start and filled > most and filled - start > self.spare:
            raise ValueError(
                f"the cache holds {filled} tokens, and slot {start} cannot follow: layers with "
                f"windows have overwritten what it reads; go back by at most {self.spare} tokens, "
                "or start again from slot 0"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(_nbytes(x) for x in self.keys + self.values)

    def bytes_read(self, tokens: int) -> int:
        """Bytes that decoding reads at the end of texts of so many tokens: no more than windows."""
        read = 0
        layers = zip(self.keys, self.values, self.windows, self._rings, strict=True)
        for keys, values, window, ring in layers:
            places = ring.places if ring else self.slots
            most = min(tokens, window or tokens, ring.window + ring.sinks if ring else tokens)
            read += (_nbytes(keys) + _nbytes(values)) * most // places
        return read


def _nbytes(x: Buffer) -> int:
    return x.rows.nbytes if isinstance(x, Packed) else x.nbytes
