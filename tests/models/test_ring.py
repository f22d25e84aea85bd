"""Caches that keep the last tokens, and the first, in rings of slots."""

import functools
from itertools import pairwise

import pytest
import tiny
import torch
from repeats import but

from eigenzoo.kernels.install import install
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference import generate, steps
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.moved import move
from eigenzoo.zoo.inference.perplexity import window_losses
from eigenzoo.zoo.inference.speculative import DraftModel, Lookup
from eigenzoo.zoo.models.cache import StaticCache
from eigenzoo.zoo.models.config import cache_bytes
from eigenzoo.zoo.models.mask import causal_matrix
from eigenzoo.zoo.models.model import Model
from eigenzoo.zoo.models.packing import Packed

SOME = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
GEMMA = ["sliding_attention", "full_attention"]
TEXT = 120  # tokens: several laps of a ring of a window of 7, which has 32 slots


@functools.cache
def low(family: str, keys: str = "", bits: tuple[int, ...] = (16,)) -> Model:
    """A model, compressed with keys of a kind if one is named."""
    sizes = {"n_layers" if family == "mpt" else "num_hidden_layers": 2}
    windows = {"mistral": {"sliding_window": 7}, "qwen2": SOME, "qwen3": SOME}
    windows["gemma3_text"] = {"sliding_window": 7, "layer_types": GEMMA, "head_dim": 8}
    dense = tiny.native(family, **windows.get(family, {}), **sizes)
    if not keys:
        return dense
    held = {"anchor_block": 3} if keys == "anchored 3" else {}
    kind = keys.split()[0]
    asked = Settings(
        keep=0.8, keys=kind, heads_per_latent=(4, 2), rank_multiple=8, kv_bits=bits, **held
    )
    return compress(dense, tiny.tokens(8, 64), asked).model


RINGED = {
    "dense": ("mistral",),
    **{f"anchored 3, {bits}": ("mistral", "anchored 3", (bits,)) for bits in (16, 8)},
    "anchored 64, segments": ("qwen2", "anchored", (8, 4)),
    "two rotations": ("gemma3_text", "anchored 3"),
    "two rotations, rebuild": ("gemma3_text", "rebuild"),
    "rebuild": ("mistral", "rebuild"),
    "rebuild, segments": ("qwen3", "rebuild", (8, 4)),
    "pairs": ("qwen2", "pairs"),
    "full": ("qwen2", "full"),
}
ringed = pytest.mark.parametrize("name", RINGED)


def whole_cache(model: Model, batch: int, slots: int) -> StaticCache:
    """A cache that keeps all slots in all layers."""
    latents = [(layer.attn.k, layer.attn.v) for layer in model.layers]
    return StaticCache(latents, batch, slots)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def logits(model: Model, x, cache: StaticCache, *ends: int, valid=None):
    """Logits of x, whose parts enter a cache one after the other, as `Generator` does it."""
    rows = []
    for start, end in pairwise((0, *ends)):
        if end - start == 1:
            rows.append(model(x[:, start:end], torch.arange(start, end), cache, valid))
        else:
            part = None if valid is None else valid[:, :end]
            rows.append(model(x[:, start:end], None, cache.first(end), part))
    return torch.cat(rows, 1)


# a lap and more at once, and steps before, across and after the ends of laps
ENDS = (9, 12, *range(13, 18), 30, *range(31, 38), 80, 83, *range(84, 100), TEXT - 1, TEXT)


@ringed
def test_far_past_the_window_logits_are_those_of_a_cache_of_all_slots(name):
    model, x = low(*RINGED[name]), tiny.tokens(2, TEXT)
    cache = model.new_cache(2, 2 * TEXT)
    assert cache.rings
    close(logits(model, x, cache, *ENDS), logits(model, x, whole_cache(model, 2, TEXT), *ENDS))
    again = x.flip(1)  # over what the first text left
    want = logits(model, again, whole_cache(model, 2, TEXT), *ENDS)
    close(logits(model, again, cache, *ENDS), want)


@ringed
def test_a_prompt_may_fill_the_cache_and_be_longer_than_the_ring(name):
    model, x = low(*RINGED[name]), tiny.tokens(2, 240)
    ends = 200, 239, 240  # of both: sums of other parts may round a code to its neighbor
    got = logits(model, x, model.new_cache(2, 240), *ends)
    close(got, logits(model, x, whole_cache(model, 2, 240), *ends))


@ringed
def test_prompts_of_different_lengths_are_answered_as_each_alone(name):
    model = low(*RINGED[name])
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (1, 40)]
    batch = Generator(model, 2, 240, compile=False).stream(prompts, 50)
    one = Generator(model, 1, 240, compile=False)
    alone = [torch.cat(list(one.stream([p], 50))) for p in prompts]
    assert torch.equal(torch.stack(list(batch), 1), torch.stack(alone))


