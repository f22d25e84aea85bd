"""What the keys, or the values, of a layer may become, and which layers may become the same."""

from collections.abc import Sequence
from itertools import chain
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.bits import LEVELS, PARTS
from ..models.config import Config
from ..models.packing import Latent
from .mixing import rounding
from .solve import Basis

NOISE = 1e-7  # of a unit's error: what fp32 sums leave where nothing is left


class Cut(NamedTuple):
    """A rank and bits that a unit may take, its bytes per token, and its error."""

    rank: int
    bits: int
    size: int
    error: float


Unit = list[Cut]  # all that the keys, or the values, of a layer may become


def cuts(
    config: Config, basis: Basis, multiple: int, bits: Sequence[int], whole: bool = False
) -> Unit:
    """The cuts of a unit: ranks in multiples, or full, where heads are kept as they are.

    bits: those to choose from. whole: at full rank only.
    """
    latents, full = basis.spectrum.shape
    step = multiple if basis.pairs is None else lcm(multiple, 2)
    ranks = [full] if whole else [*range(step, full, step), full]
    rounded = basis.rounding
    if rounded is None and set(bits) != {16}:
        rounded = rounding(basis, config.head_dim)
    errors, unit = basis.errors(), list[Cut]()
    errors = errors.clamp(min=NOISE * errors[0])  # joint latents may reach zero long before full
    for rank in ranks:
        heads = latents if rank < full else latents * full // config.head_dim
        for count in bits:
            width = rank * latents // heads
            if width % PARTS[count]:
                continue  # part of a byte would be left
            error = float(errors[rank])
            if rounded is not None and count < 16:
                error += float(rounded[rank]) / LEVELS[count] ** 2
            unit.append(
                Cut(rank, count, Latent(heads, width).rounded(count).nbytes(torch.bfloat16), error)
            )
    return unit


def merged(layers: Sequence[Sequence[Unit]]) -> list[Unit]:
    """Layers that take the same cuts, as one: sizes and errors are summed."""
    return [
        [
            same[0]._replace(size=sum(c.size for c in same), error=sum(c.error for c in same))
            for same in zip(*units, strict=True)
        ]
        for units in zip(*layers, strict=True)
    ]


def groups(
    layers: Sequence[Sequence[Unit]], chosen: Sequence[Sequence[Cut]], count: int
) -> list[list[int]]:
    """The layers in `count` groups, so that the same cuts within a group cost little.

    chosen: what the layers take without groups. Two groups are merged at a time: those that lose
    least where a byte costs what the last one was worth.
    """
    taken = zip(chain(*layers), chain(*chosen), strict=True)
    price = min(_worth(unit, cut) for unit, cut in taken)
    sides = zip(*layers, strict=True)
    bills = [torch.stack([_bill(unit, price) for unit in units]) for units in sides]
    members = [[i] for i in range(len(layers))]
    while len(members) > count:
        a, b = divmod(int(torch.stack([_loss(x) for x in bills]).sum(0).argmin()), len(members))
        members[a] += members.pop(b)
        for x in bills:
            x[a] += x[b]
        bills = [torch.cat((x[:b], x[b + 1 :])) for x in bills]
    return members


def _worth(unit: Unit, now: Cut) -> float:
    """Error that a byte of the last step up to a cut removes."""
    steps = ((c.error - now.error) / (now.size - c.size) for c in unit if c.size < now.size)
    return min(steps, default=torch.inf)


def _bill(unit: Unit, price: float) -> Tensor:
    """Error plus the price of all bytes, for every cut of a unit."""
    return torch.tensor([cut.error + price * cut.size for cut in unit], dtype=torch.float64)


def _loss(bills: Tensor) -> Tensor:
    """How much more two groups pay with equal cuts than each with its best: (n, n), a < b.

    bills: (n, cuts), sums over the layers of a group. Infinite where a >= b.
    """
    best = bills.amin(1)
    more = (bills[:, None] + bills).amin(2) - best[:, None] - best
    return more.masked_fill(torch.ones_like(more).tril().bool(), torch.inf)
