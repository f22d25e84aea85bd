"""The files in examples/ run as they are, and the exported model takes adapters."""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import pytest
import tiny
import torch

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load

peft = pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[1] / "examples"
LORA = EXAMPLES / "lora.py"
LOAD = """
import sys, json
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model(model.dummy_inputs["input_ids"]).logits.tolist()))
"""
JOINT = Settings(keep=0.5, latent="joint-kv", heads_per_latent=(4, 4), kv_bits=(16,))
WAYS = {
    "rebuild": ("llama", {"tie_word_embeddings": True}, Settings(keep=0.5, kv_bits=(16,))),
    "anchored": ("qwen2", {}, Settings(keep=0.5, keys="anchored", kv_bits=(16,))),
    "absorbed": ("opt", {}, Settings("eigen", 0.5, rank_multiple=1, kv_bits=(16,))),
    "joint": ("mpt", {}, JOINT),
}


def compressed(way: str, place: Path) -> Path:
    family, changes, settings = WAYS[way]
    tiny.save(place / "dense", family, **changes)
    dense = load(str(place / "dense"))
    compress_checkpoint(dense, place / "low", settings, samples=4, seq_len=32)
    return place / "low"


@pytest.mark.parametrize("way", WAYS)
def test_adapters_learn_and_merge_exactly(way, tmp_path):
    model = EigenForCausalLM.from_pretrained(compressed(way, tmp_path))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    adapted, x = peft.get_peft_model(model, config), tiny.tokens(2, 40)
    learned = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    adapted.eval()
    want = adapted(input_ids=x).logits
    torch.testing.assert_close(adapted.merge_and_unload()(x).logits, want, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rebuild", "joint"])
def test_lora_recovers_and_what_it_saves_loads_everywhere(way, tmp_path):
    low, out, text = compressed(way, tmp_path), tmp_path / "new", tmp_path / "a.txt"
    text.write_text(tiny.WORDS * 60)
    done = fresh.python(LORA, low, text, out, "--steps", "20", "--length", "32", "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split("\n")[0].removeprefix("loss ").split(" -> "))
    assert after < before
    native, old = load(str(out)), load(str(low))
    changed = [n for n, x in native.model.state_dict().items()
               if not torch.equal(x, old.model.state_dict()[n])]  # fmt: skip
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "k_proj", "o_proj"}
    assert native.model.config == old.model.config
    assert native.config["compression"]["lora"]["steps"] == 20
    assert native.config["compression"]["evaluation"] is None
    loaded = fresh.python("-c", LOAD, out)
    assert loaded.returncode == 0, loaded.stderr
    logits = torch.tensor(json.loads(loaded.stdout.splitlines()[-1]))
    x = EigenForCausalLM.from_pretrained(out).dummy_inputs["input_ids"]
    torch.testing.assert_close(logits, native.model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_lora_refuses_projections_that_are_clipped_or_normed_afterwards(tmp_path):
    tiny.save(tmp_path / "dense", "mpt", attn_config={"clip_qkv": 0.4})
    dense = load(str(tmp_path / "dense"))
    compress_checkpoint(
        dense, tmp_path / "low", Settings(keep=0.5, kv_bits=(16,)), samples=4, seq_len=32
    )
    done = fresh.python(LORA, tmp_path / "low", tmp_path / "a.txt", tmp_path / "new")
    assert done.returncode != 0
    assert "clip_qkv" in done.stderr


# the same graphs without C++, whose compilation takes long; the next test compiles it
QUICK = """
import functools, runpy, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A compressed checkpoint with a chat template."""
    place = tmp_path_factory.mktemp("talking")
    tiny.save(place / "dense", chat=True, num_hidden_layers=1)
    settings = Settings(keep=0.5, rank_multiple=2, heads_per_latent=(2, 2), kv_bits=(16,))
    compress_checkpoint(load(str(place / "dense")), place / "low", settings, samples=4, seq_len=32)
    return place / "low"


@pytest.mark.slow
def test_generate_streams_one_prompt_and_answers_several_as_alone(talking):
    def run(*prompts: str) -> str:
        words = talking, *prompts, "--max-new-tokens", "9"
        done = fresh.python("-c", QUICK, EXAMPLES / "generate.py", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone = run("the cat sat")
    assert alone.strip()
    assert f"the cat sat{alone.rstrip(chr(10))}\n" in run(
        "the cat sat", "on a mat and saw 12 birds"
    )


@pytest.mark.slow
def test_transformers_generates_alone_and_compiled(talking):
    script = EXAMPLES / "transformers_generate.py"
    runs = [
        fresh.python(script, talking, "the cat sat", "--max-new-tokens", "9", *words)
        for words in ((), ("--no-compile",))
    ]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr + runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.startswith("the cat sat")


@pytest.mark.slow
def test_two_processes_generate_what_one_does(talking):
    words = talking, "the cat sat", "--max-new-tokens", "9"
    one = fresh.python(EXAMPLES / "transformers_generate.py", *words, "--no-compile")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def start(rank: str):  # as torchrun does, whose processes would import torch anew
        env = os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        return fresh.python(EXAMPLES / "tensor_parallel.py", *words, env=env)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(start, "01")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert (first.stdout, second.stdout) == (one.stdout, "")
    assert first.stdout.startswith("the cat sat")


@pytest.mark.slow
def test_chat_keeps_what_was_said_in_the_cache(talking):
    words = EXAMPLES / "chat.py", talking, "--slots", "120", "--no-compile"
    done = fresh.python(*words, stdin="the cat sat\non a mat\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 3
