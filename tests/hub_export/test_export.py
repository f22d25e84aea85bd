"""Compressed checkpoints in transformers, in a process where eigenzoo cannot be imported."""

import json

import fresh
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import DynamicLayer
from variants import FOUNDRY, VARIANTS, save

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.utils.output import check_folder

ALONE = """
import json, sys
sys.modules["eigenzoo"] = None  # importing it fails
import torch
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache, pipeline
)

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["the cat sat", "on a mat and saw 12 birds"], return_tensors="pt", padding=True)
greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
whole = CompileConfig(fullgraph=True, backend="aot_eager")  # one graph, or an error
whole._compile_all_devices = True  # otherwise transformers does not compile on a CPU
ids = torch.arange(2, 42).view(2, 20)

def right(mask, name):
    _, cache = model(ids, attention_mask=mask, logits_to_keep=1).to_tuple()
    more = torch.cat((mask, mask.new_ones(2, 1)), 1)
    return model(ids[:, :1], attention_mask=more, **{name: cache}).logits.tolist()

def difference(other):
    want = model(ids).logits
    return float((other(ids).logits.float() - want).std() / want.std())

results = {
    "logits": model(ids).logits.tolist(),
    "dynamic": model.generate(**batch, **greedy)[:, -12:].tolist(),
    "uncached": model.generate(**batch, **greedy, use_cache=False)[:, -12:].tolist(),
    "static": model.generate(**batch, **greedy, cache_implementation="static")[:, -12:].tolist(),
    "chunked": model.generate(**batch, **greedy, prefill_chunk_size=3)[:, -12:].tolist(),
    "compiled": model.generate(
        **batch, **greedy, cache_implementation="static", compile_config=whole
    )[:, -12:].tolist(),
    "alone": [
        model.generate(**tokenizer(text, return_tensors="pt"), **greedy)[0, -12:].tolist()
        for text in ("the cat sat", "on a mat and saw 12 birds")
    ],
    "hidden": list(AutoModel.from_pretrained(folder, trust_remote_code=True)(ids)[0].shape),
    "pipeline": pipeline("text-generation", model=folder, trust_remote_code=True)(
        "the cat", max_new_tokens=5
    ),
    "beams": model.generate(**batch, **greedy, num_beams=2).shape[0],
    "no cache": list(model(ids, use_cache=False)) == ["logits"],
    "right": {
        name: right(torch.tensor([[1] * 20, [1] * 13 + [0] * 7]), name)
        for name in ("cache", "past_key_values")
    },
    "bf16": difference(AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16)),
    "loss": float(model(ids, labels=ids).loss),
}
try:
    model(ids, output_attentions=True)
except ValueError as error:
    results["attentions"] = str(error)
try:
    model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
except ValueError as error:
    results["two caches"] = str(error)
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
results["again"] = torch.equal(again(ids).logits, model(ids).logits)
print(json.dumps(results))
"""
IDS = torch.arange(2, 42).view(2, 20)


WAYS = {
    "llama biases": Settings("fisher", 0.5, heads_per_latent=(4, 2), kv_bits=(16,)),
    "opt 125m": Settings("eigen", 0.5, rank_multiple=1, kv_bits=(16,)),
    "opt 350m": Settings(
        "attention", 0.5, heads_per_latent=(4, 4), latent="joint-kv", kv_bits=(16,)
    ),
    "mpt 6 heads": Settings("fisher", 0.5, heads_per_latent=(2, 6), rank_multiple=4, kv_bits=(16,)),
    "foundry qk_ln": Settings("fisher", 0.5, heads_per_latent=(8, 2), kv_bits=(16,)),
    "qwen2 windows": Settings(
        "fisher", 0.5, heads_per_latent=(1, 4), rank_multiple=2, keys="rebuild", kv_bits=(16,)
    ),
    "qwen3 windows": Settings(keep=0.5, keys="pairs", heads_per_latent=(4, 2), kv_bits=(16,)),
    "gemma3_text 4b": Settings(keep=0.5, heads_per_latent=(2, 4), kv_bits=(16,)),
    "gemma3_text capped": Settings(
        keep=0.5, keys="rebuild", heads_per_latent=(4, 4), kv_bits=(16,)
    ),
    "qwen3_moe some layers": Settings(keep=0.5, rank_multiple=2, kv_bits=(16,)),
    "llama yarn": Settings("fisher", 0.5, keys="pairs", kv_bits=(16,)),
    "llama linear": Settings("attention", 0.5, keys="rotated", kv_bits=(16,)),
    "mpt scale": Settings("fisher", 0.5625, keys="full", rank_multiple=1, kv_bits=(16,)),
}


