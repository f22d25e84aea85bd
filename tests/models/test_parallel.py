"""Two processes that share a model compute what one process with the whole model computes."""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import fresh
import pytest
import shared
import torch
import variants
from accelerate.utils import send_to_device
from shared import IDS, MASK, measured
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from eigenzoo.hub_export import register
from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load

assert register  # its import registers the classes, so none come from checkpoints
pytestmark = pytest.mark.slow
WAYS = {
    "llama biases": Settings(
        keep=0.5, keys="anchored", heads_per_latent=(2, 1), rank_multiple=2, kv_bits=(16,)
    ),
    "llama tied": Settings(
        keep=0.5, keys="rebuild", heads_per_latent=(1, 2), rank_multiple=2, kv_bits=(16,)
    ),
    "llama yarn": Settings(keep=0.5, keys="pairs", heads_per_latent=(2, 2), kv_bits=(16,)),
    "qwen2 windows": Settings(
        keep=0.75, keys="full", heads_per_latent=(2, 2), rank_multiple=2, kv_bits=(16,)
    ),
    "qwen3 windows": Settings(keep=0.5, heads_per_latent=(2, 2), rank_multiple=2, kv_bits=(16,)),
    "gemma3_text 4b": Settings(keep=0.5, heads_per_latent=(2, 2), rank_multiple=2, kv_bits=(16,)),
    "opt 125m": Settings("eigen", 0.5, rank_multiple=1, kv_bits=(16,)),
    "opt 350m": Settings(
        "attention", 0.5, heads_per_latent=(4, 4), latent="joint-kv", kv_bits=(16,)
    ),
    "mpt 7b": Settings(keep=0.5, heads_per_latent=(4, 2), rank_multiple=2, kv_bits=(16,)),
    "mpt 30b clip": Settings(keep=0.5, heads_per_latent=(2, 4), rank_multiple=2, kv_bits=(16,)),
}
REFUSED = {
    "llama grouped": Settings(keep=0.5, heads_per_latent=(4, 1), rank_multiple=2, kv_bits=(16,)),
    "foundry qk_ln": Settings(keep=0.5, heads_per_latent=(2, 2), rank_multiple=2, kv_bits=(16,)),
}


def compressed(way: str, place):
    """A small compressed checkpoint of a variant in `variants`."""
    (place / "dense").mkdir(parents=True)
    variants.save(way, place / "dense")
    dense, settings = load(str(place / "dense")), (WAYS | REFUSED)[way]
    compress_checkpoint(dense, place / "low", settings, samples=4, seq_len=32)
    return place / "low"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by way, each with the results of two processes in its folder."""
    place = tmp_path_factory.mktemp("shared")
    made = {way: compressed(way, place / way.replace(" ", "-")) for way in WAYS | REFUSED}
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def start(rank: str):
        env = os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        return fresh.python(shared.__file__, *made.values(), env=env)

    with ThreadPoolExecutor() as pool:
        for done in pool.map(start, "01"):
            assert done.returncode == 0, done.stderr
    return made


def read(folder) -> list[dict]:
    """The results of each process."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module", params=WAYS)
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def one(folder):
    """The results of one process that has the whole model."""
    return measured(AutoModelForCausalLM.from_pretrained(folder))


def test_logits_and_tokens_are_those_of_one_process(folder, one):
    for result in read(folder):
        got, want = torch.tensor(result["logits"]), torch.tensor(one["logits"])
        real = MASK.bool()
        # two processes sum in another order than one
        torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
        assert result["growing"] == result["static"] == one["static"] == one["growing"]


def test_fused_ops_and_the_native_generator_work_on_a_share(folder, one):
    for result in read(folder):
        assert result["fused"] == one["static"]
        assert result["native"] == [row[20:] for row in one["static"]]


def test_gradients_are_those_of_one_process(folder, one):
    for result in read(folder):
        assert result["grads"].keys() == one["grads"].keys()
        for name, want in one["grads"].items():
            got = torch.tensor(result["grads"][name])
            # as above, but through a backward pass
            torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-3, msg=name)


def test_each_process_holds_half_of_cache_and_matrices(folder, one):
    for result in read(folder):
        assert result["cache"] * 2 == one["cache"]
        for name, size in one["weights"].items():
            part = result["weights"][name] * 2 == size
            norm, bias = "norm" in name, name.endswith(("o_proj.bias", "down_proj.bias"))
            assert part != (norm or bias or "positions" in name or "project_" in name), name


def test_a_shared_model_is_saved_again_unchanged(folder):
    saved, again = (AutoModelForCausalLM.from_pretrained(x) for x in (folder, folder / "again"))
    assert again.state_dict().keys() == saved.state_dict().keys()
    for x, y in zip(again.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("way", "reason"),
    {
        "llama grouped": "layer 0 has 8 heads, 1 latents of keys and 4 of values, which 2",
        "foundry qk_ln": "qk_ln norms queries and keys over all heads",
    }.items(),
)
def test_a_model_that_cannot_be_shared_is_refused(folders, way, reason):
    for result in read(folders[way]):
        assert result.keys() == {"error"}
        assert reason in result["error"]


def test_inputs_of_a_layer_move_to_the_device_of_the_layer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).model
    for count in (1, 2):
        given = model.begin(IDS[:, :count], torch.arange(count) + 3, model.new_cache(2, 8))
        moved = send_to_device(given, "meta")
        assert type(moved[2]) is type(given[2])
        tensors = [x for x in tree_leaves(moved) if isinstance(x, torch.Tensor)]
        assert len(tensors) > 2
        assert all(x.is_meta for x in tensors)
