"""A cache that keeps only some tokens of a prompt reads as if the others were hidden."""

import copy

import pytest
import tiny
import torch
from exported import KINDS, of_kind
from torch.testing import assert_close

from eigenzoo.zoo.inference import evict
from eigenzoo.zoo.inference.evict import EvictingGenerator, kept_slots
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.moved import by_slot
from eigenzoo.zoo.inference.speculative import Lookup
from eigenzoo.zoo.models import model as base
from eigenzoo.zoo.models.attention import attention_weights, latent_attention
from eigenzoo.zoo.models.mask import CausalMask, causal_matrix, hide

BITS = {
    "k_ranks": (8,) * 3,
    "v_ranks": (8,) * 3,
    "k_segments": ("4x8+4x4",) * 3,
    "v_segments": ("", "4x8+4x4", "8x8"),
}
MORE = {  # name: kind, changes of the config
    "rotated keys": ("anchored keys", {"anchor": 256}),
    "anchored, packed": ("anchored keys", BITS),
    "ALiBi, packed": ("ALiBi", BITS),
    "joint latents": ("learned positions", {"joint_kv": True, "v_ranks": (0,) * 3}),
    "normed, anchored keys": ("normed, anchored keys", {}),
    "experts": ("experts", {}),
    "dynamic": ("dynamic", {}),
}
every_kind = pytest.mark.parametrize("kind", [*(k for k in KINDS if k != "windows"), *MORE])
COUNT, WINDOW = 50, 6  # tokens of the prompt; 2 behind its last whole block of anchored keys


def native(kind: str):
    of, changes = MORE.get(kind, (kind, {}))
    return of_kind(of, **changes).model


def evicting(model, keep: int, slots: int = 70, **options) -> EvictingGenerator:
    options = {"window": WINDOW, "compile": False} | options
    return EvictingGenerator(model, slots, 20, keep, **options)


def fed(generator: Generator, prompt, later) -> torch.Tensor:
    """Logits (T + 1, vocabulary) behind a prompt (1, N) and behind each of later tokens (1, T)."""
    rows = [generator.advance(prompt, 0)]
    for i, token in enumerate(later[0].tolist()):
        rows.append(generator.advance(torch.tensor([[token]]), prompt.size(1) + i))
    return torch.cat(rows)


def hidden(model, prompt, later, kept) -> torch.Tensor:
    """The same from a cache of all tokens, in which each layer sees only the slots kept (layers, N)
    of the prompt."""
    count, slots = prompt.size(1), prompt.size(1) + later.size(1)
    cache, rows = model.new_cache(1, slots), []
    model(prompt, None, cache.first(count))
    position = torch.arange(slots)[None]
    for i, token in enumerate(later.split(1, 1)):
        pos = torch.tensor([count + i])
        x = model.start(token, position[:, pos])
        for number, layer in enumerate(model.layers):
            gone = torch.ones(slots, dtype=torch.bool)
            gone[kept[number]] = gone[count:] = False
            mask = hide(causal_matrix(pos, slots), gone)
            metadata = model.attention_metadata(position, pos, mask)
            x = layer(x, pos, metadata, cache.layer(number))
        rows.append(model.head(model.finish(x))[:, 0])
    return torch.cat(rows)


def greedy(generator: Generator, prompt, count: int = 20) -> list[int]:
    return [int(x) for x in generator.stream(prompt.tolist(), count)]


@every_kind
@torch.inference_mode()
def test_nothing_changes_where_all_tokens_are_kept(kind):
    model, prompt, later = native(kind), tiny.tokens(1, COUNT), tiny.tokens(1, 8, seed=2)
    plain, evicts = Generator(model, 1, 70, compile=False), evicting(model, COUNT)
    assert_close(fed(evicts, prompt, later), fed(plain, prompt, later), atol=1e-5, rtol=0)
    assert evicts.dropped == 0
    assert greedy(evicts, prompt) == greedy(plain, prompt)


@every_kind
@torch.inference_mode()
def test_dropped_tokens_are_hidden_and_nothing_else_changes(kind):
    model, prompt, later = native(kind), tiny.tokens(1, COUNT), tiny.tokens(1, 8, seed=2)
    generator = evicting(model, 21)
    got = fed(generator, prompt, later)
    kept = generator.position[:, : COUNT - generator.dropped]
    if "ALiBi" not in kind:  # with which a random model keeps the nearest tokens
        assert len({tuple(slots) for slots in kept.tolist()}) > 1  # each layer has its own
    assert_close(got[1:], hidden(model, prompt, later, kept), atol=1e-5, rtol=0)
    whole = fed(Generator(model, 1, 70, compile=False), prompt, later)
    assert_close(got[0], whole[0], atol=1e-5, rtol=0)  # the prompt was read whole
    assert (got[1:] - whole[1:]).abs().amax(1).min() > 1e-3


