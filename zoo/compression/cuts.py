"""What the keys, or the values, of a layer may become."""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations_with_replacement
from math import lcm
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..models.bits import MOST_SEGMENTS, PARTS, Segment, segments_text
from ..models.config import Config
from ..models.packing import ALIGN, Latent
from .rounding import segment_errors, whole_error
from .solve import Basis

NOISE = 1e-7  # of a unit's error: what fp32 sums leave where nothing is left
STEP = 16  # numbers: widths of segments are multiples, as kernels like them
MOST_STEPS = 32  # in a latent; 437,000 ways to cut it


class Cut(NamedTuple):
    """What a unit may become, its bytes per token, and its error.

    bits: of all numbers, unless there are segments; 16 stands for the model's dtype.
    """

    rank: int
    bits: int
    segments: str
    size: int
    error: float


Unit = list[Cut]  # all that the keys, or the values, of a layer may become


class Choices(Protocol):
    """All cuts of a unit, by number. Units of equal sizes number them alike."""

    def best(self) -> list[int]:
        """Numbers of the cuts that may be worth their bytes."""

    def cuts(self, numbers: Sequence[int]) -> Unit:
        """The cuts of such numbers."""


def choices(
    config: Config, basis: Basis, multiple: int, bits: Sequence[int], whole: bool = False
) -> Choices:
    """The cuts of a unit.

    bits: several may be segments of one latent. whole: heads are kept as they are, all numbers with
    the same bits.
    """
    if whole:
        return Listed(_whole(config, basis, bits))
    if len(set(bits)) > 1:
        return Segmented(basis, multiple, bits)
    return Listed(_ranks(config, basis, multiple, bits[0]))


class Listed(NamedTuple):
    """Cuts that are all of interest."""

    unit: Unit

    def best(self) -> list[int]:
        """All numbers."""
        return [*range(len(self.unit))]

    def cuts(self, numbers: Sequence[int]) -> Unit:
        """The cuts of such numbers."""
        return [self.unit[i] for i in numbers]


def _ranks(config: Config, basis: Basis, multiple: int, bits: int) -> Unit:
    """Ranks in multiples, or full, where heads are kept as they are."""
    latents, full = basis.spectrum.shape
    step = multiple if basis.pairs is None else lcm(multiple, 2)
    ranks = [rank for rank in range(step, full, step) if rank % PARTS[bits] == 0]
    left = _left(basis)
    lost = torch.zeros(len(ranks))
    if bits < 16:
        lost = segment_errors(basis, [0, *ranks], [bits])[0, 0, 1:]
    errors = (left[ranks] + lost).tolist()
    sizes = [Latent(latents, rank).rounded(bits).nbytes(torch.bfloat16) for rank in ranks]
    below = [Cut(r, bits, "", *x) for r, *x in zip(ranks, sizes, errors, strict=True)]
    return below + _whole(config, basis, [bits])


