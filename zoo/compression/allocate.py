"""How many ranks and bits each layer gets: a global budget, or an error budget for every layer."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.cache import LEVELS, Latent
from ..models.config import Config
from .basis import LayerBasis
from .mixing import rounding
from .solve import Basis

NOISE = 1e-7  # of a unit's error: what sums in fp32 leave of nothing


class Ranks(NamedTuple):
    """Widths of the latents of keys and of values, one a layer, and bits of their numbers.

    v is 0 where k holds both; empty bits mean 16.
    """

    k: tuple[int, ...]
    v: tuple[int, ...]
    k_bits: tuple[int, ...] = ()
    v_bits: tuple[int, ...] = ()


class Cut(NamedTuple):
    """A rank and bits that a unit may take, its bytes per token, and the error that it leaves."""

    rank: int
    bits: int
    size: int
    error: float


Unit = list[Cut]  # what the keys, or the values, of a layer may become


def greedy(
    config: Config,
    bases: Sequence[LayerBasis],
    keep: float,
    multiple: int = 8,
    whole_keys: bool = False,
    bits: Sequence[int] = (16,),
) -> Ranks:
    """Spend one budget over all layers, keys and values where it takes away most error per byte.

    keep: share of the bytes of the dense model's KV cache at 16 bits a number, in (0, 1]; never
    exceeded, scales included. Ranks are multiples of `multiple`, at least one multiple each, or
    full; even where columns are pairs. whole_keys: keys stay at full rank, and values get what is
    left. bits: those that numbers may have; of several each unit gets its own, by what rounding
    is expected to cost (`quantise.rounding`). As gains fall along every spectrum, the order of gain
    per byte is optimal up to the last step. Raises ValueError if `keep` is too small.
    """
    return few_pairs(config, bases, None, keep, multiple, whole_keys, bits)


def few_pairs(
    config: Config,
    bases: Sequence[LayerBasis],
    count: int | None,
    keep: float,
    multiple: int = 8,
    whole_keys: bool = False,
    bits: Sequence[int] = (16,),
) -> Ranks:
    """`greedy` with at most `count` distinct pairs (k, v) of ranks over the layers; None: any.

    Layers that share their ranks, and bits, are one to `greedy`, with the sums of their errors.
    Groups of them are found by merging two at a time, those that lose least by it where every byte
    costs what the last one is worth to `greedy` without groups. Limits and errors are those of
    `greedy`.
    """
    check_keep(keep)
    layers = [
        [
            _cuts(config, basis, multiple, bits, whole_keys and side == 0)
            for side, basis in enumerate(layer)
            if basis is not None
        ]
        for layer in bases
    ]
    dense = 2 * config.dense_kv_width
    least = sum(min(cut.size for cut in unit) for layer in layers for unit in layer)
    if least > int(keep * dense):
        beside = " beside whole keys" if whole_keys else ""
        raise ValueError(
            f"keep {keep} leaves less than rank {multiple} in every layer{beside}: expected at "
            f"least {least / dense:.3f}, or a smaller rank multiple"
        )
    chosen = _spend(layers, int(keep * dense))
    if count is not None and len({tuple(cut[:2] for cut in layer) for layer in chosen}) > count:
        groups = _groups(layers, chosen, count)
        merged = [_merged([layers[i] for i in group]) for group in groups]
        shared = _spend(merged, int(keep * dense))
        of = {layer: g for g, group in enumerate(groups) for layer in group}
        chosen = [shared[of[i]] for i in range(len(layers))]
    k, v = [layer[0] for layer in chosen], [layer[-1] for layer in chosen]
    ranks = Ranks(
        tuple(cut.rank for cut in k),
        tuple(cut.rank if len(layer) == 2 else 0 for cut, layer in zip(v, chosen, strict=True)),
    )
    if set(bits) == {16}:
        return ranks
    return ranks._replace(k_bits=tuple(cut.bits for cut in k), v_bits=tuple(cut.bits for cut in v))


def _spend(layers: Sequence[Sequence[Unit]], budget: int) -> list[list[Cut]]:
    """What every unit of every layer becomes within a budget of bytes per token."""
    units = [unit for layer in layers for unit in layer]
    chosen = [min(unit, key=lambda cut: cut.size) for unit in units]
    left = budget - sum(cut.size for cut in chosen)

    def step(u: int) -> list[tuple[float, int, Cut]]:
        """What takes away most error per byte from a unit, of what fits."""
        now = chosen[u]
        steps = [
            ((cut.error - now.error) / (cut.size - now.size), u, cut)
            for cut in units[u]
            if now.size < cut.size <= now.size + left and cut.error < now.error
        ]
        return [min(steps)] if steps else []

    steps = [x for u in range(len(units)) for x in step(u)]
    heapify(steps)
    while steps:
        _, u, cut = heappop(steps)
        cost = cut.size - chosen[u].size
        if cost <= left:
            chosen[u], left = cut, left - cost
        for x in step(u):
            heappush(steps, x)
    of = iter(chosen)
    return [[next(of) for _ in layer] for layer in layers]


def _merged(layers: Sequence[Sequence[Unit]]) -> list[Unit]:
    """Layers of equal ranks as one: what a cut costs, and what it leaves, are their sums."""
    return [
        [
            same[0]._replace(size=sum(c.size for c in same), error=sum(c.error for c in same))
            for same in zip(*units, strict=True)
        ]
        for units in zip(*layers, strict=True)
    ]


def _groups(
    layers: Sequence[Sequence[Unit]], chosen: Sequence[Sequence[Cut]], count: int
) -> list[list[int]]:
    """The layers in `count` groups that lose little by equal cuts; chosen: without groups."""
    pairs = [
        x for layer, cuts in zip(layers, chosen, strict=True) for x in zip(layer, cuts, strict=True)
    ]
    price = min(_worth(unit, cut) for unit, cut in pairs)
    sides = zip(*layers, strict=True)
    bills = [torch.stack([_bill(unit, price) for unit in units]) for units in sides]
    groups = [[i] for i in range(len(layers))]
    while len(groups) > count:
        a, b = divmod(int(torch.stack([_loss(x) for x in bills]).sum(0).argmin()), len(groups))
        groups[a] += groups.pop(b)
        for x in bills:
            x[a] += x[b]
        bills = [torch.cat((x[:b], x[b + 1 :])) for x in bills]
    return groups


def _worth(unit: Unit, now: Cut) -> float:
    """Error that a byte of the last step up to a cut takes away."""
    steps = ((c.error - now.error) / (now.size - c.size) for c in unit if c.size < now.size)
    return min(steps, default=torch.inf)


def _bill(unit: Unit, price: float) -> Tensor:
    """Error and price of all bytes, for every cut of a unit."""
    return torch.tensor([cut.error + price * cut.size for cut in unit], dtype=torch.float64)


def _loss(bills: Tensor) -> Tensor:
    """By how much two groups pay more with equal cuts than each with its best: (n, n), a < b.

    bills: (n, cuts), sums over the layers of a group. Infinite where a >= b.
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


def _cuts(
    config: Config, basis: Basis, multiple: int, bits: Sequence[int], whole: bool = False
) -> Unit:
    """What a unit may become; whole: at full rank only, where heads are kept as they are."""
    latents, full = basis.spectrum.shape
    step = multiple if basis.pairs is None else lcm(multiple, 2)
    ranks = [full] if whole else [*range(step, full, step), full]
    rounded = basis.rounding
    if rounded is None and set(bits) != {16}:
        rounded = rounding(basis, config.head_dim)
    errors, cuts = basis.errors(), list[Cut]()
    errors = errors.clamp(min=NOISE * errors[0])  # a joint latent may hold all long before
    for rank in ranks:
        heads = latents if rank < full else latents * full // config.head_dim
        for count in bits:
            latent = Latent(heads, rank * latents // heads, count)
            if latent.width * count % 8:
                continue  # half a byte would be left
            error = float(errors[rank])
            if rounded is not None and count < 16:
                error += float(rounded[rank]) / LEVELS[count] ** 2
            cuts.append(Cut(rank, count, latent.nbytes(torch.bfloat16), error))
    return cuts


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
