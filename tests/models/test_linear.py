import copy
import io
from dataclasses import asdict
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from eigenzoo.hub_export.remote.configuration_eigen import EigenConfig
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.kernels import cpu, ops
from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.generate import Generator, fastest_dtype
from eigenzoo.zoo.inference.int8 import Int8Linear, quantize
from eigenzoo.zoo.measure.timed_models import weight_bytes
from eigenzoo.zoo.models import linear
from eigenzoo.zoo.models.experts import Router
from eigenzoo.zoo.models.gemma3 import Norm

CPU = torch.device("cpu")
WIDE = 24


class Subclass(torch.Tensor):
    """A tensor subclass, as weights are that a quantizer or a device mesh has made."""


class Adapter(nn.Linear):
    """A subclass of nn.Linear, as layers are that an adapter or a quantizer has replaced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _doubled(self, x)


def _doubled(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return 2 * nn.Linear.forward(layer, x)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(WIDE, 17).requires_grad_(False)


@pytest.fixture
def projector():
    """A module with an op for linear layers, and the calls that the op has got."""
    module, calls = linear.Projector(), []
    module.linear_decode = lambda *args: calls.append(args) or linear.linear_decode(*args)
    return module, calls


@pytest.mark.parametrize("family", [*tiny.SIZES, "qk_ln"])
@pytest.mark.parametrize("exported", [False, True])
def test_every_linear_layer_is_of_the_class_that_quantizers_look_for(family, exported):
    foundry = tiny.FoundryMPT({"clip_qkv": 0.4, "qk_ln": True}) if family == "qk_ln" else None
    model = foundry.native() if foundry else tiny.native(family)
    if exported:
        model = EigenForCausalLM(EigenConfig(family=model.config.family, **asdict(model.config)))
    own = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() == 2}
    types = {type(model.get_submodule(name)) for name in own}
    layers = {x for x in types if not issubclass(x, nn.Embedding)}
    assert layers - {Router} == {nn.Linear}  # quantizers must not find the router


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_compiled_equal_the_matrix_product(layer, dtype, int8):
    torch._dynamo.reset()
    layer = layer.to(dtype)
    if int8:
        layer = Int8Linear(layer)
    compiled = torch.compile(partial(linear.Projector().linear, layer), fullgraph=True)
    for rows in (1, linear.ROWS, linear.ROWS + 1):
        x = torch.randn(rows, 1, WIDE, dtype=dtype)
        torch.testing.assert_close(compiled(x), layer(x))


def test_compiled_few_rows_go_row_by_row_in_one_graph(layer):
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(linear.Projector().linear, fullgraph=True, backend=keep)
    compiled(layer, torch.randn(2, 1, WIDE))
    compiled(layer, torch.randn(3, 1, WIDE))
    assert ["stack" in code for code in graphs] == [True, False]


def test_only_a_few_tokens_go_row_by_row(monkeypatch):
    module = linear.Projector()
    assert not module.few(torch.zeros(1, 1, WIDE))  # not compiled
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert module.few(torch.zeros(linear.ROWS, 1, WIDE))
    assert not module.few(torch.zeros(linear.ROWS + 1, 1, WIDE))
    assert not module.few(torch.zeros(0, 1, WIDE))
    assert module.few(torch.zeros(1, linear.ROWS, WIDE))
    assert not module.few(torch.zeros(2, linear.ROWS, WIDE))
    assert not module.few(torch.zeros(1, 1, WIDE, device="meta"))


def _hooked(hook: str):
    return lambda layer: getattr(layer, f"register_{hook}_hook")(lambda *args: None)


TOUCHED = {
    "a subclass of tensors": lambda m: setattr(
        m, "weight", nn.Parameter(m.weight.as_subclass(Subclass), False)
    ),
    "an adapter": lambda m: setattr(m, "__class__", Adapter),
    "a wrapped forward": lambda m: setattr(m, "forward", partial(_doubled, m)),
    "a transposed weight": lambda m: setattr(
        m, "weight", nn.Parameter(m.weight.T.contiguous().T, False)
    ),
    "a sparse weight": lambda m: setattr(m, "weight", nn.Parameter(m.weight.to_sparse(), False)),
    "float64": lambda m: m.double(),
    "a forward hook": _hooked("forward"),
    "a forward pre-hook": _hooked("forward_pre"),
    "a backward hook": _hooked("full_backward"),
    "a pruned weight": lambda m: prune.random_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("way", TOUCHED)
def test_a_layer_that_something_has_changed_is_called_as_it_is(layer, projector, way):
    module, calls = projector
    x = torch.randn(2, 1, WIDE)
    torch.testing.assert_close(module.linear(layer, x), layer(x))
    assert len(calls) == 1
    TOUCHED[way](layer)
    x = x.to(layer.weight.dtype)
    assert torch.equal(module.linear(layer, x), layer(x))
    assert len(calls) == 1


def test_a_layer_on_fake_tensors_is_traced(projector):
    with FakeTensorMode():
        module, layer = projector[0], nn.Linear(WIDE, 17)
        assert module.linear(layer, torch.randn(1, 1, WIDE)).shape == (1, 1, 17)


def test_weights_that_are_moved_or_replaced_are_those_that_count(layer, projector):
    module, x = projector[0], torch.randn(1, 1, WIDE)
    module.linear(layer, x)
    layer.weight = nn.Parameter(2 * layer.weight, False)
    layer.bias.data = 3 * layer.bias
    torch.testing.assert_close(module.linear(layer, x), layer(x))


@pytest.mark.slow
def test_copies_of_a_model_with_fused_ops_decode_as_it_does():
    model = install(tiny.native())
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert other.layers[0].mlp.linear_decode is ops.linear_decode
        for m in (model, other):
            m.logits = m(tiny.tokens(2, 1), torch.zeros(1, dtype=torch.long), m.new_cache(2, 4))
        assert torch.equal(other.logits, model.logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.SIZES)
@pytest.mark.parametrize("int8", [False, True])
def test_with_fused_ops_every_linear_layer_of_a_few_tokens_is_fused(monkeypatch, family, int8):
    model, counted = tiny.native(family), []
    layers = sum(type(m) is nn.Linear for m in model.modules())
    model = install(quantize(model) if int8 else model)
    for module in model.modules():
        if isinstance(module, linear.Projector):
            monkeypatch.setattr(
                module, "linear_decode", lambda *args: counted.append(1) or ops.linear_decode(*args)
            )
    cache = model.new_cache(2, 20)
    model(tiny.tokens(2, 20), torch.arange(20), cache)
    assert not counted  # 40 are many
    for count in (1, 4):
        model(tiny.tokens(2, count), torch.arange(count), cache)
    assert len(counted) == 2 * layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_of_many_rows_is_that_of_the_library(dtype):
    cpu.load()
    x, weight = torch.randn(100, 1, 70).to(dtype), torch.randn(35, 70).to(dtype)
    y = ops.linear_decode(x, weight, None, weight[:, 0].contiguous())
    want = F.linear(x.double(), weight.double(), weight[:, 0].double())
    torch.testing.assert_close(y.double(), want, rtol=2**-7, atol=0.05)


def test_where_16_bits_are_slow_every_prompt_is_multiplied_by_the_op_but_not_in_training(
    monkeypatch,
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpu, "load", lambda: None)
    x = torch.randn(1, 50, 8)
    for dtype, rows in ((torch.float32, 32), (torch.bfloat16, None)):
        mlp, given = install(tiny.native().to(dtype)).layers[0].mlp, x.to(dtype, copy=True)
        assert mlp.rows == rows
        assert mlp.few(given) == (rows is None)
        assert not mlp.few(given.requires_grad_())


@pytest.mark.parametrize("learner", ["layer", "input"])
def test_what_learns_is_not_multiplied_by_the_op_which_has_no_gradient(projector, layer, learner):
    module, calls = projector
    x = torch.randn(2, 1, WIDE)
    (layer.weight if learner == "layer" else x).requires_grad_()
    module.linear(layer, x).sum().backward()
    assert not calls
    with torch.no_grad():
        module.linear(layer, x)
    assert calls


def test_an_int8_weight_is_off_by_half_a_scale_at_most(layer):
    layer.weight[3] = 0
    before = layer.weight.clone()
    [layer] = quantize(nn.Sequential(layer))
    error = (layer.weight * layer.scale[:, None] - before).abs()
    assert layer.weight.dtype == torch.int8
    assert (error <= layer.scale[:, None] * 0.501).all()
    assert (error[3] == 0).all()


@pytest.mark.parametrize("family", tiny.SIZES)
def test_every_linear_layer_is_int8_and_the_embedding_is_not(family):
    model = quantize(tiny.native(family))
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert model.layers[0].attn.q_proj.weight.dtype == torch.int8
    assert model.dtype == torch.float32
    assert model.head.weight is not model.embed.weight


def test_int8_weights_count_as_one_byte_each():
    original = tiny.native(num_hidden_layers=1, tie_word_embeddings=True)
    light = quantize(copy.deepcopy(original))
    saved = sum(3 * m.weight.numel() for m in light.modules() if isinstance(m, Int8Linear))
    before, after = (weight_bytes(m, m.head) for m in (original, light))
    assert after == before - saved


@pytest.mark.parametrize("family", tiny.SIZES)
def test_an_int8_model_gives_nearly_the_probabilities_of_the_original(family):
    original = tiny.native(family)
    for norm in (m for m in original.modules() if isinstance(m, Norm)):
        norm.weight -= 1  # it adds 1: others' attention is as sharp without it
    light = quantize(copy.deepcopy(original))
    x = tiny.tokens(2, 20)
    want, got = (m(x).log_softmax(-1).exp() for m in (original, light))
    assert (want - got).abs().sum(-1).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_compiled_int8_model_decodes_as_it_does_uncompiled(backend):
    model = quantize(tiny.native(num_hidden_layers=1))
    tokens = []
    for compile in (True, False):
        generator = Generator(model, 1, 24, compile, compile_prefill=False)
        steps = generator.stream([[5, 9, 33]], 20)
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
