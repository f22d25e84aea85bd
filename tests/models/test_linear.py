import copy

import pytest
import tiny
import torch

from eigenzoo.kernels import ops
from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.generate import Generator, fastest_dtype
from eigenzoo.zoo.inference.int8 import quantize
from eigenzoo.zoo.measure.timed_models import weight_bytes
from eigenzoo.zoo.models import linear
from eigenzoo.zoo.models.linear import Linear

CPU = torch.device("cpu")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Linear(24, 17).requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_compiled_equal_the_matrix_product(layer, dtype, int8):
    torch._dynamo.reset()
    layer = layer.to(dtype)
    if int8:
        quantize(torch.nn.Sequential(layer))
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (1, linear.ROWS, linear.ROWS + 1):
        x = torch.randn(rows, 1, 24, dtype=dtype)
        torch.testing.assert_close(compiled(x), layer(x))


def test_only_one_token_of_few_sequences_goes_row_by_row(monkeypatch, layer):
    assert not layer.few(torch.zeros(1, 1, 24))  # not compiled
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.few(torch.zeros(linear.ROWS, 1, 24))
    assert not layer.few(torch.zeros(linear.ROWS + 1, 1, 24))
    assert not layer.few(torch.zeros(1, 2, 24))
    assert not layer.few(torch.zeros(1, 1, 24, device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.SIZES)
def test_with_fused_ops_every_linear_layer_of_one_token_is_fused(monkeypatch, family):
    model, counted = install(tiny.native(family)), []
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    for layer in linears:
        monkeypatch.setattr(
            layer, "linear_decode", lambda *args: counted.append(1) or ops.linear_decode(*args)
        )
    cache = model.new_cache(2, 8)
    model(tiny.tokens(2, 4), torch.arange(4), cache)
    assert not counted
    model(tiny.tokens(2, 1), torch.arange(4, 5), cache)
    assert len(counted) == len(linears)


def test_an_int8_weight_is_off_by_half_a_scale_at_most(layer):
    layer.weight[3] = 0
    before = layer.weight.clone()
    quantize(torch.nn.Sequential(layer))
    error = (layer.weight * layer.scale[:, None] - before).abs()
    assert layer.weight.dtype == torch.int8
    assert (error <= layer.scale[:, None] * 0.501).all()
    assert (error[3] == 0).all()


@pytest.mark.parametrize("family", tiny.SIZES)
def test_every_linear_layer_is_int8_and_the_embedding_is_not(family):
    model = quantize(tiny.native(family))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(m.weight.dtype == torch.int8 for m in linears)
    assert model.dtype == torch.float32
    assert model.head.weight is not model.embed.weight


def test_int8_weights_count_as_one_byte_each():
    original = tiny.native(num_hidden_layers=1, tie_word_embeddings=True)
    light = quantize(copy.deepcopy(original))
    saved = sum(3 * m.weight.numel() for m in light.modules() if isinstance(m, Linear))
    before, after = (weight_bytes(m, m.head) for m in (original, light))
    assert after == before - saved


@pytest.mark.parametrize("family", tiny.SIZES)
def test_an_int8_model_gives_nearly_the_probabilities_of_the_original(family):
    original = tiny.native(family)
    light = quantize(copy.deepcopy(original))
    x = tiny.tokens(2, 20)
    want, got = (m(x).log_softmax(-1).exp() for m in (original, light))
    assert (want - got).abs().sum(-1).max() < 0.1


@pytest.mark.slow
def test_a_compiled_int8_model_decodes_as_it_does_uncompiled():
    torch._dynamo.reset()
    model = quantize(tiny.native(num_hidden_layers=1))
    tokens = []
    for compile in (True, False):
        steps = Generator(model, 1, 24, compile).stream([[5, 9, 33]], 20)
        tokens.append(torch.cat(list(steps)).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_decodes_in_bfloat16_if_supported_and_else_in_float32(monkeypatch, has_it, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    assert fastest_dtype(CPU) == dtype


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_a_gpu_decodes_in_bfloat16_if_supported_and_else_as_the_checkpoint(
    monkeypatch, has_it, dtype
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert fastest_dtype(torch.device("cuda")) == dtype
