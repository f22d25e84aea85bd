"""From statistics to bases: one function a method.

A basis holds every rank at once: its columns are sorted by importance, a smaller rank is a slice,
and `spectrum` says what each column is worth.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .calibrate import DAMPING, Moments, Statistics, damped
from .model import Model
from .rope import rotate


class Basis(NamedTuple):
    """z = encoderᵀ x holds x, decoder z gives it back; L latents of up to n numbers, fp64.

    At rank r only the first r columns are kept. What is lost of the mean of x is added back.
    """

    encoder: Tensor  # (L, n, n)
    decoder: Tensor  # (L, n, n)
    spectrum: Tensor  # (L, n): the error, per token, that each column takes away
    mean: Tensor  # (L, n): zero where the method does not centre

    def errors(self) -> Tensor:
        """Error per token left at rank 0, 1, ..., n, summed over the latents: (n + 1,)."""
        gone = self.spectrum.sum(0).flip(0).cumsum(0).flip(0)
        return torch.cat((gone, gone.new_zeros(1)))


class LayerBasis(NamedTuple):
    """The bases of one layer. Where one latent holds keys and values it is k, and v is None."""

    k: Basis
    v: Basis | None


def solve(covariance: Tensor, metric: Tensor, mean: Tensor, damping: float) -> Basis:
    """The latents that lose least of x under a metric, at every rank at once.

    Minimises tr(F (I - P) C (I - P)ᵀ) over maps P = D Eᵀ of rank r, for C = covariance and
    F = metric, both (L, n, n): with F = L Lᵀ and eigh(Lᵀ C L) = W Λ Wᵀ, E = L W and D = L⁻ᵀ W.
    `damping` times the mean of its diagonal is added to F, for directions no gradient has seen.
    """
    root = torch.linalg.cholesky(damped(metric, damping))
    values, vectors = torch.linalg.eigh(root.mT @ covariance @ root)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    decoder = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    return Basis(root @ vectors, decoder, values, mean)


def fisher(model: Model, statistics: list[Statistics]) -> list[LayerBasis]:
    """Errors weighed by the gradients of the loss, token by token: see `calibrate`.

    F = E[g gᵀ] with g = ∂loss/∂k or ∂loss/∂v, and C, each weighed by the other's lengths. Half the
    error is the expected second-order rise of the loss per token, in nats, one unit for keys,
    values and all layers. Needs `calibrate(..., gradients=True)`.
    """

    def basis(x: Moments | None, grad: Moments | None) -> Basis:
        x = _asked(x)
        return solve(x.covariance, _asked(grad).second, x.mean, DAMPING)

    return [
        LayerBasis(
            basis(s.k_weighted, s.k_grad_weighted),
            None if s.v is None else basis(s.v_weighted, s.v_grad_weighted),
        )
        for s in statistics
    ]


def fisher_plain(model: Model, statistics: list[Statistics]) -> list[LayerBasis]:
    """`fisher` without the weights: as if rows and their gradients were independent.

    What token weights are worth, for comparison. Needs `calibrate(..., gradients=True)`.
    """
    plain = [
        s._replace(
            k_weighted=s.k, v_weighted=s.v, k_grad_weighted=s.k_grad, v_grad_weighted=s.v_grad
        )
        for s in statistics
    ]
    return fisher(model, plain)


def attention(model: Model, statistics: list[Statistics]) -> list[LayerBasis]:
    """Errors weighed by what reads them: queries read keys, the output projection reads values.

    Keys: the Gram of the group's queries, averaged over the relative distances of the rotation if
    there is one. Values: the sum of W_oᵀ W_o over the group's heads. Each spectrum is a share of
    its layer's whole, since the units of keys, values and layers differ; a latent of both weighs
    them alike. Needs `calibrate(..., queries=True)`.
    """
    bases = []
    for block, s in zip(model.layers, statistics, strict=True):
        g, d = model.config.num_key_value_heads, model.config.head_dim
        q = _asked(s.q).second.unflatten(0, (g, -1)).sum(1)  # (G, D, D)
        q = _turned(model, q) if model.config.rotary else q
        w_o = block.attn.o_proj.weight.double().unflatten(1, (g, -1, d))  # (hidden, G, H / G, D)
        read = torch.einsum("ogmd,ogme->gde", w_o, w_o)
        if s.v is None:
            k = solve(s.k.covariance, _both(s.k.covariance, q, read), s.k.mean, damping=0.01)
            bases.append(LayerBasis(_shares(k), None))
            continue
        k = solve(s.k.covariance, _diagonal(q, len(s.k.gram)), s.k.mean, damping=0.01)
        v = solve(s.v.covariance, _diagonal(read, len(s.v.gram)), s.v.mean, damping=0.01)
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

    bases: Callable[[Model, list[Statistics]], list[LayerBasis]]
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
