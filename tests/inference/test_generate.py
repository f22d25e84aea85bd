import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import tiny
import torch
from repeats import but
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.testing import assert_close

from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference import generate, steps
from eigenzoo.zoo.inference.generate import Generator, answer, sample_text
from eigenzoo.zoo.inference.sampling import Sampling, choose
from eigenzoo.zoo.measure.shapes import random_model
from eigenzoo.zoo.models.llama import LlamaConfig

PROMPTS = [[5, 9, 33, 7, 120], [8, 41], [99, 3, 17, 200, 12, 77, 64, 5, 31]]


def close(got, want):
    # two orders of fp32 sums: mask columns or a matrix, parts or a whole prompt
    assert_close(got, want, atol=2e-5, rtol=1e-4)


WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
GEMMA = {"sliding_window_pattern": 2, "final_logit_softcapping": 3.0}
LOW = {  # family, changes, settings of the compression
    "lifted": ("llama", {"attention_bias": True}, {"heads_per_latent": (4, 4)}),
    "folded": ("llama", {"attention_bias": True}, {"heads_per_latent": (1, 1)}),
    "windows": ("qwen2", WINDOWS, {"heads_per_latent": (2, 2)}),
    "two rotations": ("gemma3_text", GEMMA, {"heads_per_latent": (2, 2)}),
    "absorbed": ("opt", {}, {"heads_per_latent": (4, 1)}),
    "joint": ("opt", {}, {"heads_per_latent": (4, 4), "latent": "joint-kv"}),
    "alibi": ("mpt", {"attn_config": {"clip_qkv": 0.4}}, {"heads_per_latent": (2, 4)}),
}


def compiled_by(inductor: list[str], aot_eager: list[str]):
    """Parametrize a test by models and the backends that compile them.

    Windows alone are a repeat of those of "two rotations".
    """
    kinds = [(k, "inductor") for k in inductor] + [(k, "aot_eager") for k in aot_eager]
    kept = [kind for kind in kinds if kind[0] != "windows"]
    return pytest.mark.parametrize(("model", "backend"), but(kept, kinds), indirect=True)


@pytest.fixture(scope="module", params=["dense", *LOW])
def model(request):
    if request.param == "dense":
        return tiny.native(num_hidden_layers=2, attention_bias=True)
    name, _, alone = request.param.partition(", ")
    family, changes, settings = LOW[name]
    layers = "n_layers" if family == "mpt" else "num_hidden_layers"
    dense = tiny.native(family, **changes, **{layers: 1 if alone else 2})
    return compress(
        dense,
        tiny.tokens(8, 64),
        Settings(**{"keep": 0.6, "kv_bits": (16,), **settings, "rank_multiple": 2}),
    ).model


