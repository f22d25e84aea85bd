"""The compressed key/value cache: fixed buffers, written in place, safe for CUDA graphs."""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (16, 8, 4)  # of a number in the cache; 16 stands for the model's own dtype, not quantised
SCALE = torch.bfloat16  # of the steps: fp32's range, and a step need not be exact
LEVELS = {8: 127.0, 4: 7.5}  # steps from zero to the largest number


class Latent(NamedTuple):
    """What a layer keeps of its keys, or of its values, per token.

    `heads` vectors of `width` numbers of `bits` each; below 16 bits a vector has a scale as well.
    """

    heads: int
    width: int
    bits: int = 16

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes per token, where numbers that are not quantised are of a dtype."""
        if self.bits == 16 or not self.width:
            return self.heads * self.width * dtype.itemsize
        return self.heads * (self.width * self.bits // 8 + SCALE.itemsize)


class Packed(NamedTuple):
    """Vectors of whole numbers times a scale of their own.

    codes: (B, heads, S, width) in int8; or two in a byte, (B, heads, S, width / 2) in uint8, of
    which the low bits are the first half of a vector. Four bits n stand for n - 7.5, so that all
    sixteen are used, alike above and below zero. scale: (B, heads, S, 1), the largest number of a
    vector in `LEVELS`.
    """

    codes: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:
        """Of a number."""
        return 8 if self.codes.dtype == torch.int8 else 4

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """(B, heads, S, width)."""
        x = self.codes.to(dtype)
        if self.bits == 4:
            x = torch.cat((self.codes & 15, self.codes >> 4), dim=-1).to(dtype) - LEVELS[4]
        return x * self.scale.to(dtype)


def pack(x: Tensor, bits: int) -> Packed:
    """Vectors (B, heads, S, width) in 8 or 4 bits: none is off by more than half its scale."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS[bits]).clamp(min=1e-30)
    # up to what SCALE holds, by its bits: torch.compile leaves a cast there and back out
    scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    x = x / scale
    if bits == 8:
        return Packed(x.round().clamp(-127, 127).to(torch.int8), scale.to(SCALE))
    low, high = (x + 8).floor().clamp(0, 15).to(torch.uint8).chunk(2, dim=-1)
    return Packed(low | high << 4, scale.to(SCALE))


Buffer = Tensor | Packed


def unpacked(x: Buffer, dtype: torch.dtype) -> Tensor:
    """Numbers (B, heads, S, width) of a buffer, in `dtype` if they were packed."""
    return x.unpack(dtype) if isinstance(x, Packed) else x


class LayerCache(NamedTuple):
    """The buffers of one layer. It does not know which: compiled layers of equal shapes are one."""

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

    Numbers of 8 or 4 bits are `Packed`. A slot is written once per prompt and read only by tokens
    at or after it, so a cache is used for the next prompt as it is: what an earlier prompt left
    behind is never seen.
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
        """bits: 16, 8 or 4 for all numbers; None leaves it to each latent.

        Raises ValueError for other bits, and where two numbers do not fill their bytes.
        """

        def zeros(latent: Latent, width: int, dtype: torch.dtype) -> Tensor:
            # zeros, not empty: a slot not seen still enters as 0 * v, and 0 * nan is nan
            x = torch.zeros(batch, latent.heads, slots, width, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(x)  # else in-place writes rule out CUDA graphs
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
        """The first slots as a cache: a view, so what is written there is written here.

        A prompt's next part is best given the slots up to its own: it reads all that it is given.
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
        """Raise ValueError unless tokens (B, T) at slots pos (T,) fit; compiled code skips it."""
        if torch.compiler.is_compiling():
            return  # a look at pos would break the graph: generation counts slots itself
        if tokens.size(0) != self.batch:
            raise ValueError(f"the cache was made for batch {self.batch}, given {tokens.size(0)}")
        if int(pos.max()) >= self.slots or int(pos.min()) < 0:
            raise ValueError(
                f"slots {int(pos.min())} to {int(pos.max())} do not fit a cache of {self.slots}: "
                "make a larger cache or pass fewer tokens"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        buffers = self.keys + self.values
        return sum(sum(y.nbytes for y in x) if isinstance(x, Packed) else x.nbytes for x in buffers)


def check_bits(bits: int | None, width: int = 0) -> None:
    """Raise ValueError unless numbers of so many bits are known, and fill bytes side by side.

    None stands for what is decided elsewhere.
    """
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits is {bits}: expected one of {', '.join(map(str, BITS))}")
    if bits == 4 and width % 2:
        raise ValueError(
            f"a latent of {width} numbers leaves half a byte at 4 bits: take 8 bits, or even ranks"
        )
