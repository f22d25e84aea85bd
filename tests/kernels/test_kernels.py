"""The ops as PyTorch and the models call them, here in C++ on the CPU. test_cpu_ops.py compares
them with the definitions; interpreted.py and test_aot.py test the Triton kernels.
"""

import os
import subprocess
import sys
from inspect import signature
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from torch.library import opcheck

from eigenzoo.kernels import layouts, ops, split
from eigenzoo.kernels.install import FUSED, install, register
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.models import attention
from eigenzoo.zoo.models.packing import Latent, Packed, pack

pytestmark = pytest.mark.slow  # the first test builds the ops, in half a minute
torch.manual_seed(0)
ROOT = Path(__file__).parents[2]
SPAN = torch.tensor([[3, 20], [0, 12]])
Q, K, V, BIAS = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 32, 8), torch.randn(2, 1, 32, 5), None
UP, MEAN = torch.randn(2, 8, 32), torch.randn(4, 1, 16)
ANGLES, AHEAD = torch.rand(2, 1, 32, 8), torch.rand(1, 1, 4, 8)
POSITION = (torch.arange(32) - torch.tensor([[3], [0]])).clamp(min=0).int()
CALLS = {  # op and arguments
    "latent": (ops.latent_decode, (Q[..., :8], K, V, SPAN, 0.3)),
    "alibi": (ops.latent_decode, (Q[..., :8], K, V, SPAN, 0.3, BIAS, torch.rand(4))),
    "lift heads": (ops.lift_heads, (torch.randn(2, 4, 3, 8), torch.randn(1, 8, 32), 16)),
    "linear": (ops.linear_decode, (torch.randn(2, 1, 8), torch.randn(20, 8), None, None)),
    "int8": (
        ops.linear_decode,
        (
            torch.randn(2, 1, 8),
            torch.ones(20, 8, dtype=torch.int8),
            torch.rand(20),
            torch.randn(20),
        ),
    ),
    "few tokens": (ops.latent_decode, (torch.randn(2, 4, 3, 8), K, V, SPAN, 0.3)),
    "anchored": (
        ops.anchored_decode,
        (Q, K, V, SPAN, 0.3, AHEAD.cos(), AHEAD.sin(), UP, MEAN, 8, torch.rand(2, 32)),
    ),
    "padded": (
        ops.anchored_decode,
        (Q, K, V, SPAN, 0.3, AHEAD.cos(), AHEAD.sin(), UP, MEAN, 8, torch.rand(2, 32), POSITION),
    ),
    "rotary": (
        ops.rotary_decode,
        (Q, K, V, SPAN, 0.3, ANGLES.cos(), ANGLES.sin(), UP, None, torch.rand(2, 32)),
    ),
}
call = pytest.mark.parametrize(("op", "arguments"), CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True, scope="module")
def _built():
    register("cpu")


def test_launchers_agree_with_the_definitions_under_the_interpreter(request):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted.py"]
    command += ["--runslow"] * request.config.getoption("--runslow")
    options = {"cwd": ROOT / "tests/kernels", "env": os.environ | {"TRITON_INTERPRET": "1"}}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@call
def test_ops_are_registered_as_torch_expects(op, arguments):
    opcheck(getattr(torch.ops.eigenzoo, op.__name__).default, arguments)


PACKED = [pack(K, Latent.of_layout("2:4x8+4x2")), pack(V[..., :4], Latent.of_layout("1:4x4"))]
LAYOUTS = [2, 4, 8, 4, 2], [1, 4, 4]
packed_call = pytest.mark.parametrize("name", ["latent", "padded", "rotary"])


@packed_call
def test_ops_of_packed_caches_are_registered_as_torch_expects(name):
    op, (q, _, v, *rest) = CALLS[name]
    registered = getattr(torch.ops.eigenzoo, op.__name__).default
    rest += [None] * (len(registered._schema.arguments) - 6 - len(rest))  # before the layouts
    k_rows, v_rows = (x.rows for x in PACKED)
    opcheck(registered, (q, k_rows, v_rows, *rest, *LAYOUTS))
    opcheck(registered, (q, k_rows, v, *rest, LAYOUTS[0]))


@packed_call
def test_ops_of_packed_caches_compile_in_one_graph_and_export(name):
    op, (q, _, _, *rest) = CALLS[name]
    compile_and_export(op, (q, *PACKED, *rest))


K_PAGES, V_PAGES = (x.unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 1) for x in (K, V))
TABLE = torch.tensor([[0, 1], [2, -1]]).int()  # the second sequence ends in its first page


