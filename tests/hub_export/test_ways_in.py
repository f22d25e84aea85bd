"""How transformers places, trains and saves a checkpoint, and errors for what cannot work."""

import json
from pathlib import Path

import exported
import fresh
import pytest
import tiny
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eigenzoo.hub_export import register
from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.hub_export.remote import modeling_eigen
from eigenzoo.hub_export.remote.configuration_eigen import EigenConfig
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.models.families import FAMILIES

assert register  # its import registers the classes, so none come from checkpoints
IDS = torch.arange(2, 42).view(2, 20)
KINDS = {
    "llama": {"family": "llama", "tie_word_embeddings": True},
    "opt": {"family": "opt"},
    "mpt": {"family": "mpt"},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A small compressed checkpoint in several shards."""
    place = tmp_path_factory.mktemp(request.param)
    tiny.save(place / "dense", **KINDS[request.param])
    dense, settings = load(str(place / "dense")), Settings(keep=0.6, rank_multiple=2, kv_bits=(16,))
    compress_checkpoint(dense, place / "low", settings, samples=4, seq_len=32, shard_size="60KB")
    return place / "low"


@pytest.fixture
def model(folder):
    """The checkpoint of `folder`, loaded by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_a_long_prompt_goes_into_a_static_cache_in_parts(model):
    how = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(IDS, **how)
    got = model.generate(IDS, **how, prefill_chunk_size=8, disable_compile=True)
    assert got.tolist() == want.tolist()


def test_device_map_auto_places_the_model(folder, logits):
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    torch.testing.assert_close(placed(IDS).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_never_split_among_devices(family):
    _, ours = exported.dense_and_exported(family)
    assert {type(layer).__name__ for layer in ours.model.layers} <= set(ours._no_split_modules)


def test_layers_that_do_not_fit_stay_on_disk(folder, logits, tmp_path):
    placed = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": 300_000},
        offload_folder=tmp_path / "disk",
    )
    assert "disk" in placed.hf_device_map.values()
    with torch.inference_mode():
        torch.testing.assert_close(placed(IDS).logits, logits)
        assert placed.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 23)


HELD = ("rebuilt keys", "pairs", "longrope", "ALiBi", "learned positions")


@pytest.mark.parametrize("kind", HELD)
def test_it_loads_from_disk_where_nothing_fits_memory(kind, tmp_path):
    made = exported.of_kind(kind)
    made.save_pretrained(tmp_path / "out")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
    )
    assert {p.device.type for p in placed.parameters()} == {"meta"}
    torch.testing.assert_close(placed(IDS).logits, made(IDS).logits)
    assert placed.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 22)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("way", ["cpu", "cpu and disk", "with buffers", "by hand"])
def test_a_model_built_without_memory_is_filled_by_accelerate(kind, way, tmp_path):
    made = exported.of_kind(kind)
    made.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=way == "with buffers"):
        empty = AutoModelForCausalLM.from_config(made.config)
    empty.tie_weights()
    if way == "by hand":
        empty.load_state_dict(made.state_dict(), assign=True)
    else:
        disk = "disk" if way == "cpu and disk" else "cpu"
        parts = {name: "cpu" for name, _ in empty.model.named_children()} | {"layers": disk}
        empty = load_checkpoint_and_dispatch(
            empty,
            tmp_path,
            device_map={f"model.{name}": device for name, device in parts.items()},
            offload_folder=tmp_path / "disk",
            offload_buffers=True,
        )
    torch.testing.assert_close(empty.eval()(IDS).logits, made(IDS).logits)


def test_buffers_that_accelerate_would_not_load_are_an_error(tmp_path):
    made = exported.of_kind("pairs")
    made.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(made.config)
    parts = {"model.layers": "disk"}
    parts |= {f"model.{name}": "cpu" for name in ("embed", "norm", "head")}
    with pytest.raises(ValueError, match="k_pairs is on the meta device"):
        load_checkpoint_and_dispatch(
            empty, tmp_path, device_map=parts, offload_folder=tmp_path / "disk"
        )


def test_a_loaded_checkpoint_is_saved_again_unchanged(model, logits, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, logits)
    tiny.tokenizer().save_pretrained(tmp_path / "again")  # `save_pretrained` does not save it
    native = load(str(tmp_path / "again")).model
    torch.testing.assert_close(native(IDS), logits)


