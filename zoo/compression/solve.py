"""The latents with the least error under a metric.

A basis serves every rank: its columns are sorted by importance, a smaller rank is a slice, and
`spectrum` has the error that each column removes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """z = encoderᵀ x holds x, decoder z gives it back; L latents of up to n numbers, fp64.

    At rank r only the first r columns are kept. The error of the mean of x is added back.
    """

    encoder: Tensor  # (L, n, n)
    decoder: Tensor  # (L, n, n)
    spectrum: Tensor  # (L, n): the error, per token, that each column takes away
    mean: Tensor  # (L, n): zero where the method does not center
    pairs: Tensor | None = None  # (L, n / 2): see `solve_pairs`
    rounding: Tensor | None = None  # (2, L, n): see `rounding.facts`; None if not asked for

    def errors(self) -> Tensor:
        """Error per token left at rank 0, 1, ..., n, summed over the latents: (n + 1,)."""
        gone = self.spectrum.sum(0).flip(0).cumsum(0).flip(0)
        return torch.cat((gone, gone.new_zeros(1)))


def damped(matrix: Tensor, damping: float) -> Tensor:
    """(L, n, n) with `damping` times the mean of its diagonal added to the diagonal."""
    return damp(matrix.clone(), damping)


def damp(matrix: Tensor, damping: float) -> Tensor:
    """`damped`, in place."""
    matrix.diagonal(dim1=1, dim2=2).add_(damping * usual(matrix)[:, None])
    return matrix


def usual(matrix: Tensor) -> Tensor:
    """Mean of the diagonal of (L, n, n), above 0: (L,)."""
    return matrix.diagonal(dim1=1, dim2=2).real.mean(1).clamp(min=torch.finfo(torch.float32).tiny)


def solve(covariance: Tensor, metric: Tensor, mean: Tensor, damping: float) -> Basis:
    """The latents that lose least of x under a metric, at every rank at once.

    Minimizes tr(F (I - P) C (I - P)ᵀ) over maps P = D Eᵀ of rank r, for C = covariance and
    F = metric, both (L, n, n): with F = L Lᵀ and eigh(Lᵀ C L) = W Λ Wᵀ, E = L W and D = L⁻ᵀ W.
    `damping` times the mean of its diagonal is added to F, for directions no gradient has seen.
    Columns are signed so that their sum is positive: otherwise the last bits of C and F would
    decide how latents are rounded.
    """
    root = torch.linalg.cholesky(damped(metric, damping))
    values, vectors = torch.linalg.eigh(root.mH @ covariance @ root)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    sign = (root @ vectors).sum(1, keepdim=True).sgn().conj()
    vectors = vectors * torch.where(sign == 0, 1, sign)
    decoder = torch.linalg.solve_triangular(root.mH, vectors, upper=True)
    return Basis(root @ vectors, decoder, values, mean)


def solve_pairs(second: Tensor, metric: Tensor, head_dim: int, damping: float) -> Basis:
    """Latents of keys that commute with the rotation: one complex `solve` a frequency.

    The rotation multiplies the pair (k[f], k[f + D / 2]) of every head, as one complex number, by
    e^(iωt); a complex map over the heads lets it pass. second, metric: (L, g D, g D) of g heads
    before the rotation; averaged over its phase they are complex, g x g for every frequency. Two
    columns side by side are the real and the imaginary part of a complex one; `pairs` says of
    which frequency. Any even rank is a slice.
    """
    latents, half = len(second), head_dim // 2
    c, f = (_phase_average(x, half).flatten(0, 1) for x in (second, metric))
    complex_basis = solve(c, f, c.new_zeros(c.shape[:2]), damping)
    spectrum = complex_basis.spectrum.unflatten(0, (latents, half)).flatten(1)
    spectrum, order = spectrum.sort(dim=1, descending=True, stable=True)
    encoder, decoder = (
        _real_columns(x.unflatten(0, (latents, half)), order)
        for x in (complex_basis.encoder, complex_basis.decoder)
    )
    spectrum = spectrum.repeat_interleave(2, dim=1)
    return Basis(encoder, decoder, spectrum, torch.zeros_like(spectrum), order // c.size(-1))


def _phase_average(gram: Tensor, half: int) -> Tensor:
    """Gram of vectors (a, b) of every head, (L, g D, g D), as that of a + ib, (L, D / 2, g, g).

    Halved, so that it says of real vectors what the real Gram, averaged over the phase, would.
    """
    x = gram.unflatten(2, (-1, 2, half)).unflatten(1, (-1, 2, half))  # (L, g, 2, D / 2, g, 2, ...)
    x = x.diagonal(dim1=3, dim2=6)  # (L, g, 2, g, 2, D / 2): no two frequencies together
    (aa, ab), (ba, bb) = (y.unbind(3) for y in x.unbind(2))
    return torch.complex(aa + bb, ba - ab).permute(0, 3, 1, 2) / 2


def _real_columns(x: Tensor, order: Tensor) -> Tensor:
    """Complex maps of every frequency (L, D / 2, g, g) as one real map of whole heads, (L, n, n).

    order: (L, n / 2), in which the complex columns come, numbered frequency by frequency.
    """
    x = x.permute(0, 2, 3, 1).diag_embed()  # (L, g, g columns, D / 2, D / 2 columns)
    x = x.permute(0, 1, 3, 4, 2).flatten(3).take_along_dim(order[:, None, None], 3)
    columns = (x.real, x.imag), (-x.imag, x.real)
    real = torch.stack([torch.stack(parts, 2) for parts in columns], -1)
    return real.flatten(4).flatten(1, 3)  # (L, g, 2, D / 2, n / 2, 2) until here
