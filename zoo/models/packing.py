"""Latents in a few bits a number: how a token's numbers become a row of bytes, and back.

The row of a token holds, for the keys or for the values of a layer:

    codes of latent 0 | codes of latent 1 | ... | scales of latent 0 | scales of latent 1 | ... | 0s

The codes of a latent are those of its segments, one after the other, and below 16 bits every
segment has a scale of one byte. Zeros fill the row up to a multiple of `ALIGN` bytes.

- 16 bits: the number in bfloat16, its low byte first. It needs no scale.
- 8 bits: code n, signed, stands for n scales.
- 4 bits: code n stands for n - 7.5 scales. Byte i holds numbers i (low bits) and i + w / 2.
- 2 bits: code n stands for n - 1.5 scales. Byte i holds numbers i, i + w / 4, ..., from the lowest
  bits on.
- 3 bits: code n stands for n - 3.5 scales. Its low two bits are packed as for 2 bits. Behind them,
  byte i holds the high bits of numbers i, i + w / 8, ..., from its lowest bit on.
- A scale of code n is 2 ** (n // 8 - 20) * (1 + n % 8 / 8): a float of 5 and 3 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bits import LEVELS, Segment, parse_segments, segments_text

ALIGN = 8  # bytes
LOWEST = 107 << 23  # the bits, as fp32, of the smallest scale: 2 ** -20
# width of a step, in standard deviations, that loses least of normal numbers (Max, 1960)
STEPS = {4: 0.335, 3: 0.586, 2: 0.996}
TRIED = range(-2, 5)  # scales beside that one which are tried


class Latent(NamedTuple):
    """What a layer caches per token of its keys, or of its values: `heads` vectors of numbers.

    segments: of a vector of `width` numbers. Without any, numbers are in the model's dtype.
    """

    heads: int
    width: int
    segments: tuple[Segment, ...] = ()

    def rounded(self, bits: int) -> "Latent":
        """The same numbers, all with `bits` bits; 16 stands for the model's dtype."""
        whole = bits == 16 or not self.width
        return self._replace(segments=() if whole else (Segment(self.width, bits),))

    @property
    def bits(self) -> int:
        """The smallest number of bits of a number."""
        return min((16, *(s.bits for s in self.segments)))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a vector."""
        return sum(s.nbytes for s in self.segments)

    @property
    def scales(self) -> int:
        """The number of scales of a vector."""
        return sum(s.bits < 16 for s in self.segments)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes per token: of its row. dtype: of numbers that are not packed."""
        if not self.segments:
            return self.heads * self.width * dtype.itemsize
        return -(-self.heads * (self.code_bytes + self.scales) // ALIGN) * ALIGN

    @property
    def layout(self) -> str:
        """All of it as a text: torch.compile takes texts, unlike numbers, as constants."""
        return f"{self.heads}:{segments_text(self.segments)}"

    @classmethod
    def of_layout(cls, layout: str) -> "Latent":
        """The inverse of `layout`."""
        heads, _, text = layout.partition(":")
        segments = parse_segments(text)
        return cls(int(heads), sum(s.width for s in segments), segments)


class Packed(NamedTuple):
    """Rows of bytes, (B, S, bytes) in uint8, and their layout: see `Latent.layout`."""

    rows: Tensor
    layout: str

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The numbers, (B, heads, S, width), in a dtype."""
        return unpack(self, dtype)


def pack(x: Tensor, latent: Latent) -> Packed:
    """Vectors x (B, heads, T, width) as rows. The scale of a segment is one that loses little."""
    x = x.transpose(1, 2).float()  # (B, T, heads, width)
    codes, scales = [], []
    for part, segment in zip(
        x.split([s.width for s in latent.segments], -1), latent.segments, strict=True
    ):
        if segment.bits == 16:
            codes.append(_halves_of(part.to(torch.bfloat16)))
            continue
        scale = _best_scale(part, segment.bits)
        scales.append(scale.to(torch.uint8))
        codes.append(_joined(_rounded(part, scale_of(scale), segment.bits), segment.bits))
    parts = [torch.cat(y, -1).flatten(2) for y in (codes, scales) if y]
    used = latent.heads * (latent.code_bytes + latent.scales)
    empty = latent.nbytes(torch.uint8) - used
    if empty:
        parts.append(parts[0].new_zeros(*x.shape[:2], empty))
    return Packed(torch.cat(parts, -1), latent.layout)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers, (B, heads, S, width), in a dtype."""
    latent = Latent.of_layout(packed.layout)
    end = latent.heads * latent.code_bytes
    codes = packed.rows[..., :end].unflatten(-1, (latent.heads, -1))
    scales = scale_of(packed.rows[..., end : end + latent.heads * latent.scales])
    scales = scales.unflatten(-1, (latent.heads, -1))
    numbers, at = [], 0
    for i, segment in enumerate(latent.segments):
        x = _numbers(codes[..., at : at + segment.nbytes], segment.bits)
        i -= latent.segments[0].bits == 16  # which has no scale
        numbers.append(x if segment.bits == 16 else x * scales[..., i : i + 1])
        at += segment.nbytes
    return torch.cat(numbers, -1).to(dtype).transpose(1, 2)


def scale_of(code: Tensor) -> Tensor:
    """The scales, in fp32, of their codes."""
    return ((code.to(torch.int32) << 20) + LOWEST).view(torch.float32)


def _code_of(scale: Tensor, up: bool = False) -> Tensor:
    """The code, in int32, of the nearest scale; up: of the next one that is not smaller."""
    bits = scale.contiguous().view(torch.int32) - LOWEST + ((1 << 20) - 1 if up else 1 << 19)
    return (bits >> 20).clamp(0, 255)


def _best_scale(x: Tensor, bits: int) -> Tensor:
    """The code of a scale for vectors x (..., width), in int32: (..., 1).

    With 8 bits the smallest that holds the largest number. Below, of some around the one that is
    best for normal numbers, and that one, the scale that loses least.
    """
    most = _code_of(x.abs().amax(-1, keepdim=True) / LEVELS[bits], up=True)
    if bits == 8:
        return most
    usual = _code_of(x.square().mean(-1, keepdim=True).sqrt() * STEPS[bits])
    best = least = None
    for code in (most, *((usual + step).clamp(0, 255) for step in TRIED)):
        scale = scale_of(code)
        y = _rounded(x, scale, bits).to(x.dtype) - LEVELS[bits]
        error = (y * scale - x).square().sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = code, error
            continue
        best = torch.where(error < least, code, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of numbers, in uint8 or int8."""
    if bits == 8:
        return (x / scale).round().clamp(-127, 127).to(torch.int8)
    count = 1 << bits
    return (x / scale + count / 2).floor().clamp(0, count - 1).to(torch.uint8)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., width) as bytes, (..., width * bits / 8)."""
    if bits == 8:
        return codes.view(torch.uint8)
    if bits == 3:
        return torch.cat((_shifted(codes & 3, 2), _shifted(codes >> 2, 1)), -1)
    return _shifted(codes, bits)


def _shifted(codes: Tensor, bits: int) -> Tensor:
    """Equal parts of codes (..., width), each in bits of its own of the same bytes."""
    first, *rest = codes.chunk(8 // bits, -1)
    for i, part in enumerate(rest, start=1):
        first = first | part << i * bits
    return first


def _parts(joined: Tensor, bits: int) -> Tensor:
    """The inverse of `_shifted`."""
    mask = (1 << bits) - 1
    return torch.cat([joined >> shift & mask for shift in range(0, 8, bits)], -1)


def _numbers(joined: Tensor, bits: int) -> Tensor:
    """Bytes of a segment as numbers in fp32, (..., width), not yet times their scale."""
    if bits == 16:
        low, high = (x.to(torch.int32) for x in joined.unflatten(-1, (-1, 2)).unbind(-1))
        return (low << 16 | high << 24).view(torch.float32)
    if bits == 8:
        return joined.view(torch.int8).float()
    if bits == 3:
        low, high = joined.split([joined.size(-1) * 2 // 3, joined.size(-1) // 3], -1)
        codes = _parts(low, 2) | _parts(high, 1) << 2
    else:
        codes = _parts(joined, bits)
    return codes.float() - LEVELS[bits]


def _halves_of(x: Tensor) -> Tensor:
    """The bytes of numbers in bfloat16, the low one of each first: (..., 2 width)."""
    whole = x.contiguous().view(torch.int16).to(torch.int32)
    return torch.stack((whole & 255, whole >> 8 & 255), -1).flatten(-2).to(torch.uint8)
