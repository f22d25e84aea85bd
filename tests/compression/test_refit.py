import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from eigenzoo.hub_export.card import card
from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.choices import REFITS
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.refit import RIDGE
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import inspect, load, native_config


def outputs(model, x, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a layer's output projection for tokens x in a cache, in fp64."""
    seen = []
    o_proj = model.layers[layer].attn.o_proj
    hook = o_proj.register_forward_hook(lambda module, args, out: seen.extend((*args, out)))
    model(x, None, model.new_cache(*x.shape))
    hook.remove()
    given, out = (s.flatten(0, 1).double() for s in seen)
    return given, out


def lost(dense, low, x) -> float:
    """KL(dense || low) in nats per token."""
    want, got = (m(x).log_softmax(-1).flatten(0, 1) for m in (dense, low))
    return F.kl_div(got, want, reduction="batchmean", log_target=True).item()


def compressed(dense, x, *refit: str, **changes):
    settings = Settings(keep=0.5, rank_multiple=4, refit=refit, **changes)
    return compress(dense, x, settings).model


@pytest.mark.parametrize("part", REFITS)
@pytest.mark.parametrize("family", tiny.SIZES)
def test_every_refit_brings_the_model_nearer_to_the_original(family, part):
    dense, x = tiny.native(family).double(), tiny.tokens(16, 64)  # fp32 is too coarse for OPT
    unfitted, fitted = (
        compress(dense, x, Settings(keep=0.15, rank_multiple=1, refit=parts, kv_bits=(16,))).model
        for parts in ((), (part,))
    )
    assert lost(dense, fitted, x) < lost(dense, unfitted, x)


@pytest.mark.parametrize("part", REFITS)
def test_what_loses_nothing_is_not_changed(part):
    dense, x = tiny.native(attention_bias=True), tiny.tokens(4, 64)
    unfitted, fitted = (
        compress(dense, x, Settings(keep=1.0, refit=parts, kv_bits=(16,))).model
        for parts in ((), (part,))
    )
    want = unfitted.state_dict()
    for name, got in fitted.state_dict().items():
        torch.testing.assert_close(got, want[name], atol=1e-5, rtol=0)


def test_the_output_projection_is_the_ridge_regression_with_intercept():
    dense, x = tiny.native(), tiny.tokens(6, 48)
    unfitted, fitted = compressed(dense, x), compressed(dense, x, "output")
    given, got = outputs(unfitted, x, 0)
    missing = outputs(dense, x, 0)[1] - got
    x_mean, mean = given.mean(0), missing.mean(0)
    given, missing = given - x_mean, missing - mean
    gram = given.T @ given
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram, given.T @ missing).T
    old, new = (m.layers[0].attn.o_proj for m in (unfitted, fitted))
    torch.testing.assert_close((new.weight - old.weight).double(), change, atol=1e-5, rtol=1e-4)
    shift = mean - change @ x_mean
    torch.testing.assert_close((new.bias - old.bias).double(), shift, atol=1e-5, rtol=1e-4)


def test_refits_are_fitted_to_latents_as_a_cache_holds_them():
    dense, x = tiny.native(), tiny.tokens(6, 48)
    settings = Settings(keep=0.15, refit=("output",), rank_multiple=2, kv_bits=(3, 2))
    low = compress(dense, x, settings).model
    out = low.layers[0].attn.o_proj
    cache = low.new_cache(6, 48)
    seen = []
    hook = out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    low(x, None, cache)
    low(x)
    hook.remove()
    want = outputs(dense, x, 0)[1]
    rounded, exact = (out(y).flatten(0, 1).double() for y in seen)
    # with an intercept, a fit has the mean of what it was fitted to
    torch.testing.assert_close(rounded.mean(0), want.mean(0), atol=1e-5, rtol=0)
    assert (exact.mean(0) - want.mean(0)).abs().max() > 1e-4


def test_fisher_is_refitted_unless_told():
    config = tiny.native().config
    assert Settings(keep=0.6, kv_bits=(16,)).fit(config).refit == ("output",)
    assert Settings(keep=0.6, refit=(), kv_bits=(16,)).fit(config).refit == ()
    assert Settings("eigen", keep=0.6, kv_bits=(16,)).fit(config).refit == ()


def test_unknown_refits_are_refused():
    with pytest.raises(ValueError, match="refit 'everything' is unknown: expected one of output"):
        Settings(keep=0.6, refit=("everything",), kv_bits=(16,)).check()
    with pytest.raises(ValueError, match="lorc reads no text"):
        Settings("lorc", keep=0.6, refit=("output",), kv_bits=(16,)).check()


def test_checkpoints_with_refits_of_earlier_versions_load_and_show_them(dense, tmp_path):
    folder, x = tmp_path / "low", tiny.tokens(2, 20)
    compress_checkpoint(
        dense, folder, Settings(keep=0.6, refit=("output",), kv_bits=(16,)), samples=4, seq_len=32
    )
    want = load(str(folder)).model(x)
    raw = json.loads((folder / "config.json").read_text())
    raw["compression"]["refit"] = ["inputs", "heads", "output"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert torch.equal(load(str(folder)).model(x), want)
    text = card(native_config(raw), raw["compression"])
    assert "Refitted to them after the solve: inputs, heads, output." in text
    assert inspect(str(folder))["compression"]["refit"] == ["inputs", "heads", "output"]
