"""From the statistics of a layer to its bases: one function a method, named in `METHODS`.

Here are our own methods and what all share; those of papers are in `basis_published.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.model import LatentAttention, Model
from .calibrate import DAMPING
from .metric import block_diagonal, joint, readers
from .moments import Moments, Statistics, given
from .solve import Basis, solve, solve_pairs


class LayerBasis(NamedTuple):
    """The bases of one layer. A latent for both keys and values is k, and v is None."""

    k: Basis
    v: Basis | None


def _solve(x: Moments, metric: Tensor, damping: float, paired: int = 0) -> Basis:
    """Latents by second moments; paired: head size, for latents that commute with the rotation."""
    if paired:  # not centered: a mean that is rotated is no constant
        return solve_pairs(x.second, metric, paired, damping)
    return solve(x.covariance, metric, x.mean, damping)


def fisher(
    model: Model,
    attn: LatentAttention,
    s: Statistics,
    pairs: bool = False,
    damping: float = DAMPING,
) -> LayerBasis:
    """Errors weighted by the gradients of the loss, token by token: see `calibrate`.

    F = E[g gᵀ] with g = ∂loss/∂k or ∂loss/∂v, and C, each weighted by the other's lengths. Half the
    error is the expected second-order rise of the loss per token, in nats, one unit for keys,
    values and all layers. pairs: keys by `solve_pairs`. Needs `calibrate(..., gradients=True)`.
    """

    def basis(x: Moments | None, grad: Moments | None, paired: int = 0) -> Basis:
        return _solve(given(x), given(grad).second, damping, paired)

    return LayerBasis(
        basis(s.k_weighted, s.k_grad_weighted, model.config.head_dim if pairs else 0),
        None if s.v is None else basis(s.v_weighted, s.v_grad_weighted),
    )


def fisher_plain(
    model: Model,
    attn: LatentAttention,
    s: Statistics,
    pairs: bool = False,
    damping: float = DAMPING,
) -> LayerBasis:
    """`fisher` without token weights: as if rows and their gradients were independent.

    Shows, by comparison, what token weights are worth. Needs `calibrate(..., gradients=True)`.
    """
    unweighted = s._replace(
        k_weighted=s.k, v_weighted=s.v, k_grad_weighted=s.k_grad, v_grad_weighted=s.v_grad
    )
    return fisher(model, attn, unweighted, pairs, damping)


def attention(
    model: Model, attn: LatentAttention, s: Statistics, pairs: bool = False
) -> LayerBasis:
    """Errors weighted by what reads them: queries read keys, the output projection reads values.

    Keys: the Gram matrix of the group's queries, averaged over the relative distances of the
    rotation if there is one. Values: the sum of W_oᵀ W_o over the group's heads. Each spectrum is
    a share of its layer's whole, since the units of keys, values and layers differ; a joint latent
    gives both the same weight. pairs: keys by `solve_pairs`. Needs `calibrate(..., queries=True)`.
    """
    q, read = readers(model, attn, s)
    if s.v is None:
        k = _solve(s.k, joint(s.k.covariance, q, read), 0.01)
        return LayerBasis(shares(k), None)
    k = _solve(s.k, block_diagonal(q, len(s.k.gram)), 0.01, model.config.head_dim if pairs else 0)
    v = _solve(s.v, block_diagonal(read, len(s.v.gram)), 0.01)
    return LayerBasis(shares(k), shares(v))


def pca(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Principal components of keys, and of values: all directions have one weight (Pearson, 1901).

    Centered, since a mean needs no latent. Each spectrum is a share of its own whole, so that one
    global budget compares keys with values and layer with layer whatever their scale. With squared
    errors themselves the budget would go to the longest vectors.
    """

    def basis(x: Moments) -> Basis:
        return shares(principal(x.covariance)._replace(mean=x.mean))

    return LayerBasis(basis(s.k), basis(given(s.v)))


def principal(second: Tensor) -> Basis:
    """Principal directions by a second moment (L, n, n)."""
    values, vectors = torch.linalg.eigh(second)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    return Basis(vectors, vectors, values, torch.zeros_like(values))


def shares(basis: Basis) -> Basis:
    """The same basis with errors, and so latents, in units of the whole error."""
    whole = basis.spectrum.sum()
    return basis._replace(
        encoder=basis.encoder / whole.sqrt(),
        decoder=basis.decoder * whole.sqrt(),
        spectrum=basis.spectrum / whole,
    )
