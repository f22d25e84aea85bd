"""Bits of numbers in the cache, and segments of a latent. Imports nothing, as a command line asks.

A latent may be cut into segments of falling bits: "16x8+96x4+48x2" says that its first 16 numbers
have 8 bits each, the next 96 have 4, and the last 48 have 2.
"""

from typing import NamedTuple

BITS = (16, 8, 4, 3, 2)  # per cached number; 16 means not quantized
LEVELS = {8: 127.0, 4: 7.5, 3: 3.5, 2: 1.5}  # the largest number of a segment / its scale
PARTS = {16: 1, 8: 1, 4: 2, 3: 8, 2: 4}  # widths are multiples of these, so that bytes are whole
MOST_SEGMENTS = 4


class Segment(NamedTuple):
    """`width` adjacent numbers of a latent, of `bits` bits each."""

    width: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.width * self.bits // 8


def check_bits(bits: int | None, width: int = 0) -> None:
    """Raise ValueError unless a cache supports `width` numbers of `bits` bits.

    None is always accepted: it leaves the bits to another setting.
    """
    if bits is None:
        return
    if bits not in BITS:
        raise ValueError(f"bits is {bits}: expected one of {', '.join(map(str, BITS))}")
    if width % PARTS[bits]:
        raise ValueError(
            f"a latent of {width} numbers does not fill whole bytes at {bits} bits: use 8 bits, or "
            f"ranks that are multiples of {PARTS[bits]}"
        )


def parse_segments(text: str) -> tuple[Segment, ...]:
    """Segments as "16x8+96x4" names them: width x bits; none for an empty text.

    Raises ValueError for another form, for bits that do not fall, and for more than four.
    """
    try:
        pairs = [part.split("x") for part in text.split("+")] if text else []
        segments = tuple(Segment(int(width), int(bits)) for width, bits in pairs)
    except ValueError:
        raise ValueError(
            f"the segments {text!r} are no widths and bits: expected a text like '16x8+96x4'"
        ) from None
    bits = [segment.bits for segment in segments]
    if len(segments) > MOST_SEGMENTS or bits != sorted(set(bits), reverse=True):
        raise ValueError(
            f"the segments {text!r} do not fit: expected at most {MOST_SEGMENTS}, of falling bits"
        )
    for segment in segments:
        check_bits(segment.bits, segment.width)
        if segment.width < 1:
            raise ValueError(f"the segments {text!r} hold an empty one: expected widths above 0")
    if 16 in bits and sum(s.nbytes for s in segments) % 2:
        raise ValueError(f"the segments {text!r} fill an odd number of bytes beside 16 bits")
    return segments


def segments_text(segments: tuple[Segment, ...]) -> str:
    """The inverse of `parse_segments`."""
    return "+".join(f"{s.width}x{s.bits}" for s in segments)
