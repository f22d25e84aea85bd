"""Which layers become the same, so that few shapes are left to compile."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .cuts import Cut, Unit


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
