"""Metrics of attention: the weights of errors in keys and in values, by what reads them."""

import torch
from torch import Tensor

from ..models.model import LatentAttention, Model
from ..models.rope import rotate
from .moments import Statistics, given


def readers(model: Model, attn: LatentAttention, s: Statistics) -> tuple[Tensor, Tensor]:
    """Metrics of the keys, and of the values, of every kv head: (G, D, D) each.

    Of keys the Gram matrix of the group's queries, averaged over relative distances if keys are
    rotated; of values Σ W_oᵀ W_o.
    """
    g = model.config.num_key_value_heads
    q = given(s.q).second.unflatten(0, (g, -1)).sum(1)
    keys = turned(model, attn, q) if model.config.rotary else q
    return keys, output_readers(attn, g)


def output_readers(attn: LatentAttention, kv_heads: int) -> Tensor:
    """Σ W_oᵀ W_o over the query heads of every kv head: (G, D, D)."""
    w_o = attn.o_proj.weight.double().unflatten(1, (kv_heads, -1, attn.head_dim))
    return torch.einsum("ogmd,ogme->gde", w_o, w_o)


def block_diagonal(per_head: Tensor, latents: int) -> Tensor:
    """Block diagonals of the heads that share a latent. (G, D, D) -> (L, G / L * D, ...)."""
    return torch.stack([torch.block_diag(*x) for x in per_head.unflatten(0, (latents, -1))])


def joint(covariance: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Metric of latents that hold keys and then values: losing all of either costs 1."""
    halves = [block_diagonal(x, len(covariance)) for x in (keys, values)]
    n = halves[0].size(-1)
    corners = covariance[:, :n, :n], covariance[:, n:, n:]
    k, v = (f / (f * c).sum((1, 2), keepdim=True) for f, c in zip(halves, corners, strict=True))
    return torch.stack([torch.block_diag(*x) for x in zip(k, v, strict=True)])


def turned(model: Model, attn: LatentAttention, gram: Tensor, distances: int = 64) -> Tensor:
    """Average of R F Rᵀ over the relative distances of a causal window. gram: (G, D, D)."""
    window = model.config.max_position_embeddings
    delta = torch.linspace(0, window - 1, distances, device=gram.device).round()
    weight = (window - delta) / (window - delta).sum()  # near pairs are more frequent
    cos, sin = (x[0, 0, :, None] for x in model.rope(delta[None], delta, attn.window))
    half = rotate(gram[:, None], cos, sin)  # rotates rows: (G, distances, D, D)
    return torch.einsum("n,gnij->gij", weight.double(), rotate(half.mT, cos, sin).mT)
