"""Fold bases into the projections: the same model with other numbers in its ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.config import Config
from ..models.families import model_of, new_model
from ..models.model import LatentAttention, Model
from .allocate import Ranks
from .basis import LayerBasis
from .solve import Basis


def compressed_config(
    config: Config, bases: Sequence[LayerBasis], ranks: Ranks, anchor: int = 1
) -> Config:
    """The config of the folded model."""
    k, v = bases[0]
    shared = [config.num_key_value_heads // len(b.spectrum) for b in (k, v or k)]
    mean = any(bool(b.k.mean.any()) for b in bases)
    pairs = k.pairs is not None
    return low_config(config, ranks, (shared[0], shared[1]), v is None, anchor, mean, pairs)


def low_config(
    config: Config,
    ranks: Ranks,
    heads_per_latent: tuple[int, int],
    joint: bool = False,
    anchor: int = 1,
    key_mean: bool = False,
    pairs: bool = False,
) -> Config:
    """The config of a model with such ranks, with biases where folding leaves them."""
    rotary: dict[str, Any] = {"key_mean": key_mean, "anchor": anchor, "pairs": pairs}
    return replace(
        config,
        k_ranks=ranks.k,
        v_ranks=ranks.v,
        k_bits=ranks.k_bits,
        v_bits=ranks.v_bits,
        k_segments=ranks.k_segments,
        v_segments=ranks.v_segments,
        k_heads_per_latent=heads_per_latent[0],
        v_heads_per_latent=heads_per_latent[1],
        joint_kv=joint,
        centered=bool(ranks.k_bits or ranks.k_segments),
        key_bias=config.key_bias and (config.rotary or config.nonlinear[0]),
        value_bias=config.value_bias and config.nonlinear[1],
        output_bias=True,
        **(rotary if config.rotary else {}),
    )


@torch.no_grad()
def fold(model: Model, bases: Sequence[LayerBasis], ranks: Ranks, anchor: int = 1) -> Model:
    """A new model whose cache holds latents of `ranks`; weights that do not change are shared.

    anchor: positions in a block within which rotated keys are turned before they are encoded; the
    bases must be of statistics taken so. Raises ValueError where the ranks do not fit the bases.
    """
    config = compressed_config(model.config, bases, ranks, anchor)
    with torch.device("meta"):
        low = new_model(config)
    weights = {k: v for k, v in model.state_dict().items() if ".attn." not in k}
    for i, basis in enumerate(bases):
        folded = fold_attention(config, model.layers[i].attn, low.layers[i].attn, basis)
        weights |= {f"layers.{i}.attn.{name}": x for name, x in folded.items()}
    return model_of(config, weights)


def fold_attention(
    config: Config, dense: LatentAttention, low: LatentAttention, basis: LayerBasis
) -> dict[str, Tensor]:
    """Weights for attention `low` of the folded config, made from `dense` and a basis, in fp64.

    Unchanged weights are copied. A block is (L, n, ...): the rows of the heads of one latent.
    """
    new: dict[str, Tensor] = {}
    wanted = low.state_dict()
    low_k, low_v = config.compressed(low.layer)
    b_v = _bias(dense.v_proj) * (not config.nonlinear[1])  # else it is in what is encoded
    if low_k and config.joint_kv:
        e, d = _cut(basis.k, low.k.width)
        rows = [_blocks(p.weight, e) for p in (dense.k_proj, dense.v_proj)]
        new["k_proj.weight"] = _encode(e, torch.cat(rows, dim=1))
        bias = torch.cat([_blocks(b, e) for b in (_bias(dense.k_proj), b_v)], dim=1)
        _, b_v = _constant(new, wanted, "k_shift", basis.k.mean, bias, e, d).chunk(2, dim=1)
        k_decoder, v_decoder = d.chunk(2, dim=1)
        _fold_queries(new, wanted, dense, k_decoder)
    else:
        if low_k:
            _fold_keys(new, wanted, dense, basis.k, low.k.width)
        if low_v and basis.v is not None:
            e, v_decoder = _cut(basis.v, low.v.width)
            if "v_down" in wanted:
                new["v_down"] = e
            else:
                new["v_proj.weight"] = _encode(e, _blocks(dense.v_proj.weight, e))
            bias = _blocks(b_v, e)
            b_v = _constant(new, wanted, "v_shift", basis.v.mean, bias, e, v_decoder)
    queries = dense.heads // config.num_key_value_heads
    w_o = dense.o_proj.weight.double().unflatten(1, (dense.heads, -1))  # (hidden, H, D)
    constant = b_v.reshape(config.num_key_value_heads, -1).repeat_interleave(queries, dim=0)
    # a row of attention weights sums to 1, so constants pass through it to the output bias
    new["o_proj.bias"] = torch.einsum("ohd,hd->o", w_o, constant) + _bias(dense.o_proj)
    if "v_up" in wanted:
        new["v_up"] = v_decoder.mT
    elif low_v:
        read = _per_query_head(v_decoder, dense)
        new["o_proj.weight"] = torch.einsum("ohd,hdr->ohr", w_o, read).flatten(1)
    like, kept = dense.q_proj.weight, dense.state_dict()
    cast = {
        name: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype).contiguous()
        for name, x in new.items()
    }
    return {name: (kept | cast)[name] for name in wanted}


def _fold_keys(
    new: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    dense: LatentAttention,
    basis: Basis,
    rank: int,
) -> None:
    e, d = _cut(basis, rank)
    if basis.pairs is not None:
        new["k_pairs"] = basis.pairs[:, : rank // 2].clone()
    if "k_down" in wanted:
        new["k_down"] = e
    else:
        new["k_proj.weight"] = _encode(e, _blocks(dense.k_proj.weight, e))
        if "k_proj.bias" in wanted:
            new["k_proj.bias"] = _encode(e, _blocks(_bias(dense.k_proj), e)[..., None])[:, 0]
    bias = _blocks(_bias(dense.k_proj), e)
    dropped = "k_down" not in wanted and "k_proj.bias" not in wanted  # softmax ignores it
    mean = _constant(new, wanted, "k_shift", basis.mean, bias if dropped else 0 * bias, e, d)
    if "k_mean" in wanted:
        new["k_mean"] = mean.reshape(wanted["k_mean"].shape)
    _fold_queries(new, wanted, dense, d)


def _fold_queries(
    new: dict[str, Tensor], wanted: Mapping[str, Tensor], dense: LatentAttention, decoder: Tensor
) -> None:
    """Keep the lift of keys as a matrix of its own, or fold it into the projection of queries."""
    if "k_up" in wanted:
        new["k_up"] = decoder.mT
        return
    read = _per_query_head(decoder, dense)
    for name, x in dense.q_proj.named_parameters():
        heads = x.double().unflatten(0, (dense.heads, -1))
        new[f"q_proj.{name}"] = torch.einsum("hdr,hd...->hr...", read, heads).flatten(0, 1)


def _per_query_head(decoder: Tensor, dense: LatentAttention) -> Tensor:
    """(L, n, R) -> (H, D, R)."""
    per_head = decoder.unflatten(1, (-1, dense.head_dim)).flatten(0, 1)
    return per_head.repeat_interleave(dense.heads // len(per_head), dim=0)


def _bias(linear: nn.Linear) -> Tensor:
    """The bias in fp64, zeros if there is none."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features, dtype=torch.float64)
    return linear.bias.double()


