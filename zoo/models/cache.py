"""The compressed KV cache: fixed buffers, written in place, safe for CUDA graphs."""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import LEVELS, check_bits

SCALE = torch.bfloat16  # dtype of the scales: it has fp32's range, and they need not be exact


class Latent(NamedTuple):
    """What a layer caches per token of its keys, or of its values.

    That is `heads` vectors of `width` numbers with `bits` bits each. Below 16 bits, each vector has
    a scale too.
    """

    heads: int
    width: int
    bits: int = 16

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes per token, scales included. dtype: of numbers that are not quantized."""
        if self.bits == 16 or not self.width:
            return self.heads * self.width * dtype.itemsize
        return self.heads * (self.width * self.bits // 8 + SCALE.itemsize)


class Packed(NamedTuple):
    """Quantized vectors: integer codes, and one scale per vector.

    codes: with 8 bits (B, heads, S, width) in int8; with 4 bits (B, heads, S, width / 2) in uint8,
    where the low and high halves of the bytes hold the first and second half of a vector. A 4-bit
    code n means n - 7.5, so the 16 levels are symmetric around zero. scale: (B, heads, S, 1), the
    largest absolute value of a vector divided by its entry in `LEVELS`.
    """

    codes: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:
        """Bits per number."""
        return 8 if self.codes.dtype == torch.int8 else 4

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The numbers, (B, heads, S, width), in a dtype."""
        x = self.codes.to(dtype)
        if self.bits == 4:
            x = torch.cat((self.codes & 15, self.codes >> 4), dim=-1).to(dtype) - LEVELS[4]
        return x * self.scale.to(dtype)


def pack(x: Tensor, bits: int) -> Packed:
    """Quantize vectors (B, heads, S, width) to 8 or 4 bits.

    The error of a number is at most half the scale of its vector.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS[bits]).clamp(min=1e-30)
    # Round up to bf16 by its bits: torch.compile would remove a cast to bf16 and back.
    scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    x = x / scale
    if bits == 8:
        return Packed(x.round().clamp(-127, 127).to(torch.int8), scale.to(SCALE))
    low, high = (x + 8).floor().clamp(0, 15).to(torch.uint8).chunk(2, dim=-1)
    return Packed(low | high << 4, scale.to(SCALE))


Buffer = Tensor | Packed


def unpacked(x: Buffer, dtype: torch.dtype) -> Tensor:
    """The numbers of a buffer, (B, heads, S, width). dtype: of the result if x is packed."""
    return x.unpack(dtype) if isinstance(x, Packed) else x


class LayerCache(NamedTuple):
    """The buffers of one layer. It has no layer index, so layers of equal shapes compile once."""

    keys: Buffer
    values: Buffer

    def update(self, pos: Tensor, k: Tensor, v: Tensor) -> tuple[Buffer, Buffer]:
        """Write k and v (B, heads, T, width) to slots pos (T,); return the buffers."""
        return _write(self.keys, pos, k), _write(self.values, pos, v)


def _write(buffer: Buffer, pos: Tensor, x: Tensor) -> Buffer:
    if not isinstance(buffer, Packed):
        return buffer.index_copy_(2, pos, x)
    for kept, new in zip(buffer, pack(x, buffer.bits), strict=True):
        kept.index_copy_(2, pos, new)
    return buffer


class StaticCache:
    """Buffers (B, heads, S, width) for the keys and values of every layer, allocated once.

    Below 16 bits they are `Packed`. A token writes its slot before any token reads it, so a cache
    serves the next prompt without being cleared: what the previous prompt wrote is never read.
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
        """bits: 16, 8 or 4 for all numbers; None: the bits of each latent.

        Raises ValueError for other bits, and for an odd width at 4 bits.
        """

        def zeros(latent: Latent, width: int, dtype: torch.dtype) -> Tensor:
            # not empty: slots that are not attended to enter as 0 * v, and 0 * NaN is NaN
            x = torch.zeros(batch, latent.heads, slots, width, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(x)  # otherwise in-place writes prevent CUDA graphs
            return x

        def buffer(latent: Latent) -> Buffer:
            width, count = latent.width, latent.bits if bits is None else bits
            check_bits(count, width)
            if count == 16 or not width:
                return zeros(latent, width, dtype)
            whole = zeros(latent, width, torch.int8) if count == 8 else None
            codes = zeros(latent, width // 2, torch.uint8) if whole is None else whole
            return Packed(codes, zeros(latent, 1, SCALE))

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
                return Packed(*(part[:, :, :slots] for part in x))
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
        return sum(sum(y.nbytes for y in x) if isinstance(x, Packed) else x.nbytes for x in buffers)
