from itertools import accumulate, product

import pytest
import tiny
import torch

from eigenzoo.zoo.compression.allocate import few_pairs, greedy, proportional, threshold_rank
from eigenzoo.zoo.compression.basis import Basis, LayerBasis
from eigenzoo.zoo.compression.fold import low_config
from eigenzoo.zoo.compression.rounding import segment_errors
from eigenzoo.zoo.models.bits import BITS
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.models.llama import LlamaConfig


def bases(latents: int, n: int, layers: int = 2) -> list[LayerBasis]:
    torch.manual_seed(0)

    def basis() -> Basis:
        spectrum = torch.rand(latents, n).double().sort(descending=True).values * torch.rand(1) * 9
        return Basis(torch.empty(0), torch.empty(0), spectrum, torch.zeros(latents, n))

    return [LayerBasis(basis(), basis()) for _ in range(layers)]


def config(layers: int = 2) -> LlamaConfig:
    sizes = tiny.ROTARY | {"head_dim": 8} | {"num_hidden_layers": layers}
    return LlamaConfig(**sizes, k_heads_per_latent=4, v_heads_per_latent=4)


def steep(layers: int) -> list[LayerBasis]:
    """Bases of one latent of 128 numbers, whose spectra fall by three decades or more."""
    torch.manual_seed(0)

    def basis() -> Basis:
        fall = torch.logspace(0, -3 - float(torch.rand(1)), 128, dtype=torch.float64)
        spectrum = (fall * (0.5 + torch.rand(1, 128)) * torch.rand(1) * 9).sort(descending=True)
        return Basis(
            torch.empty(0),
            torch.empty(0),
            spectrum.values,
            torch.zeros(1, 128),
            rounding=torch.ones(2, 1, 128, dtype=torch.float64),
        )

    return [LayerBasis(basis(), basis()) for _ in range(layers)]


def wide(layers: int) -> LlamaConfig:
    """The config of a dense model with 4 heads of 32 numbers."""
    sizes = tiny.ROTARY | {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": layers}
    return LlamaConfig(**sizes)


def cost(ranks) -> int:
    return sum(ranks.k) + sum(ranks.v)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 1.0])
def test_the_budget_is_met_and_not_exceeded(keep):
    ranks = greedy(config(), bases(1, 32), keep, multiple=4)
    assert keep * 128 - 4 < cost(ranks) <= keep * 128
    assert all(r % 4 == 0 for r in (*ranks.k, *ranks.v))


@pytest.mark.parametrize("multiple", [1, 3, 4])
def test_pairs_get_even_ranks(multiple):
    paired = [x._replace(k=x.k._replace(pairs=torch.zeros(1, 16))) for x in bases(1, 32)]
    ranks = greedy(config(), paired, 0.5, multiple)
    assert all(r % 2 == 0 and (r % multiple == 0 or r == 32) for r in ranks.k)
    assert cost(ranks) <= 64


def test_whole_keys_are_a_fixed_cost():
    units = bases(1, 32)
    ranks = greedy(config(), units, 0.75, multiple=2, whole_keys=True)
    assert ranks.k == (32, 32)
    assert sum(ranks.v) == 32
    heavy = [units[0]._replace(k=units[0].k._replace(spectrum=units[0].k.spectrum * 50)), units[1]]
    assert greedy(config(), heavy, 0.75, multiple=2, whole_keys=True) == ranks


def test_greedy_finds_what_trying_everything_finds():
    units, choices = bases(1, 32), range(8, 33, 8)
    errors = [b.errors() for layer in units for b in layer]
    ranks = greedy(config(), units, 0.5, multiple=8)
    got = [ranks.k[0], ranks.v[0], ranks.k[1], ranks.v[1]]

    def total(rs):
        return float(sum(e[r] for e, r in zip(errors, rs, strict=True)))

    best = min(total(rs) for rs in product(choices, repeat=4) if sum(rs) <= 64)
    assert total(got) == pytest.approx(best)


def test_a_layer_that_matters_more_gets_more():
    light = bases(1, 32)
    heavy = [light[0], light[1]._replace(k=light[1].k._replace(spectrum=light[1].k.spectrum * 50))]
    before, after = (greedy(config(), b, 0.5, 4) for b in (light, heavy))
    assert after.k[1] > before.k[1]
    assert after.k[0] <= before.k[0]


