"""How many ranks and bits each layer gets within a budget of bytes."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.bits import Segment, parse_segments
from ..models.config import Config
from .basis import LayerBasis
from .cuts import Choices, Cut, Unit, choices, together
from .groups import groups, merged
from .solve import Basis


class Ranks(NamedTuple):
    """Widths of the latents of keys and of values, one a layer, and how their numbers are held.

    v is 0 where k holds both. As in `Config`: empty bits mean 16, and segments are texts.
    """

    k: tuple[int, ...]
    v: tuple[int, ...]
    k_bits: tuple[int, ...] = ()
    v_bits: tuple[int, ...] = ()
    k_segments: tuple[str, ...] = ()
    v_segments: tuple[str, ...] = ()

    def segments(self, layer: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """The segments of a layer's latents of keys, and of values; none at 16 bits."""
        k, v = self.k_segments, self.v_segments
        return parse_segments(k[layer] if k else ""), parse_segments(v[layer] if v else "")


def greedy(
    config: Config,
    bases: Sequence[LayerBasis],
    keep: float,
    multiple: int = 8,
    whole_keys: bool = False,
    bits: Sequence[int] = (16,),
) -> Ranks:
    """Spend one budget over the keys and values of all layers where it removes most error per byte.

    keep: share of the bytes of the dense model's KV cache at 16 bits a number, in (0, 1]; never
    exceeded, scales included. Ranks are multiples of `multiple`, at least one multiple each, or
    full; even if columns are pairs. whole_keys: keys stay at full rank, and values get what is
    left. bits: those that numbers may have; if there are several, latents are cut into segments of
    falling bits, by the expected error of rounding (`rounding.segment_errors`). Each unit takes
    the corners of its convex hull in turn, so the order of gain per byte is optimal up to the last
    step. Raises ValueError if `keep` is too small.
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

    Layers that share their ranks, and bits, are one to `greedy`, with the sums of their errors;
    `cuts.groups` chooses which do. Limits and errors are those of `greedy`.
    """
    check_keep(keep)
    units = [
        [
            choices(config, basis, multiple, bits, whole_keys and side == 0)
            for side, basis in enumerate(layer)
            if basis is not None
        ]
        for layer in bases
    ]
    layers = [[unit.cuts(unit.best()) for unit in layer] for layer in units]
    budget = int(keep * 2 * config.dense_kv_width)
    _check_room(config, layers, budget, " beside whole keys" * whole_keys)
    chosen = _spend(layers, budget)
    if count is not None and len({tuple(cut[:3] for cut in layer) for layer in chosen}) > count:
        chosen = _alike(units, chosen, count, budget)
    return _ranks(chosen, set(bits) == {16})


def _check_room(config: Config, layers: Sequence[Sequence[Unit]], budget: int, beside: str) -> None:
    """Raise ValueError unless the smallest cuts fit into a budget."""
    smallest = [min(unit, key=lambda cut: cut.size) for layer in layers for unit in layer]
    least = sum(cut.size for cut in smallest)
    if least > budget:
        dense = 2 * config.dense_kv_width
        rank = min(cut.rank for cut in smallest)
        raise ValueError(
            f"keep {budget / dense:.3g} leaves less than rank {rank} in every layer{beside}: "
            f"expected at least {least / dense:.3f}, or a smaller rank multiple"
        )


def _alike(
    units: Sequence[Sequence[Choices]], chosen: list[list[Cut]], count: int, budget: int
) -> list[list[Cut]]:
    """The cuts of all layers in `count` groups. chosen: what they take without groups."""
    sides = [together(side) for side in zip(*units, strict=True)]
    layers = [*zip(*sides, strict=True)]
    members = groups(layers, chosen, count)
    shared = _spend([merged([layers[i] for i in group]) for group in members], budget)
    group_of = {layer: g for g, group in enumerate(members) for layer in group}
    return [shared[group_of[i]] for i in range(len(layers))]


def _ranks(chosen: Sequence[Sequence[Cut]], unrounded: bool) -> Ranks:
    """The cuts of all layers as `fold` reads them."""
    k, *rest = zip(*chosen, strict=True)
    v = rest[0] if rest else ()  # joint latents are those of keys
    ranks = Ranks(tuple(cut.rank for cut in k), tuple(cut.rank for cut in v) or (0,) * len(k))
    if unrounded:
        return ranks
    (k_bits, k_segments), (v_bits, v_segments) = _held(k), _held(v)
    return ranks._replace(
        k_bits=k_bits, v_bits=v_bits, k_segments=k_segments, v_segments=v_segments
    )


def _held(side: Sequence[Cut]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Bits of whole heads in all layers; or segments, of which whole heads then are one."""
    if not any(cut.segments for cut in side):
        return tuple(cut.bits for cut in side), ()
    whole = ("" if cut.bits == 16 else f"{cut.rank}x{cut.bits}" for cut in side)
    return (), tuple(cut.segments or text for cut, text in zip(side, whole, strict=True))


def _spend(layers: Sequence[Sequence[Unit]], budget: int) -> list[list[Cut]]:
    """The cuts of every unit of every layer within a budget of bytes per token."""
    units = [unit for layer in layers for unit in layer]
    chosen = [min(unit, key=lambda cut: cut.size) for unit in units]
    left = budget - sum(cut.size for cut in chosen)

    def step(u: int) -> list[tuple[float, int, Cut]]:
        """The step of a unit that removes most error per byte, of those that fit."""
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
    rest = iter(chosen)
    return [[next(rest) for _ in layer] for layer in layers]


def proportional(
    config: Config,
    bases: Sequence[LayerBasis],
    weights: Sequence[tuple[float, float]],
    keep: float,
    multiple: int = 8,
    count: int | None = None,
) -> Ranks:
    """Spend one budget so that latents of keys, and of values, get ranks in proportion to weights.

    weights: one pair a layer. Where the next rank r of a unit removes weight / r, `greedy` is the
    divisor method of apportionment (D'Hondt); what a full unit cannot take goes to the others.
    Limits, rounding and errors are those of `greedy`; count: as in `few_pairs`.
    """

    def falling(basis: Basis, weight: float) -> Basis:
        gain = weight / torch.arange(1, basis.spectrum.size(1) + 1, dtype=torch.float64)
        return basis._replace(spectrum=gain.expand_as(basis.spectrum))

    weighted = [
        LayerBasis(falling(k, w_k), None if v is None else falling(v, w_v))
        for (k, v), (w_k, w_v) in zip(bases, weights, strict=True)
    ]
    return few_pairs(config, weighted, count, keep, multiple)


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
    """Share of the dense KV numbers that `ranks` keep; latents: how many k and v have a layer."""
    numbers = latents[0] * sum(ranks.k) + latents[1] * sum(ranks.v)
    return numbers / config.dense_kv_width