@pytest.fixture(scope="module", params=WAYS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("out")
    (place / "dense").mkdir()
    save(request.param, place / "dense")
    settings, out = WAYS[request.param], place / "low"
    dense = load(str(place / "dense"))
    compress_checkpoint(dense, out, settings, samples=8, seq_len=64, shard_size="60KB")
    return out


@pytest.fixture(scope="module")
def alone(folder):
    """The results of `ALONE`, in a process without eigenzoo."""
    done = fresh.python("-c", ALONE, folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def test_logits_are_those_of_the_native_model(folder, alone):
    native = load(str(folder)).model(IDS)
    torch.testing.assert_close(torch.tensor(alone["logits"]), native, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", ["uncached", "static", "compiled", "chunked", "alone"])
def test_greedy_tokens_are_the_same_with_every_cache_and_padding(alone, way):
    assert alone[way] == alone["dynamic"]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # since 5.24, and before
def test_right_padding_is_skipped_by_what_follows(folder, alone, name):
    native = load(str(folder)).model
    follow = torch.cat((IDS[1, :13], IDS[1, :1]))[None]
    got = torch.tensor(alone["right"][name])[1, -1]
    torch.testing.assert_close(got, native(follow)[0, -1], atol=1e-4, rtol=0)


def test_transformers_does_not_warn_of_deprecated_names(alone):
    assert "past_key_values" not in alone["stderr"]


def test_pipelines_beams_training_and_saving_work(alone):
    assert alone["hidden"][:2] == [2, 20]
    assert alone["pipeline"][0]["generated_text"].startswith("the cat")
    assert alone["beams"] == 2
    assert alone["no cache"]
    assert alone["again"]
    assert alone["bf16"] < 0.1
    assert alone["loss"] > 0


def test_lm_eval_scores_it_as_the_native_model_does(folder):
    lm = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2)
    texts = [("the cat", " sat on a mat"), ("birds fly over hills,", " rivers")]
    asked = [Instance("loglikelihood", {}, text, 0) for text in texts]
    scores = [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    model, tokenizer, *_ = load(str(folder))
    for (before, after), score in zip(texts, scores, strict=True):
        ids = torch.tensor([tokenizer(before + after)["input_ids"]])
        logs = model(ids)[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
        new = len(tokenizer(after)["input_ids"])
        assert float(logs[-new:].sum()) == pytest.approx(score, abs=1e-3)


def test_unsupported_options_raise_an_error_that_names_them(alone):
    assert "output_attentions is not supported" in alone["attentions"]
    assert "two names of one input" in alone["two caches"]


@pytest.mark.parametrize("variant", [*VARIANTS, *FOUNDRY])
def test_every_variant_survives_the_way_through_transformers(variant, tmp_path):
    (tmp_path / "dense").mkdir()
    save(variant, tmp_path / "dense")
    original = load(str(tmp_path / "dense"))
    settings = Settings("attention", keep=0.7, rank_multiple=1, kv_bits=(16,))
    compress_checkpoint(original, tmp_path / "low", settings, samples=4, seq_len=32)
    native = load(str(tmp_path / "low")).model
    theirs = EigenForCausalLM.from_pretrained(tmp_path / "low")
    x = tiny.tokens(2, 100)
    torch.testing.assert_close(theirs(x).logits, native(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", ["mpt 6 heads"], indirect=True)
def test_the_trainer_predicts_logits_and_no_cache(folder, tmp_path):
    model = EigenForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": x, "labels": x} for x in IDS]
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert trainer.predict(rows).predictions.shape == (*IDS.shape, model.config.vocab_size)


@pytest.mark.parametrize("folder", ["mpt 6 heads"], indirect=True)
def test_registered_classes_load_it_without_remote_code(folder):
    code = (
        "import sys, eigenzoo.hub_export.register; from transformers import AutoModelForCausalLM;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)"
    )
    done = fresh.python("-c", code, folder)
    assert done.stdout.strip() == "eigenzoo.hub_export.remote.modeling_eigen", done.stderr


def test_config_says_what_was_done_and_what_was_kept(folder):
    raw = json.loads((folder / "config.json").read_text())
    model, record = load(str(folder)).model, raw["compression"]
    assert record["share"] == pytest.approx(model.config.kv_width / model.config.dense_kv_width)
    assert record["share"] <= record["keep"]
    assert raw["family"] == model.config.family
    assert [x["k_rank"] for x in record["layers"]] == list(model.config.k_ranks)
    assert record["calibration"]["tokens"] == 8 * 64
    assert set(record["versions"]) == {"eigenzoo", "torch", "transformers"}
    card = (folder / "README.md").read_text()
    for on in record["evaluation"]["domains"]["texts"]:
        assert f"{on['perplexity']:.3f}" in card
    assert f"| {model.config.dense_kv_width} | {model.config.kv_width} |" in card


def test_weights_are_sharded_and_whole(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    weights = [name for shard in shards for name in load_file(shard)]
    assert len(weights) == len(set(weights))


def test_the_cache_of_transformers_is_really_narrower(folder):
    model = EigenForCausalLM.from_pretrained(folder)
    _, cache = model(IDS).to_tuple()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config, asked = load(str(folder)).model.config, model.config.compression["keep"]
    assert held == IDS.numel() * 4 * config.kv_width
    assert config.kv_width <= asked * config.dense_kv_width


def test_an_output_that_exists_is_kept_unless_forced(folder, dense):
    with pytest.raises(ValueError, match="--force"):
        check_folder(folder, force=False)
    check_folder(folder, force=True)


FEW = {  # heads per latent: equal and different for keys and values; joint latents; full keys
    "llama": ("llama", Settings(keep=0.4, heads_per_latent=(4, 4), rank_multiple=1, kv_bits=(8,))),
    "qwen2": ("qwen2", Settings(keep=0.25, heads_per_latent=(2, 4), rank_multiple=2, kv_bits=(4,))),
    "opt": ("opt", Settings(keep=0.2, heads_per_latent=(4, 4), latent="joint-kv", kv_bits=(4,))),
    "mpt": ("mpt", Settings(keep=0.6, keys="full", rank_multiple=2, kv_bits=(16, 8, 4))),
}


@pytest.fixture(scope="module", params=FEW)
def few(request, tmp_path_factory):
    """A checkpoint with a quantized cache."""
    place = tmp_path_factory.mktemp("few")
    family, settings = FEW[request.param]
    tiny.save(place / "dense", family)
    dense = load(str(place / "dense"))
    compress_checkpoint(dense, place / "low", settings, samples=8, seq_len=64)
    return place / "low"


def tokens_of(model, **options) -> list[list[int]]:
    tokens = model.generate(IDS, do_sample=False, eos_token_id=None, max_new_tokens=12, **options)
    return tokens[:, 20:].tolist()


def test_few_bits_give_the_tokens_of_the_native_cache_in_every_cache(few):
    native = load(str(few)).model
    stream = Generator(native, 2, 32, compile=False).stream(IDS.tolist(), 12)
    want = torch.stack(list(stream), 1).tolist()
    for ops in ("reference", "fused"):  # with the checkpoint's own classes
        model = AutoModelForCausalLM.from_pretrained(few, ops=ops, trust_remote_code=True)
        cache = model(IDS[:, :-1], use_cache=True).to_tuple()[1]  # with gradients
        assert tokens_of(model, past_key_values=cache) == want
        assert tokens_of(model) == want
        assert tokens_of(model, cache_implementation="static") == want
        assert tokens_of(model, prefill_chunk_size=3) == want
        assert tokens_of(model, past_key_values=DynamicCache()) == want
        assert len(tokens_of(model, num_beams=2)) == 2
        one = model.generate(IDS[:1], do_sample=False, eos_token_id=None, max_new_tokens=12)
        assisted = {"assistant_model": model, "max_new_tokens": 12, "eos_token_id": None}
        assert torch.equal(model.generate(IDS[:1], do_sample=False, **assisted), one)
    whole = CompileConfig(fullgraph=True, backend="aot_eager")
    whole._compile_all_devices = True
    assert tokens_of(model, cache_implementation="static", compile_config=whole) == want


def test_other_bits_may_be_asked_for_at_loading(few):
    native = load(str(few)).model
    config, layers = native.config, range(native.config.num_hidden_layers)
    if any(x.width % 2 for i in layers for x in config.latents(i)):
        pytest.skip("odd widths do not fill whole bytes at four bits")
    stream = Generator(native, 2, 32, compile=False, bits=4).stream(IDS.tolist(), 12)
    want = torch.stack(list(stream), 1).tolist()
    asked = {}
    for name, ranks, segments in (
        ("k", config.k_ranks, config.k_segments),
        ("v", config.v_ranks, config.v_segments),
    ):
        if any(segments) and not all(x or not r for x, r in zip(segments, ranks, strict=True)):
            pytest.skip("whole heads beside latents: these have no bits of their own")
        if any(segments):  # a latent even at full rank, so it must stay one
            asked[f"{name}_segments"] = [f"{rank}x4" if rank else "" for rank in ranks]
        else:
            asked[f"{name}_bits"] = [4 for _ in layers]
    assert tokens_of(EigenForCausalLM.from_pretrained(few, **asked)) == want


def test_few_bits_take_their_bytes_in_every_cache(few):
    model = EigenForCausalLM.from_pretrained(few)
    config, dtype = model.model.config, model.dtype
    latents = [x for i in range(config.num_hidden_layers) for x in config.latents(i)]
    size = sum(latent.nbytes(dtype) for latent in latents)
    for cache, slots in (
        (DynamicCache(), 20),
        (StaticCache(config=model.config, max_cache_len=50), 50),
    ):
        with torch.inference_mode():
            model(IDS, past_key_values=cache)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == 2 * slots * size


def test_a_cache_that_would_round_few_bits_once_more_is_refused(few):
    class QuantizedLayer(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [QuantizedLayer()]
    with pytest.raises(ValueError, match="quantizes its cache already"):
        EigenForCausalLM.from_pretrained(few)(IDS, past_key_values=cache)


def test_what_is_learned_is_not_rounded(few):
    model = EigenForCausalLM.from_pretrained(few).train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    exact = model(IDS, labels=IDS, use_cache=False).loss
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)
    assert all(p.grad is not None for n, p in model.named_parameters() if "k_proj" in n)
