"""The compressed KV cache: fixed buffers, written in place, safe for CUDA graphs."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import check_bits
from .packing import Latent, Packed, pack

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


class WatchedLayer(NamedTuple):
    """A layer's cache that notes which slots the last tokens of a prompt attend to.

    seen: (B, S) in fp32, for the mean weight that the last `window` of the new tokens give to each
    slot, over these tokens and all query heads.
    """

    cache: LayerCache
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
    previous prompt wrote is never read.
    """

    def __init__(
        self,
        latents: Sequence[tuple[Latent, Latent]],
        batch: int,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        bits: int | None = None,
    ):
        """bits: for all numbers, one of `bits.BITS`; None: as each latent says.

        Raises ValueError for other bits, and for a width that does not fill whole bytes.
        """

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            # not empty: slots that are not attended to enter as 0 * v, and 0 * NaN is NaN
            x = torch.zeros(batch, *shape, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(x)  # otherwise in-place writes prevent CUDA graphs
            return x

        def buffer(latent: Latent) -> Buffer:
            check_bits(bits, latent.width)
            kept = latent if bits is None else latent.rounded(bits)
            if not kept.segments:
                return zeros(kept.heads, slots, kept.width, dtype=dtype)
            rows = zeros(slots, kept.nbytes(dtype), dtype=torch.uint8)
            return Packed(rows, kept.layout)

        self.batch, self.slots = batch, slots
        self.keys = [buffer(k) for k, _ in latents]
        self.values = [buffer(v) for _, v in latents]

    def layer(self, index: int) -> LayerCache:
        """The buffers of one layer."""
        return LayerCache(self.keys[index], self.values[index])

    def first(self, slots: int) -> "StaticCache":
        """A view of the first slots as a cache: writes to it are writes to this cache.

        Attention of a prompt reads all slots of the cache it is given. So for a part of a prompt,
        pass only the slots up to its end.
        """

        def cut(x: Buffer) -> Buffer:
            if isinstance(x, Packed):
                return x._replace(rows=x.rows[:, :slots])
            return x[:, :, :slots]

        view = copy(self)
        view.slots = slots
        view.keys, view.values = [cut(x) for x in self.keys], [cut(x) for x in self.values]
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
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        buffers = self.keys + self.values
        return sum(x.rows.nbytes if isinstance(x, Packed) else x.nbytes for x in buffers)