def _whole(config: Config, basis: Basis, bits: Sequence[int]) -> Unit:
    """Heads as they are."""
    latents, full = basis.spectrum.shape
    heads, left, unit = Latent(latents * full // config.head_dim, config.head_dim), _left(basis), []
    for count in bits:
        if config.head_dim % PARTS[count] == 0:  # else part of a byte would be left
            error = float(left[full]) + whole_error(basis, config.head_dim, count)
            size = heads.rounded(count).nbytes(torch.bfloat16)
            unit.append(Cut(full, count, "", size, error))
    return unit


def _left(basis: Basis) -> Tensor:
    """Error left at every rank; joint latents may reach zero long before they are full."""
    errors = basis.errors().cpu()
    return errors.clamp(min=NOISE * float(errors[0]))


class Segmented:
    """All ways to cut a latent into segments of falling bits, and to drop the rest.

    One segment of 16 bits is no segment: numbers are in the model's dtype.
    """

    def __init__(self, basis: Basis, multiple: int, bits: Sequence[int]):
        latents, full = basis.spectrum.shape
        self.latents, self.bits = latents, sorted(set(bits), reverse=True)
        step = lcm(STEP, multiple)
        step *= -(-full // (MOST_STEPS * step))
        self.bounds = [*range(0, full, step), full]
        self.left = _left(basis)[self.bounds]
        self.lost = segment_errors(basis, self.bounds, self.bits)

    @property
    def _ends(self) -> Tensor:
        return _ways(len(self.bounds) - 1, len(self.bits))

    def _measured(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes and errors of cuts whose segments end at bounds of such numbers, (cuts, bits)."""
        starts = _starts(ends)
        bits, bounds = torch.tensor(self.bits), torch.tensor(self.bounds)
        width = bounds[ends] - bounds[starts]
        lost = self.lost[torch.arange(len(bits)), starts, ends].sum(1)
        codes = (width * bits).sum(1) // 8
        scales = ((width > 0) & (bits < 16)).sum(1)
        wide = (width * (bits == 16)).sum(1)  # numbers of 16 bits
        lost[(wide > 0) & (codes % 2 > 0)] = torch.inf  # they would lie at odd bytes
        sizes = -(-self.latents * (codes + scales) // ALIGN) * ALIGN
        pure = scales == 0
        sizes = torch.where(pure, 2 * self.latents * wide, sizes)
        return sizes, self.left[ends[:, -1]] + lost.masked_fill(pure, 0)

    def best(self) -> list[int]:
        """Those on the lower convex hull of errors over bytes."""
        return hull(*self._measured(self._ends))

    def cuts(self, numbers: Sequence[int]) -> Unit:
        """The cuts of such numbers."""
        ends = self._ends[numbers]
        measured = zip(*(x.tolist() for x in self._measured(ends)), strict=True)
        texts = [self._segments(row) for row in ends.tolist()]
        return [
            Cut(self.bounds[end], 16, text, *x)
            for end, text, x in zip(ends[:, -1].tolist(), texts, measured, strict=True)
        ]

    def _segments(self, ends: Sequence[int]) -> str:
        widths = [self.bounds[b] - self.bounds[a] for a, b in zip((0, *ends), ends, strict=False)]
        cut = [Segment(w, b) for w, b in zip(widths, self.bits, strict=True) if w]
        return "" if [s.bits for s in cut] == [16] else segments_text(tuple(cut))


def _starts(ends: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(ends[:, :1]), ends[:, :-1]), 1)


@cache
def _ways(steps: int, count: int) -> Tensor:
    """Where `count` segments may end, after 0 to `steps` steps: (ways, count). Some are empty."""
    ways = torch.tensor([*combinations_with_replacement(range(steps + 1), count)])
    filled = (ways > _starts(ways)).sum(1)
    return ways[(filled > 0) & (filled <= MOST_SEGMENTS)]


def hull(sizes: Tensor, errors: Tensor) -> list[int]:
    """Numbers of the points on the lower convex hull, by rising size and falling error.

    The smallest size is one of them. Infinite errors are none.
    """
    least = torch.full((int(sizes.max()) + 1,), torch.inf, dtype=errors.dtype)
    least = least.scatter_reduce(0, sizes, errors, "amin")
    falls = torch.cat((least[:1], least.cummin(0).values[:-1])) > least
    falls[0] = False
    corners: list[tuple[int, float]] = []
    for x, y in zip(falls.nonzero()[:, 0].tolist(), least[falls].tolist(), strict=True):
        while len(corners) > 1 and _above(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    wanted = torch.full_like(least, torch.nan)
    at = [x for x, _ in corners]
    wanted[at] = least[at]
    first: dict[int, int] = {}
    for i in (wanted[sizes] == errors).nonzero()[:, 0].tolist():
        first.setdefault(int(sizes[i]), i)
    return [first[x] for x in at]


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b is on the line from a to c, or above it."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def together(units: Iterable[Choices]) -> list[Unit]:
    """The cuts that are of interest to any of them, of each."""
    units = [*units]
    numbers = sorted({i for unit in units for i in unit.best()})
    return [unit.cuts(numbers) for unit in units]
