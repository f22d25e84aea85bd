"""kv-heads of an MPT as an ordinary grouped-query checkpoint."""

import json

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import calibration_tokens
from eigenzoo.zoo.inference.generate import Generator, answer

VARIANTS = {
    "transformers": None,
    "foundry": ({}, {}),
    "biases": ({}, {"no_bias": False}),
    "grouped": ({"attn_type": "grouped_query_attention", "kv_n_heads": 4}, {"no_bias": False}),
    "learned positions": ({"alibi": False}, {"learned_pos_emb": True, "expansion_ratio": 2}),
    "other scales": ({"alibi_bias_max": 4, "softmax_scale": 0.5}, {"logit_scale": 0.5}),
    "rmsnorm": ({}, {"norm_type": "low_precision_rmsnorm"}),
}


def reference(folder) -> tiny.FoundryMPT:
    """The model that llm-foundry would make from the folder's config and weights."""
    raw = json.loads((folder / "config.json").read_text())
    keys = ("no_bias", "learned_pos_emb", "expansion_ratio", "logit_scale", "norm_type")
    model = tiny.FoundryMPT(raw["attn_config"], **{k: raw[k] for k in keys})
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.weights().keys()
    named = {key.replace("Wqkv.", "Wqkv.linear."): x for key, x in weights.items()}
    model.model.load_state_dict(named | {"lm_head.weight": named["transformer.wte.weight"]})
    return model


@pytest.mark.parametrize("merged", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_checkpoint_computes_what_the_folded_model_does(tmp_path, variant, merged):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    if VARIANTS[variant] is None:
        tiny.save(source, "mpt")
    else:
        attn, other = VARIANTS[variant]
        tiny.FoundryMPT(attn, **other).save(source)
    original, settings = load(str(source)), Settings("kv-heads", 1 / merged, kv_bits=(16,))
    tokens = calibration_tokens("self", original.model, original.tokenizer, 4, 32)
    folded = compress(original.model, tokens, settings).model
    record = compress_checkpoint(original, out, settings, "self", 4, 32, plain=True)
    written, x = load(str(out)), tiny.tokens(2, 30)
    config = written.model.config
    assert config.num_key_value_heads * merged == original.model.config.num_key_value_heads
    assert config.kv_width == config.dense_kv_width == folded.config.kv_width
    torch.testing.assert_close(written.model(x), folded(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(reference(out)(x).logits, folded(x), atol=1e-4, rtol=0)
    assert written.config["compression"] == json.loads(json.dumps(record))
    assert (written.model(x) - original.model(x)).abs().max() > 1e-2


def test_a_plain_checkpoint_is_decoded_and_compressed_as_any_other(tmp_path):
    tiny.save(tmp_path / "mpt", "mpt", tie_word_embeddings=False)
    options = {"samples": 4, "seq_len": 32}
    original = load(str(tmp_path / "mpt"))
    compress_checkpoint(
        original, tmp_path / "out", Settings("kv-heads", 0.5, kv_bits=(16,)), **options, plain=True
    )
    grouped = load(str(tmp_path / "out"))
    assert not torch.equal(grouped.model.head.weight, grouped.model.embed.weight)
    (tokens,), *_ = answer(Generator(grouped.model, 1, 20, compile=False), [[5, 6, 7]], 9, stop=[])
    assert len(tokens) == 9
    compress_checkpoint(grouped, tmp_path / "again", Settings(keep=0.5, kv_bits=(16,)), **options)
    again = load(str(tmp_path / "again")).model.config
    assert again.kv_width <= 0.25 * original.model.config.kv_width


def test_transformers_own_mpt_refuses_it(tmp_path):
    tiny.save(tmp_path / "mpt", "mpt")
    settings = Settings("kv-heads", 0.5, kv_bits=(16,))
    original = load(str(tmp_path / "mpt"))
    compress_checkpoint(original, tmp_path / "out", settings, samples=4, seq_len=32, plain=True)
    with pytest.raises(StrictDataclassError, match="got grouped_query_attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "change", "method", "named"),
    [
        ("mpt", {}, "fisher", "fisher keeps latents, .* use --method kv-heads"),
        ("opt", {}, "kv-heads", "config of opt has no field for fewer kv heads"),
        ("llama", {}, "kv-heads", "does not fit all their rotations in llama"),
        ("qwen2", {}, "kv-heads", "does not fit all their rotations in qwen2"),
        ("mpt", {"attn_config": {"clip_qkv": 0.4}}, "kv-heads", "clip_qkv or qk_ln changes"),
    ],
)
def test_a_model_without_a_plain_form_is_refused_and_nothing_is_written(
    tmp_path, family, change, method, named
):
    tiny.save(tmp_path / "source", family, **change)
    original = load(str(tmp_path / "source"))
    with pytest.raises(ValueError, match=f"no plain checkpoint: .*{named}.*leave --plain out"):
        compress_checkpoint(
            original, tmp_path / "out", Settings(method, 0.5, kv_bits=(16,)), plain=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
