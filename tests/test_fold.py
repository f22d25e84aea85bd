import pytest
import tiny
import torch

from eigenzoo.zoo.allocate import Ranks
from eigenzoo.zoo.basis import METHODS
from eigenzoo.zoo.calibrate import calibrate
from eigenzoo.zoo.fold import fold
from eigenzoo.zoo.model import Model

METHOD_AND_SHARES = [
    ("eigen", (1, 1)),
    *((m, shared) for m in ("fisher", "attention") for shared in ((1, 1), (4, 1), (2, 4), (4, 4))),
]


def folded(model: Model, method: str, shared: tuple[int, int], k: int, v: int) -> Model:
    """`model` at ranks k and v in the middle layer, odd ones around it."""
    needs = METHODS[method]
    statistics = calibrate(model, tiny.tokens(4, 64), shared, needs.gradients, needs.queries)
    bases = needs.bases(model, statistics)
    return fold(model, bases, Ranks((k, k - 1, k), (v, v, v - 1)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("method", "shared"), METHOD_AND_SHARES)
def test_decoding_equals_recomputing(method, shared, bias):
    low = folded(tiny.native(attention_bias=bias), method, shared, 5 * shared[0], 6 * shared[1])
    x, cache = tiny.tokens(2, 25), low.new_cache(2, 30)
    steps = [low(x[:, p], p, cache) for p in torch.arange(25).split([9, 3, *[1] * 13])]
    torch.testing.assert_close(torch.cat(steps, 1), low(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_dense_model(method, bias):
    model = tiny.native(attention_bias=bias)
    full = METHODS[method].bases(model, calibrate(model, tiny.tokens(4, 64), (1, 1), True, True))
    low = fold(model, full, Ranks((8,) * 3, (8,) * 3))
    x = tiny.tokens(2, 30)
    torch.testing.assert_close(low(x), model(x), atol=1e-4, rtol=0)
    assert low.new_cache(1, 9).nbytes == model.new_cache(1, 9).nbytes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["fisher", "attention"])
def test_a_latent_as_wide_as_the_layer_loses_nothing(method, bias):
    # keys and values are 4 heads of 32 made from 64 numbers: 64 hold them, lifted and rotated
    model = tiny.native(head_dim=32, attention_bias=bias)
    needs = METHODS[method]
    x = tiny.tokens(8, 64)
    bases = needs.bases(model, calibrate(model, x, (4, 4), needs.gradients, needs.queries))
    low = fold(model, bases, Ranks((64,) * 3, (64,) * 3))
    assert all(layer.attn.k_up is not None and layer.attn.v_up is not None for layer in low.layers)
    torch.testing.assert_close(low(x[:2]), model(x[:2]), atol=1e-4, rtol=0)


def test_value_bias_folds_into_the_output_bias_exactly():
    model = tiny.native(attention_bias=True)
    bases = METHODS["fisher"].bases(model, calibrate(model, tiny.tokens(4, 64), (4, 4), True))
    low = fold(model, bases, Ranks((32,) * 3, (32,) * 3))
    assert all(layer.attn.v_proj.bias is None for layer in low.layers)
    torch.testing.assert_close(
        low(tiny.tokens(2, 30)), model(tiny.tokens(2, 30)), atol=1e-4, rtol=0
    )


def test_a_constant_in_the_values_costs_nothing_at_any_rank():
    def attention_outputs(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first layer, dense and at rank 12, with `shift` added to every value."""
        model, x = tiny.native(attention_bias=True), tiny.tokens(4, 64)
        model.layers[0].attn.v_proj.bias += shift
        bases = METHODS["attention"].bases(model, calibrate(model, x, (4, 4), queries=True))
        low = fold(model, bases, Ranks((32,) * 3, (12,) * 3))
        seen, pos, where = model.begin(x)
        seen = model.layers[0].attn_norm(seen)
        return tuple(m.layers[0].attn(seen, pos, where, None) for m in (model, low))

    dense, low = attention_outputs(0.0)
    shifted_dense, shifted_low = attention_outputs(7.0)
    assert (low - dense).abs().max() > 1e-2
    torch.testing.assert_close(shifted_low - shifted_dense, low - dense, atol=1e-3, rtol=0)


def test_centring_is_better_where_means_are_not_zero():
    model, x = tiny.native(attention_bias=True), tiny.tokens(8, 64)
    for layer in model.layers:
        layer.attn.v_proj.bias *= 3
        layer.attn.k_proj.bias *= 3
    bases = METHODS["fisher"].bases(model, calibrate(model, x, (4, 4), True))
    plain = [type(b)(*(u._replace(mean=torch.zeros_like(u.mean)) for u in b)) for b in bases]
    ranks = Ranks((12,) * 3, (12,) * 3)
    want = model(x)
    error = [(fold(model, b, ranks)(x) - want).square().mean() for b in (bases, plain)]
    assert error[0] < error[1]


@pytest.mark.parametrize("shared", [(1, 1), (4, 4)])
def test_bfloat16_stays_near_float32(shared):
    low = folded(tiny.native(attention_bias=True), "fisher", shared, 5 * shared[0], 6 * shared[1])
    x = tiny.tokens(2, 25)
    want = low(x)
    low, cache = low.to(torch.bfloat16), low.new_cache(2, 25, torch.bfloat16)
    steps = [low(x[:, p], p, cache).float() for p in torch.arange(25).split([9, *[1] * 16])]
    # 8 bits of mantissa through 3 layers: a few percent of the logits' spread
    assert (torch.cat(steps, 1) - want).std() < 0.05 * want.std()


def test_the_rest_of_the_model_is_shared_not_copied():
    model = tiny.native()
    low = folded(model, "fisher", (4, 4), 20, 20)
    assert low.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert (
        low.layers[0].mlp.up_proj.weight.data_ptr() == model.layers[0].mlp.up_proj.weight.data_ptr()
    )


def test_cache_bytes_are_those_of_the_ranks():
    low = folded(tiny.native(), "fisher", (4, 2), 20, 12)
    assert low.new_cache(2, 10).nbytes == 2 * 10 * 4 * ((20 + 19 + 20) + 2 * (12 + 12 + 11))
