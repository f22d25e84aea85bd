import pytest
import tiny
import torch

from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.models.llama import LlamaConfig


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (3, 3), (4, 4), (5, 1), (8, 4), (32, 4)])
def test_up_to_four_heads_share_a_latent_unless_told(heads, shared):
    sizes = (
        tiny.ROTARY | {"head_dim": 8} | {"num_attention_heads": heads, "num_key_value_heads": heads}
    )
    config = LlamaConfig(**sizes)
    assert Settings(keep=0.6, kv_bits=(16,)).fit(config).heads_per_latent == (shared, shared)
    assert Settings("eigen", keep=0.6, kv_bits=(16,)).fit(config).heads_per_latent == (1, 1)


def test_heads_that_share_a_latent_are_as_published_unless_told():
    config = LlamaConfig(
        **tiny.ROTARY | {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    )
    defaults = {
        m: Settings(m, keep=0.6, kv_bits=(16,)).fit(config).heads_per_latent
        for m in METHODS
        if m != "kv-heads"
    }
    assert defaults.pop("lorc") == (8, 8)
    assert {defaults.pop(name) for name in ("eigen", "kq-svd", "clover")} == {(1, 1)}
    assert set(defaults.values()) == {(4, 4)}
    assert Settings("lorc", keep=0.6, heads_per_latent=(2, 1), kv_bits=(16,)).fit(
        config
    ).heads_per_latent == (2, 1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "kv-heads"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_every_method_meets_the_bytes_asked_for(method, keep):
    dense, x = tiny.native(head_dim=16), tiny.tokens(4, 64)
    low = compress(dense, x, Settings(method, keep, kv_bits=(16,))).model
    kept = low.new_cache(1, 7).nbytes / dense.new_cache(1, 7).nbytes
    assert keep - 0.1 < kept <= keep


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("eigen", "kv-heads")])
def test_every_method_with_one_budget_takes_few_pairs_of_ranks(method):
    dense, x = tiny.native(head_dim=16), tiny.tokens(4, 64)
    for count in (1, 2):
        settings = Settings(method, 0.5, rank_multiple=2, rank_pairs=count, kv_bits=(16,))
        config = compress(dense, x, settings).model.config
        assert len(set(zip(config.k_ranks, config.v_ranks, strict=True))) <= count
        assert config.kv_width <= 0.5 * config.dense_kv_width


def test_eigen_refuses_few_pairs_of_ranks():
    with pytest.raises(ValueError, match="eigen finds the ranks of every layer by itself"):
        Settings("eigen", keep=0.6, rank_pairs=2, kv_bits=(16,)).check()


@pytest.mark.parametrize("family", ["llama", "opt", "mpt"])
@pytest.mark.parametrize("merged", [2, 4])
def test_kv_heads_makes_one_head_of_a_group(family, merged):
    dense, x = tiny.native(family), tiny.tokens(4, 64)
    heads = dense.config.num_key_value_heads // merged
    low = compress(dense, x, Settings("kv-heads", 1 / merged, kv_bits=(16,))).model
    assert all(k.shape[1:] == (heads, 7, 8) for k in low.new_cache(1, 7).keys)
    assert low.config.kv_width * merged == dense.config.kv_width
    if family != "llama":  # the result is ordinary grouped-query attention
        assert not any(x.attn.k_up is not None or x.attn.v_up is not None for x in low.layers)
    cache, y = low.new_cache(2, 20), tiny.tokens(2, 20)
    steps = [low(y[:, p], p, cache) for p in torch.arange(20).split([11, *[1] * 9])]
    torch.testing.assert_close(torch.cat(steps, 1), low(y), atol=1e-4, rtol=0)


def test_merging_a_part_of_a_head_is_refused():
    config = tiny.native().config
    with pytest.raises(ValueError, match=r"whole heads, of 4 here; expected one of 0.5, 0.25"):
        Settings("kv-heads", 0.6, kv_bits=(16,)).fit(config)


def test_kv_heads_may_be_anchored():
    dense, x = tiny.native(head_dim=16), tiny.tokens(4, 64)
    settings = Settings("kv-heads", 0.5, keys="anchored", anchor_block=8, kv_bits=(16,))
    low, y = compress(dense, x, settings).model, tiny.tokens(2, 20)
    assert low.config.anchor == 8
    cache = low.new_cache(2, 20)
    steps = [low(y[:, p], p, cache) for p in torch.arange(20).split([11, *[1] * 9])]
    torch.testing.assert_close(torch.cat(steps, 1), low(y), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["eigen", "palu", "lorc", "clover"])
def test_methods_that_rebuild_their_keys_are_not_anchored(method):
    with pytest.raises(ValueError, match=f"{method} rebuilds its keys: .* kv-heads or kq-svd"):
        Settings(method, keep=0.6, keys="anchored", kv_bits=(16,)).check()


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].joint])
def test_methods_without_joint_latents_say_so(method):
    with pytest.raises(ValueError, match=r"no joint latents: choose fisher"):
        Settings(method, keep=0.6, latent="joint-kv", kv_bits=(16,)).check()


@pytest.mark.parametrize("method", ["lorc", "clover"])
def test_methods_of_weights_run_no_model_and_read_no_tokens(method):
    def refuse(module, args):
        raise AssertionError("the model was run")

    dense = tiny.native()
    dense.layers[0].attn.q_proj.register_forward_pre_hook(refuse)
    one, two = (
        compress(
            dense, tiny.tokens(4, 64, seed), Settings(method, 0.6, rank_multiple=4, kv_bits=(16,))
        ).model.state_dict()
        for seed in (1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_tokens_give_the_same_model():
    x = tiny.tokens(4, 64)
    one, two = (compress(tiny.native(), x).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_dense_model_is_left_as_it_was():
    dense, x = tiny.native(attention_bias=True), tiny.tokens(4, 64)
    before = {name: w.clone() for name, w in dense.state_dict().items()}
    compress(dense, x)
    assert all(torch.equal(w, before[name]) for name, w in dense.state_dict().items())


def test_uniform_ranks_are_the_same_in_every_layer():
    dense, x = tiny.native(head_dim=16), tiny.tokens(8, 64)
    even, free = (
        compress(
            dense, x, Settings(keep=0.5, rank_multiple=4, budget=b, kv_bits=(16,))
        ).model.config
        for b in ("uniform", "global")
    )
    ranks = even.k_ranks + even.v_ranks
    assert max(ranks) - min(ranks) <= 4  # the last multiple does not suffice for all layers
    assert (free.k_ranks, free.v_ranks) != (even.k_ranks, even.v_ranks)
    assert even.kv_width <= 0.5 * dense.config.kv_width


def test_damping_changes_the_basis_of_fisher_and_is_refused_elsewhere():
    dense, x = tiny.native(), tiny.tokens(8, 64)
    a, b = (
        compress(dense, x, Settings(keep=0.5, damping=d, kv_bits=(16,))).bases[0].v
        for d in (None, 3.0)
    )
    assert not torch.allclose(a.encoder, b.encoder)
    with pytest.raises(ValueError, match=r"damping is 0\.1: expected more than 0, and fisher"):
        Settings("pca", keep=0.6, damping=0.1, kv_bits=(16,)).check()


@pytest.mark.parametrize("method", ["eigen", "kv-heads", "palu", "lorc", "clover"])
def test_uniform_ranks_are_refused_where_a_method_has_its_own_rule(method):
    with pytest.raises(ValueError, match="uniform ranks go with"):
        Settings(method, keep=0.5, budget="uniform", kv_bits=(16,)).check()
