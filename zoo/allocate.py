"""How many ranks each layer gets: a global budget, or an error budget for every layer."""

from collections.abc import Sequence
from itertools import pairwise
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .basis import LayerBasis
from .model import Config
from .solve import Basis

NOISE = 1e-7  # of a unit's error: what sums in fp32 leave of nothing


class Ranks(NamedTuple):
    """Widths of the latents of keys and of values, one a layer; v is 0 where k holds both."""

    k: tuple[int, ...]
    v: tuple[int, ...]


def greedy(
    config: Config,
    bases: Sequence[LayerBasis],
    keep: float,
    multiple: int = 8,
    whole_keys: bool = False,
) -> Ranks:
    """Spend one budget over all layers, keys and values where it takes away most error per byte.

    keep: share of the dense model's KV numbers, in (0, 1]; never exceeded. Ranks are multiples of
    `multiple`, at least one multiple each, or full; even where columns are pairs. Since gains fall
    along every spectrum, the order of gain per number is optimal up to rounding. whole_keys: keys
    stay at full rank, and values get what is left. Raises ValueError if `keep` is too small.
    """
    check_keep(keep)
    units = [b for layer in bases for b in layer if b is not None]  # k and v of layer 0, of 1, ...
    sizes = [_cuts(b, multiple) for b in units]
    if whole_keys:
        sizes[0::2] = [cut[-1:] for cut in sizes[0::2]]
    ranks = [cut[0] for cut in sizes]
    left = int(keep * config.dense_kv_width)
    left -= sum(r * len(b.spectrum) for r, b in zip(ranks, units, strict=True))
    if left < 0:
        least = (int(keep * config.dense_kv_width) - left) / config.dense_kv_width
        beside = " beside whole keys" if whole_keys else ""
        raise ValueError(
            f"keep {keep} leaves less than rank {multiple} in every layer{beside}: expected at "
            f"least {least:.3f}, or a smaller rank multiple"
        )
    steps = []
    for u, (basis, cut) in enumerate(zip(units, sizes, strict=True)):
        gone = basis.errors()
        for low, high in pairwise(cut):
            cost, gain = (high - low) * len(basis.spectrum), float(gone[low] - gone[high])
            if gain > NOISE * float(gone[0]):  # a joint latent may hold everything long before
                steps.append((-gain / cost, u, low, high, cost))
    for _, u, low, high, cost in sorted(steps):
        if low == ranks[u] and cost <= left:  # a step that does not fit ends its unit, no other
            ranks[u], left = high, left - cost
    if bases[0].v is None:
        return Ranks(tuple(ranks), (0,) * len(ranks))
    return Ranks(tuple(ranks[0::2]), tuple(ranks[1::2]))


def few_pairs(
    config: Config,
    bases: Sequence[LayerBasis],
    count: int | None,
    keep: float,
    multiple: int = 8,
    whole_keys: bool = False,
) -> Ranks:
    """`greedy` with at most `count` distinct pairs (k, v) of ranks over the layers; None: any.

    Layers that share their ranks are one to `greedy`, with the sums of their errors. Groups of them
    are found by merging two at a time, those that lose least by it where every number costs what
    the last one is worth to `greedy` without groups. Limits and errors are those of `greedy`.
    """
    ranks = greedy(config, bases, keep, multiple, whole_keys)
    if count is None or len(set(zip(*ranks, strict=True))) <= count:
        return ranks
    groups = _groups(bases, ranks, count, multiple, whole_keys)
    merged = [_merged([bases[i] for i in group]) for group in groups]
    shared = greedy(config, merged, keep, multiple, whole_keys)
    of = {layer: g for g, group in enumerate(groups) for layer in group}
    k, v = (tuple(side[of[i]] for i in range(len(bases))) for side in shared)
    return Ranks(k, v)


def _merged(bases: Sequence[LayerBasis]) -> LayerBasis:
    """Layers of equal ranks as one: what a rank costs, and what it leaves, are their sums."""

    def side(units: Sequence[Basis]) -> Basis:
        return units[0]._replace(spectrum=torch.cat([b.spectrum for b in units]))

    v = [b.v for b in bases if b.v is not None]
    return LayerBasis(side([b.k for b in bases]), side(v) if v else None)