@every_kind
@torch.inference_mode()
def test_several_tokens_at_once_read_as_one_after_the_other(kind):
    model, prompt, later = native(kind), tiny.tokens(1, COUNT), tiny.tokens(1, 6, seed=2)
    generator = evicting(model, 21)
    want = fed(generator, prompt, later)[1:]
    generator.advance(prompt, 0)
    assert_close(generator.verify(later, COUNT), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["rebuilt keys", "anchored, packed", "ALiBi"])
@torch.inference_mode()
def test_slots_are_weighed_by_the_attention_of_the_last_tokens(kind, monkeypatch):
    model, seen = native(kind), []

    def recorded(q, k, v, mask, scale):
        ones = torch.eye(k.size(2))[None, None]  # so that attention returns its weights
        seen.append(latent_attention(q, k, ones, mask, scale)[:, :, -WINDOW:].mean((1, 2)))
        return latent_attention(q, k, v, mask, scale)

    monkeypatch.setattr(base, "latent_attention", recorded)
    read = evicting(model, 21).read(tiny.tokens(1, COUNT))
    assert_close(read.seen, torch.cat(seen), atol=1e-6, rtol=1e-4)
    assert_close(read.seen.sum(1), torch.ones(3))


@pytest.mark.parametrize("masked", ["causal", "bool", "floats", "ALiBi"])
def test_attention_weights_are_those_of_attention(masked):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 1, 9, 6)
    mask = causal_matrix(torch.arange(4, 9), 9)
    if masked == "causal":
        mask = CausalMask(torch.arange(9) >= torch.tensor([[0], [2]]))
    elif masked == "ALiBi":
        mask = CausalMask(None, torch.arange(9)[None], torch.rand(4))
    elif masked == "floats":
        mask = torch.randn(2, 4, 5, 9).masked_fill(~mask, -torch.inf)
    weights = attention_weights(q, k, mask, 0.3)
    assert weights.shape == (2, 4, 5, 9)
    assert_close(weights @ v, latent_attention(q, k, v, mask, 0.3), atol=1e-5, rtol=1e-4)


def test_the_heaviest_slots_stay_with_their_neighbors_and_the_window():
    seen = torch.zeros(2, 50)
    seen[0, 20], seen[1, 7], seen[1, 30] = 1.0, 1.0, 0.5
    kept = kept_slots(seen, keep=26, window=4, block=1)
    assert {*range(15, 26), *range(46, 50)} <= {*kept[0].tolist()}
    assert kept[1].tolist() == [*range(2, 13), *range(25, 36), *range(46, 50)]
    assert kept_slots(seen, keep=50, window=4, block=1).tolist() == [[*range(50)]] * 2


def test_blocks_stay_whole_and_so_do_the_tokens_behind_the_last():
    seen = torch.zeros(2, 78)
    seen[0, 20], seen[1, 40], seen[1, 6] = 1.0, 0.5, 0.4
    kept = kept_slots(seen, keep=46, window=16, block=16)  # the window begins in block 3
    assert kept.tolist() == [[*range(16, 32), *range(48, 78)], [*range(32, 78)]]
    fewer, more = (kept_slots(seen, keep, window=16, block=16)[1].tolist() for keep in (45, 62))
    assert fewer == [*range(48, 78)]
    assert more == [*range(16), *range(32, 78)]


@pytest.mark.parametrize("kind", ["anchored, packed", "ALiBi, packed"])
@torch.inference_mode()
def test_rows_of_bytes_are_kept_as_they_are_in_a_cache_of_few_slots(kind):
    model, prompt = native(kind), tiny.tokens(1, COUNT)
    generator = evicting(model, 21, slots=200)
    read = generator.read(prompt)
    generator.take(read)
    assert generator.cache.nbytes * 200 == read.cache.nbytes * 41
    for i in range(3):
        for small, large in zip(generator.cache.layer(i), read.cache.layer(i), strict=True):
            rows = by_slot(large)[..., generator.position[i, : COUNT - generator.dropped], :]
            assert torch.equal(by_slot(small)[..., : COUNT - generator.dropped, :], rows)