@packed_call
def test_ops_of_caches_in_pages_are_registered_compile_and_export(name):
    op, (q, k, v, *rest) = CALLS[name]
    registered = getattr(torch.ops.eigenzoo, op.__name__).default
    opcheck(registered, (q, K_PAGES, V_PAGES, *rest), {"table": TABLE})
    rest += [None] * (len(signature(op).parameters) - 4 - len(rest))  # before the table
    compile_and_export(op, (q, K_PAGES, V_PAGES, *rest, TABLE))
    got = op(q, K_PAGES, V_PAGES, *rest, table=TABLE)
    torch.testing.assert_close(got, op(q, k, v, *rest))


@call
def test_ops_compile_in_one_graph_and_export(op, arguments):
    compile_and_export(op, arguments)


@pytest.mark.parametrize("width", [8, 13])
def test_packing_is_registered_as_torch_expects_and_compiles(width):
    torch._dynamo.reset()
    layout, x = [3, width, 8, 8, 3], torch.randn(2, 3, 4, width + 8)
    opcheck(torch.ops.eigenzoo.pack.default, (x, layout))
    latent = Latent.of_layout(f"3:{width}x8+8x3")
    packing = torch.compile(ops.pack, fullgraph=True, backend="aot_eager")
    packed = pack(x, latent)
    assert torch.equal(packing(x, latent).rows, packed.rows)
    opcheck(torch.ops.eigenzoo.unpack.default, (packed.rows, layout, torch.bfloat16))
    unpacking = torch.compile(ops.unpack, fullgraph=True, backend="aot_eager")
    assert torch.equal(unpacking(packed, torch.float16), packed.unpack(torch.float16))


def compile_and_export(op, arguments) -> None:
    """Both give what a call gives."""
    torch._dynamo.reset()
    layouts = [x.layout if isinstance(x, Packed) else None for x in arguments]
    tensors = [x.rows if isinstance(x, Packed) else x for x in arguments]

    class Twice(torch.nn.Module):
        def forward(self, q, *rest):
            given = (
                x if layout is None else Packed(x, layout)
                for x, layout in zip(rest, layouts[1:], strict=True)
            )
            return op(2 * q, *given) + 1

    want = Twice()(*tensors)
    compiled = torch.compile(Twice(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), want)
    exported = torch.export.export(Twice(), tuple(tensors))
    assert f"eigenzoo.{op.__name__}.default" in {str(n.target) for n in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(*tensors), want)


def test_ops_without_triton_need_torch_only():
    code = (
        "import sys; sys.modules['triton'] = None; from eigenzoo.kernels import install; "
        "install.register('cuda')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: on a GPU the fused ops need Triton" in done.stderr


WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
LOW = {  # family, changes, settings of the compression
    "anchored": ("llama", {}, {"keys": "anchored", "anchor_block": 3, "heads_per_latent": (4, 2)}),
    "rebuilt": ("llama", {}, {"keys": "rebuild", "heads_per_latent": (2, 1)}),
    "pairs": ("llama", {}, {"keys": "pairs", "heads_per_latent": (2, 2)}),
    "rotated": ("llama", {}, {"keys": "rotated"}),
    "full": ("llama", {}, {"keys": "full", "keep": 0.8}),
    "windows": ("qwen2", WINDOWS, {"keys": "rebuild", "heads_per_latent": (2, 2)}),
    "joint": ("opt", {}, {"heads_per_latent": (4, 4), "latent": "joint-kv"}),
    "alibi": ("mpt", {}, {"heads_per_latent": (2, 4)}),
}


def low(name: str, layers: int = 2):
    """A small compressed model."""
    family, changes, settings = LOW[name]
    changes = changes | {"n_layers" if family == "mpt" else "num_hidden_layers": layers}
    dense = tiny.native(family, **changes)
    return compress(
        dense,
        tiny.tokens(8, 64),
        Settings(**{"keep": 0.6, "kv_bits": (16,), **settings, "rank_multiple": 2}),
    ).model


@pytest.fixture
def used(monkeypatch):
    """Names of the ops that are called, in the order of calls."""
    names = []
    for definition, op in FUSED.items():

        def noted(*arguments, op=op):
            names.append(op.__name__)
            return op(*arguments)

        noted.__name__ = op.__name__
        monkeypatch.setitem(FUSED, definition, noted)
    return names


@pytest.mark.parametrize("name", LOW)
def test_an_installed_model_writes_the_same_text(name, used):
    prompts = [[5, 9, 33, 7, 120], [8, 41]]
    model = low(name)
    want = list(Generator(model, 2, 30, compile=False).stream(prompts, 20))
    assert install(install(model)) is model
    got = list(Generator(model, 2, 30, compile=False).stream(prompts, 20))
    assert torch.equal(torch.stack(got), torch.stack(want))
    kinds = dict.fromkeys(("anchored", "rotated"), "anchored_decode")
    kinds |= dict.fromkeys(("rebuilt", "windows"), "rotary_decode")
    assert set(used) == {kinds.get(name, "latent_decode")}
    assert len(used) == 2 * 19  # layers, and tokens after the first


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["anchored", "rotated"])
def test_an_installed_model_answers_padded_prompts_as_each_alone(name, bits):
    model = install(low(name))
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (5, 2, 9)]
    batch = Generator(model, 3, 40, compile=False, bits=bits).stream(prompts, 25)
    one = Generator(model, 1, 40, compile=False, bits=bits)
    alone = [torch.cat(list(one.stream([p], 25))) for p in prompts]
    assert torch.equal(torch.stack(list(batch), 1), torch.stack(alone))


