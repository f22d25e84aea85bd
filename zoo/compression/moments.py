"""The statistics of a layer: sums and Gram matrices, whose size does not depend on the text."""

from typing import NamedTuple

import torch
from torch import Tensor

from .solve import damped, usual


class Moments:
    """Count, mean and Gram matrix of row vectors, for L blocks of `width` numbers side by side.

    Sums are about the mean of the first rows: about zero, a large mean would leave few digits of
    the covariance in fp32.
    """

    def __init__(self, blocks: int, width: int, device: torch.device):
        self.count = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.origin = torch.zeros(blocks, width, device=device)
        self.sum = torch.zeros(blocks, width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(blocks, width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Take in x (..., L * width); weight: (L, rows), by default 1."""
        rows = _rows(x, self.origin)
        if not self.count.any():
            self.origin = rows.mean(1)
        rows = rows - self.origin[:, None]
        weighted = rows if weight is None else rows * weight[..., None]
        self.count += rows.size(1) if weight is None else weight.sum(1)
        self.sum += weighted.sum(1)
        self.gram += weighted.mT @ rows

    def split(self, parts: int, sides: int = 1) -> "Moments":
        """The moments of blocks cut into `parts`, as narrower blocks would have gathered them.

        sides: 2 if a block is keys and then values; a part takes its share of both.
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
        """Mean of x xᵀ, centered: (L, width, width)."""
        return self.gram / self.count[:, None, None] - _outer(self._shift)

    @property
    def second(self) -> Tensor:
        """Mean of x xᵀ, not centered: (L, width, width)."""
        return self.about(torch.zeros_like(self.sum))

    def about(self, point: Tensor) -> Tensor:
        """Mean of (x - point)(x - point)ᵀ, for a point (L, width)."""
        return self.covariance + _outer(self.mean - point)

    @property
    def _shift(self) -> Tensor:
        return self.sum / self.count[:, None]


class Lengths:
    """Lengths of rows relative to the usual in their direction: √(xᵀ M⁻¹ x / width).

    M is the mean of x xᵀ, centered or not, with `damping` times the mean of its diagonal added to
    the diagonal. One factor of M⁻¹ is kept, in fp32, which takes half the bytes of the sums.
    """

    def __init__(self, moments: Moments, centered: bool, damping: float):
        """Raises torch.linalg.LinAlgError for moments of no rows, or that are not finite."""
        m = moments.covariance if centered else moments.second
        one = torch.eye(m.size(-1)).to(m)
        noise = 1e-6 * float(usual(moments.second).max())  # of fp32 sums, where nothing varies
        root = torch.linalg.cholesky(damped(m, damping) + noise * one)
        self.inverse = torch.linalg.solve_triangular(root, one.expand_as(m), upper=False).float()
        self.origin = (moments.mean * centered).float()

    def of(self, x: Tensor) -> Tensor:
        """Lengths of rows (..., L * width), at least 0.001: (L, rows)."""
        rows = _rows(x, self.origin) - self.origin[:, None]
        return (rows @ self.inverse.mT).square().mean(-1).sqrt().clamp(min=1e-3)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """x (..., L * width) as (L, rows, width) in fp32, for blocks `like` (L, width)."""
    return x.detach().float().flatten(0, -2).unflatten(-1, like.shape).transpose(0, 1)


def _outer(x: Tensor) -> Tensor:
    return x[:, :, None] * x[:, None]


def given(moments: Moments | None) -> Moments:
    """Statistics that a method needs. Raises ValueError if they were not taken."""
    if moments is None:
        raise ValueError("the statistics lack what this method needs: see METHODS")
    return moments


class Statistics(NamedTuple):
    """The moments of one layer. Those of queries and gradients are None unless needed.

    For joint latents k has keys and values side by side, and v is None. In weighted moments a row
    has the length of its gradient as weight, and a gradient the length of its row: see
    `calibrate`.
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
    k_weight: Moments | None  # gradients of a sequence's loss by the key weight, number by number
    v_weight: Moments | None
    anchor: int = 1  # positions of the blocks within which the keys were turned; 1: not turned

    @property
    def moments(self) -> dict[str, Moments]:
        """The moments that were taken, by name."""
        return {name: m for name, m in self._asdict().items() if isinstance(m, Moments)}

    def split(self, k_parts: int, v_parts: int) -> "Statistics":
        """The statistics for latents that are shared by so many times fewer heads.

        Raises ValueError for those of gradients, whose weights belong to whole blocks.
        """
        gradients = any(m is not None for m in (self.k_grad, self.k_grad_weighted))
        if gradients and (k_parts, v_parts) != (1, 1):
            raise ValueError(
                "statistics of gradients belong to one number of heads per latent: gather "
                "them for each"
            )
        sides = 2 if self.v is None else 1
        return self._replace(k=self.k.split(k_parts, sides), v=self.v and self.v.split(v_parts))


class Needs(NamedTuple):
    """Which statistics are needed: the arguments of `calibrate`."""

    heads_per_latent: tuple[int, int] = (1, 1)
    gradients: bool = False
    queries: bool = False
    joint: bool = False
    anchor: int = 1
    weights: bool = False
    unweighted: bool = True
    weighted: bool = True
