"""What rounding is expected to cost, in the unit of a spectrum.

`packing.pack` gives a segment of a latent one scale. For w normal numbers of variance v each it
loses w v c: `COST` has c by bits and w. Segments are mixed, so that their numbers are about normal
and of like variance, and that sum is then (tr S^(1/2))² c / w: see `mixing.spread`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.bits import PARTS, Segment
from ..models.packing import Latent, pack
from .solve import Basis

# mean squared error of a number of `pack`, for normal numbers of variance 1, by the width of their
# segment: means of 1.6e7 numbers, of standard deviations even on a log scale
WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
COST = {
    16: (2.752e-6,) * 8,
    8: (1.961e-5, 2.576e-5, 3.235e-5, 3.912e-5, 4.616e-5, 5.328e-5, 6.023e-5, 6.764e-5),
    4: (0.004712, 0.006314, 0.007793, 0.009084, 0.01011, 0.01081, 0.01120, 0.01140),
    3: (0.01909, 0.02504, 0.02988, 0.03332, 0.03538, 0.03642, 0.03701, 0.03729),
    2: (0.07963, 0.09732, 0.1077, 0.1133, 0.1162, 0.1176, 0.1185, 0.1188),
}
DRAWS = 256  # vectors that a simulation rounds
POINTS = 192  # of an integral


def cost(bits: int, width: Tensor) -> Tensor:
    """The c above for segments of such widths, linear in their logarithms between `WIDTHS`."""
    known = torch.tensor(COST[bits], dtype=torch.float64)
    at = (width.double().log2() - math.log2(WIDTHS[0])).clamp(0, len(WIDTHS) - 1)
    low = at.floor().long().clamp(max=len(WIDTHS) - 2)
    return known[low].lerp(known[low + 1], at - low)


def facts(basis: Basis) -> Tensor:
    """What this module reads of a basis beside its spectrum: (3, L, n).

    Squares of the mean in a latent; second moments of the numbers that it holds, before encoding;
    and what errors in those cost.
    """
    mean = (basis.encoder.mT @ basis.mean[..., None])[..., 0]
    variance = (basis.decoder.square() @ basis.spectrum[..., None])[..., 0]
    weight = basis.encoder.square().sum(-1)
    return torch.stack((mean.square(), variance + basis.mean.square(), weight))


def segment_errors(basis: Basis, bounds: Sequence[int], bits: Sequence[int]) -> Tensor:
    """Expected error of numbers bounds[i] to bounds[j] of all latents: [bits, i, j], fp64.

    Per token. They are one segment, mixed by `spread`; 0 where i = j, and infinite where i > j or
    where they do not fill whole bytes. Pairs are one segment from the first number on.
    """
    ends = torch.tensor(bounds)
    width = ends - ends[:, None]
    if basis.pairs is None:
        spread = (_roots(basis, ends).square().sum(0) / width.clamp(min=1)).cpu()
        errors = [spread * cost(count, width.clamp(min=1)) for count in bits]
        if 16 in bits:  # floating-point numbers are not mixed: each has a scale of its own
            second = (basis.spectrum + _given(basis)[0]).sum(0).cumsum(0).cpu()
            second = torch.cat((second.new_zeros(1), second))[ends]
            errors[bits.index(16)] = COST[16][0] * (second - second[:, None])
    else:
        errors = [width.double() for _ in bits]
        for error, count in zip(errors, bits, strict=True):
            error[1:] = torch.inf
            for j, end in enumerate(bounds[1:], start=1):
                if end % PARTS[count] == 0:
                    root = basis.spectrum[:, :end].sqrt()
                    error[0, j] = simulated(root, root, count)
    for error, count in zip(errors, bits, strict=True):
        error[(width < 0) | (width % PARTS[count] != 0)] = torch.inf
        error.fill_diagonal_(0)
    return torch.stack(errors)


def whole_error(basis: Basis, head_dim: int, bits: int) -> float:
    """Expected error per token of rounding whole heads as they are, each with one scale."""
    if bits == 16:
        return 0.0
    _, variance, weight = _given(basis).unflatten(2, (-1, head_dim)).flatten(1, 2)
    return simulated(variance, weight, bits)


def simulated(variance: Tensor, weight: Tensor, bits: int) -> float:
    """Expected error of rounding normal numbers, (L, w), each L with one scale.

    weight: of their squared errors. The same numbers are drawn at every call.
    """
    latents, width = variance.shape
    random = torch.Generator().manual_seed(0)
    draw = torch.randn(DRAWS, width, generator=random, dtype=torch.float64).to(variance)
    x = (draw * variance.sqrt()[:, None])[None]
    rounded = pack(x, Latent(latents, width, (Segment(width, bits),))).unpack(torch.float64)
    return float(((rounded - x).square().mean((0, 2)) * weight).sum())


def _given(basis: Basis) -> Tensor:
    return facts(basis) if basis.rounding is None else basis.rounding


def _roots(basis: Basis, ends: Tensor) -> Tensor:
    """tr S^(1/2) of blocks S = Λ + μ μᵀ from ends[i] to ends[j], of every latent: (L, i, j).

    It is tr Λ^(1/2) + 1/π ∫ log(1 + Σ μ²/(λ + s²)) ds, over all s > 0; since sums over a block are
    differences of sums from the first number on, no block needs its eigenvalues.
    """
    spectrum, mean = basis.spectrum, _given(basis)[0]  # (L, n)
    ends = ends.to(spectrum.device)

    def blocks(x: Tensor) -> Tensor:
        """Sums of x (L, n, ...) from ends[i] to ends[j]: (L, i, j, ...)."""
        sums = torch.cat((torch.zeros_like(x[:, :1]), x.cumsum(1)), 1)[:, ends]
        return (sums[:, None] - sums[:, :, None]).clamp(min=0)

    most = (spectrum.amax(1) + mean.sum(1)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    log = torch.linspace(-14, 10, POINTS, dtype=torch.float64, device=spectrum.device)
    s = most[:, None] * log.exp()  # (L, points)
    inside = blocks(mean[..., None] / (spectrum[..., None] + s[:, None].square()))
    added = torch.trapezoid(inside.log1p() * s[:, None, None], log) / math.pi
    return blocks(spectrum.sqrt()) + added
