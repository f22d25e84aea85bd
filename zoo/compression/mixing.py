"""Latents mixed so that rounding them costs less; the model computes the same.

Any invertible M turns an encoder E and a decoder D into E M and D M⁻ᵀ, whose product is the same.
Only the error of rounding the latent changes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.bits import Segment
from .hadamard import hadamard
from .solve import Basis


def spread(basis: Basis, segments: Sequence[Segment]) -> Basis:
    """The first columns of a basis, mixed so that each segment may be rounded with one scale.

    Errors of all columns have one weight, and S = E[z zᵀ] = Λ + μ μᵀ for the spectrum Λ and the
    mean μ of a segment. Rounding Mᵀ z to as many levels a number costs Σ (Mᵀ S M)ᵢᵢ (M⁻¹ M⁻ᵀ)ᵢᵢ,
    up to a factor. For an orthogonal M this is tr S; for M = S^(-1/4) H, with H orthogonal and its
    entries of one size, it is (tr S^(1/2))² / w, which falls as the spectrum gets steeper. Pairs
    are only scaled, by Λ^(-1/4): mixing them would not commute with the rotation. Numbers of 16
    bits, each with an exponent of its own, stay as they are.
    """
    at = 0
    for segment in segments:
        if segment.bits < 16:
            basis = _spread(basis, at, at + segment.width)
        at += segment.width
    return basis


def _spread(basis: Basis, start: int, end: int) -> Basis:
    encoder, decoder = basis.encoder[..., start:end], basis.decoder[..., start:end]
    spectrum = basis.spectrum[:, start:end]
    if basis.pairs is not None:
        power = _power(spectrum)[:, None]
        return _replaced(basis, start, encoder * power, decoder / power)
    mean = (encoder.mT @ basis.mean[..., None])[..., 0]
    second = torch.diag_embed(spectrum) + mean[..., None] * mean[:, None]
    values, vectors = torch.linalg.eigh(second)
    power = _power(values)[..., None]
    turn = _rotation(end - start).to(second)
    mix, back = vectors @ (power * turn), vectors @ (turn / power)
    return _replaced(basis, start, encoder @ mix, decoder @ back)


def _power(values: Tensor) -> Tensor:
    """values^(-1/4), (L, w); values below 1e-8 of the largest count as that."""
    least = 1e-8 * values.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(values, least) ** -0.25


def _rotation(size: int) -> Tensor:
    """An orthogonal matrix, fp64: its entries are of one size if `hadamard` makes it, else random.

    The same at every call and on every device.
    """
    if (even := hadamard(size)) is not None:
        return even / size**0.5
    random = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random)).Q


def _replaced(basis: Basis, start: int, encoder: Tensor, decoder: Tensor) -> Basis:
    """The basis with other columns from `start` on."""
    encoders, decoders = basis.encoder.clone(), basis.decoder.clone()
    end = start + encoder.size(-1)
    encoders[..., start:end], decoders[..., start:end] = encoder, decoder
    return basis._replace(encoder=encoders, decoder=decoders)
