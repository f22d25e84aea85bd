"""What rounding is expected to cost is what `pack` loses of normal numbers."""

import pytest
import torch
from torch.testing import assert_close

from eigenzoo.zoo.compression.mixing import spread
from eigenzoo.zoo.compression.rounding import (
    COST,
    WIDTHS,
    cost,
    facts,
    segment_errors,
    whole_error,
)
from eigenzoo.zoo.compression.solve import Basis, solve, solve_pairs
from eigenzoo.zoo.models.bits import Segment, parse_segments
from eigenzoo.zoo.models.packing import Latent, pack

N = 96


def rounded(y, segments):
    """Latents (L, width, tokens) as a cache of such segments holds them."""
    latent = Latent(len(y), y.size(1), segments)
    return pack(y.mT[None], latent).unpack(torch.float64)[0].mT


def basis_of(kind: str) -> Basis:
    torch.manual_seed(0)
    scale = torch.logspace(0, -1, N, dtype=torch.float64)[:, None]
    x, g = (torch.randn(2, N, 4 * N).double() * scale / N for _ in range(2))
    if kind == "diagonal":
        x, g = (torch.diag_embed(a.diagonal(dim1=1, dim2=2)) for a in (x, g))
    if kind == "pairs":
        return solve_pairs(x @ x.mT, g @ g.mT, 24, 0.01)
    mean = torch.randn(2, N).double() * (kind != "diagonal")
    return solve(x @ x.mT, g @ g.mT, mean, 0.01)


@pytest.mark.parametrize(("bits", "width"), [(8, 16), (4, 64), (3, 32), (2, 256)])
def test_a_number_costs_what_pack_loses(bits, width):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400_000 // width, width, generator=random, dtype=torch.float64)
    x *= 2 ** torch.linspace(0, 3, x.size(1), dtype=torch.float64)[:, None]
    lost = rounded(x.mT, (Segment(width, bits),)).mT - x
    got = (lost.square().mean(-1) / 4 ** torch.linspace(0, 3, x.size(1))).mean()
    assert float(got) == pytest.approx(COST[bits][WIDTHS.index(width)], rel=0.02)


def test_costs_between_known_widths_are_between_theirs():
    low, middle, high = cost(4, torch.tensor([32, 48, 64])).tolist()
    assert (low, high) == (COST[4][2], COST[4][3])
    assert low < middle < high
    assert cost(8, torch.tensor([1, 4096])).tolist() == [COST[8][0], COST[8][-1]]


@pytest.mark.parametrize("kind", ["mixed", "pairs"])
@pytest.mark.parametrize(
    "text", ["96x8", "32x4", "96x3", "48x2", "32x8+48x4", "16x8+48x4+16x3+16x2"]
)
def test_segments_lose_what_is_expected_of_normal_numbers(kind, text):
    segments, basis = parse_segments(text), basis_of(kind)
    if kind == "pairs" and len(segments) > 1:
        pytest.skip("pairs are one segment")
    torch.manual_seed(1)
    z = basis.spectrum.sqrt()[..., None] * torch.randn(2, N, 4000).double()
    x = basis.decoder @ z  # centered
    mixed, width = spread(basis, segments), sum(s.width for s in segments)
    y = mixed.encoder[..., :width].mT @ x
    lost = mixed.decoder[..., :width] @ (rounded(y, segments) - y)
    got = (basis.encoder.mT @ lost).square().sum((0, 1)).mean()
    bounds = [0, *torch.tensor([s.width for s in segments]).cumsum(0).tolist()]
    table = segment_errors(basis, bounds, [s.bits for s in segments])
    want = sum(table[i, i, i + 1] for i in range(len(segments)))
    least = 0.85 if "8" in text else 0.95  # mixed numbers have smaller maxima than normal ones
    assert least < float(got) / float(want) < 1.05


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_whole_heads_lose_what_is_expected_of_normal_numbers(bits):
    basis = basis_of("diagonal")
    torch.manual_seed(1)
    z = basis.spectrum.sqrt()[..., None] * torch.randn(2, N, 4000).double()
    x = (basis.decoder @ z).unflatten(1, (4, 24)).flatten(0, 1)
    lost = (rounded(x, (Segment(24, bits),)) - x).unflatten(0, (2, 4)).flatten(1, 2)
    got = (basis.encoder.mT @ lost).square().sum((0, 1)).mean()
    assert whole_error(basis, 24, bits) == pytest.approx(float(got), rel=0.1)


def test_facts_stand_for_encoders_and_decoders():
    basis = basis_of("mixed")
    bare = basis._replace(encoder=None, decoder=None, rounding=facts(basis))
    bounds = [0, 16, 96]
    assert_close(segment_errors(bare, bounds, [4]), segment_errors(basis, bounds, [4]))
    assert whole_error(bare, 24, 4) == whole_error(basis, 24, 4)
