import pytest
import tiny
import torch
from test_rope import rope_parameters

from eigenzoo.zoo.checkpoint import load
from eigenzoo.zoo.families import new_model
from eigenzoo.zoo.llama import LlamaConfig

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
VARIANTS = {
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "linear": {"rope_parameters": rope_parameters("linear"), "head_dim": 16},
    "llama3": {"rope_parameters": rope_parameters("llama3"), "head_dim": 16},
    "yarn": {"rope_parameters": rope_parameters("yarn-mscale"), "head_dim": 16},
    "longrope": {"rope_parameters": rope_parameters("longrope"), "head_dim": 16},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """transformers' Llama and ours, loaded from the same folder."""
    folder = tmp_path_factory.mktemp("llama")
    theirs = tiny.save(folder, **VARIANTS[request.param])
    return theirs, load(str(folder)).model


def tokens(length: int) -> torch.Tensor:
    return tiny.tokens(2, length)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 40, 100])
def test_prompt_equals_transformers(pair, length):
    theirs, ours = pair
    x = tokens(length)
    close(ours(x), theirs(x).logits)


def test_token_by_token_equals_transformers(pair):
    theirs, ours = pair
    x, cache = tokens(30), ours.new_cache(2, 32)
    steps = [ours(x[:, [t]], torch.tensor([t]), cache) for t in range(30)]
    close(torch.cat(steps, 1), theirs(x).logits)


def test_chunked_prompt_equals_transformers(pair):
    theirs, ours = pair
    x, cache = tokens(40), ours.new_cache(2, 50)
    chunks = [ours(x[:, p], p, cache) for p in torch.arange(40).split([13, 1, 26])]
    close(torch.cat(chunks, 1), theirs(x).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_transformers(pair, side):
    theirs, ours = pair
    x, mask = tokens(20), torch.ones(2, 20, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(13, 20)] = 0
    want, real = theirs(x, attention_mask=mask).logits, mask.bool()
    close(ours(x, valid=real)[real], want[real])
    cache, valid = ours.new_cache(2, 24), torch.nn.functional.pad(real, (0, 4), value=True)
    close(ours(x, torch.arange(20), cache, valid)[real], want[real])


def test_padded_batch_decodes_as_transformers(pair):
    theirs, ours = pair
    x, valid = tokens(24), torch.ones(2, 24, dtype=torch.bool)
    valid[0, :7] = False
    cache = ours.new_cache(2, 24)
    ours(x[:, :20], torch.arange(20), cache, valid)
    steps = [ours(x[:, [t]], torch.tensor([t]), cache, valid) for t in range(20, 24)]
    want = theirs(x, attention_mask=valid.long()).logits[:, 20:]
    close(torch.cat(steps, 1), want)


def test_last_returns_the_last_logits(pair):
    _, ours = pair
    close(ours(tokens(9), last=2), ours(tokens(9))[:, -2:])


def test_a_cache_serves_the_next_prompt_as_it_is(pair):
    _, ours = pair
    cache = ours.new_cache(2, 30)
    where = [x.data_ptr() for x in cache.keys + cache.values]
    ours(tokens(30), torch.arange(30), cache)
    second = tokens(30).flip(1)[:, :11]
    close(ours(second, torch.arange(11), cache), ours(second))
    assert where == [x.data_ptr() for x in cache.keys + cache.values]


def test_writing_past_the_end_raises_before_anything_is_overwritten(pair):
    _, ours = pair
    cache = ours.new_cache(2, 8)
    ours(tokens(8), torch.arange(8), cache)
    before = [x.clone() for x in cache.keys + cache.values]
    with pytest.raises(ValueError, match="do not fit a cache of 8"):
        ours(tokens(3).flip(1), torch.arange(6, 9), cache)
    assert all(map(torch.equal, before, cache.keys + cache.values))


def test_casting_the_model_does_not_round_its_angles(pair):
    _, ours = pair
    assert new_model(ours.config).to(torch.bfloat16).inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {"k_ranks": (8, 8)},
        {"k_ranks": (8, 9, 8)},
        {"v_ranks": (0, 1, 1)},
        {"k_heads_per_latent": 3},
    ],
)
def test_ranks_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        LlamaConfig(**SIZES, **change)
