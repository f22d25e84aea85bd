"""The cuts of a unit: segments of falling bits, and the corners of their convex hull."""

from itertools import pairwise, product

import pytest
import torch

from eigenzoo.zoo.compression.cuts import NOISE, Segmented, choices, hull
from eigenzoo.zoo.compression.rounding import segment_errors
from eigenzoo.zoo.compression.solve import Basis
from eigenzoo.zoo.models.bits import BITS, parse_segments
from eigenzoo.zoo.models.llama import LlamaConfig
from eigenzoo.zoo.models.packing import Latent


def basis(latents: int = 2, width: int = 64) -> Basis:
    torch.manual_seed(0)
    fall = torch.logspace(0, -3, width, dtype=torch.float64)
    spectrum = (torch.rand(latents, width).double() * fall).sort(descending=True).values
    nothing = torch.zeros(latents, width, dtype=torch.float64)
    rounding = torch.stack((nothing + 1, nothing + 1))
    return Basis(torch.empty(0), torch.empty(0), spectrum, nothing, rounding=rounding)


def everything(basis: Basis, step: int = 16) -> list[tuple[int, float]]:
    """Bytes and errors of all cuts, counted one by one."""
    latents, full = basis.spectrum.shape
    bounds = [*range(0, full, step), full]
    table, left = segment_errors(basis, bounds, BITS[1:]), basis.errors()
    left, found = left.clamp(min=NOISE * left[0]), []
    for bits_of in product((*BITS, 0), repeat=len(bounds) - 1):  # of every step, 0 where dropped
        kept = [b for b in bits_of if b]
        if (
            sorted(bits_of, reverse=True) != [*bits_of]
            or not kept
            or (16 in kept and len({*kept}) > 1)
        ):
            continue
        parts = [
            (b, bits_of.index(b), bits_of.index(b) + bits_of.count(b)) for b in BITS if b in kept
        ]
        text = "+".join(f"{bounds[j] - bounds[i]}x{b}" for b, i, j in parts)
        error = float(left[bounds[len(kept)]])
        if set(kept) == {16}:
            text = ""
        else:
            error += sum(float(table[BITS.index(b) - 1, i, j]) for b, i, j in parts)
        latent = Latent(latents, bounds[len(kept)], parse_segments(text))
        found.append((latent.nbytes(torch.bfloat16), error))
    return found


def test_no_cut_is_below_the_hull_at_any_price_of_a_byte():
    unit = Segmented(basis(), 8, BITS)
    corners, found = unit.cuts(unit.best()), everything(basis())
    assert len(found) > 70
    for price in torch.logspace(-6, 0, 40, dtype=torch.float64).tolist():
        got = min(cut.error + price * cut.size for cut in corners)
        assert got == pytest.approx(min(e + price * size for size, e in found), rel=1e-6)


def test_corners_cost_more_and_lose_less_at_a_falling_rate():
    unit = Segmented(basis(), 8, BITS)
    corners = unit.cuts(unit.best())
    steps = [*pairwise(corners)]
    rates = [(a.error - b.error) / (b.size - a.size) for a, b in steps]
    assert all(a.size < b.size and a.error > b.error for a, b in steps)
    assert rates == sorted(rates, reverse=True)
    assert corners[0].rank == 16
    assert (corners[-1].segments, corners[-1].rank) == ("", 64)  # all of it in the model's dtype


def test_cuts_have_the_bytes_of_their_rows():
    unit = Segmented(basis(3, 40), 8, BITS)
    allowed = [c for c in unit.cuts(range(len(unit.ends) + 3)) if c.error < torch.inf]
    assert len(allowed) > 30
    for cut in allowed:
        segments = parse_segments(cut.segments)
        assert sum(s.width for s in segments) in (0, cut.rank)
        assert Latent(3, cut.rank, segments).nbytes(torch.bfloat16) == cut.size
        assert all(s.width % 16 == 0 for s in segments[:-1])


def test_wide_latents_are_cut_in_larger_steps():
    assert Segmented(basis(1, 512), 8, (4, 2)).bounds == [*range(0, 513, 16)]
    assert Segmented(basis(1, 528), 8, (4, 2)).bounds == [*range(0, 528, 32), 528]
    assert Segmented(basis(1, 96), 24, (4, 2)).bounds == [0, 48, 96]
    assert Segmented(basis(1, 8), 8, (4, 2)).bounds == [0, 8]


def test_pairs_are_one_segment_of_any_bits():
    paired = basis()._replace(pairs=torch.zeros(2, 32))
    unit = Segmented(paired, 8, BITS)
    texts = [cut.segments for cut in unit.cuts(unit.best())]
    assert all("+" not in text for text in texts)
    assert {text.partition("x")[2] for text in texts} >= {"3", "8", ""}


def test_whole_heads_have_one_number_of_bits_each():
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=8,
    )
    unit = choices(config, basis(), 8, BITS, whole=True)
    assert [cut[:3] for cut in unit.cuts(unit.best())] == [(64, bits, "") for bits in BITS]


def test_a_hull_leaves_out_what_is_above_it():
    sizes = torch.tensor([8, 8, 16, 24, 24, 32, 40])
    errors = torch.tensor([9.0, 8.0, 7.0, 2.0, 3.0, 1.9, torch.inf])
    assert hull(sizes, errors) == [1, 3, 5]
