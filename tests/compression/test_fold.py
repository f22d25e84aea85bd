import copy
from itertools import product

import pytest
import tiny
import torch
from observe import made
from repeats import but

from eigenzoo.zoo.compression.allocate import Ranks, greedy
from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.fold import fold
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.moments import Moments
from eigenzoo.zoo.models.model import Model

MODELS = {
    "llama": lambda: tiny.native(),
    "llama biases": lambda: tiny.native(attention_bias=True),
    "qwen2": lambda: tiny.native(
        "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: tiny.native("qwen3", attention_bias=True),
    "gemma3": lambda: tiny.native("gemma3_text", head_dim=8),
    "opt": lambda: tiny.native("opt"),
    "opt 350m": lambda: tiny.native("opt", do_layer_norm_before=False, word_embed_proj_dim=32),
    "mpt": lambda: tiny.native("mpt"),
    "mpt grouped": lambda: tiny.FoundryMPT(
        {"attn_type": "grouped_query_attention", "kv_n_heads": 4}, no_bias=False
    ).native(),
    "mpt clip": lambda: tiny.FoundryMPT({"clip_qkv": 0.4, "qk_ln": True}, no_bias=False).native(),
}
ABSORBED = [name for name in MODELS if name.startswith(("opt", "mpt"))]
METHOD_AND_SHARES = [
    ("eigen", (1, 1)),
    ("kq-svd", (2, 1)),
    ("clover", (1, 2)),
    *((m, (4, 4)) for m in ("pca", "palu", "lorc")),
    *((m, shared) for m in ("fisher", "attention") for shared in ((1, 1), (4, 1), (2, 4), (4, 4))),
]


def solved(model: Model, method: str, shared: tuple[int, int] = (1, 1), joint: bool = False):
    """Bases of a method, from the model's statistics on random tokens."""
    needs = METHODS[method]
    x = tiny.tokens(8, 64)
    statistics = calibrate(model, x, shared, needs.gradients, needs.queries, joint)
    return needs.bases(model, statistics)


def folded(model: Model, method: str, shared: tuple[int, int], k: int, v: int) -> Model:
    """`model` at ranks k and v in the middle layer, odd ones around it."""
    bases = solved(model, method, shared)
    return fold(model, bases, Ranks((k, k - 1, k), (v, v, v - 1)))


def decoded(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Logits of x, read in chunks and then token by token through a cache with spare slots."""
    cache = model.new_cache(len(x), x.size(1) + 5)
    parts = torch.arange(x.size(1)).split([9, 3, *[1] * (x.size(1) - 12)])
    return torch.cat([model(x[:, p], p, cache) for p in parts], 1)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "shared"), METHOD_AND_SHARES)
def test_decoding_equals_recomputing(method, shared, name):
    low = folded(MODELS[name](), method, shared, 5 * shared[0], 6 * shared[1])
    x = tiny.tokens(2, 25)
    close(decoded(low, x), low(x))


@pytest.mark.parametrize("rank", [5, 20, 60])
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("name", ["opt", "opt 350m", "mpt", "mpt grouped"])
def test_decoding_equals_recomputing_where_one_latent_holds_both(name, shared, rank):
    model = MODELS[name]()
    rank = min(rank, 16 * shared - 1)
    bases = solved(model, "fisher", (shared, shared), joint=True)
    low = fold(model, bases, Ranks((rank,) * 3, (0,) * 3))
    x = tiny.tokens(2, 25)
    close(decoded(low, x), low(x))
    latents = model.config.num_key_value_heads // shared
    assert low.new_cache(1, 1).nbytes == 3 * latents * rank * 4


@pytest.mark.parametrize("method", ["fisher", "attention"])
@pytest.mark.parametrize("name", ["opt", "mpt"])
def test_half_the_bytes_lose_nothing_where_one_latent_holds_all_heads(name, method):
    # 8 heads of 8 keys and 8 values are made from 64 numbers, so a latent of 64 holds them all
    model = MODELS[name]()
    bases = solved(model, method, (8, 8), joint=True)
    ranks = greedy(model.config, bases, 0.9, multiple=8)
    assert ranks == Ranks((64,) * 3, (0,) * 3)  # the values need no latent of their own
    low, x = fold(model, bases, ranks), tiny.tokens(2, 25)
    close(low(x), model(x))
    assert 2 * low.config.kv_width == model.config.kv_width


@pytest.mark.parametrize("name", ABSORBED)
@pytest.mark.parametrize("shared", [(1, 1), (2, 4)])
def test_no_key_is_rebuilt(name, shared):
    """Of the tensors of a decoding step, only rows of scores and masks are as long as the cache."""
    model, slots = MODELS[name](), 37
    low = folded(model, "fisher", shared, 5 * shared[0], 6 * shared[1])
    longest = max(shape.numel() for shape in made(low, slots) if slots in shape)
    assert longest == slots * model.config.num_attention_heads


@pytest.mark.parametrize(
    ("method", "name"),
    but(
        [*product(["fisher"], MODELS), *product(METHODS, ["llama biases", "mpt grouped"])],
        product(METHODS, MODELS),
    ),
)
def test_full_rank_is_the_dense_model(method, name):
    model = MODELS[name]()
    low = fold(model, solved(model, method), Ranks((8,) * 3, (8,) * 3))
    x = tiny.tokens(2, 30)
    close(low(x), model(x))
    assert low.new_cache(1, 9).nbytes == model.new_cache(1, 9).nbytes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["fisher", "attention"])
def test_a_latent_as_wide_as_the_layer_loses_nothing(method, bias):
    # 4 heads of 32 keys and values are made from 64 numbers, so a latent of 64 holds them
    model = tiny.native(head_dim=32, attention_bias=bias)
    needs = METHODS[method]
    x = tiny.tokens(8, 64)
    bases = needs.bases(model, calibrate(model, x, (4, 4), needs.gradients, needs.queries))
    low = fold(model, bases, Ranks((64,) * 3, (64,) * 3))
    assert all(layer.attn.k_up is not None and layer.attn.v_up is not None for layer in low.layers)
    torch.testing.assert_close(low(x[:2]), model(x[:2]), atol=1e-4, rtol=0)


BIASED = ["llama biases", "qwen2", "opt", "opt 350m", "mpt grouped"]


@pytest.mark.parametrize("name", BIASED)
def test_value_bias_folds_into_the_output_bias_exactly(name):
    model = MODELS[name]()
    heads = model.config.num_key_value_heads
    width = heads * model.config.head_dim
    low = fold(model, solved(model, "fisher", (heads, heads)), Ranks((width,) * 3, (width,) * 3))
    assert all(layer.attn.v_proj.bias is None for layer in low.layers)
    close(low(tiny.tokens(2, 30)), model(tiny.tokens(2, 30)))


@pytest.mark.parametrize("name", BIASED)
def test_a_constant_in_the_values_costs_nothing_at_any_rank(name):
    def attention_outputs(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first layer, dense and at rank 12, with `shift` added to every value."""
        model, x = MODELS[name](), tiny.tokens(4, 64)
        model.layers[0].attn.v_proj.bias += shift
        low = fold(model, solved(model, "attention", (4, 4)), Ranks((32,) * 3, (12,) * 3))
        seen, pos, attn_metadata = model.begin(x)
        seen = model.layers[0].attn_norm(seen)
        return tuple(m.layers[0].attn(seen, pos, attn_metadata, None) for m in (model, low))

    dense, low = attention_outputs(0.0)
    shifted_dense, shifted_low = attention_outputs(7.0)
    assert (low - dense).abs().max() > 1e-2
    torch.testing.assert_close(shifted_low - shifted_dense, low - dense, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["llama biases", "opt", "mpt grouped"])
def test_centering_is_better_if_means_are_not_zero(name):
    model, x = MODELS[name](), tiny.tokens(8, 64)
    for layer in model.layers:
        layer.attn.v_proj.bias *= 3
        layer.attn.k_proj.bias *= 3
    ranks, want = Ranks((12,) * 3, (12,) * 3), model(x)
    needs = METHODS["fisher"]
    centered = calibrate(model, x, (4, 4), True)
    uncentered = [
        s._replace(k_weighted=without_mean(s.k_weighted), v_weighted=without_mean(s.v_weighted))
        for s in centered
    ]
    error = [
        (fold(model, needs.bases(model, s), ranks)(x) - want).square().mean()
        for s in (centered, uncentered)
    ]
    assert error[0] < error[1]


def without_mean(moments: Moments) -> Moments:
    """The same moments as if the mean were zero."""
    other = copy.copy(moments)
    other.gram = moments.second * moments.count[:, None, None]
    other.origin = other.sum = torch.zeros_like(moments.sum)
    return other


@pytest.mark.parametrize("name", ["opt", "mpt grouped"])
def test_key_bias_is_dropped_and_changes_nothing_at_any_rank(name):
    def outputs(shift: float) -> torch.Tensor:
        model = MODELS[name]()
        for layer in model.layers:
            layer.attn.k_proj.bias += shift * torch.arange(len(layer.attn.k_proj.bias))
        low = folded(model, "attention", (4, 4), 12, 12)
        assert all(layer.attn.k_proj.bias is None for layer in low.layers)
        return low(tiny.tokens(2, 30))

    close(outputs(0.0), outputs(0.5))


@pytest.mark.parametrize("name", ["llama biases", "opt", "mpt"])
@pytest.mark.parametrize("shared", [(1, 1), (4, 4)])
def test_bfloat16_stays_near_float32(name, shared):
    low = folded(MODELS[name](), "fisher", shared, 5 * shared[0], 6 * shared[1])
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


SEGMENTED = {  # joint latents, keys turned within blocks, rebuilt ones, clipped projections
    **{name: (name, False, 1) for name in MODELS},
    "llama anchored": ("llama biases", False, 16),
    "opt joint": ("opt", True, 1),
    "mpt joint": ("mpt", True, 1),
}


@pytest.mark.parametrize("way", SEGMENTED)
def test_centered_latents_have_no_mean_and_the_model_computes_the_same(way):
    name, joint, anchor = SEGMENTED[way]
    model, x = MODELS[name](), tiny.tokens(8, 64)
    for p in model.parameters():  # biases that a mean shows
        p.data += 0.1 * (p.dim() == 1)
    shared = min(4, model.config.num_key_value_heads)
    statistics = calibrate(model, x, (shared, shared), queries=True, joint=joint, anchor=anchor)
    bases = METHODS["attention"].bases(model, statistics)  # fisher weights tokens, and so means
    texts = ("16x8+8x4", "12x4+12x2", "16x3+8x2")
    ranks = Ranks((24,) * 3, ((0,) if joint else (24,)) * 3)
    few = ranks._replace(k_segments=texts, v_segments=("",) * 3 if joint else texts)
    low, whole = fold(model, bases, few, anchor), fold(model, bases, ranks, anchor)
    assert low.config.centered
    close(low(x[:2]), whole(x[:2]))
    seen = [[], []]
    attn = low.layers[0].attn  # what it reads is not compressed

    def watch(k, v, pos, cache):
        for parts, latents in zip(seen, (k, v), strict=True):
            parts.append(latents)
        return type(attn).remember(attn, k, v, pos, cache)

    attn.remember = watch
    for row in x:
        low(row[None])
    for parts, shift in zip(seen, (attn.k_shift, attn.v_shift), strict=True):
        if shift is not None:
            latents = torch.cat(parts, 2) + shift
            spread = latents.std(2, keepdim=True)
            assert (latents.mean((0, 2), keepdim=True).abs() < 1e-3 * spread).all()