def _groups(
    bases: Sequence[LayerBasis], ranks: Ranks, count: int, multiple: int, whole_keys: bool
) -> list[list[int]]:
    """The layers in `count` groups that lose little by equal ranks; ranks: without groups."""
    v = [b.v for b in bases if b.v is not None]
    sides = [([b.k for b in bases], ranks.k)] * (not whole_keys) + [(v, ranks.v)] * bool(v)
    price = min(_worth(b, r, multiple) for side in sides for b, r in zip(*side, strict=True))
    bills = [torch.stack([_bill(b, price, multiple) for b in units]) for units, _ in sides]
    groups = [[i] for i in range(len(bases))]
    while len(groups) > count:
        a, b = divmod(int(torch.stack([_loss(x) for x in bills]).sum(0).argmin()), len(groups))
        groups[a] += groups.pop(b)
        for x in bills:
            x[a] += x[b]
        bills = [torch.cat((x[:b], x[b + 1 :])) for x in bills]
    return groups


def _worth(basis: Basis, rank: int, multiple: int) -> float:
    """Error that a number of the last step up to a rank takes away."""
    cut, errors = _cuts(basis, multiple), basis.errors()
    at = cut.index(rank)
    if at == 0:
        return torch.inf
    return float(errors[cut[at - 1]] - errors[rank]) / (rank - cut[at - 1]) / len(basis.spectrum)


def _bill(basis: Basis, price: float, multiple: int) -> Tensor:
    """Error and price of all numbers, for every rank that a unit may take."""
    cut = _cuts(basis, multiple)
    return basis.errors()[cut] + price * len(basis.spectrum) * basis.spectrum.new_tensor(cut)


def _loss(bills: Tensor) -> Tensor:
    """By how much two groups pay more with equal ranks than each with its best: (n, n), a < b.

    bills: (n, ranks), sums over the layers of a group. Infinite where a >= b.
    """
    best = bills.amin(1)
    more = (bills[:, None] + bills).amin(2) - best[:, None] - best
    return more.masked_fill(torch.ones_like(more).tril().bool(), torch.inf)


def proportional(
    config: Config,
    bases: Sequence[LayerBasis],
    weights: Sequence[tuple[float, float]],
    keep: float,
    multiple: int = 8,
    count: int | None = None,
) -> Ranks:
    """Spend one budget so that latents of keys, and of values, get ranks as their weights are.

    weights: one pair a layer. A unit whose next rank r gains weight / r makes `greedy` the divisor
    method of apportionment (D'Hondt), and what one that is full cannot take goes to the others.
    Limits, rounding and errors are those of `greedy`; count: as in `few_pairs`.
    """

    def falling(basis: Basis, weight: float) -> Basis:
        gain = weight / torch.arange(1, basis.spectrum.size(1) + 1, dtype=torch.float64)
        return basis._replace(spectrum=gain.expand_as(basis.spectrum))

    given = [
        LayerBasis(falling(k, w_k), None if v is None else falling(v, w_v))
        for (k, v), (w_k, w_v) in zip(bases, weights, strict=True)
    ]
    return few_pairs(config, given, count, keep, multiple)


def _cuts(basis: Basis, multiple: int) -> list[int]:
    """The ranks that a unit may take."""
    full = basis.spectrum.size(1)
    step = multiple if basis.pairs is None else lcm(multiple, 2)
    return [*range(step, full, step), full]


def check_keep(keep: float) -> None:
    """Raise ValueError unless keep is a share of bytes."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: expected a share of the KV bytes above 0 and up to 1")


def threshold_rank(spectrum: Tensor, threshold: float, multiple: int = 1) -> int:
    """Eigen Attention's rule: the smallest rank whose singular values sum to `threshold` of all.

    spectrum: (L, n) squared singular values. The largest rank over the heads, rounded up to a
    multiple.
    """
    values = spectrum.sqrt()
    share = values.cumsum(1) / values.sum(1, keepdim=True)
    rank = int((share < threshold - 1e-12).sum(1).max()) + 1
    return min(-(-rank // multiple) * multiple, spectrum.size(1))


def kept_share(config: Config, ranks: Ranks, latents: tuple[int, int]) -> float:
    """Share of the dense KV numbers that `ranks` keep, with so many latents a layer for k and v."""
    numbers = latents[0] * sum(ranks.k) + latents[1] * sum(ranks.v)
    return numbers / config.dense_kv_width


def kv_bytes(config: Config, dtype: torch.dtype, bits: int | None = None) -> dict[str, Any]:
    """Bytes that the cache takes per token, scales included, and those of the uncompressed model.

    bits: of all numbers, by default as the config says. A share is of the same dtype: beside
    float32, 8 bits are a quarter.
    """
    pairs = (config.latents(layer) for layer in range(config.num_hidden_layers))
    latents = [x if bits is None else x._replace(bits=bits) for pair in pairs for x in pair]
    kept = sum(latent.nbytes(dtype) for latent in latents)
    dense = config.dense_kv_width * dtype.itemsize
    return {
        "kv_bytes_per_token": kept,
        "kv_bytes_per_token_dense": dense,
        "kv_share": kept / dense,
    }