@torch.inference_mode()
def test_a_prompt_that_is_read_in_parts_keeps_the_same(monkeypatch):
    model, prompt, later = native("anchored keys"), tiny.tokens(1, COUNT), tiny.tokens(1, 6, seed=2)
    whole = evicting(model, 21)
    want = fed(whole, prompt, later)
    monkeypatch.setattr(evict, "PART", 16)
    parts = evicting(model, 21)
    assert_close(fed(parts, prompt, later), want, atol=1e-5, rtol=0)
    assert torch.equal(parts.position, whole.position)


@torch.inference_mode()
def test_a_generator_takes_one_prompt_after_the_other():
    model, generator = native("anchored keys"), evicting(native("anchored keys"), 21)
    for count in (50, 1, 13, 21, 69):
        prompt = tiny.tokens(1, count, seed=count)
        got = greedy(generator, prompt, min(20, 71 - count))
        assert got == greedy(evicting(model, 21), prompt, min(20, 71 - count))


@pytest.mark.parametrize("kind", ["rebuilt keys", pytest.param("ALiBi", marks=pytest.mark.slow)])
def test_prompts_of_all_lengths_take_one_graph_and_decoding_another(kind):
    torch._dynamo.reset()
    model, later = native(kind), tiny.tokens(1, 8, seed=2)
    generator, eager = evicting(model, 21), evicting(model, 21)
    static = {"fullgraph": True, "backend": "eager"}
    generator._read = torch.compile(evict.watched, **static)
    generator._step = torch.compile(evict.kept_step, dynamic=False, **static)
    greedy(generator, tiny.tokens(1, 30), 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (50, 15, 22):
            prompt = tiny.tokens(1, count)
            got, want = fed(generator, prompt, later), fed(eager, prompt, later)
            assert_close(got, want, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_lookup_drafts_behind_dropped_tokens_too():
    model, prompt = native("anchored keys"), tiny.tokens(1, 10).repeat(1, 5)
    draft = Lookup(3)
    drafted = [int(x) for x in evicting(model, 21).stream(prompt.tolist(), 20, draft=draft)]
    assert drafted == greedy(evicting(model, 21), prompt)
    assert draft.proposed > 0


@pytest.mark.parametrize(
    ("kind", "sizes", "named"),
    [
        ("windows", {}, "has windows of 5 tokens"),
        ("anchored keys", {"keep": 8}, "expected 9 or more"),
        ("rebuilt keys", {"keep": 5}, "expected 6 or more"),
        ("rebuilt keys", {"window": 0}, "expected 1 to 1024"),
        ("learned positions", {"slots": 300}, "256 learned positions"),
    ],
)
def test_what_cannot_be_dropped_is_refused(kind, sizes, named):
    with pytest.raises(ValueError, match=named):
        evicting(native(kind), **{"keep": 21} | sizes)


def test_tokens_are_dropped_in_one_of_two_ways():
    model = copy.copy(native("rebuilt keys")).keep(8)
    with pytest.raises(ValueError, match="expected one of them"):
        evicting(model, 21)


def test_windows_that_no_text_fills_may_stay():
    model, prompt, later = native("windows"), tiny.tokens(1, 3), tiny.tokens(1, 2, seed=2)
    generator = evicting(model, 2, slots=5, window=1)
    with torch.inference_mode():
        got = fed(generator, prompt, later)
    assert generator.dropped == 1
    assert_close(got[1:], hidden(model, prompt, later, generator.position[:, :2]))


def test_more_tokens_than_there_is_room_for_are_refused():
    generator = evicting(native("rebuilt keys"), 21, slots=100)
    with pytest.raises(ValueError, match="at most 20"):
        next(generator.stream([[3] * 50], 21))
    with pytest.raises(ValueError, match="do not fit: expected one"):
        generator.advance(tiny.tokens(2, 50), 0)
    generator.advance(tiny.tokens(1, 50), 0)
    with pytest.raises(ValueError, match="at most 20 tokens after the prompt"):
        generator.advance(tiny.tokens(1, 1), 70)


def test_part_of_a_shared_model_is_refused():
    model = native("rebuilt keys")
    model.layers[0].attn.share = 0, 2
    with pytest.raises(ValueError, match="several processes"):
        evicting(model, 21)
