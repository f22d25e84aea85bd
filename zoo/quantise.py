"""Latents made easy to round: other numbers in encoder and decoder, the same model.

Any invertible M turns an encoder E and a decoder D into E M and D M⁻ᵀ, of which the product is what
it was. What changes is what rounding the latent costs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .allocate import Ranks
from .basis import LayerBasis
from .solve import Basis


def spread(basis: Basis, rank: int) -> Basis:
    """The first columns of a basis, mixed so that their latent may be rounded with one scale.

    An error of any column weighs the same, and S = E[z zᵀ] = Λ + μ μᵀ for the spectrum Λ and the
    mean μ. Rounding Mᵀ z to as many levels a number costs Σ (Mᵀ S M)ᵢᵢ (M⁻¹ M⁻ᵀ)ᵢᵢ, up to a factor.
    An orthogonal M leaves tr S of it; M = S^(-1/4) H, with H orthogonal and its entries alike in
    size, (tr S^(1/2))² / r, which is the less the steeper the spectrum. H is drawn at random, from
    one seed. Pairs are only scaled, by Λ^(-1/4): what mixes them would not let the rotation pass.
    """
    encoder, decoder = basis.encoder[..., :rank], basis.decoder[..., :rank]
    mean = (encoder.mT @ basis.mean[..., None])[..., 0]
    spectrum = basis.spectrum[:, :rank]
    second = torch.diag_embed(spectrum) + mean[..., None] * mean[:, None]
    if basis.pairs is not None:
        power = _power(spectrum)
        return _columns(basis, encoder * power[:, None], decoder / power[:, None])
    values, vectors = torch.linalg.eigh(second)
    power = _power(values)[..., None]
    turn = _rotation(rank).to(second)
    mix, back = vectors @ (power * turn), vectors @ (turn / power)
    return _columns(basis, encoder @ mix, decoder @ back)


def spread_all(bases: Sequence[LayerBasis], ranks: Ranks) -> list[LayerBasis]:
    """`spread` wherever something is compressed; whole keys and values stay as they are."""

    def side(basis: Basis, rank: int) -> Basis:
        return spread(basis, rank) if rank < basis.spectrum.size(1) else basis

    return [
        LayerBasis(side(k, k_rank), None if v is None else side(v, v_rank))
        for (k, v), k_rank, v_rank in zip(bases, *ranks, strict=True)
    ]


def _power(values: Tensor) -> Tensor:
    """values^(-1/4), (L, r); what is nearly nothing of the largest counts as a little of it."""
    least = 1e-8 * values.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(values, least) ** -0.25


def _rotation(size: int) -> Tensor:
    """An orthogonal matrix, the same whenever it is asked for, on any device."""
    random = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random)).Q


def _columns(basis: Basis, encoder: Tensor, decoder: Tensor) -> Basis:
    """The basis with other first columns; the rest is not read at this rank."""
    rank = encoder.size(-1)
    return basis._replace(
        encoder=torch.cat((encoder, basis.encoder[..., rank:]), -1),
        decoder=torch.cat((decoder, basis.decoder[..., rank:]), -1),
    )