def test_ranks_are_in_proportion_to_weights():
    ranks = proportional(config(), bases(1, 32), [(1, 2), (4, 3)], keep=60 / 128, multiple=1)
    assert (ranks.k, ranks.v) == ((6, 24), (12, 18))


def test_what_a_full_unit_cannot_take_goes_to_the_others():
    ranks = proportional(config(), bases(1, 32), [(1, 2), (97, 0)], keep=60 / 128, multiple=1)
    assert (ranks.k, ranks.v) == ((9, 32), (18, 1))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 1.0])
def test_proportional_ranks_meet_the_budget(keep):
    ranks = proportional(config(), bases(1, 32), [(1, 2), (90, 0.1)], keep, multiple=4)
    assert keep * 128 - 4 < cost(ranks) <= keep * 128
    assert all(r % 4 == 0 for r in (*ranks.k, *ranks.v))


def loss(units, ranks) -> float:
    sides = zip(units, *ranks[:2], strict=True)
    return sum(float(k.errors()[rk] + v.errors()[rv]) for (k, v), rk, rv in sides)


def distinct(ranks) -> int:
    return len(set(zip(ranks.k, ranks.v, strict=True)))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_few_pairs_are_few_within_the_bytes_and_lose_no_more_than_equal_ranks(count, keep):
    units, sizes = bases(1, 32, layers=7), config(layers=7)
    ranks = few_pairs(sizes, units, count, keep, multiple=2)
    assert distinct(ranks) <= count
    assert cost(ranks) <= keep * 7 * 64
    each = int(keep * 32) // 2 * 2
    alike = (each,) * 7
    assert loss(units, ranks) <= loss(units, (alike, alike)) + 1e-9


def test_more_pairs_lose_less():
    units, sizes = bases(1, 32, layers=7), config(layers=7)
    losses = [loss(units, few_pairs(sizes, units, n, 0.5, multiple=2)) for n in range(1, 8)]
    assert losses == sorted(losses, reverse=True)


def test_as_many_pairs_as_layers_change_nothing():
    units, sizes = bases(1, 32, layers=7), config(layers=7)
    assert few_pairs(sizes, units, 7, 0.5, 2) == greedy(sizes, units, 0.5, 2)


def test_two_kinds_of_layers_are_the_two_groups():
    light, heavy = bases(1, 32)
    heavy = heavy._replace(k=heavy.k._replace(spectrum=heavy.k.spectrum * 50))
    units, sizes = [light, heavy, heavy, light, heavy], config(layers=5)
    assert few_pairs(sizes, units, 2, 0.5, 2) == greedy(sizes, units, 0.5, 2)
    assert distinct(few_pairs(sizes, units, 1, 0.5, 2)) == 1


def test_few_pairs_are_even_where_columns_are_pairs_and_leave_whole_keys_whole():
    units, sizes = bases(1, 32, layers=5), config(layers=5)
    paired = [x._replace(k=x.k._replace(pairs=torch.zeros(1, 16))) for x in units]
    ranks = few_pairs(sizes, paired, 2, 0.5, multiple=3)
    assert all(r % 6 == 0 or r == 32 for r in ranks.k)
    whole = few_pairs(sizes, units, 2, 0.75, 2, whole_keys=True)
    assert set(whole.k) == {32}
    assert distinct(whole) <= 2


def test_joint_latents_have_few_ranks_within_the_budget():
    joint = [x._replace(v=None) for x in bases(1, 64, layers=5)]
    ranks = few_pairs(config(layers=5), joint, 2, 0.5, multiple=2)
    assert distinct(ranks) <= 2
    assert sum(ranks.k) <= 0.5 * 5 * 64
    assert set(ranks.v) == {0}


def test_few_pairs_of_ranks_follow_weights():
    weights = [(1, 2), (4, 3), (1, 2), (4, 2)]
    units, sizes = bases(1, 32, layers=4), config(layers=4)
    ranks = proportional(sizes, units, weights, 0.5, 1, count=2)
    assert distinct(ranks) == 2
    assert cost(ranks) <= 0.5 * 4 * 64
    assert ranks.k[1] > ranks.k[0]


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
def test_a_keep_outside_0_to_1_is_refused(keep):
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        greedy(config(), bases(1, 32), keep)


