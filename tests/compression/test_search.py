import pytest
import tiny

from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.search import STEP, ErrorBudget
from eigenzoo.zoo.compression.settings import Settings


@pytest.fixture(scope="module")
def search():
    model, x = tiny.native(head_dim=16, attention_bias=True), tiny.tokens(4, 64)
    bases = METHODS["eigen"].bases(model, calibrate(model, x))
    return ErrorBudget(model, bases, x, multiple=1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_stops_before_its_error_exceeds_the_budget(search, layer):
    budget = (search.setting(layer, 8).error + search.setting(layer, 40).error) / 2
    step = round((1 - search.choose(budget)[layer].threshold) / STEP)
    errors = [search.setting(layer, i).error for i in range(step + 2)]
    assert max(errors[: step + 1]) <= budget < errors[step + 1]


def test_output_error_is_that_of_the_folded_layer(search):
    budget = search.setting(0, 25).error
    chosen = search.choose(budget)
    low = compress(
        search.model,
        tiny.tokens(4, 64),
        Settings("eigen", keep=0.6, error_budget=budget, rank_multiple=1, kv_bits=(16,)),
    )
    assert [x["k_rank"] for x in low.layers] == [s.k_rank for s in chosen]
    x, want = search.inputs[:2]
    got = low.model.layers[0](x, search.pos, search.attn_metadata, None)
    assert chosen[0].error > 0
    assert float((got - want).norm() / want.norm()) == pytest.approx(chosen[0].error, rel=1e-3)


def test_no_error_allowed_means_full_rank(search):
    assert all(s.k_rank == s.v_rank == 16 for s in search.choose(0.0))


@pytest.mark.parametrize("keep", [0.9, 0.6])
def test_keep_finds_the_smallest_budget_that_meets_it(search, keep):
    budget = search.meet(keep)
    assert search.share(search.choose(budget)) <= keep
    assert search.share(search.choose(budget / 1.02)) > keep
