"""Keys that are turned within blocks of slots, encoded, and read by one query a block."""

import pytest
import tiny
import torch
from test_rope import rope_parameters

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo.allocate import Ranks
from eigenzoo.zoo.basis import METHODS
from eigenzoo.zoo.calibrate import calibrate
from eigenzoo.zoo.checkpoint import load
from eigenzoo.zoo.compress import Settings, compress
from eigenzoo.zoo.fold import fold
from eigenzoo.zoo.generate import Generator

MODELS = {
    "llama": lambda: tiny.native(),
    "biases": lambda: tiny.native(attention_bias=True),
    "yarn": lambda: tiny.native(rope_parameters=rope_parameters("yarn-mscale"), head_dim=16),
    "windows": lambda: tiny.native(
        "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
}


def anchored(model, anchor: int, shared: tuple[int, int] = (4, 2), share: float = 0.6):
    """The model with a share of its ranks, keys anchored."""
    found = calibrate(model, tiny.tokens(8, 64), shared, gradients=True, anchor=anchor)
    bases = METHODS["fisher"].bases(model, found)
    k, v = (max(1, int(share * s * model.config.head_dim)) for s in shared)
    return fold(model, bases, Ranks((k, k - 1, k), (v,) * 3), anchor)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("anchor", [3, 16])
@pytest.mark.parametrize("shared", [(1, 1), (4, 2), (2, 4)])
def test_decoding_equals_recomputing_far_beyond_a_block(name, anchor, shared):
    low, x = anchored(MODELS[name](), anchor, shared), tiny.tokens(2, 70)
    cache = low.new_cache(2, 77)  # no multiple of a block
    parts = torch.arange(70).split([9, 3, *[1] * 20, 30, *[1] * 8])
    close(torch.cat([low(x[:, p], p, cache) for p in parts], 1), low(x))


@pytest.mark.parametrize("anchor", [3, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(anchor, side):
    low, x = anchored(MODELS["biases"](), anchor), tiny.tokens(1, 33)
    pad = torch.full((1, 8), 5)
    # what follows right padding is decoded behind it
    whole = torch.cat((pad, x) if side == "left" else (x[:, :20], pad, x[:, 20:]), 1)
    valid = torch.ones(1, 41, dtype=torch.bool)
    valid[:, :8] = side != "left"
    valid[:, 20:28] &= side != "right"
    cache = low.new_cache(1, 41)
    first = low(whole[:, :28], torch.arange(28), cache, valid)
    steps = [low(whole[:, [t]], torch.tensor([t]), cache, valid) for t in range(28, 41)]
    got = torch.cat([first, *steps], 1)[valid][None]
    # blocks fall elsewhere without the padding, so only the share that is lost may differ
    dense = MODELS["biases"]()
    lost = (low(x) - dense(x)).std()
    assert (got - dense(x)).std() < 1.5 * lost
    parallel = low(whole, valid=valid)[valid][None]
    close(got, parallel)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("anchor", [3, 16])
def test_nearly_full_rank_is_nearly_the_dense_model(name, anchor):
    model, x = MODELS[name](), tiny.tokens(2, 60)
    wide = 4 * model.config.head_dim
    found = calibrate(model, tiny.tokens(8, 64), (4, 4), gradients=True, anchor=anchor)
    bases = METHODS["fisher"].bases(model, found)
    low = fold(model, bases, Ranks((wide - 1,) * 3, (wide,) * 3), anchor)
    assert all(layer.attn.k_down is not None for layer in low.layers)
    want = model(x)
    assert (low(x) - want).std() < 0.03 * want.std()


def test_statistics_are_of_keys_turned_within_their_blocks():
    model, x = tiny.native(), tiny.tokens(2, 12)
    plain, turned = (calibrate(model, x, (1, 1), anchor=a)[0].k for a in (1, 4))
    traces = [m.second.diagonal(dim1=1, dim2=2).sum(1) for m in (plain, turned)]
    torch.testing.assert_close(*traces)  # a rotation keeps lengths
    assert not torch.allclose(plain.second, turned.second, rtol=1e-2)
    one = calibrate(model, x[:1, :1], (1, 1), anchor=4)[0].k.second[0]
    key = model.layers[0].attn.k_proj(model.layers[0].attn_norm(model.embed(x[0, 0])))[:8]
    angle = -2 * model.inv_freq[0]  # the first slot of four lies two before the centre
    a, b = key.chunk(2)
    phi = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
    torch.testing.assert_close(one.float(), phi[:, None] * phi, atol=1e-5, rtol=1e-4)


def test_the_checkpoint_runs_in_transformers_with_every_cache(tmp_path):
    tiny.save(tmp_path / "dense", attention_bias=True)
    settings = Settings(keep=0.5, rank_multiple=1, keys="anchored", anchor_block=4)
    original = load(str(tmp_path / "dense"))
    compress_checkpoint(original, tmp_path / "low", settings, samples=4, seq_len=64)
    native = load(str(tmp_path / "low")).model
    theirs = EigenForCausalLM.from_pretrained(tmp_path / "low")
    x = tiny.tokens(1, 20)
    torch.testing.assert_close(theirs(x).logits, native(x), atol=1e-4, rtol=0)
    want = list(Generator(native, 1, 40, compile=False).stream(x.tolist(), 15))
    for cache in ({}, {"cache_implementation": "static"}):
        got = theirs.generate(x, max_new_tokens=15, do_sample=False, eos_token_id=None, **cache)
        assert got[0, 20:].tolist() == torch.cat(want).tolist()


@pytest.mark.slow
def test_one_graph_serves_every_length():
    torch._dynamo.reset()
    settings = Settings(rank_multiple=2, keys="anchored", anchor_block=8)
    dense = tiny.native(num_hidden_layers=2)
    low = compress(dense, tiny.tokens(8, 64), settings).model
    prompts = [[5, 9, 33, 7, 120], [99, 3, 17, 200, 12, 77, 64, 5, 31]]
    plain = Generator(low, 1, 45, compile=False)
    compiled = Generator(low, 1, 45)
    assert list(compiled.stream(prompts[:1], 20)) == list(plain.stream(prompts[:1], 20))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert list(compiled.stream(prompts[1:], 30)) == list(plain.stream(prompts[1:], 30))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(keys="turned"), "keys 'turned' is unknown"),
        (Settings(keys="anchored", anchor_block=1), "anchor block is 1"),
        (Settings("eigen", keys="anchored"), "eigen rebuilds"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        settings.check()


def test_what_cannot_be_anchored_is_refused():
    with pytest.raises(ValueError, match="nothing to anchor"):
        Settings(keys="anchored").fit(tiny.native("opt").config)
    model = tiny.native(rope_parameters=rope_parameters("longrope"), head_dim=16)
    with pytest.raises(ValueError, match="longrope"):
        compress(model, tiny.tokens(4, 32), Settings(keys="anchored"))
