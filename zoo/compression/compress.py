"""The main job in one call: calibrate, solve, choose ranks, fold."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from ..models.config import Config
from ..models.model import Model
from ..utils.records import LayerRecord
from .allocate import Ranks, few_pairs, proportional
from .basis import LayerBasis
from .calibrate import calibrate
from .fold import fold
from .methods import METHODS
from .mixing import spread
from .moments import Statistics
from .refit import refit
from .search import ErrorBudget, ranks_of
from .settings import Settings, needs
from .solve import Basis

SEARCH_TOKENS = 4096  # on so many the errors of layers are measured


class Compressed(NamedTuple):
    """A model with a smaller cache, and for every layer its ranks and errors, ready for JSON."""

    model: Model
    layers: list[LayerRecord]
    settings: Settings  # with what was chosen filled in
    bases: list[LayerBasis]


def gather(model: Model, tokens: Tensor, settings: Settings) -> list[Statistics]:
    """The statistics of tokens (N, T) that `settings`, fitted to the model, need.

    A method without data is given none: its statistics are empty, and the model is not run.
    """
    data = METHODS[settings.method].data
    return calibrate(model, tokens if data else tokens[:0], *needs(settings, model.config))


def error_search(
    model: Model, tokens: Tensor, settings: Settings, statistics: list[Statistics]
) -> ErrorBudget:
    """The errors that `eigen` searches, for these settings and others that differ in what to keep.

    Arguments as in `compress`.
    """
    bases = METHODS[settings.method].bases(model, statistics)
    rows = max(1, SEARCH_TOKENS // tokens.size(1))
    return ErrorBudget(model, bases, tokens[:rows], settings.rank_multiple)


def compress(
    model: Model,
    tokens: Tensor,
    settings: Settings | None = None,
    statistics: list[Statistics] | None = None,
    search: ErrorBudget | None = None,
) -> Compressed:
    """Compress the KV cache of a dense model, calibrated on tokens (N, T).

    statistics: what `gather` returned for settings with the same `needs`. search, for `eigen`
    only: what `error_search` returned for settings that differ in what to keep and nothing else.
    Raises ValueError for settings that do not fit the model.
    """
    settings = settings or Settings()
    settings.check()
    settings = settings.fit(model.config, model.device.type)
    method, seen = METHODS[settings.method], statistics or gather(model, tokens, settings)
    if settings.method == "eigen":
        search = search or error_search(model, tokens, settings, seen)
    bases = search.bases if search else method.bases(model, seen, **settings.basis_options)
    found: list[dict[str, Any]] = [{} for _ in bases]
    if search:
        budget = settings.error_budget
        budget = search.meet(settings.keep) if budget is None else budget
        settings, chosen = settings._replace(error_budget=budget), search.choose(budget)
        ranks = ranks_of(chosen)
        found = [{"threshold": s.threshold, "output_error": s.error} for s in chosen]
    else:
        weights = method.ranks(model, seen) if method.ranks else None
        ranks = choose_ranks(model.config, bases, settings, weights)
    layers = report(bases, ranks)
    layers = [a | b for a, b in zip(layers, found, strict=True)]
    anchor = settings.anchor(model.config)
    bases = [mixed(basis, ranks, i) for i, basis in enumerate(bases)]
    if settings.refit:
        low = refit(model, tokens, bases, ranks, anchor, settings.refit)
    else:
        low = fold(model, bases, ranks, anchor)
    return Compressed(low, cast(list[LayerRecord], layers), settings, bases)


def choose_ranks(
    config: Config,
    bases: Sequence[LayerBasis],
    settings: Settings,
    weights: Sequence[tuple[float, float]] | None = None,
) -> Ranks:
    """The ranks of all layers of a dense `config`; of the bases only spectra are read.

    weights: what the method's own rank rule found, where it has one.
    """
    keep, multiple, count = settings.keep, settings.rank_multiple, settings.rank_pairs
    if settings.method == "kv-heads":  # one head for every group
        width = (config.head_dim,) * len(bases)
        return Ranks(width, width)
    if settings.budget == "uniform":
        weights = [(1.0, 1.0)] * len(bases)
    if weights is not None:
        return proportional(config, bases, weights, keep, multiple, count)
    whole = settings.keys == "full"
    return few_pairs(config, bases, count, keep, multiple, whole, settings.kv_bits)


def mixed(basis: LayerBasis, ranks: Ranks, layer: int) -> LayerBasis:
    """`spread` where fewer bits hold a latent; whole keys and values stay as they are."""

    def side(basis: Basis, rank: int, bits: int) -> Basis:
        return spread(basis, rank) if bits < 16 and rank < basis.spectrum.size(1) else basis

    if not ranks.k_bits:
        return basis
    k = side(basis.k, ranks.k[layer], ranks.k_bits[layer])
    if basis.v is None:
        return LayerBasis(k, None)
    return LayerBasis(k, side(basis.v, ranks.v[layer], ranks.v_bits[layer]))


def report(bases: Sequence[LayerBasis], ranks: Ranks) -> list[dict[str, Any]]:
    """For every layer its ranks, and the share of the method's own error that they leave."""
    found = [_report(*x) for x in zip(bases, ranks.k, ranks.v, strict=True)]
    for side, counts in (("k", ranks.k_bits), ("v", ranks.v_bits)):
        for layer, bits in zip(found, counts, strict=bool(counts)):
            layer[f"{side}_bits"] = bits
    return found


def _report(basis: LayerBasis, k_rank: int, v_rank: int) -> dict[str, Any]:
    k = basis.k.errors()
    found = {"k_rank": k_rank, "v_rank": v_rank, "k_error": float(k[k_rank] / k[0])}
    if basis.v is not None:
        v = basis.v.errors()
        found["v_error"] = float(v[v_rank] / v[0])
    return found
