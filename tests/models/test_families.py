"""Every variant of every family, compared with transformers on the same checkpoint."""

import pytest
import tiny
import torch
from ropes import rope_parameters
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from variants import FOUNDRY, VARIANTS, save

from eigenzoo.zoo.inference.checkpoint import load, native_config
from eigenzoo.zoo.inference.weights import build
from eigenzoo.zoo.models.families import new_model
from eigenzoo.zoo.models.llama import LlamaConfig


@pytest.fixture(scope="module", params=[*VARIANTS, *FOUNDRY])
def pair(request, tmp_path_factory):
    """transformers' model and ours, loaded from the same folder."""
    folder = tmp_path_factory.mktemp("model")
    theirs = save(request.param, folder)
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


@pytest.mark.parametrize("variant", ["llama dynamic", "llama longrope"])
def test_a_text_grows_as_in_transformers_past_the_length_where_angles_change(variant, tmp_path):
    theirs = save(variant, tmp_path)
    ours, x = load(str(tmp_path)).model, tokens(80)
    cache, held = ours.new_cache(2, 80), DynamicCache()
    parts = torch.arange(80).split([60, *[1] * 20])
    got = [ours(x[:, p], p, cache) for p in parts]
    close(
        torch.cat(got, 1),
        torch.cat([theirs(x[:, p], past_key_values=held).logits for p in parts], 1),
    )


def test_last_returns_the_last_logits(pair):
    _, ours = pair
    close(ours(tokens(9), last=2), ours(tokens(9))[:, -2:])


def test_a_cache_serves_the_next_prompt_as_it_is(pair):
    _, ours = pair
    cache = ours.new_cache(2, 30)
    addresses = [x.data_ptr() for x in cache.keys + cache.values]
    ours(tokens(30), torch.arange(30), cache)
    second = tokens(30).flip(1)[:, :11]
    close(ours(second, torch.arange(11), cache), ours(second))
    assert addresses == [x.data_ptr() for x in cache.keys + cache.values]


def test_writing_past_the_end_raises_before_anything_is_overwritten(pair):
    _, ours = pair
    cache = ours.new_cache(2, 8)
    ours(tokens(8), torch.arange(8), cache)
    before = [x.clone() for x in cache.keys + cache.values]
    with pytest.raises(ValueError, match="do not fit a cache of 8"):
        ours(tokens(3).flip(1), torch.arange(6, 9), cache)
    assert all(map(torch.equal, before, cache.keys + cache.values))


def test_casting_the_model_does_not_round_its_angles():
    model = new_model(tiny.native().config)
    assert model.to(torch.bfloat16).inv_freq.dtype == torch.float32


def test_a_gemma_of_old_fields_is_that_of_new_ones():
    old = {"rope_theta": 5000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 2}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    rope = gemma_ropes("linear", "default")["rope_parameters"]
    rope["sliding_attention"]["rope_theta"] = 100.0
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"model_type": "gemma3_text", **tiny.SIZES["gemma3_text"]}
    config = native_config(sizes | old)
    assert config == native_config(sizes | {"rope_parameters": rope, "layer_types": kinds})
    assert (config.windows, config.rope_local_base_freq) == ((7, 0, 7), 100.0)
    assert config.rope_parameters == rope_parameters("linear")
    with pytest.raises(
        ValueError, match="has a factor but no rope_type"
    ):  # transformers ignores it
        native_config(sizes | old | {"rope_scaling": {"type": "linear", "factor": 4.0}})


def test_a_gemma_in_bfloat16_rounds_as_transformers_does():
    theirs = tiny.hf(
        "gemma3_text", hidden_size=96, head_dim=16
    ).bfloat16()  # a root that is rounded
    ours = build(native_config(theirs.config.to_dict()), theirs.state_dict().items())
    x = tokens(20)
    assert torch.equal(ours.embed(x), theirs.get_input_embeddings()(x))
    y = ours.embed(x)
    assert torch.equal(ours.layers[0].attn_norm(y), theirs.model.layers[0].input_layernorm(y))


def test_a_gemma_that_reads_images_is_refused_by_name():
    raw = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    with pytest.raises(ValueError, match=r"'gemma3' is not .*; save its text part, a gemma3_text"):
        native_config(raw)


@pytest.mark.parametrize("variant", ["opt 125m", "foundry learned positions"])
def test_positions_that_were_not_learned_are_refused(variant, tmp_path):
    save(variant, tmp_path)
    model = load(str(tmp_path)).model
    with pytest.raises(ValueError, match="has 256 learned positions, given 257"):
        model(tokens(257))
    with pytest.raises(ValueError, match="has 256 learned positions, given 300"):
        model.new_cache(1, 300)


@pytest.mark.parametrize(
    "ignored",
    [
        {"attn_config": {"alibi_bias_max": 4}},
        {"attn_config": {"alibi": False}},
        {"attn_config": {"qk_ln": True}},
        {"attn_config": {"attn_type": "multiquery_attention"}},
        {"attn_config": {"kv_n_heads": 2}},
        {"no_bias": False},
        {"expansion_ratio": 2},
        {"logit_scale": 0.5},
        {"norm_type": "low_precision_rmsnorm"},
    ],
    ids=str,
)
def test_transformers_ignores_what_llm_foundry_means(ignored):
    # so the reference for MPTs with these fields is FoundryMPT, not transformers alone
    x = tokens(20)
    default, changed = tiny.hf("mpt"), tiny.hf("mpt", **ignored)
    assert torch.equal(default(x).logits, changed(x).logits)


def gemma_ropes(whole: str, local: str) -> dict:
    """The rotations of a Gemma 3 by their types."""
    ropes = {"full_attention": whole, "sliding_attention": local}
    return {"rope_parameters": {kind: rope_parameters(name) for kind, name in ropes.items()}}


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("opt", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu'"),
        ("opt", {"hidden_size": 60}, "hidden_size is 60: expected a multiple"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9: expected at most 8"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_act.* 'silu' is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window is absent"),
        (
            "gemma3_text",
            gemma_ropes("yarn", "default"),
            "rope_type 'yarn' is not supported in gemma3",
        ),
        ("gemma3_text", {"rope_parameters": rope_parameters("linear")}, "have factor, rope_theta"),
        ("gemma3_text", gemma_ropes("default", "linear"), "rope_type 'linear' of sliding layers"),
        ("mpt", {"attn_config": {"rope": True}}, "attn_config.rope"),
        ("mpt", {"attn_config": {"sliding_window_size": 128}}, "sliding_window_size to 128"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
        ("mpt", {"attn_config": {"qk_gn": True}}, "qk_gn"),
        ("mpt", {"attn_config": {"attn_type": "linear"}}, "attn_type to 'linear'"),
        ("mpt", {"ffn_config": {"ffn_type": "mptglu"}}, "ffn_type to 'mptglu'"),
        ("mpt", {"norm_type": "triton_rmsnorm"}, "norm_type to 'triton_rmsnorm'"),
        ("mpt", {"d_model": 60}, "d_model is 60: expected a multiple"),
    ],
)
def test_an_unsupported_field_raises_an_error_that_names_it(family, change, named):
    raw = CONFIG_MAPPING[family](**tiny.SIZES[family]).to_dict() | {"model_type": family}
    with pytest.raises(ValueError, match=named):
        native_config(raw | change)


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
        LlamaConfig(**tiny.ROTARY, head_dim=8, **change)