def _blocks(x: Tensor, like: Tensor) -> Tensor:
    """Rows (G D, ...) as (L, n, ...), for as many latents as `like` has."""
    return x.double().unflatten(0, (len(like), -1))


def _cut(basis: Basis, rank: int) -> tuple[Tensor, Tensor]:
    """Encoder and decoder (L, n, rank). Pairs become halves, as the rotation expects them."""
    order = torch.arange(rank)
    if basis.pairs is not None:
        order = order.unflatten(0, (-1, 2)).mT.flatten()
    return basis.encoder[..., order], basis.decoder[..., order]


def _encode(encoder: Tensor, blocks: Tensor) -> Tensor:
    """encoderᵀ blocks, latent by latent. (L, n, R), (L, n, m) -> (L R, m)."""
    return (encoder.mT @ blocks).flatten(0, 1)


def _constant(
    new: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    shift: str,
    mean: Tensor,
    bias: Tensor,
    encoder: Tensor,
    decoder: Tensor,
) -> Tensor:
    """What to add to decoded latents, (L, n), so that none of the mean is lost.

    mean: of x (L, n), of which x - bias is encoded. Where latents are centered, makes the shift,
    and the whole mean is added.
    """
    if shift not in wanted:
        return bias + _lost(mean - bias, encoder, decoder)
    new[shift] = -((mean - bias)[:, None] @ encoder)
    return mean


def _lost(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """The error of encoding and decoding x (L, n)."""
    column = x[..., None]
    return (column - decoder @ (encoder.mT @ column))[..., 0]
