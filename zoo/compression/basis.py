"""From the statistics of a layer to its bases: one function a method, named in `METHODS`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
        return LayerBasis(_shares(k), None)
    k = _solve(s.k, block_diagonal(q, len(s.k.gram)), 0.01, model.config.head_dim if pairs else 0)
    v = _solve(s.v, block_diagonal(read, len(s.v.gram)), 0.01)
    return LayerBasis(_shares(k), _shares(v))


def eigen(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Eigen Attention (Saxena et al., arXiv 2408.05646): singular vectors, not centered.

    Without a rotation: one basis a head, of its keys and queries stacked; with one: of keys before
    it, one basis a layer, shared by its kv heads. Values: one a kv head. Takes one kv head per
    latent. The spectrum is the squared singular values, per token. Needs
    `calibrate(..., queries=True)` where there is no rotation.
    """
    k, v = s.k.second, given(s.v).second
    if model.config.rotary:
        k = k.sum(0).expand_as(k)
    else:
        k = k + given(s.q).second.unflatten(0, (len(k), -1)).sum(1)
    return LayerBasis(_principal(k), _principal(v))


def kv_heads(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Effectively Compress KV Heads (Yu et al., arXiv 2406.07056): singular vectors, not centered.

    Of the calibrated keys, and values, of a group's heads side by side. The paper keeps as many as
    a head has: the group becomes one head.
    """
    return LayerBasis(_principal(s.k.second), _principal(given(s.v).second))


def pca(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Principal components of keys, and of values: all directions have one weight (Pearson, 1901).

    Centered, since a mean needs no latent. Each spectrum is a share of its own whole, so that one
    global budget compares keys with values and layer with layer whatever their scale. With squared
    errors themselves the budget would go to the longest vectors.
    """

    def basis(x: Moments) -> Basis:
        return _shares(_principal(x.covariance)._replace(mean=x.mean))

    return LayerBasis(basis(s.k), basis(given(s.v)))


def palu(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Palu (Chang et al., arXiv 2407.21118): SVD of W S for a group's rows W, S Sᵀ = E[x xᵀ].

    Group-head low-rank decomposition under the input whitening of SVD-LLM (arXiv 2403.07378). The
    left singular vectors of W S are the eigenvectors of W S Sᵀ Wᵀ = E[(W x)(W x)ᵀ], so the
    second moments of outputs without their bias suffice; the bias is not compressed. If a clip or
    a norm makes the outputs nonlinear there is no such W, and the outputs are taken as they are.
    """
    k_bias, v_bias = _biases(model, attn, s)
    return LayerBasis(
        _principal(s.k.about(k_bias))._replace(mean=k_bias),
        _principal(given(s.v).about(v_bias))._replace(mean=v_bias),
    )


def palu_weights(model: Model, statistics: list[Statistics]) -> list[tuple[float, float]]:
    """Palu's rank rule: in proportion to the Fisher information of a weight, for k and for v.

    The paper sums the squares of a weight's gradients, its code the roots of their means over
    sequences. This is the root of the sum, near the code, and one number instead of one an
    element; ranks are the same for all groups of a layer, as with the code's `fisher_uniform`.
    Needs `calibrate(..., weights=True)`.
    """

    def information(grad: Moments | None) -> float:
        moments = given(grad)
        return float(moments.count * moments.second) ** 0.5

    return [(information(s.k_weight), information(s.v_weight)) for s in statistics]


def lorc(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """LoRC (Zhang et al., arXiv 2410.03111): SVD of the key weight, and of the value weight.

    Uses no data: of the statistics only the number of latents is read. As in the paper a latent
    holds all heads by default. Biases are not compressed. The spectrum is the squared
    singular values.
    """

    def basis(projection: nn.Linear, blocks: int, bias: Tensor) -> Basis:
        rows = projection.weight.double().unflatten(0, (blocks, -1))
        return _principal(rows @ rows.mT)._replace(mean=bias)

    k_bias, v_bias = _biases(model, attn, s)
    k = basis(attn.k_proj, len(s.k.gram), k_bias)
    return LayerBasis(k, basis(attn.v_proj, len(given(s.v).gram), v_bias))


def lorc_weights(model: Model, statistics: list[Statistics]) -> list[tuple[float, float]]:
    """LoRC's progressive rank rule: the same for k and v, falling with depth.

    κ̃_l = Π_{j >= l} κ(W_k,j) κ(W_v,j), the condition numbers of this layer and of all behind it,
    bounds how its error grows. Ranks are linear in log κ̃, from d_min at the least to d_max at the
    largest. In the paper both are given; here they follow from the budget and d_max = 2 d_min. A
    condition number ignores singular values that are 0.
    """
    logs = [
        _log_condition(block.attn.k_proj.weight) + _log_condition(block.attn.v_proj.weight)
        for block in model.layers
    ]
    kappa = torch.tensor(logs).flip(0).cumsum(0).flip(0)
    span = (kappa.max() - kappa.min()).clamp(min=torch.finfo(kappa.dtype).tiny)
    return [(w, w) for w in ((1 + (kappa - kappa.min()) / span) / 2).tolist()]


def kq_svd(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """KQ-SVD (Lesens et al., arXiv 2512.05916): the best K Qᵀ, and the best V W_o, of rank r.

    Of all products of rank r, K P Qᵀ loses least: ‖K (I - P) Qᵀ‖² = tr(F (I - P)ᵀ C (I - P)) with
    C = KᵀK and F = QᵀQ, so the SVD of K Qᵀ follows from the two Gram matrices. The queries of
    a group are taken together; values are treated alike, with W_o for Q. Not centered; a damping
    of 1e-6 only keeps the Cholesky factor real. One head a latent by default. Each spectrum is a
    share of its whole.

    With a rotation the paper takes rotated keys and queries. Here keys are compressed before the
    rotation, or rotated within their block, since one basis does not fit all angles: Q is then the
    queries rotated by the relative distance, which gives the same scores, averaged as for
    `attention`.
    Needs `calibrate(..., queries=True)`.
    """

    def basis(x: Moments, metric: Tensor) -> Basis:
        zero = torch.zeros_like(x.mean, dtype=torch.float64)
        return _shares(solve(x.second, block_diagonal(metric, len(x.gram)), zero, damping=1e-6))

    q, read = readers(model, attn, s)
    return LayerBasis(basis(s.k, q), basis(given(s.v), read))


def _principal(second: Tensor) -> Basis:
    """Principal directions by a second moment (L, n, n)."""
    values, vectors = torch.linalg.eigh(second)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    return Basis(vectors, vectors, values, torch.zeros_like(values))


def _biases(model: Model, attn: LatentAttention, s: Statistics) -> tuple[Tensor, Tensor]:
    """The biases of keys and of values, zeros where outputs are not linear: (L, n) each."""

    def bias(projection: nn.Linear, nonlinear: bool, like: Moments) -> Tensor:
        if projection.bias is None or nonlinear:
            return torch.zeros_like(like.sum)
        return projection.bias.double().reshape(like.sum.shape)

    k_nonlinear, v_nonlinear = model.config.nonlinear
    return bias(attn.k_proj, k_nonlinear, s.k), bias(attn.v_proj, v_nonlinear, given(s.v))


def _log_condition(weight: Tensor) -> float:
    """Log of the ratio of the largest singular value to the least that is not 0."""
    values = torch.linalg.svdvals(weight.double())
    least = values[values > values[0] * max(weight.shape) * torch.finfo(torch.float32).eps][-1]
    return float((values[0] / least).log())


def _shares(basis: Basis) -> Basis:
    """The same basis with errors, and so latents, in units of the whole error."""
    whole = basis.spectrum.sum()
    return basis._replace(
        encoder=basis.encoder / whole.sqrt(),
        decoder=basis.decoder * whole.sqrt(),
        spectrum=basis.spectrum / whole,
    )
