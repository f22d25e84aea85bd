"""From the statistics of a layer to its bases: one function a method."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.model import LatentAttention, Model
from ..models.rope import rotate
from .calibrate import DAMPING
from .moments import Moments, Statistics
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


def fisher(
    model: Model,
    attn: LatentAttention,
    s: Statistics,
    pairs: bool = False,
    damping: float = DAMPING,
) -> LayerBasis:
    """Errors weighed by the gradients of the loss, token by token: see `calibrate`.

    F = E[g gᵀ] with g = ∂loss/∂k or ∂loss/∂v, and C, each weighed by the other's lengths. Half the
    error is the expected second-order rise of the loss per token, in nats, one unit for keys,
    values and all layers. pairs: keys by `solve_pairs`. Needs `calibrate(..., gradients=True)`.
    """

    def basis(x: Moments | None, grad: Moments | None, paired: int = 0) -> Basis:
        return _solve(_asked(x), _asked(grad).second, damping, paired)

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
    """`fisher` without the weights: as if rows and their gradients were independent.

    What token weights are worth, for comparison. Needs `calibrate(..., gradients=True)`.
    """
    plain = s._replace(
        k_weighted=s.k, v_weighted=s.v, k_grad_weighted=s.k_grad, v_grad_weighted=s.v_grad
    )
    return fisher(model, attn, plain, pairs, damping)


def attention(
    model: Model, attn: LatentAttention, s: Statistics, pairs: bool = False
) -> LayerBasis:
    """Errors weighed by what reads them: queries read keys, the output projection reads values.

    Keys: the Gram of the group's queries, averaged over the relative distances of the rotation if
    there is one. Values: the sum of W_oᵀ W_o over the group's heads. Each spectrum is a share of
    its layer's whole, since the units of keys, values and layers differ; a latent of both weighs
    them alike. pairs: keys by `solve_pairs`. Needs `calibrate(..., queries=True)`.
    """
    q, read = _readers(model, attn, s)
    if s.v is None:
        k = _solve(s.k, _both(s.k.covariance, q, read), 0.01)
        return LayerBasis(_shares(k), None)
    k = _solve(s.k, _diagonal(q, len(s.k.gram)), 0.01, model.config.head_dim if pairs else 0)
    v = _solve(s.v, _diagonal(read, len(s.v.gram)), 0.01)
    return LayerBasis(_shares(k), _shares(v))


def eigen(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Eigen Attention (Saxena et al., arXiv 2408.05646): singular vectors, uncentred.

    Without a rotation: one basis a head, of its keys and queries stacked; with one: of keys before
    it, one basis a layer, shared by its kv heads. Values: one a kv head. Takes one kv head per
    latent. The spectrum is the squared singular values, per token. Needs
    `calibrate(..., queries=True)` where there is no rotation.
    """
    k, v = s.k.second, _asked(s.v).second
    if model.config.rotary:
        k = k.sum(0).expand_as(k)
    else:
        k = k + _asked(s.q).second.unflatten(0, (len(k), -1)).sum(1)
    return LayerBasis(_principal(k), _principal(v))