@pytest.mark.slow
def test_saved_again_without_eigenzoo_it_still_brings_its_code(folder, tmp_path):
    code = (
        "import sys; sys.modules['eigenzoo'] = None\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "again = Auto.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
        "print(type(again).__name__)\n"
    )
    done = fresh.python("-c", code, folder, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "EigenForCausalLM"


GREEDY = """
import json, sys
sys.modules.update({name: None for name in sys.argv[2:3]})
import torch
from transformers import AutoModelForCausalLM as Auto

how = {"ops": "reference"} if sys.argv[3:] else {}
model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True, **how)
ids, mask = torch.arange(2, 42).view(2, 20), torch.ones(2, 20, dtype=torch.long)
mask[1, :4] = 0
tokens = [
    model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
        cache_implementation=cache, **more,
    ).tolist()
    for cache in (None, "static") for more in ({}, {"num_beams": 2})
]
attn = model.model.layers[0].attn
print(json.dumps([
    tokens,
    [op.__module__.split(".")[0] for op in (attn.latent_decode, attn.linear_decode)],
]))
"""


@pytest.mark.slow
def test_checkpoints_decode_by_fused_ops_if_eigenzoo_is_there_and_write_the_same(folder, tmp_path):
    outputs = {}
    for words in ((), ("eigenzoo",), ("no such module", "reference")):
        done = fresh.python("-c", GREEDY, folder, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs[words] = json.loads(done.stdout)
    (tokens, fused), *others = outputs.values()
    assert fused == ["eigenzoo"] * 2
    assert others == [[tokens, ["transformers_modules"] * 2]] * 2


def test_norms_of_queries_and_keys_are_read_under_their_older_names_too(tmp_path):
    tiny.FoundryMPT({"qk_ln": True}, no_bias=False).save(_made(tmp_path / "dense"))
    settings = Settings("fisher", keep=0.6, heads_per_latent=(8, 2), kv_bits=(16,))
    dense, low = load(str(tmp_path / "dense")), tmp_path / "low"
    compress_checkpoint(dense, low, settings, samples=4, seq_len=32)
    want, file = load(str(low)).model(IDS), low / "model.safetensors"
    weights = {k.replace("_bound.norm", "_proj.norm"): x for k, x in load_file(file).items()}
    assert "model.layers.0.attn.k_proj.norm.weight" in weights
    save_file(weights, file, {"format": "pt"})
    assert torch.equal(load(str(low)).model(IDS), want)
    theirs = AutoModelForCausalLM.from_pretrained(low, ops="reference")
    torch.testing.assert_close(theirs(IDS).logits, want)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_other_ops_are_refused(folder):
    with pytest.raises(StrictDataclassFieldValidationError, match="ops"):
        AutoModelForCausalLM.from_pretrained(folder, ops="quick")


def test_without_a_compiler_the_reference_decodes_and_it_says_so(folder, monkeypatch):
    said = []

    def lacking(model):
        raise ValueError("there is no g++")

    monkeypatch.setattr(modeling_eigen, "install", lacking)
    monkeypatch.setattr(modeling_eigen.logger, "warning_once", said.append)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert said == ["decoding with the reference ops: there is no g++"]
    assert model.generate(IDS, max_new_tokens=3).shape == (2, 23)


LOADING = """
import re, sys
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
import eigenzoo.hub_export.register

def memory(kind):  # KiB; getrusage would include the peak of the parent process
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, before = Path(sys.argv[1]), memory("VmRSS")
if sys.argv[2] == "transformers":
    AutoModelForCausalLM.from_pretrained(folder, ops="reference")
else:  # takes twice the memory: a whole model, then its weights
    weights = {k: v.clone() for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(weights)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = EigenConfig(
        **sizes,
        num_hidden_layers=4,
        intermediate_size=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e4},
        mlp_bias=False,
        anchor=1,
        key_mean=False,
        pairs=False,
        vocab_size=4096,
        k_ranks=[64] * 4,
        v_ranks=[64] * 4,
    )
    model = EigenForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    size, peaks = sum(p.nbytes for p in model.parameters()), {}
    for way in ("transformers", "by hand"):
        done = fresh.python("-c", LOADING, tmp_path, way)
        assert done.returncode == 0, done.stderr
        peaks[way] = int(done.stdout) * 1024 / size
    assert peaks["transformers"] < 1.3, peaks
    assert peaks["by hand"] > 1.8, peaks


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_when_layers_are_computed_again(model, reentrant):
    model.train()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    grads = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(IDS, attention_mask=mask, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for g in grads[1].values())
    torch.testing.assert_close(grads[1], grads[0])


def test_what_is_recomputed_holds_less(model):
    model.train()
    held = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x
        ):
            model(IDS, labels=IDS)
        held.append(sum(kept))
    assert held[1] < held[0] / 2


def test_flash_attention_is_refused(folder):
    with pytest.raises((ValueError, ImportError), match=r"[Ff]lash"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="continuous batching keeps keys and values of one width"):
        model.generate_batch([[5, 9, 33]])


@pytest.mark.parametrize("cache", [None, "static"])
def test_an_assistant_gives_the_same_tokens(model, cache):
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(IDS[:1], **greedy)
    try:
        got = model.generate(IDS[:1], **greedy, assistant_model=model, cache_implementation=cache)
    except ValueError as error:
        if cache is None or "not supported with Static cache" not in str(error):
            raise
        pytest.skip("this transformers refuses it")
    assert got.tolist() == want.tolist()
