"""Latents mixed so that rounding them costs less; the model computes the same.

Any invertible M turns an encoder E and a decoder D into E M and D M⁻ᵀ, whose product is the same.
Only the error of rounding the latent changes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.bits import Segment
from .hadamard import even
from .solve import Basis


def spread(basis: Basis, segments: Sequence[Segment]) -> Basis:
    """The first columns of a basis, mixed so that each segment may be rounded with one scale.

    Errors of all columns have one weight, and the variances of a centered latent are its spectrum
    Λ. Rounding Mᵀ z to as many levels a number costs Σ (Mᵀ Λ M)ᵢᵢ (M⁻¹ M⁻ᵀ)ᵢᵢ, up to a factor. For
    an orthogonal M this is tr Λ; for M = Λ^(-1/4) H, with H orthogonal and its entries of one size,
    it is (tr Λ^(1/2))² / w, which falls as the spectrum gets steeper. Pairs are only scaled, by
    Λ^(-1/4): mixing them would not commute with the rotation. Numbers of 16 bits, each with an
    exponent of its own, stay as they are.
    """
    encoder, decoder, at = basis.encoder.clone(), basis.decoder.clone(), 0
    for segment in segments:
        part = slice(at, at := at + segment.width)
        if segment.bits < 16:
            power = _power(basis.spectrum[:, part])[:, None]
            turn = even(segment.width) if basis.pairs is None else torch.eye(segment.width)
            turn = turn.to(encoder)
            encoder[..., part] = encoder[..., part] * power @ turn
            decoder[..., part] = decoder[..., part] / power @ turn
    return basis._replace(encoder=encoder, decoder=decoder)


def _power(values: Tensor) -> Tensor:
    """values^(-1/4), (L, w); values below 1e-8 of the largest count as that."""
    least = 1e-8 * values.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(values, least) ** -0.25
