"""Speculative decoding gives the tokens of plain decoding, or their distribution."""

import pytest
import tiny
import torch
from repeats import but

from eigenzoo.kernels.install import install
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.generate import Generator, answer
from eigenzoo.zoo.inference.sampling import Sampling, choose, distribution
from eigenzoo.zoo.inference.speculative import DraftModel, Lookup, Proposal, accept
from eigenzoo.zoo.models.cache import Packed

PROMPT = [5, 9, 33, 7, 120, 8, 41, 5, 9, 33, 7]  # it repeats itself
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
ANCHORED = {"keys": "anchored", "anchor_block": 4, "heads_per_latent": (4, 2)}
KINDS = {  # family, changes, settings of the compression
    "anchored": ("llama", {"attention_bias": True}, ANCHORED),
    "packed": ("llama", {}, ANCHORED | {"kv_bits": (8, 4)}),
    "rebuilt": ("llama", {}, {"keys": "rebuild", "heads_per_latent": (4, 2)}),
    "windows": ("qwen2", WINDOWS, ANCHORED),
    "positions": ("opt", {}, {"heads_per_latent": (4, 1)}),
    "alibi": ("mpt", {}, {"heads_per_latent": (2, 4)}),
}


def low_and_dense(kind: str, layers: int = 3):
    """A compressed model and the dense one, which drafts what the other often says."""
    family, changes, settings = KINDS[kind]
    count = {"n_layers" if family == "mpt" else "num_hidden_layers": layers}
    dense = tiny.native(family, **changes, **count)
    asked = Settings(**{"keep": 0.6, "kv_bits": (16,), "rank_multiple": 2, **settings})
    return compress(dense, tiny.tokens(8, 64), asked).model, dense


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    return low_and_dense(request.param)


def tokens_of(generator: Generator, count: int, **options) -> list[int]:
    return torch.cat(list(generator.stream([PROMPT], count, **options))).tolist()


def poisoned(generator: Generator) -> Generator:
    """The generator, with numbers in all slots that would show in every later token."""
    for buffer in generator.cache.keys + generator.cache.values:
        if isinstance(buffer, Packed):
            buffer.rows.fill_(126)  # codes and scales are bytes
        else:
            buffer.fill_(1e4)
    return generator


def drafts(draft_of: str, dense, slots: int, compile: bool = False):
    if draft_of == "lookup":
        return Lookup(4)
    return DraftModel(Generator(dense, 1, slots, compile=compile, compile_prefill=False), 3)


@pytest.mark.parametrize("draft_of", ["lookup", "model"])
def test_greedy_tokens_are_those_without_drafts_and_rejected_ones_are_never_read(models, draft_of):
    low, dense = models
    want = tokens_of(Generator(low, 1, 72, compile=False), 60)
    draft = drafts(draft_of, dense, 72)
    generator = poisoned(Generator(low, 1, 72, compile=False))
    for _ in range(2):  # the second time over what the first one left
        assert tokens_of(generator, 60, draft=draft) == want
        assert 0 < draft.accepted <= draft.proposed
    assert tokens_of(generator, 60) == want


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_fused_ops_greedy_tokens_are_those_without_drafts(kind):
    low, dense = map(install, low_and_dense(kind))
    want = tokens_of(Generator(low, 1, 72, compile=False), 60)
    for draft in (Lookup(7), drafts("model", dense, 72)):
        assert tokens_of(poisoned(Generator(low, 1, 72, compile=False)), 60, draft=draft) == want
        assert draft.accepted


def test_a_last_slot_may_be_filled_and_what_comes_after_the_end_is_dropped(models):
    low, dense = models
    generator = Generator(low, 1, 40, compile=False)
    want, most = tokens_of(generator, 30), min(29, generator.cache.spare)
    for draft in (Lookup(most), drafts("model", dense, 40)):
        generator = Generator(low, 1, len(PROMPT) + 29, compile=False)
        assert tokens_of(generator, 30, draft=draft) == want
        end = want[-5]
        stopped = tokens_of(generator, 30, draft=draft, stop=[end])
        assert stopped == want[: want.index(end) + 1]


def test_a_wrong_draft_changes_nothing(models):
    class Wrong(Lookup):
        def propose(self, text, sampling, random):
            return Proposal([(want[len(text) - len(PROMPT)] + 1) % 320, 7, 7, 7])

    low, _ = models
    want = tokens_of(Generator(low, 1, 72, compile=False), 50)
    draft = Wrong(4)
    assert tokens_of(Generator(low, 1, 72, compile=False), 50, draft=draft) == want
    assert (draft.accepted, draft.proposed) == (0, 4 * 49)


def test_a_model_that_drafts_for_itself_is_always_right(models):
    low, _ = models
    draft = drafts("model", low, 80)
    tokens_of(Generator(low, 1, 80, compile=False), 41, draft=draft)
    assert draft.accepted == draft.proposed == 30


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=3), Sampling(0.7, 40, 0.9, seed=4)])
def test_sampled_tokens_with_a_lookup_are_those_without_it_at_the_same_seed(models, sampling):
    low, _ = models
    want = tokens_of(Generator(low, 1, 72, compile=False), 50, sampling=sampling)
    got = tokens_of(Generator(low, 1, 72, compile=False), 50, sampling=sampling, draft=Lookup(4))
    assert got == want


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("kind", but(("packed", "windows", "alibi"), KINDS))
def test_one_compiled_graph_verifies_drafts_of_a_length(kind, backend):
    low, dense = low_and_dense(kind, layers=2)
    want = tokens_of(Generator(low, 1, 72, compile=False), 60)
    generator = Generator(low, 1, 72, compile_prefill=False)
    compiled = kind == "alibi"  # the dense model drafts in a graph of its own, in one case
    given = [drafts(draft_of, dense, 72, compiled) for draft_of in ("lookup", "model")]
    given[0].tokens = given[1].tokens = 3
    assert tokens_of(generator, 5, draft=given[1]) == want[:5]
    with torch.compiler.set_stance("fail_on_recompile"):
        for draft in given:
            assert tokens_of(generator, 60, draft=draft) == want


