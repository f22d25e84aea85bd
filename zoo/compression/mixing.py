"""Latents mixed so that rounding them costs less; the model computes the same.

Any invertible M turns an encoder E and a decoder D into E M and D M⁻ᵀ, whose product is the same.
Only the error of rounding the latent changes.
"""

import torch
from torch import Tensor

from .solve import Basis


def spread(basis: Basis, rank: int) -> Basis:
    """The first columns of a basis, mixed so that their latent may be rounded with one scale.

    Errors of all columns have one weight, and S = E[z zᵀ] = Λ + μ μᵀ for the spectrum Λ and the
    mean μ. Rounding Mᵀ z to as many levels a number costs Σ (Mᵀ S M)ᵢᵢ (M⁻¹ M⁻ᵀ)ᵢᵢ, up to a factor.
    For an orthogonal M this is tr S; for M = S^(-1/4) H, with H orthogonal and its entries of like
    size, it is (tr S^(1/2))² / r, which falls as the spectrum gets steeper. H is random, from a
    fixed seed. Pairs are only scaled, by Λ^(-1/4): mixing them would not commute with the rotation.
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


def rounding(basis: Basis, head_dim: int) -> Tensor:
    """Expected error per token of rounding a latent of rank 0, 1, ..., n: (n + 1,), fp64.

    In the unit of the spectrum, summed over the latents, and times the square of `bits.LEVELS`. A
    step is the largest number divided by the levels, and numbers are assumed to be normal. Below
    full rank latents are mixed by `spread`; this bounds its tr S^(1/2) from above, with the
    diagonal for the eigenvalues. At full rank each head of `head_dim` numbers is rounded as it is.
    """
    mean = (basis.encoder.mT @ basis.mean[..., None])[..., 0]
    root = (basis.spectrum + mean.square()).sqrt()  # (L, n)
    count = torch.arange(1, root.size(1) + 1, device=root.device)
    if basis.pairs is None:
        even = root.new_ones(1, root.size(1))
        below = root.cumsum(1).square() / count * _largest(even)
    else:
        below = root.cumsum(1) * _largest(root)
    variance = (basis.decoder.square() @ basis.spectrum[..., None])[..., 0] + basis.mean.square()
    weight = basis.encoder.square().sum(-1)
    variance, weight = (x.unflatten(1, (-1, head_dim)).flatten(0, 1) for x in (variance, weight))
    error = torch.cat((root.new_zeros(1), below.sum(0)))
    error[-1] = (_largest(variance)[:, -1] * weight.sum(1)).sum()
    return error / 12


def _largest(variance: Tensor) -> Tensor:
    """Expected largest square of the first 1, 2, ..., n normal numbers: (L, n)."""
    most = variance.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    t = torch.linspace(0, 40, 512, dtype=torch.float64, device=variance.device)
    ratio = (most / variance.clamp(min=1e-12 * most))[..., None]
    least = torch.finfo(torch.float64).tiny
    below = (t * ratio / 2).sqrt().erf().clamp(min=least).log().cumsum(1).exp()  # (L, n, t)
    return most * torch.trapezoid(1 - below, t)


def _power(values: Tensor) -> Tensor:
    """values^(-1/4), (L, r); values below 1e-8 of the largest count as that."""
    least = 1e-8 * values.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(values, least) ** -0.25


def _rotation(size: int) -> Tensor:
    """A random orthogonal matrix, the same at every call and on every device."""
    random = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random)).Q


def _columns(basis: Basis, encoder: Tensor, decoder: Tensor) -> Basis:
    """The basis with its first columns replaced; this rank does not read the rest."""
    rank = encoder.size(-1)
    return basis._replace(
        encoder=torch.cat((encoder, basis.encoder[..., rank:]), -1),
        decoder=torch.cat((decoder, basis.decoder[..., rank:]), -1),
    )