@ringed
def test_padding_before_a_text_changes_nothing(name):
    model, x = low(*RINGED[name]), tiny.tokens(2, TEXT)
    valid = torch.ones(2, 2 * TEXT, dtype=torch.bool)
    valid[0, :21] = False
    got = logits(model, x, model.new_cache(2, 2 * TEXT), *ENDS, valid=valid)
    valid = valid[:, :TEXT]
    want = logits(model, x, whole_cache(model, 2, TEXT), *ENDS, valid=valid)
    close(got[valid], want[valid])


def test_the_cache_takes_the_bytes_of_windows_however_long_the_text():
    model = low("mistral")
    sizes = {slots: model.new_cache(3, slots).nbytes for slots in (24, 32, 33, 250)}
    token = 2 * 2 * 4 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert sizes == {24: 3 * 24 * token, **dict.fromkeys((32, 33, 250), 3 * 32 * token)}
    cache = model.new_cache(3, 250)
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in cache.keys + cache.values)
    assert cache.bytes_read(200) == 3 * 7 * token
    assert cache_bytes(model.config, 250) == 32 * token // 2  # of 16 bits


def test_keys_in_one_block_of_the_whole_context_keep_all_slots():
    model = low("qwen2", "rotated")
    cache = model.new_cache(2, 256)
    assert not cache.rings
    assert cache.nbytes == 2 * 256 * model.new_cache(1, 1).nbytes
    with pytest.raises(ValueError, match="one block of 256 positions, of which no window"):
        model.keep(20, 4)


def test_a_layer_without_a_window_keeps_all_slots():
    model = low("qwen2", "anchored", (8, 4))
    first, second = model.new_cache(1, 250).keys
    assert first.rows.shape[:2] == (1, 250)
    assert second.rows.shape[:2] == (2, 64)  # pages of a block
    assert model.new_cache(1, 250).nbytes == cache_bytes(model.config, 250)


@pytest.mark.parametrize("name", ["dense", "anchored 3, 8"])
def test_drafts_are_verified_over_rings(name):
    model, prompt = low(*RINGED[name]), tiny.tokens(1, 11)[0].tolist() * 2
    want = torch.cat(list(Generator(model, 1, TEXT, compile=False).stream([prompt], 60)))
    draft = DraftModel(Generator(model, 1, TEXT, compile=False), 5)
    for how in (Lookup(7), Lookup(17), draft):
        generator = Generator(model, 1, TEXT, compile=False)
        assert torch.equal(torch.cat(list(generator.stream([prompt], 60, draft=how))), want)
        assert how.accepted > 0


def test_drafts_that_would_overwrite_the_window_are_refused():
    model = low("mistral")
    for model_slots, draft_slots in ((TEXT, None), (30, TEXT)):
        generator, draft = Generator(model, 1, model_slots, compile=False), Lookup(18)
        if draft_slots:
            draft = DraftModel(Generator(model, 1, draft_slots, compile=False), 18)
        with pytest.raises(ValueError, match="given drafts of 18 tokens: expected at most 17"):
            next(generator.stream([[5]], 20, draft=draft))


def test_going_back_past_what_is_overwritten_is_refused():
    model, x = low("mistral"), tiny.tokens(1, 60)
    generator = Generator(model, 1, TEXT, compile=False)
    want = generator.advance(x[:, :44], 0)
    generator.advance(x[:, 44:60], 44)
    with pytest.raises(ValueError, match="holds 60 tokens, and slot 42 cannot follow"):
        generator.advance(x[:, 42:44], 42)
    close(generator.advance(x[:, 43:44], 43), want)
    with pytest.raises(ValueError, match="slot 42 cannot follow"):  # 59 may be overwritten still
        generator.advance(x[:, 42:44], 42)
    generator.advance(x[:, :20], 0)
    generator.advance(x[:, 5:6], 5)  # nothing is overwritten yet


def test_rows_of_rings_are_not_moved():
    model = low("mistral", "anchored 3")
    rings, whole = model.new_cache(1, TEXT), whole_cache(model, 1, TEXT)
    with pytest.raises(ValueError, match="keep only the last tokens"):
        move(whole, 0, rings, 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", but(["sinks"], ["dense", "anchored 64, segments", "sinks"]))
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_prompts_and_decoding_compile_once_each(name, backend):
    torch._dynamo.reset()
    model = sinks("llama", 20, 4) if name == "sinks" else low(*RINGED[name])
    compiled, eager = (Generator(model, 1, 240, compile=x) for x in (True, False))
    x = tiny.tokens(1, 240)
    spans = [(0, 30), (30, 50), (50, 51), (51, 57)]  # one of each kind
    for start, end in spans:
        compiled.advance(x[:, start:end].clone(), start)
    compiled.verify(x[:, 57:61], 57)
    with torch.compiler.set_stance("fail_on_recompile"):
        start = 0
        for end in (3, 9, 10, 11, 100, 101, 177, 240 - 1, 240):
            part = x[:, start:end].clone()
            close(compiled.advance(part, start), eager.advance(part, start))
            start = end
        compiled.advance(x[:, :200].clone(), 0)
        eager.advance(x[:, :200].clone(), 0)
        close(compiled.verify(x[:, 200:204], 200), eager.verify(x[:, 200:204], 200))


@pytest.mark.slow
@ringed
def test_fused_ops_read_rings(name):
    model = low(*RINGED[name])
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (40, 17)]
    want = list(Generator(model, 2, 240, compile=False).stream(prompts, 99))
    low.cache_clear()  # of the model, which is changed
    got = list(Generator(install(model), 2, 240, compile=False).stream(prompts, 99))
    assert torch.equal(torch.stack(got), torch.stack(want))


