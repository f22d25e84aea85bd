"""A model with the fused ops in it says what it said without them."""

import pytest
import tiny
import torch

from eigenzoo.kernels import ops
from eigenzoo.kernels.install import install, register
from eigenzoo.zoo.compress import Settings, compress
from eigenzoo.zoo.generate import Generator

PROMPTS = [[5, 9, 33, 7, 120], [8, 41], [99, 3, 17, 200, 12, 77, 64, 5, 31]]
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
JOINT = {"latent": "joint-kv", "heads_per_latent": (4, 4)}
WAYS = {
    "rebuild": ("llama", {}, {"keys": "rebuild"}),
    "anchored": ("llama", {"attention_bias": True}, {"keys": "anchored", "anchor_block": 4}),
    "pairs": ("llama", {}, {"keys": "pairs"}),
    "rotated": ("llama", {}, {"keys": "rotated"}),
    "full": ("llama", {}, {"keys": "full", "keep": 0.8}),
    "windows": ("qwen2", WINDOWS, {"heads_per_latent": (2, 2)}),
    "absorbed": ("opt", {}, {}),
    "joint": ("opt", {}, JOINT),
    "alibi": ("mpt", {}, {"heads_per_latent": (2, 4)}),
    "bent": ("mpt", {"attn_config": {"clip_qkv": 0.4}}, {"heads_per_latent": (2, 4)}),
}
pytestmark = pytest.mark.slow  # the ops are built first


def low(way: str):
    family, changes, settings = WAYS[way]
    settings = Settings(**{"keep": 0.6, "rank_multiple": 2, **settings})
    return compress(tiny.native(family, **changes), tiny.tokens(8, 64), settings).model


def texts(model, compile: bool = False) -> list:
    """Of a batch of different lengths, and of one prompt alone."""
    return [
        torch.stack(list(Generator(model, len(p), 40, compile, False).stream(p, 25)), 1).tolist()
        for p in (PROMPTS, PROMPTS[:1])
    ]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_with_and_without(way):
    model = low(way)
    want = texts(model)
    assert install(model) is model
    assert install(model).layers[0].attn.latent_decode is ops.latent_decode
    assert texts(model) == want


@pytest.mark.parametrize("way", ["anchored", "rebuild", "alibi"])
def test_compiled_they_stay_one_graph(way):
    torch._dynamo.reset()
    model = install(low(way))
    want = texts(model)
    assert texts(model, compile=True) == want
    prompt = PROMPTS[:1]
    compiled, plain = Generator(model, 1, 40, True, False), Generator(model, 1, 40, False)
    list(compiled.stream(prompt, 4))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert list(compiled.stream(prompt, 30)) == list(plain.stream(prompt, 30))


def test_a_device_without_fused_ops_is_refused():
    with pytest.raises(ValueError, match="no fused ops for mps"):
        register("mps")
