"""Methods of papers: from the statistics of a layer to its bases, as in `basis.py`."""

import torch
from torch import Tensor, nn

from ..models.model import LatentAttention, Model
from .basis import LayerBasis, principal, shares
from .metric import block_diagonal, output_readers, readers, turned
from .moments import Moments, Statistics, given
from .solve import Basis, solve


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
    return LayerBasis(principal(k), principal(v))


def kv_heads(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Effectively Compress KV Heads (Yu et al., arXiv 2406.07056): singular vectors, not centered.

    Of the calibrated keys, and values, of a group's heads side by side. The paper keeps as many as
    a head has: the group becomes one head.
    """
    return LayerBasis(principal(s.k.second), principal(given(s.v).second))


def palu(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """Palu (Chang et al., arXiv 2407.21118): SVD of W S for a group's rows W, S Sᵀ = E[x xᵀ].

    Group-head low-rank decomposition under the input whitening of SVD-LLM (arXiv 2403.07378). The
    left singular vectors of W S are the eigenvectors of W S Sᵀ Wᵀ = E[(W x)(W x)ᵀ], so the
    second moments of outputs without their bias suffice; the bias is not compressed. If a clip or
    a norm makes the outputs nonlinear there is no such W, and the outputs are taken as they are.
    """
    k_bias, v_bias = _biases(model, attn, s)
    return LayerBasis(
        principal(s.k.about(k_bias))._replace(mean=k_bias),
        principal(given(s.v).about(v_bias))._replace(mean=v_bias),
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
        return principal(rows @ rows.mT)._replace(mean=bias)

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
        return shares(solve(x.second, block_diagonal(metric, len(x.gram)), zero, damping=1e-6))

    q, read = readers(model, attn, s)
    return LayerBasis(basis(s.k, q), basis(given(s.v), read))


def clover(model: Model, attn: LatentAttention, s: Statistics) -> LayerBasis:
    """CLOVER (Meng et al., arXiv 2411.17426): SVD of a head's W_qᵀ W_k, and of its W_o W_v.

    Uses no data: of the statistics only the number of latents is read. ‖W_qᵀ (I - P) W_k‖² =
    tr(F (I - P) C (I - P)ᵀ) with C = W_k W_kᵀ and F = W_q W_qᵀ, so `solve` finds the product of
    rank r that is nearest to the whole one; values alike, with W_oᵀ W_o. As in the paper a bias
    is one more column of its weight, and one latent holds one head. The spectrum is the squared
    singular values; a damping of 1e-6 only keeps the Cholesky factor real.

    The paper has one query head a key head: with grouped queries their weights, and the output
    projections of a group, are taken together here. It prunes queries with keys only where no
    rotation stands between them; here, under a rotation, keys are compressed before it, and F is
    averaged over relative distances as for `attention`. Its fine-tuning is left out.
    """
    g = model.config.num_key_value_heads
    queries = _grams(attn.q_proj, attn.heads).unflatten(0, (g, -1)).sum(1)
    metrics = (
        turned(model, attn, queries) if model.config.rotary else queries,
        output_readers(attn, g),
    )

    def basis(projection: nn.Linear, metric: Tensor, like: Moments) -> Basis:
        blocks = len(like.gram)
        zero = like.sum.new_zeros(like.sum.shape)
        return solve(_grams(projection, blocks), block_diagonal(metric, blocks), zero, 1e-6)

    return LayerBasis(
        basis(attn.k_proj, metrics[0], s.k), basis(attn.v_proj, metrics[1], given(s.v))
    )


def clover_weights(model: Model, statistics: list[Statistics]) -> list[tuple[float, float]]:
    """CLOVER's rank rule: the same share of every head's vectors is pruned, in all layers.

    That is its structured pruning. Curves of the paper that set the smallest singular values of
    the whole model to zero save no bytes.
    """
    return [(1.0, 1.0)] * len(model.layers)


def _grams(projection: nn.Linear, blocks: int) -> Tensor:
    """W Wᵀ of each block of rows, a bias being one more column: (blocks, rows, rows), fp64."""
    rows = projection.weight.double()
    if projection.bias is not None:
        rows = torch.cat((rows, projection.bias.double()[:, None]), 1)
    rows = rows.unflatten(0, (blocks, -1))
    return rows @ rows.mT


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
