"""Compression in one call: calibrate, solve, choose ranks, fold, refit."""

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

SEARCH_TOKENS = 4096  # to measure the errors of layers on


class Compressed(NamedTuple):
    """What `compress` returns."""

    model: Model
    """The model with a smaller cache: the same class, with other ranks in its config."""
    layers: list[LayerRecord]
    """Ranks, bits and relative errors of every layer, ready for JSON."""
    settings: Settings
    """The settings with every open choice made."""
    bases: list[LayerBasis]
    """Encoders, decoders and spectra of every layer."""


def gather(model: Model, tokens: Tensor, settings: Settings) -> list[Statistics]:
    """The statistics that `settings`, fitted to the model, need, of tokens (N, T).

    For a method without data they are empty, and the model is not run.
    """
    data = METHODS[settings.method].data
    return calibrate(model, tokens if data else tokens[:0], *needs(settings, model.config))


def error_search(
    model: Model, tokens: Tensor, settings: Settings, statistics: list[Statistics]
) -> ErrorBudget:
    """The errors that a method with searched ranks measures.

    They serve all settings that differ from these in `keep` or `error_budget` only. Arguments as
    in `compress`.
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
    """Compress the KV cache of a dense model.

    - model: as `load` returns it. It is not changed. CPUs compute slowly in float16: load such a
      checkpoint with `dtype=torch.float32`.
    - tokens: (N, T) token ids to calibrate on, N sequences of T tokens, on the model's device.
    - settings: what to compress to; None stands for the defaults of `Settings`.
    - statistics: to share one calibration among calls, what `gather` returned for settings with
      the same `needs`.
    - search: the same for methods that search their ranks, what `error_search` returned for
      settings that differ in `keep` only.

    The function of a method cites its source. Raises ValueError for settings that are unsound or
    do not fit the model, for a model that is compressed already, and for statistics that are not
    finite.
    """
    settings = settings or Settings()
    settings.check()
    settings = settings.fit(model.config)
    method = METHODS[settings.method]
    statistics = statistics or gather(model, tokens, settings)
    _check_blocks(statistics[0].anchor, settings.anchor(model.config))
    if method.searched:
        search = search or error_search(model, tokens, settings, statistics)
        bases = search.bases
        budget = settings.error_budget
        budget = search.meet(settings.keep) if budget is None else budget
        settings, chosen = settings._replace(error_budget=budget), search.choose(budget)
        ranks = ranks_of(chosen)
        layers = [
            row | {"threshold": s.threshold, "output_error": s.error}
            for row, s in zip(report(bases, ranks), chosen, strict=True)
        ]
    else:
        bases = method.bases(model, statistics, **settings.basis_options)
        weights = method.rank_weights(model, statistics)
        ranks = choose_ranks(model.config, bases, settings, weights)
        layers = report(bases, ranks)
    anchor = settings.anchor(model.config)
    bases = [mixed(basis, ranks, i) for i, basis in enumerate(bases)]
    if settings.refit:
        low = refit(model, tokens, bases, ranks, anchor)
    else:
        low = fold(model, bases, ranks, anchor)
    return Compressed(low, cast(list[LayerRecord], layers), settings, bases)


def _check_blocks(have: int, want: int) -> None:
    if have != want:
        raise ValueError(
            f"the statistics are of keys turned within blocks of {have}, but these settings keep "
            f"keys in blocks of {want}: gather statistics for these settings, or set the same "
            "keys and anchor_block"
        )


def choose_ranks(
    config: Config,
    bases: Sequence[LayerBasis],
    settings: Settings,
    weights: Sequence[tuple[float, float]] | None = None,
) -> Ranks:
    """The ranks of all layers of a dense `config`; of the bases only spectra are read.

    weights: see `Method.rank_weights`. For methods that do not search their ranks.
    """
    keep, multiple, count = settings.keep, settings.rank_multiple, settings.rank_pairs
    if METHODS[settings.method].merged:  # one head for every group
        width = (config.head_dim,) * len(bases)
        return Ranks(width, width)
    if settings.budget == "uniform":
        weights = [(1.0, 1.0)] * len(bases)
    if weights is not None:
        return proportional(config, bases, weights, keep, multiple, count)
    whole = settings.keys == "full"
    return few_pairs(config, bases, count, keep, multiple, whole, settings.bits)


def mixed(basis: LayerBasis, ranks: Ranks, layer: int) -> LayerBasis:
    """`spread` for latents of fewer than 16 bits; whole heads stay as they are."""
    k, v = ranks.segments(layer)
    return LayerBasis(spread(basis.k, k), None if basis.v is None else spread(basis.v, v))


def report(bases: Sequence[LayerBasis], ranks: Ranks) -> list[dict[str, Any]]:
    """The ranks of every layer, and the share of the method's own error that they leave."""
    rows = [_report(*x) for x in zip(bases, ranks.k, ranks.v, strict=True)]
    for name in ("k_bits", "v_bits", "k_segments", "v_segments"):
        by_layer = getattr(ranks, name)
        for row, held in zip(rows, by_layer, strict=bool(by_layer)):
            row[name] = held
    return rows


def _report(basis: LayerBasis, k_rank: int, v_rank: int) -> dict[str, Any]:
    k = basis.k.errors()
    row: dict[str, Any] = {"k_rank": k_rank, "v_rank": v_rank, "k_error": float(k[k_rank] / k[0])}
    if basis.v is not None:
        v = basis.v.errors()
        row["v_error"] = float(v[v_rank] / v[0])
    return row
