"""What the keys, or the values, of a layer may become."""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations_with_replacement, pairwise
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
MOST_STEPS = 32  # in a latent; there are 58,904 ways to cut it into four bits


class Cut(NamedTuple):
    """What a unit may become, its bytes per token, and its error.

    bits: of whole heads; 16, also of a latent without segments, stands for the model's dtype.
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
    errors, texts = _left(basis)[ranks], [""] * len(ranks)
    if bits < 16:
        errors += segment_errors(basis, [0, *ranks], [bits])[0, 0, 1:]
        texts = [segments_text((Segment(rank, bits),)) for rank in ranks]
    sizes = [Latent(latents, rank).rounded(bits).nbytes(torch.bfloat16) for rank in ranks]
    cells = zip(ranks, texts, sizes, errors.tolist(), strict=True)
    return [Cut(rank, 16, *x) for rank, *x in cells] + _whole(config, basis, [bits])


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

    Where 16 bits are allowed, a latent may also be in the model's dtype. It has no segments then:
    beside fewer bits 16 are never worth their bytes.
    """

    def __init__(self, basis: Basis, multiple: int, bits: Sequence[int]):
        self.latents, full = basis.spectrum.shape
        self.bits = sorted({*bits} - {16}, reverse=True)
        step = lcm(STEP, multiple)
        step *= -(-full // (MOST_STEPS * step))
        self.bounds = [*range(0, full, step), full]
        self.left = _left(basis)[self.bounds]
        self.lost = segment_errors(basis, self.bounds, self.bits)
        self.whole = [*range(1, len(self.bounds))] if 16 in bits else []  # numbers of bounds
        self.ends = _ways(len(self.bounds) - 1, len(self.bits))

    def _measured(self) -> tuple[Tensor, Tensor]:
        """Bytes and errors of all cuts; those in the model's dtype come last."""
        starts, bounds = _starts(self.ends), torch.tensor(self.bounds)
        width = bounds[self.ends] - bounds[starts]
        lost = self.lost[torch.arange(len(self.bits)), starts, self.ends].sum(1)
        each = (width * torch.tensor(self.bits)).sum(1) // 8 + (width > 0).sum(1)
        sizes = -(-self.latents * each // ALIGN) * ALIGN
        whole = 2 * self.latents * bounds[self.whole]
        errors = torch.cat((self.left[self.ends[:, -1]] + lost, self.left[self.whole]))
        return torch.cat((sizes, whole)), errors

    def best(self) -> list[int]:
        """Those on the lower convex hull of errors over bytes."""
        return hull(*self._measured())

    def cuts(self, numbers: Sequence[int]) -> Unit:
        """The cuts of such numbers."""
        sizes, errors = (x[numbers].tolist() for x in self._measured())
        cells = zip(map(self._cut, numbers), sizes, errors, strict=True)
        return [Cut(rank, 16, text, size, error) for (rank, text), size, error in cells]

    def _cut(self, number: int) -> tuple[int, str]:
        """Rank and segments of a cut."""
        if number >= len(self.ends):
            return self.bounds[self.whole[number - len(self.ends)]], ""
        ends = [self.bounds[i] for i in (0, *self.ends[number].tolist())]
        widths = zip((b - a for a, b in pairwise(ends)), self.bits, strict=True)
        return ends[-1], segments_text(tuple(Segment(w, b) for w, b in widths if w))


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