def test_a_lookup_drafts_what_followed_the_latest_match():
    lookup = Lookup(3)
    lookup.begin([])
    text = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8]
    sampling, random = Sampling(), torch.Generator()
    assert lookup.propose(text, sampling, random) is None
    assert lookup.propose([*text, 1, 2, 3], sampling, random).tokens == [6, 7, 8]
    assert lookup.propose([*text, 1, 2, 3, 4, 5], sampling, random).tokens == [1, 2, 3]
    repeated = [*text, 1, 2, 3, 4, 5, 9, 9, 9]
    assert lookup.propose(repeated, sampling, random).tokens == [9, 9, 9]  # goes on from its start
    lookup.begin([])
    assert lookup.propose([1, 2, 3], sampling, random) is None


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=4, top_p=0.9)])
def test_accepted_and_redrawn_tokens_follow_the_model_whatever_the_draft(certain, sampling):
    """Two drafted tokens: all that is kept follows the model, given the tokens before it."""
    torch.manual_seed(0)
    logits, theirs = 1.5 * torch.randn(3, 5), 1.5 * torch.randn(2, 5)
    p, q = distribution(logits, sampling), distribution(theirs, Sampling(1.0))
    random, counts, kept = torch.Generator().manual_seed(1), torch.zeros(3, 5), 0
    for _ in range(8000):
        drafted = (p[:2].argmax(1) if certain else choose(theirs, Sampling(1.0), random)).tolist()
        tokens = accept(logits, Proposal(drafted, None if certain else q), sampling, random)
        assert tokens[:-1] == drafted[: len(tokens) - 1]
        kept += len(tokens) - 1
        for i, token in enumerate(tokens):
            counts[i, token] += 1
    for want, row in zip(p, counts, strict=True):
        n = row.sum()
        spread = (want * (1 - want) / n).sqrt()  # of a share among n independent draws
        assert n > 300
        assert ((row / n - want).abs() <= 4 * spread).all()
    if not certain:  # the highest rate that any exact scheme has, for two tokens
        rate = torch.minimum(p[:2], q).sum(1)
        assert kept / 8000 == pytest.approx(float(rate[0] + rate[0] * rate[1]), abs=0.03)


def test_sampling_from_a_draft_model_follows_the_model():
    """The pairs of tokens after one prompt are drawn as by plain sampling."""
    sizes = {"vocab_size": 8, "num_hidden_layers": 1}
    low, dense = (tiny.native("llama", seed, **sizes) for seed in (0, 1))
    for model in (low, dense):
        model.head.weight.mul_(8)  # peaked, so that the two models differ
    generator, prompt = Generator(low, 1, 8, compile=False), [[3, 5, 1]]
    draft = DraftModel(Generator(dense, 1, 8, compile=False), 2)
    seconds = torch.cat([torch.tensor([[*prompt[0], first]]) for first in range(8)])
    first = low(seconds[:1, :3], last=1)[0, 0].softmax(-1)
    want = first[:, None] * low(seconds, last=1)[:, 0].softmax(-1)
    counts, drawn = torch.zeros(8, 8), 1200
    for seed in range(drawn):
        sampling = Sampling(1.0, seed=seed)
        a, b, _ = torch.cat(list(generator.stream(prompt, 3, sampling, draft=draft))).tolist()
        counts[a, b] += 1
    spread = (want * (1 - want) / drawn).sqrt()
    assert ((counts / drawn - want).abs() <= 4.5 * spread + 1 / drawn).all()


def test_an_answer_counts_what_was_drafted():
    low, _ = low_and_dense("anchored")
    draft, shown = Lookup(4), []
    got = answer(Generator(low, 1, 72, compile=False), [PROMPT], 50, None, (), shown.append, draft)
    assert len(got.tokens[0]) == len(shown) == 50
    assert got.tokens_per_second > 0
    assert draft.proposed % 4 == 0 < draft.accepted < 50


def test_drafts_that_do_not_fit_are_refused_before_anything_is_written():
    low = tiny.native()
    one, two = (Generator(low, batch, 40, compile=False) for batch in (1, 2))
    small = tiny.native(vocab_size=300)
    for generator, prompts, draft, said in (
        (two, [PROMPT, PROMPT], Lookup(4), "given 2 sequences and a draft"),
        (one, [PROMPT], Lookup(0), "expected at least 1"),
        (one, [PROMPT], Lookup(20), "fewer than the new ones"),
        (one, [PROMPT], DraftModel(Generator(small, 1, 40, compile=False), 3), "knows 300 tokens"),
        (one, [PROMPT], DraftModel(Generator(low, 1, 30, compile=False), 3), "has 30 slots"),
        (one, [PROMPT], DraftModel(two, 3), "given 2 sequences"),
        (one, [PROMPT], DraftModel(one, 3), "the model's own"),
    ):
        with pytest.raises(ValueError, match=said):
            next(generator.stream(prompts, 20, draft=draft))
    assert not any(x.any() for g in (one, two) for x in g.cache.keys)