def test_a_keep_below_the_least_rank_is_refused():
    with pytest.raises(ValueError, match=r"at least 0\.250"):
        greedy(config(), bases(1, 32), 0.2, multiple=8)


def test_threshold_is_a_share_of_singular_values_and_the_largest_head_counts():
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.0, 1.0, 0.0, 0.0]])
    spectrum = values.square()
    assert threshold_rank(spectrum, 0.9) == 3
    assert threshold_rank(spectrum, 0.91) == 4
    assert threshold_rank(spectrum[1:], 0.9) == 1
    assert threshold_rank(spectrum, 0.4, multiple=4) == 4


def segments_lost(units, ranks) -> float:
    """The expected error of ranks whose latents have segments, or are whole."""
    total = 0.0
    for i, pair in enumerate(units):
        for basis, parts, rank in zip(
            pair, ranks.segments(i), (ranks.k[i], ranks.v[i]), strict=True
        ):
            total += float(basis.errors()[rank])
            bounds = [0, *accumulate(s.width for s in parts)]
            for j, s in enumerate(parts):
                total += float(segment_errors(basis, bounds, [s.bits])[0, j, j + 1])
    return total


def held(sizes, ranks) -> int:
    """Bytes per token."""
    return kv_bytes(low_config(sizes, ranks, (4, 4)))["kv_bytes_per_token"]


@pytest.mark.parametrize("keep", [0.12, 0.16, 0.25, 0.4])
def test_segments_fill_the_budget_to_a_step_and_lose_less_than_one_number_of_bits(keep):
    units, sizes = steep(7), wide(7)
    budget = keep * 2 * sizes.dense_kv_width
    segments = greedy(sizes, units, keep, multiple=16, bits=BITS)
    # a step may be 16 numbers of 2 bits, or one bit more each: 4 bytes, and a scale, and zeros
    assert budget - 16 < held(sizes, segments) <= budget
    assert not segments.k_bits
    for bits in (8, 4, 3, 2):
        try:
            one = greedy(sizes, units, keep, multiple=16, bits=(bits,))
        except ValueError:  # so many bits are too many for the least rank
            continue
        assert held(sizes, one) <= budget
        assert segments_lost(units, segments) < 0.9 * segments_lost(units, one)


def test_fewer_bytes_are_fewer_bits_and_fewer_numbers():
    units, sizes = steep(7), wide(7)

    def numbers(keep: float, bits: int) -> int:
        ranks = greedy(sizes, units, keep, 16, bits=BITS)
        parts = [s for i in range(7) for side in ranks.segments(i) for s in side]
        return sum(s.width for s in parts if s.bits == bits or not bits)

    assert numbers(0.1, 8) < numbers(0.3, 8)
    assert numbers(0.1, 2) > numbers(0.3, 2)
    assert numbers(0.1, 0) < numbers(0.3, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_few_pairs_have_few_pairs_of_segments(count):
    units, sizes = steep(7), wide(7)
    free = greedy(sizes, units, 0.2, 16, bits=BITS)
    ranks = few_pairs(sizes, units, count, 0.2, 16, bits=BITS)
    assert len({*zip(free.k_segments, free.v_segments, strict=True)}) > 3
    assert len({*zip(ranks.k_segments, ranks.v_segments, strict=True)}) <= count
    assert held(sizes, ranks) <= 0.2 * 2 * sizes.dense_kv_width
    assert segments_lost(units, ranks) < segments_lost(
        units, greedy(sizes, units, 0.2, 16, bits=(4,))
    )


def test_one_number_of_bits_is_one_segment_and_whole_heads_stay_whole():
    units, sizes = steep(3), wide(3)
    ranks = greedy(sizes, units, 0.3, 16, bits=(4,))
    assert ranks.k_segments == tuple(f"{r}x4" for r in ranks.k)
    whole = greedy(sizes, units, 1.0, 16, bits=(8,))
    assert (whole.k, whole.k_bits, whole.k_segments) == ((128,) * 3, (8,) * 3, ())
    keys = greedy(sizes, units, 0.4, 16, whole_keys=True, bits=(8, 4, 2))
    assert keys.k == (128,) * 3
    assert {*keys.k_bits} <= {8, 4, 2}
    assert len(keys.v_segments) == 3
