"""What calibration gathers of a layer: sums and Gram matrices, which do not grow with the text."""

from typing import NamedTuple

import torch
from torch import Tensor

from .solve import damped, usual


class Moments:
    """Count, mean and Gram matrix of row vectors, for L blocks of `width` numbers side by side.

    Sums are kept about the mean of the first rows: about zero, a large mean would leave little of
    the covariance in fp32.
    """

    def __init__(self, blocks: int, width: int, device: torch.device):
        self.count = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.origin = torch.zeros(blocks, width, device=device)
        self.sum = torch.zeros(blocks, width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(blocks, width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Take in x (..., L * width), where a row counts as `weight` (L, rows) of them, or once."""
        rows = _rows(x, self.origin)
        if not self.count.any():
            self.origin = rows.mean(1)
        rows = rows - self.origin[:, None]
        weighed = rows if weight is None else rows * weight[..., None]
        self.count += rows.size(1) if weight is None else weight.sum(1)
        self.sum += weighed.sum(1)
        self.gram += weighed.mT @ rows

    def split(self, parts: int, sides: int = 1) -> "Moments":
        """The moments of blocks cut into `parts`: what narrower blocks would have gathered.

        sides: 2 where a block is keys and then values; a part takes its share of either.
        """
        blocks, width = self.sum.shape
        cut = blocks, sides, parts, width // (sides * parts)
        small = Moments(blocks * parts, width // parts, self.sum.device)
        small.count = self.count.repeat_interleave(parts)
        small.origin, small.sum = (
            x.view(cut).transpose(1, 2).reshape(small.sum.shape) for x in (self.origin, self.sum)
        )
        pairs = self.gram.view(*cut, *cut[1:]).diagonal(dim1=2, dim2=5)  # of a part with itself
        small.gram = pairs.movedim(-1, 1).reshape(small.gram.shape)
        return small

    @property
    def mean(self) -> Tensor:
        """(L, width)."""
        return self.origin + self._shift

    @property
    def covariance(self) -> Tensor:
        """Mean of x xᵀ, centred: (L, width, width)."""
        return self.gram / self.count[:, None, None] - _outer(self._shift)

    @property
    def second(self) -> Tensor:
        """The same, uncentred."""
        return self.about(torch.zeros_like(self.sum))

    def about(self, point: Tensor) -> Tensor:
        """Mean of (x - point)(x - point)ᵀ, for a point (L, width)."""
        return self.covariance + _outer(self.mean - point)

    @property
    def _shift(self) -> Tensor:
        return self.sum / self.count[:, None]


class Lengths:
    """How long rows are, beside what is usual in their direction: √(xᵀ M⁻¹ x / width).

    M is the mean of x xᵀ, centred or not, with `damping` times the mean of its diagonal added to
    the diagonal. One factor of M⁻¹ is kept, in fp32: half of the sums that it is made from.
    """

    def __init__(self, seen: Moments, centred: bool, damping: float):
        """Raises torch.linalg.LinAlgError for sums that are of no rows, or not finite."""
        m = seen.covariance if centred else seen.second
        one = torch.eye(m.size(-1)).to(m)
        noise = 1e-6 * float(usual(seen.second).max())  # of fp32 sums, where nothing varies
        root = torch.linalg.cholesky(damped(m, damping) + noise * one)
        self.inverse = torch.linalg.solve_triangular(root, one.expand_as(m), upper=False).float()
        self.origin = (seen.mean * centred).float()

    def of(self, x: Tensor) -> Tensor:
        """Of rows (..., L * width), at least 0.001: (L, rows)."""
        rows = _rows(x, self.origin) - self.origin[:, None]
        return (rows @ self.inverse.mT).square().mean(-1).sqrt().clamp(min=1e-3)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """x (..., L * width) as (L, rows, width) in fp32, for blocks `like` (L, width)."""
    return x.detach().float().flatten(0, -2).unflatten(-1, like.shape).transpose(0, 1)


def _outer(x: Tensor) -> Tensor:
    return x[:, :, None] * x[:, None]


class Statistics(NamedTuple):
    """What one layer showed. Queries and gradients are present only if they were asked for.

    Where one latent is to hold keys and values, k has both, side by side, and v is None. The
    weighted ones are those of k, v and of their gradients where a row of x counts by the length
    of its gradient, and a gradient by the length of its row: see `calibrate`.
    """

    k: Moments  # keys before the rotation, biases included: (kv heads / heads per latent) blocks
    v: Moments | None
    q: Moments | None  # queries before the rotation, one block per query head
    k_grad: Moments | None  # gradients of the summed loss at the keys, in the blocks of k
    v_grad: Moments | None
    k_weighted: Moments | None
    v_weighted: Moments | None
    k_grad_weighted: Moments | None
    v_grad_weighted: Moments | None
    k_weight: Moments | None  # of a sequence's loss by the key weight, number by number
    v_weight: Moments | None

    def split(self, k_parts: int, v_parts: int) -> "Statistics":
        """The statistics of latents that so many times fewer heads share.

        Raises ValueError for those of gradients: weights are those of whole blocks.
        """
        gradients = any(m is not None for m in (self.k_grad, self.k_grad_weighted))
        if gradients and (k_parts, v_parts) != (1, 1):
            raise ValueError("statistics of gradients are of one sharing: gather them for each")
        sides = 2 if self.v is None else 1
        return self._replace(k=self.k.split(k_parts, sides), v=self.v and self.v.split(v_parts))


class Needs(NamedTuple):
    """Which statistics: the arguments of `calibrate`."""

    heads_per_latent: tuple[int, int] = (1, 1)
    gradients: bool = False
    queries: bool = False
    joint: bool = False
    anchor: int = 1
    weights: bool = False
    plain: bool = True
    weighted: bool = True
