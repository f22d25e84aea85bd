"""Trained OPT and MPT checkpoints in float16, if they are present."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from repeats import but
from transformers import AutoModelForCausalLM

from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.refine import RefineSettings, refine
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.perplexity import perplexity

SHARED = Path(__file__).parents[2] / "shared"
MODELS = "opt-tiny", "mpt-tiny"
WORDS = SHARED / "data" / "wikitext-2-valid.txt"


@pytest.fixture(scope="module", params=MODELS)
def folder(request):
    path = SHARED / "models" / request.param
    if not (path.is_dir() and WORDS.exists()):
        pytest.skip(f"{request.param} and wikitext are not here: they are no part of the project")
    return path


@pytest.fixture(scope="module")
def text(folder):
    return encode(load(str(folder)).tokenizer, WORDS.read_text()[:200_000])


@pytest.fixture(scope="module")
def model(folder):
    return load(str(folder), torch.float32).model


@pytest.fixture(scope="module")
def low(model, text):
    """Compress the model on eight rows, once for all tests that ask for the same."""
    rows = text[: 8 * 256].view(8, 256)
    made = cache(lambda settings: compress(model, rows, settings).model)
    return lambda settings: made(settings.fit(model.config))


def test_logits_of_the_float16_checkpoint_equal_transformers(folder, text):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load(str(folder), torch.float32).model
    x = text[:512].view(2, 256)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


def test_at_the_same_bytes_fisher_beats_eigen_sharing_beats_that_and_joint_latents_win(
    model, low, text
):
    test = text[-10 * 256 :]

    def after(method: str, shared: tuple[int, int] | None = None, latent: str = "separate"):
        settings = Settings(
            method, 0.05, heads_per_latent=shared, rank_multiple=2, latent=latent, kv_bits=(16,)
        )
        return perplexity(low(settings), test, 256).perplexity

    joint = after("fisher", (4, 4), "joint-kv")
    perplexities = [joint, after("fisher", (4, 4)), after("fisher", (1, 1)), after("eigen")]
    assert perplexities == sorted(perplexities)
    assert joint < 1.02 * perplexity(model, test, 256).perplexity


once = pytest.mark.parametrize("folder", but(["opt-tiny"], MODELS), indirect=True)


@pytest.mark.slow
@once
def test_every_method_compresses_and_fisher_is_the_best_at_few_bytes(model, low, text):
    perplexities = {}
    for method in METHODS:
        keep = 0.25 if method == "kv-heads" else 0.05  # kv-heads keeps at least one head of four
        small = low(Settings(method, keep, rank_multiple=2, kv_bits=(16,)))
        assert keep - 0.01 < small.config.kv_width / model.config.kv_width <= keep
        perplexities[method] = perplexity(small, text[-10 * 256 :], 256).perplexity
    assert all(math.isfinite(x) for x in perplexities.values())
    del perplexities["kv-heads"]  # it has five times the bytes
    assert min(perplexities, key=perplexities.__getitem__) == "fisher"


@pytest.mark.slow
@once
def test_refining_wins_back_quality(model, low, text):
    rows, test = text[: 24 * 256].view(24, 256), text[-10 * 256 :]
    small = low(Settings("eigen", 0.05, rank_multiple=2, kv_bits=(16,)))
    refined = refine(model, small, rows, RefineSettings(steps=16, batch=4, lr=2e-3, every=16))
    assert refined.best["held_out"] < 0.95 * refined.history[0]["held_out"]
    dense, before, after = (
        perplexity(m, test, 256).perplexity for m in (model, small, refined.model)
    )
    assert dense < after < before
