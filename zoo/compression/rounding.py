"""What rounding is expected to cost, in the unit of a spectrum.

`packing.pack` gives a segment of a latent one scale. For w normal numbers of variance v each it
loses w v c: `COST` has c by bits and w. Latents are centered, and segments are mixed so that their
numbers are about normal and of like variance. That sum is then (tr Λ^(1/2))² c / w: see
`mixing.spread`.
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
    8: (1.961e-5, 2.576e-5, 3.235e-5, 3.912e-5, 4.616e-5, 5.328e-5, 6.023e-5, 6.764e-5),
    4: (0.004712, 0.006314, 0.007793, 0.009084, 0.01011, 0.01081, 0.01120, 0.01140),
    3: (0.01909, 0.02504, 0.02988, 0.03332, 0.03538, 0.03642, 0.03701, 0.03729),
    2: (0.07963, 0.09732, 0.1077, 0.1133, 0.1162, 0.1176, 0.1185, 0.1188),
}
DRAWS = 256  # vectors that a simulation rounds


def cost(bits: int, width: Tensor) -> Tensor:
    """The c above for segments of such widths, linear in their logarithms between `WIDTHS`."""
    known = torch.tensor(COST[bits], dtype=torch.float64)
    at = (width.double().log2() - math.log2(WIDTHS[0])).clamp(0, len(WIDTHS) - 1)
    low = at.floor().long().clamp(max=len(WIDTHS) - 2)
    return known[low].lerp(known[low + 1], at - low)


def facts(basis: Basis) -> Tensor:
    """What `whole_error` reads of a basis: (2, L, n).

    Second moments of the numbers that a latent holds, before encoding, and what their errors cost.
    """
    variance = (basis.decoder.square() @ basis.spectrum[..., None])[..., 0]
    return torch.stack((variance + basis.mean.square(), basis.encoder.square().sum(-1)))


def segment_errors(basis: Basis, bounds: Sequence[int], bits: Sequence[int]) -> Tensor:
    """Expected error of numbers bounds[i] to bounds[j] of all latents: [bits, i, j], fp64.

    Per token; bits: below 16. The numbers are one segment, mixed by `spread`; infinite where they
    do not fill whole bytes or i > j, 0 where i = j. Pairs are one segment from the first number on.
    """
    ends = torch.tensor(bounds)
    width = ends - ends[:, None]
    sums = basis.spectrum.sqrt().cumsum(1)
    sums = torch.cat((torch.zeros_like(sums[:, :1]), sums), 1)[:, bounds]  # (L, bounds)
    even = (sums[:, None] - sums[:, :, None]).square().sum(0).cpu() / width.clamp(min=1)
    errors = []
    for count in bits:
        if basis.pairs is None:
            error = even * cost(count, width.clamp(min=1))
        else:
            error = torch.full_like(even, torch.inf)
            error[0] = _pairs(basis, bounds, count)
        error[(width < 0) | (width % PARTS[count] != 0)] = torch.inf
        errors.append(error.fill_diagonal_(0))
    return torch.stack(errors)


def _pairs(basis: Basis, ends: Sequence[int], bits: int) -> Tensor:
    """Expected errors of the numbers up to each of `ends`, which are scaled but not mixed."""
    errors = torch.zeros(len(ends), dtype=torch.float64)
    for i, end in enumerate(ends):
        if end and end % PARTS[bits] == 0:
            root = basis.spectrum[:, :end].sqrt()
            errors[i] = simulated(root, root, bits)
    return errors


def whole_error(basis: Basis, head_dim: int, bits: int) -> float:
    """Expected error per token of rounding whole heads as they are, each with one scale."""
    if bits == 16:
        return 0.0
    known = facts(basis) if basis.rounding is None else basis.rounding
    variance, weight = known.unflatten(2, (-1, head_dim)).flatten(1, 2)
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