def test_code_with_an_older_definition_gets_the_op_and_with_another_keeps_it(monkeypatch):
    attention_class = type(low("anchored").layers[0].attn)

    def older(q, z, v, span, scale, cos, sin, up, mean, block, bias=None): ...

    def other(q, z, v, span, scale, cos, sin, up, mean, bias=None): ...

    for definition, is_kept in ((older, False), (other, True)):
        monkeypatch.setattr(attention_class, "anchored_decode", staticmethod(definition))
        attn = install(low("anchored")).layers[0].attn
        assert (attn.anchored_decode is definition) == is_kept
        assert attn.rotary_decode is not attention_class.rotary_decode


def test_an_installed_model_keeps_its_weights_and_other_models_their_attention():
    model, other = low("alibi"), low("alibi")
    names = list(model.state_dict())
    install(model)
    assert list(model.state_dict()) == names
    assert other.layers[0].attn.latent_decode is attention.latent_decode


def test_a_model_in_float64_decodes_by_the_definitions():
    model, x, pos = install(low("anchored")), tiny.tokens(2, 1), torch.zeros(1, dtype=torch.long)
    want = model(x, pos, model.new_cache(2, 4))
    with pytest.raises(ValueError, match="no fused ops for float64"):
        install(model.double())
    assert not any("decode" in name for m in model.modules() for name in vars(m))
    got = model(x, pos, model.new_cache(2, 4))
    torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LOW)
def test_a_growing_text_compiles_one_step(name):
    torch._dynamo.reset()
    model, x = install(low(name)), tiny.tokens(2, 30)
    cache = model.new_cache(2, 30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :4] = False
    want = model(x, valid=valid)
    model(x[:, :9], torch.arange(9), cache, valid)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for stance, slots in (("default", range(9, 10)), ("fail_on_recompile", range(10, 30))):
        with torch.compiler.set_stance(stance):
            for t in slots:
                got = step(x[:, [t]], torch.tensor([t]), cache, valid)
                torch.testing.assert_close(got[:, 0], want[:, t], atol=1e-4, rtol=0)


def test_inductor_keeps_the_ops_in_one_graph():
    torch._dynamo.reset()
    model, prompts = install(low("anchored", layers=1)), [[5, 9, 33, 7, 120], [8, 41]]
    want = list(Generator(model, 2, 30, compile=False).stream(prompts, 20))
    got = list(Generator(model, 2, 30, compile_prefill=False).stream(prompts, 20))
    assert torch.equal(torch.stack(got), torch.stack(want))


def test_a_device_without_fused_ops_is_refused():
    with pytest.raises(ValueError, match="no fused ops for mps"):
        register("mps")


def test_splits_fill_a_gpu_and_chunks_cover_every_width():
    for width in range(1, 1200):
        parts = layouts.powers(width)
        assert width <= sum(parts) < max(2 * width, 17)
        assert all(p & (p - 1) == 0 and p >= 16 for p in parts)
        assert all(a > b for a, b in pairwise(parts))
    assert split.splits_of(1, 1 << 20, 64) == 128
    assert split.splits_of(32, 8192, 64) == 16
    assert split.splits_of(1024, 8192, 64) == 1
    assert split.splits_of(1, 100, 64) == 1