def sinks(family: str, window: int, count: int, *how) -> Model:
    low.cache_clear()  # each caller gets a model of its own
    return low(family, *how).keep(window, count)


@torch.inference_mode()
def masked(model: Model, x, window: int, count: int):
    """Logits of x if every token attends to the last ones and to the first, by a mask."""
    pos = torch.arange(x.size(1))
    kept = (pos > pos[:, None] - window) | (pos < count)
    y, pos, metadata = model.begin(x, mask=causal_matrix(pos, len(pos)) & kept)
    for layer in model.layers:
        y = layer(y, pos, metadata, None)
    return model.head(model.finish(y))


STREAMED = {
    **{family: (family,) for family in ("llama", "opt", "mpt", "mistral")},
    **{keys: ("llama", keys) for keys in ("rebuild", "anchored 3", "anchored", "pairs", "full")},
    "qwen2": ("qwen2", "anchored 3"),
}


@pytest.mark.parametrize(
    ("name", "window", "count"),
    [*((name, 20, 4) for name in STREAMED), ("anchored", 1, 0), ("mpt", 33, 17)],
)
def test_with_sinks_a_token_reads_the_last_tokens_and_the_first(name, window, count):
    (family, *how), x = STREAMED[name], tiny.tokens(2, TEXT)
    model = sinks(family, window, count, *how)
    close(logits(model, x, model.new_cache(2, 240), *ENDS), masked(model, x, window, count))


def test_with_sinks_packed_caches_decode_as_they_read_prompts():
    model, x = sinks("llama", 20, 4, "anchored 3", (8,)), tiny.tokens(2, TEXT)
    assert isinstance(model.new_cache(2, TEXT).keys[0], Packed)
    got = logits(model.double(), x, model.new_cache(2, 240), *ENDS)
    close(got, logits(model, x, model.new_cache(2, TEXT), TEXT))


def test_until_something_is_evicted_sinks_change_nothing():
    model, prompt = low("llama"), tiny.tokens(1, 9)[0].tolist()
    want = torch.cat(list(Generator(model, 1, TEXT, compile=False).stream([prompt], 80)))
    generator = Generator(sinks("llama", 60, 4), 1, TEXT, compile=False)
    got = torch.cat(list(generator.stream([prompt], 80)))
    assert torch.equal(got[: 60 + 4 - 9], want[: 60 + 4 - 9])
    assert not torch.equal(got, want)
    assert generator.cache.nbytes == (16 + 80) * 2 * 2 * 4 * 8 * 4 < model.new_cache(1, TEXT).nbytes
    whole = model.keep(0).new_cache(1, 64).nbytes
    assert model.keep(60, 4).new_cache(1, 64).nbytes == whole  # it never evicts


def test_perplexity_is_that_of_what_the_cache_keeps():
    model, rows = sinks("llama", 20, 4), tiny.tokens(2, 81)
    want = masked(model, rows[:, :-1], 20, 4).transpose(1, 2)
    close(
        window_losses(model, rows),
        torch.nn.functional.cross_entropy(want, rows[:, 1:], reduction="none"),
    )


@pytest.mark.parametrize("part", [3, 13, 50])
def test_a_long_prompt_is_read_in_parts_over_sinks(part, monkeypatch):
    monkeypatch.setattr(generate, "PART", part)
    model, x = sinks("llama", 20, 4), tiny.tokens(1, TEXT)
    got = Generator(model, 1, 240, compile=False).advance(x, 0)
    close(got, masked(model, x, 20, 4)[:, -1])


def test_the_form_that_is_compiled_reads_sinks():
    model, x = sinks("llama", 20, 4), tiny.tokens(1, TEXT)
    cache = model.new_cache(1, 240)
    logits(model, x, cache, TEXT - 1)
    with torch.inference_mode():
        got = steps.decode_by_layer(model, x[:, -1:], torch.tensor([TEXT - 1]), cache, None)
    close(got, masked(model, x, 20, 4)[:, -1])


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ((-1, 0), "a window of -1 and 0 sinks: expected 0 or more"),
        ((8, -2), "a window of 8 and -2 sinks: expected 0 or more"),
        ((0, 4), "4 sinks without a window"),
    ],
)
def test_numbers_that_cannot_be_kept_are_refused(kept, said):
    with pytest.raises(ValueError, match=said):
        low("llama").keep(*kept)


def test_prompts_of_different_lengths_and_sinks_are_refused():
    generator = Generator(sinks("llama", 20, 4), 2, TEXT, compile=False)
    with pytest.raises(ValueError, match=r"prompts of \[1, 2\] tokens, and a cache with sinks"):
        next(generator.stream([[5], [6, 7]], 9))