def kv_heads(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Effectively Compress KV Heads (Yu et al., arXiv 2406.07056): singular vectors, uncentred.

    Of the calibrated keys, and values, of a group's heads side by side. The paper keeps as many as
    a head has: the group becomes one head.
    """
    return LayerBasis(_principal(s.k.second), _principal(_asked(s.v).second))


def pca(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Principal components of keys, and of values: every direction weighs alike (Pearson, 1901).

    Centred, as no mean needs a latent. Each spectrum is a share of its own whole, so that one
    global budget compares keys with values and layer with layer whatever their scale: what plain
    PCA knows of them. Squared errors as they are would spend it on the longest vectors.
    """

    def basis(x: Moments) -> Basis:
        return _shares(_principal(x.covariance)._replace(mean=x.mean))

    return LayerBasis(basis(s.k), basis(_asked(s.v)))


def palu(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Palu (Chang et al., arXiv 2407.21118): SVD of W S for a group's rows W, S Sᵀ = E[x xᵀ].

    Group-head low-rank decomposition under the input whitening of SVD-LLM (arXiv 2403.07378). The
    left singular vectors of W S are the eigenvectors of W S Sᵀ Wᵀ = E[(W x)(W x)ᵀ], so the
    outputs without their bias, uncentred, say it all; the bias is left whole. Where a clip or a
    norm bends the outputs there is no such W: they are taken as they are.
    """
    k_bias, v_bias = _left_whole(model, attn, s)
    return LayerBasis(
        _principal(s.k.about(k_bias))._replace(mean=k_bias),
        _principal(_asked(s.v).about(v_bias))._replace(mean=v_bias),
    )


def palu_weights(model: Model, statistics: list[Statistics]) -> list[tuple[float, float]]:
    """Palu's rank rule: in proportion to the Fisher information of a weight, for k and for v.

    The paper sums the squares of a weight's gradients, its code the roots of their means over
    sequences. This is the root of the sum, near the code, and one number instead of one an
    element; ranks are the same for all groups of a layer, as with the code's `fisher_uniform`.
    Needs `calibrate(..., weights=True)`.
    """

    def information(grad: Moments | None) -> float:
        found = _asked(grad)
        return float(found.count * found.second) ** 0.5

    return [(information(s.k_weight), information(s.v_weight)) for s in statistics]


def lorc(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """LoRC (Zhang et al., arXiv 2410.03111): SVD of the key weight, and of the value weight.

    No data: of the statistics only the number of latents is read. A latent holds all heads unless
    told, as there. Biases are left whole. The spectrum is the squared singular values.
    """

    def basis(projection: nn.Linear, blocks: int, bias: Tensor) -> Basis:
        rows = projection.weight.double().unflatten(0, (blocks, -1))
        return _principal(rows @ rows.mT)._replace(mean=bias)

    k_bias, v_bias = _left_whole(model, attn, s)
    k = basis(attn.k_proj, len(s.k.gram), k_bias)
    return LayerBasis(k, basis(attn.v_proj, len(_asked(s.v).gram), v_bias))


def lorc_weights(model: Model, statistics: list[Statistics]) -> list[tuple[float, float]]:
    """LoRC's progressive rank rule: the same for k and v, falling with depth.

    κ̃_l = Π_{j >= l} κ(W_k,j) κ(W_v,j), the condition numbers of this layer and of all behind it,
    bounds how its error grows. Ranks go in a straight line over log κ̃ from d_min at the least to
    d_max at the largest. There both are given; here they follow from the budget and
    d_max = 2 d_min. A condition number leaves out singular values that are 0.
    """
    logs = [
        _log_condition(block.attn.k_proj.weight) + _log_condition(block.attn.v_proj.weight)
        for block in model.layers
    ]
    kappa = torch.tensor(logs).flip(0).cumsum(0).flip(0)
    span = (kappa.max() - kappa.min()).clamp(min=torch.finfo(kappa.dtype).tiny)
    return [(w, w) for w in ((1 + (kappa - kappa.min()) / span) / 2).tolist()]


def kq_svd(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """KQ-SVD (Lesens et al., arXiv 2512.05916): the best scores K Qᵀ, and the best V W_o.

    Of all products of rank r, K P Qᵀ loses least: ‖K (I - P) Qᵀ‖² = tr(F (I - P)ᵀ C (I - P)) with
    C = KᵀK and F = QᵀQ, so the SVD of K Qᵀ comes from the two Grams. A group's queries count
    together; values the same with W_o in the place of Q. Uncentred; 1e-6 of damping only keeps
    the Cholesky factor real. One head a latent unless told. Each spectrum is a share of its whole.

    With a rotation the paper takes rotated keys and queries. Here keys are compressed before it
    and rebuilt, since one basis does not fit all angles: Q is then the queries turned by the
    relative distance, averaged as for `attention`, which gives the same scores.
    Needs `calibrate(..., queries=True)`.
    """

    def basis(x: Moments, metric: Tensor) -> Basis:
        zero = torch.zeros_like(x.mean, dtype=torch.float64)
        return _shares(solve(x.second, _diagonal(metric, len(x.gram)), zero, damping=1e-6))

    q, read = _readers(model, attn, s)
    return LayerBasis(basis(s.k, q), basis(_asked(s.v), read))


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


def _readers(model: Model, attn: LatentAttention, s: Statistics) -> tuple[Tensor, Tensor]:
    """What reads the keys of every kv head, and what reads its values: (G, D, D) each.

    The Gram of its queries, averaged over relative distances if keys are rotated; Σ W_oᵀ W_o.
    """
    g, d = model.config.num_key_value_heads, model.config.head_dim
    q = _asked(s.q).second.unflatten(0, (g, -1)).sum(1)
    w_o = attn.o_proj.weight.double().unflatten(1, (g, -1, d))  # (hidden, G, H / G, D)
    read = torch.einsum("ogmd,ogme->gde", w_o, w_o)
    return (_turned(model, q) if model.config.rotary else q), read


def _left_whole(model: Model, attn: LatentAttention, s: Statistics) -> tuple[Tensor, Tensor]:
    """The biases of keys and of values, zeros where they are not simply added: (L, n) each."""

    def bias(projection: nn.Linear, bent: bool, like: Moments) -> Tensor:
        if projection.bias is None or bent:
            return torch.zeros_like(like.sum)
        return projection.bias.double().reshape(like.sum.shape)

    k_bent, v_bent = model.config.nonlinear
    return bias(attn.k_proj, k_bent, s.k), bias(attn.v_proj, v_bent, _asked(s.v))


def _log_condition(weight: Tensor) -> float:
    """Log of the largest over the least singular value, of those that are not 0."""
    values = torch.linalg.svdvals(weight.double())
    least = values[values > values[0] * max(weight.shape) * torch.finfo(torch.float32).eps][-1]
    return float((values[0] / least).log())


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
    """The same basis, its errors as shares of the whole; latents are of that unit as well."""
    whole = basis.spectrum.sum()
    return basis._replace(
        encoder=basis.encoder / whole.sqrt(),
        decoder=basis.decoder * whole.sqrt(),
        spectrum=basis.spectrum / whole,
    )
