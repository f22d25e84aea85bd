"""Ways in which transformers places, trains and saves a checkpoint, and what cannot work."""

import subprocess
import sys

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from eigenzoo.hub_export import register
from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.checkpoint import load
from eigenzoo.zoo.compress import Settings

assert register  # the classes here, without remote code
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
    dense, settings = load(str(place / "dense")), Settings(rank_multiple=2)
    compress_checkpoint(dense, place / "low", settings, samples=4, seq_len=32, shard_size="60KB")
    return place / "low"


@pytest.fixture
def model(folder):
    """It, as transformers loads it."""
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


def test_it_is_placed_by_itself(folder, logits):
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    torch.testing.assert_close(placed(IDS).logits, logits)


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


def test_it_is_saved_again_as_it_was(model, logits, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, logits)
    tiny.tokenizer().save_pretrained(tmp_path / "again")  # transformers saves it by itself
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
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "again")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "EigenForCausalLM"


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
    got = model.generate(IDS[:1], **greedy, assistant_model=model, cache_implementation=cache)
    assert got.tolist() == want.tolist()