def recomputed(model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each computed from the whole text without a cache."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]), last=1).argmax()))
    return text[len(prompt) :]


def tokens_of(generator: Generator, prompts, count: int, **options) -> list[list[int]]:
    steps = list(generator.stream(prompts, count, **options))
    return torch.stack(steps, 1).tolist()


@pytest.mark.slow
@compiled_by([], ["dense", *(kind for kind in LOW if kind != "alibi")])  # alibi: below
def test_compiled_steps_equal_recomputing_and_compile_once(model, backend):
    generator = Generator(model, 1, 40)
    assert tokens_of(generator, PROMPTS[:1], 20) == [recomputed(model, PROMPTS[0], 20)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt in PROMPTS[1:]:
            assert tokens_of(generator, [prompt], 30) == [recomputed(model, prompt, 30)]


@pytest.mark.slow
@compiled_by(["alibi, one layer"], ["lifted"])
def test_a_compiled_batch_of_different_lengths_answers_each_as_alone(model, backend):
    generator = Generator(model, 3, 40)
    want = [recomputed(model, p, 20) for p in PROMPTS]
    assert tokens_of(generator, PROMPTS, 20) == want
    with torch.compiler.set_stance("fail_on_recompile"):
        longer = [p + p for p in PROMPTS]
        assert tokens_of(generator, longer, 10) == [recomputed(model, p, 10) for p in longer]


def parts(generator: Generator, tokens: torch.Tensor, *ends: int) -> torch.Tensor:
    """Logits after a prompt that is processed in parts, as in a chat."""
    for start, end in pairwise((0, *ends)):
        logits = generator.advance(tokens[:, start:end].clone(), start)
    return logits


@pytest.mark.slow
@compiled_by([], ["lifted", "alibi", "windows", "two rotations"])
def test_later_parts_of_a_prompt_take_one_graph_of_any_length(model, backend):
    tokens = tiny.tokens(2, 40)
    generator, eager = Generator(model, 2, 41), Generator(model, 2, 41, compile=False)
    parts(generator, tokens, 9, 20)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = parts(generator, tokens, 11, 14, 40)
    close(got, parts(eager, tokens, 40))


@pytest.mark.parametrize("ends", [(20,), (9, 20)])
def test_a_prompt_may_fill_a_compiled_cache_to_its_last_slot(ends):
    torch._dynamo.reset()
    model, tokens = tiny.native(num_hidden_layers=2), tiny.tokens(1, 20)
    generator, eager = (Generator(model, 1, 20, compile=x) for x in (True, False))
    generator.prefill = torch.compile(steps.prefill, fullgraph=True, backend="aot_eager")
    close(parts(generator, tokens, *ends), parts(eager, tokens, 20))


def test_a_long_prompt_is_run_in_parts(model, monkeypatch):
    tokens, generator = tiny.tokens(2, 40), Generator(model, 2, 40, compile=False)
    want = generator.advance(tokens, 0)
    monkeypatch.setattr(generate, "PART", 13)
    close(generator.advance(tokens, 0), want)


@pytest.mark.parametrize("padding", [0, 15])
def test_parts_of_a_prompt_give_the_logits_of_the_whole(model, padding):
    tokens, generator = tiny.tokens(2, 40), Generator(model, 2, 50, compile=False)
    generator.valid[0, :padding] = False
    close(parts(generator, tokens, 9, 12, 13, 40), parts(generator, tokens, 40))


def test_layers_in_the_form_that_is_compiled_equal_recomputing(model):
    torch._dynamo.reset()
    generator = Generator(model, 3, 40, compile=False)
    generator.decode = torch.compile(steps.decode_by_layer, fullgraph=True, backend="eager")
    assert tokens_of(generator, PROMPTS, 9) == [recomputed(model, p, 9) for p in PROMPTS]


def test_one_graph_holds_every_kind_of_layer_once():
    ranks = (4, 6) * 3
    sizes = tiny.ROTARY | {"head_dim": 8, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, k_ranks=ranks, v_ranks=(5,) * 6)
    model = random_model(config, torch.float32, "cpu")
    torch._dynamo.reset()
    backend = EagerAndRecordGraphs()
    generator, eager = (Generator(model, 1, 40, compile=False) for _ in range(2))
    generator.decode = torch.compile(steps.decode_by_layer, fullgraph=True, backend=backend)
    assert tokens_of(generator, PROMPTS[:1], 9) == tokens_of(eager, PROMPTS[:1], 9)
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt in PROMPTS[1:]:
            assert tokens_of(generator, [prompt], 9) == tokens_of(eager, [prompt], 9)
    (graph,) = backend.graphs
    regions = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]
    assert len(regions) == 6
    assert len({n.args[0].target for n in regions}) == 2


def test_models_of_other_ranks_are_compiled_one_after_the_other(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    sizes = {"intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=320, hidden_size=64, num_key_value_heads=4, head_dim=8, **sizes)
    ranks = {"k_ranks": (24, 16, 24, 16), "v_ranks": (16, 24, 16, 24)}
    low = replace(config, **ranks, k_heads_per_latent=4, v_heads_per_latent=4)
    for one in (config, low, replace(low, anchor=4)):
        model = random_model(one, torch.float32, torch.device("cpu"))
        generator = Generator(model, 1, 40, compile_prefill=False)
        assert tokens_of(generator, PROMPTS[:1], 4) == [recomputed(model, PROMPTS[0], 4)]
    model = random_model(
        replace(config, num_hidden_layers=1, k_ranks=(), v_ranks=()),
        torch.float32,
        torch.device("cpu"),
    )
    for slots in range(41, 51):  # dynamo's default limit of recompilations is 8
        generator = Generator(model, 1, slots, compile_prefill=False)
        assert tokens_of(generator, PROMPTS[:1], 4) == [recomputed(model, PROMPTS[0], 4)]


def test_steps_without_a_compiler_equal_recomputing(model):
    generator = Generator(model, 3, 40, compile=False)
    assert tokens_of(generator, PROMPTS, 20) == [recomputed(model, p, 20) for p in PROMPTS]


def test_a_sequence_stops_at_its_end_token_and_the_batch_after_the_last(model):
    want = [recomputed(model, p, 20) for p in PROMPTS]
    stop = [want[0][3], want[1][6], want[2][2]]
    got = tokens_of(Generator(model, 3, 40, compile=False), PROMPTS, 20, stop=stop)
    firsts = [min(i for i, t in enumerate(row) if t in stop) for row in want]
    assert len(got[0]) == max(firsts) + 1
    for row, full, first in zip(got, want, firsts, strict=True):
        assert row == (full[: first + 1] + [full[first]] * 20)[: len(row)]


def test_an_answer_ends_with_its_end_token(model):
    want = [recomputed(model, p, 20) for p in PROMPTS]
    shown = []
    generator = Generator(model, 3, 40, compile=False)
    got = answer(generator, PROMPTS, 20, stop=[want[0][3]], show=shown.append)
    first = want[0].index(want[0][3])
    assert got.tokens[0] == want[0][: first + 1]
    assert len(shown) == max(map(len, got.tokens))


@pytest.mark.parametrize(
    ("prompts", "count"), [(PROMPTS[:2], 5), ([[1], [], [2]], 5), (PROMPTS, 33), (PROMPTS, 0)]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(model, prompts, count):
    generator = Generator(model, 3, 40, compile=False)
    with pytest.raises(ValueError, match=r"expected|do not fit"):
        next(generator.stream(prompts, count))
    assert not any(x.any() for x in generator.cache.keys)


def test_a_missing_compiler_raises_an_error_that_names_it(monkeypatch):
    def absent():
        raise steps.InvalidCxxCompiler

    monkeypatch.setattr(steps, "get_cpp_compiler", absent)
    with pytest.raises(ValueError, match="--no-compile"):
        Generator(tiny.native(), 1, 8)


def test_the_seed_determines_what_is_drawn():
    drawn = [
        sample_text(tiny.native(), start=4, samples=3, length=20, seed=seed).tolist()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(row[0] == 4 for row in drawn[0])


def counts(sampling: Sampling) -> list[int]:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    random = torch.Generator().manual_seed(0)
    return choose(logits, sampling, random).bincount(minlength=4).tolist()


def test_sampling_follows_the_distribution():
    assert counts(Sampling()) == [4000, 0, 0, 0]
    assert counts(Sampling(1.0)) == pytest.approx([1600, 1200, 800, 400], abs=120)
    assert counts(Sampling(1.0, top_k=2)) == pytest.approx([2286, 1714, 0, 0], abs=120)
    assert counts(Sampling(1.0, top_p=0.65)) == pytest.approx([2286, 1714, 0, 0], abs=120)
    assert counts(Sampling(1.0, top_p=0.75)) == pytest.approx([1778, 1333, 889, 0], abs=120)
    assert counts(Sampling(0.5)) == pytest.approx([2133, 1200, 533, 133], abs=120)


@pytest.mark.parametrize(
    "bad",
    [
        *(Sampling(x) for x in (-1, math.nan, math.inf)),
        *(Sampling(1, 0, x) for x in (0, 2, math.nan)),
        Sampling(1, -2),
    ],
)
def test_invalid_sampling_settings_are_refused(bad):
    with pytest.raises(ValueError, match="expected a finite temperature"):
        bad.check()


def test_a_prompt_with_a_token_that_the_model_does_not_know_is_refused():
    for token in (-1, 320):
        with pytest.raises(ValueError, match="it knows 320"):
            next(Generator(tiny.native(), 1, 8, compile=False).stream([[3, token]], 2))
