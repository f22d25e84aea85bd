"""From statistics to bases: one function a method."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .calibrate import DAMPING, Moments, Statistics
from .model import Model
from .rope import rotate
from .solve import Basis, solve, solve_pairs


class LayerBasis(NamedTuple):
    """The bases of one layer. Where one latent holds keys and values it is k, and v is None."""

    k: Basis
    v: Basis | None


def _solve(x: Moments, metric: Tensor, damping: float, paired: int = 0) -> Basis:
    """Latents of what was counted; paired: the size of the heads whose rotation they let pass."""
    if paired:  # a constant that turns is none: it stays in
        return solve_pairs(x.second, metric, paired, damping)
    return solve(x.covariance, metric, x.mean, damping)


def fisher(model: Model, statistics: list[Statistics], pairs: bool = False) -> list[LayerBasis]:
    """Errors weighed by the gradients of the loss, token by token: see `calibrate`.

    F = E[g gᵀ] with g = ∂loss/∂k or ∂loss/∂v, and C, each weighed by the other's lengths. Half the
    error is the expected second-order rise of the loss per token, in nats, one unit for keys,
    values and all layers. pairs: keys by `solve_pairs`. Needs `calibrate(..., gradients=True)`.
    """

    def basis(x: Moments | None, grad: Moments | None, paired: int = 0) -> Basis:
        return _solve(_asked(x), _asked(grad).second, DAMPING, paired)

    paired = model.config.head_dim if pairs else 0
    return [
        LayerBasis(
            basis(s.k_weighted, s.k_grad_weighted, paired),
            None if s.v is None else basis(s.v_weighted, s.v_grad_weighted),
        )
        for s in statistics
    ]


def fisher_plain(
    model: Model, statistics: list[Statistics], pairs: bool = False
) -> list[LayerBasis]:
    """`fisher` without the weights: as if rows and their gradients were independent.

    What token weights are worth, for comparison. Needs `calibrate(..., gradients=True)`.
    """
    plain = [
        s._replace(
            k_weighted=s.k, v_weighted=s.v, k_grad_weighted=s.k_grad, v_grad_weighted=s.v_grad
        )
        for s in statistics
    ]
    return fisher(model, plain, pairs)


def attention(model: Model, statistics: list[Statistics], pairs: bool = False) -> list[LayerBasis]:
    """Errors weighed by what reads them: queries read keys, the output projection reads values.

    Keys: the Gram of the group's queries, averaged over the relative distances of the rotation if
    there is one. Values: the sum of W_oᵀ W_o over the group's heads. Each spectrum is a share of
    its layer's whole, since the units of keys, values and layers differ; a latent of both weighs
    them alike. pairs: keys by `solve_pairs`. Needs `calibrate(..., queries=True)`.
    """
    bases, paired = [], model.config.head_dim if pairs else 0
    for block, s in zip(model.layers, statistics, strict=True):
        g, d = model.config.num_key_value_heads, model.config.head_dim
        q = _asked(s.q).second.unflatten(0, (g, -1)).sum(1)  # (G, D, D)
        q = _turned(model, q) if model.config.rotary else q
        w_o = block.attn.o_proj.weight.double().unflatten(1, (g, -1, d))  # (hidden, G, H / G, D)
        read = torch.einsum("ogmd,ogme->gde", w_o, w_o)
        if s.v is None:
            k = _solve(s.k, _both(s.k.covariance, q, read), 0.01)
            bases.append(LayerBasis(_shares(k), None))
            continue
        k = _solve(s.k, _diagonal(q, len(s.k.gram)), 0.01, paired)
        v = _solve(s.v, _diagonal(read, len(s.v.gram)), 0.01)
        bases.append(LayerBasis(_shares(k), _shares(v)))
    return bases


def eigen(model: Model, statistics: list[Statistics]) -> list[LayerBasis]:
    """Eigen Attention (Saxena et al., arXiv 2408.05646): singular vectors, uncentred.

    Without a rotation: one basis a head, of its keys and queries stacked; with one: of keys before
    it, one basis a layer, shared by its kv heads. Values: one a kv head. Takes one kv head per
    latent. The spectrum is the squared singular values, per token. Needs
    `calibrate(..., queries=True)` where there is no rotation.
    """
    bases = []
    for s in statistics:
        k, v = s.k.second, _asked(s.v).second
        if model.config.rotary:
            k = k.sum(0).expand_as(k)
        else:
            k = k + _asked(s.q).second.unflatten(0, (len(k), -1)).sum(1)
        bases.append(LayerBasis(_principal(k), _principal(v)))
    return bases


def kv_heads(model: Model, statistics: list[Statistics]) -> list[LayerBasis]:
    """Effectively Compress KV Heads (Yu et al., arXiv 2406.07056): singular vectors, uncentred.

    Of the calibrated keys, and values, of a group's heads side by side. The paper keeps as many as
    a head has: the group becomes one head.
    """
    return [LayerBasis(_principal(s.k.second), _principal(_asked(s.v).second)) for s in statistics]


def _asked(moments: Moments | None) -> Moments:
    """Statistics that a method needs. Raises ValueError if they were not taken."""
    if moments is None:
        raise ValueError("the statistics lack what this method needs: see METHODS")
    return moments


def _principal(second: Tensor) -> Basis:
    """Principal directions of uncentred vectors, (L, n, n)."""
    values, vectors = torch.linalg.eigh(second)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    return Basis(vectors, vectors, values, torch.zeros_like(values))


def _turned(model: Model, gram: Tensor, distances: int = 64) -> Tensor:
    """Average of R F Rᵀ over the relative distances of a causal window. gram: (G, D, D)."""
    window = model.config.max_position_embeddings
    delta = torch.linspace(0, window - 1, distances, device=gram.device).round()
    weight = (window - delta) / (window - delta).sum()  # near pairs are more frequent
    cos, sin = (x[0, 0, :, None] for x in model.rope(delta[None], delta))
    half = rotate(gram[:, None], cos, sin)  # rotates rows: (G, distances, D, D)
    return torch.einsum("n,gnij->gij", weight.double(), rotate(half.mT, cos, sin).mT)


def _diagonal(per_head: Tensor, latents: int) -> Tensor:
    """Block diagonals of the heads that share a latent. (G, D, D) -> (L, G / L * D, ...)."""
    return torch.stack([torch.block_diag(*x) for x in per_head.unflatten(0, (latents, -1))])


def _both(covariance: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Metric of latents that hold keys and then values: each weighs 1 where all of it is lost."""
    halves = [_diagonal(x, len(covariance)) for x in (keys, values)]
    n = halves[0].size(-1)
    corners = covariance[:, :n, :n], covariance[:, n:, n:]
    k, v = (f / (f * c).sum((1, 2), keepdim=True) for f, c in zip(halves, corners, strict=True))
    return torch.stack([torch.block_diag(*x) for x in zip(k, v, strict=True)])


def _shares(basis: Basis) -> Basis:
    """The same basis, its errors as shares of the whole."""
    return basis._replace(spectrum=basis.spectrum / basis.spectrum.sum())


class Method(NamedTuple):
    """A way to choose bases, where it comes from, and the statistics that it needs."""

    bases: Callable[..., list[LayerBasis]]  # of a model and its statistics
    source: str
    gradients: bool = False
    queries: bool = False


METHODS = {
    "fisher": Method(fisher, "latents under the Fisher metric (eigenzoo)", gradients=True),
    "fisher-plain": Method(fisher_plain, "fisher without token weights (eigenzoo)", gradients=True),
    "attention": Method(attention, "latents under the attention metric (eigenzoo)", queries=True),
    "kv-heads": Method(kv_heads, "Effectively Compress KV Heads (Yu et al., arXiv 2406.07056)"),
    "eigen": Method(eigen, "Eigen Attention (Saxena et al., arXiv 2408.05646)", queries=True),
}
