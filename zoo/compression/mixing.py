"""Latents made easy to round: other numbers in encoder and decoder, the same model.

Any invertible M turns an encoder E and a decoder D into E M and D M⁻ᵀ, of which the product is what
it was. What changes is what rounding the latent costs.
"""

import torch
from torch import Tensor

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


def rounding(basis: Basis, head_dim: int) -> Tensor:
    """Error per token expected of rounding a latent of rank 0, 1, ..., n: (n + 1,), fp64.

    In the unit of the spectrum, summed over the latents, and times the square of `cache.LEVELS`.
    Steps are the largest number over the levels, and numbers are taken as normal. Below full rank
    latents are mixed by `spread`; of its tr S^(1/2) this is a bound from above, with the diagonal
    for the eigenvalues. At full rank every head of `head_dim` numbers is rounded as it is.
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
    """Expected largest square of the first 1, 2, ..., n of normal numbers: (L, n)."""
    most = variance.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    t = torch.linspace(0, 40, 512, dtype=torch.float64, device=variance.device)
    ratio = (most / variance.clamp(min=1e-12 * most))[..., None]
    least = torch.finfo(torch.float64).tiny
    below = (t * ratio / 2).sqrt().erf().clamp(min=least).log().cumsum(1).exp()  # (L, n, t)
    return most * torch.trapezoid(1 - below, t)


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
