"""The main job in one call: calibrate, solve, choose ranks, fold."""

from typing import Any, NamedTuple

from torch import Tensor

from .allocate import check_keep, greedy
from .basis import METHODS, LayerBasis
from .calibrate import calibrate
from .fold import fold
from .llama import Model
from .search import ErrorBudget, ranks_of

SEARCH_TOKENS = 4096  # on so many the errors of layers are measured


class Compressed(NamedTuple):
    """A model with a smaller cache, and for every layer its ranks and errors, ready for JSON."""

    model: Model
    layers: list[dict[str, Any]]
    error_budget: float | None


def compress(
    model: Model,
    tokens: Tensor,
    method: str = "fisher",
    keep: float = 0.6,
    error_budget: float | None = None,
    heads_per_latent: tuple[int, int] | None = None,
    rank_multiple: int = 8,
) -> Compressed:
    """Compress the KV cache of a dense model, calibrated on tokens (N, T).

    method: a name in `METHODS`. keep: share of the KV bytes that stay. error_budget, for `eigen`
    only: the relative output error that each layer may have, instead of `keep`.
    heads_per_latent: kv heads that share a latent of keys, and of values; None chooses. Raises
    ValueError for settings that do not fit the model.
    """
    check_settings(method, keep, error_budget, rank_multiple)
    shared = _shared(model, method, heads_per_latent)
    needs = METHODS[method]
    statistics = calibrate(model, tokens, shared, needs.gradients, needs.queries)
    bases = needs.bases(model, statistics)
    extra: list[dict[str, Any]] = [{} for _ in bases]
    if method == "eigen":
        rows = max(1, SEARCH_TOKENS // tokens.size(1))
        search = ErrorBudget(model, bases, tokens[:rows], rank_multiple)
        error_budget = search.meet(keep) if error_budget is None else error_budget
        settings = search.choose(error_budget)
        ranks = ranks_of(settings)
        extra = [{"threshold": s.threshold, "output_error": s.error} for s in settings]
    else:
        ranks = greedy(model.config, bases, keep, rank_multiple)
    layers = [_report(*x) | extra[i] for i, x in enumerate(zip(bases, *ranks, strict=True))]
    return Compressed(fold(model, bases, ranks), layers, error_budget)


def check_settings(
    method: str, keep: float, error_budget: float | None = None, rank_multiple: int = 8
) -> None:
    """Raise ValueError for settings that fit no model, before anything long begins."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: expected one of {', '.join(METHODS)}")
    if rank_multiple < 1:
        raise ValueError(f"rank multiple is {rank_multiple}: expected at least 1")
    if error_budget is not None and (method != "eigen" or error_budget < 0):
        raise ValueError("an error budget goes with the method eigen, and is 0 or more")
    check_keep(keep)


def _shared(model: Model, method: str, heads_per_latent: tuple[int, int] | None) -> tuple[int, int]:
    heads = model.config.num_key_value_heads
    if method == "eigen":
        if heads_per_latent not in (None, (1, 1)):
            raise ValueError("eigen keeps one latent a kv head: leave --heads-per-latent at 1")
        return 1, 1
    if heads_per_latent is None:  # beyond four the lift costs more than sharing gains
        most = max(n for n in range(1, 5) if heads % n == 0)
        return most, most
    if any(n < 1 or heads % n for n in heads_per_latent):
        raise ValueError(
            f"heads per latent is {heads_per_latent}: expected divisors of {heads} kv heads"
        )
    return heads_per_latent


def _report(basis: LayerBasis, k_rank: int, v_rank: int) -> dict[str, Any]:
    """Ranks, and the share of the method's own error that they leave."""
    k, v = basis.k.errors(), basis.v.errors()
    return {
        "k_rank": k_rank,
        "v_rank": v_rank,
        "k_error": float(k[k_rank] / k[0]),
        "v_error": float(v[v_rank] / v[0]),
    }
