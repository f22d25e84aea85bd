"""Fold bases into the projections: the same model with other numbers in its ranks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .allocate import Ranks
from .basis import Basis, LayerBasis
from .llama import Attention, Config, Model


def compressed_config(config: Config, bases: Sequence[LayerBasis], ranks: Ranks) -> Config:
    """The config of the folded model."""
    heads = config.num_key_value_heads
    return replace(
        config,
        k_ranks=ranks.k,
        v_ranks=ranks.v,
        k_heads_per_latent=heads // len(bases[0].k.spectrum),
        v_heads_per_latent=heads // len(bases[0].v.spectrum),
        key_mean=any(bool(b.k.mean.any()) for b in bases),
        value_bias=False,
        output_bias=True,
    )


@torch.no_grad()
def fold(model: Model, bases: Sequence[LayerBasis], ranks: Ranks) -> Model:
    """A new model whose cache holds latents of `ranks`; weights that do not change are shared.

    Raises ValueError where the ranks do not fit the bases.
    """
    config = compressed_config(model.config, bases, ranks)
    with torch.device("meta"):
        low = Model(config)
    weights = {k: v for k, v in model.state_dict().items() if ".attn." not in k}
    for i, basis in enumerate(bases):
        folded = fold_attention(model.layers[i].attn, low.layers[i].attn, basis)
        weights |= {f"layers.{i}.attn.{name}": x for name, x in folded.items()}
    low.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        low.head.weight = low.embed.weight
    low.reset_rope()
    return low.eval().requires_grad_(False)


def fold_attention(dense: Attention, low: Attention, basis: LayerBasis) -> dict[str, Tensor]:
    """Weights for attention `low`, made from `dense` (at full rank) and a basis."""
    weights = {
        name: x for name, x in dense.state_dict().items() if name.startswith(("q_proj", "o_proj"))
    }
    like = dense.q_proj.weight
    for name, x in (_keys(dense, low, basis.k) | _values(dense, low, basis.v)).items():
        weights[name] = x.to(like.device, like.dtype).contiguous()
    return weights


def _keys(dense: Attention, low: Attention, basis: Basis) -> dict[str, Tensor]:
    w, b = dense.k_proj.weight.double(), dense.k_proj.bias
    if low.k_up is None:
        return {"k_proj.weight": w} | ({} if b is None else {"k_proj.bias": b})
    e, d = basis.encoder[..., : low.k.width], basis.decoder[..., : low.k.width]
    weights = {"k_proj.weight": _encode(e, w), "k_up": d.mT}
    if b is not None:
        weights["k_proj.bias"] = _encode(e, b.double()[:, None])[:, 0]
    if low.k_mean is not None:
        weights["k_mean"] = _lost(basis.mean, e, d).reshape(low.k_mean.shape)
    return weights


def _values(dense: Attention, low: Attention, basis: Basis) -> dict[str, Tensor]:
    """A row of attention weights sums to 1, so constants pass through it to the output bias."""
    w_v, w_o = dense.v_proj.weight.double(), dense.o_proj.weight.double()
    bias = dense.v_proj.bias
    constant = basis.mean.new_zeros(basis.mean.shape) if bias is None else bias.double()
    constant = constant.reshape(basis.mean.shape)  # (L, n)
    queries = dense.heads // dense.v.heads  # query heads of one kv head

    weights = {"v_proj.weight": w_v, "o_proj.weight": w_o}
    if low.v != dense.v:
        e, d = basis.encoder[..., : low.v.width], basis.decoder[..., : low.v.width]
        weights["v_proj.weight"] = _encode(e, w_v)
        constant = constant + _lost(basis.mean - constant, e, d)
        if low.v_up is not None:
            weights["v_up"] = d.mT
        else:
            per_head = d.unflatten(1, (-1, dense.head_dim)).flatten(0, 1)  # (G, D, R)
            read = per_head.repeat_interleave(queries, dim=0)  # (H, D, R)
            heads = w_o.unflatten(1, (dense.heads, -1)).transpose(0, 1)  # (H, hidden, D)
            weights["o_proj.weight"] = (heads @ read).transpose(0, 1).flatten(1)
    per_head = constant.reshape(dense.v.heads, -1).repeat_interleave(queries, dim=0)
    out = w_o @ per_head.flatten()
    if dense.o_proj.bias is not None:
        out = out + dense.o_proj.bias.double()
    return weights | {"o_proj.bias": out}


def _encode(encoder: Tensor, weight: Tensor) -> Tensor:
    """encoderᵀ weight, latent by latent. (L, n, R), (L n, m) -> (L R, m)."""
    return (encoder.mT @ weight.unflatten(0, (len(encoder), -1))).flatten(0, 1)


def _lost(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """What encoding and decoding lose of x (L, n)."""
    column = x[..., None]
    return (column - decoder @ (encoder.mT @ column))[..., 0]
