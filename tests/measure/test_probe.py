import math
from random import Random

import pytest
import tiny
import torch
from copier import Copier

from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.perplexity import perplexity, token_losses
from eigenzoo.zoo.measure.probe import DEPTHS, Planted, by_position, plant, recall, retrieval

TEXT = tiny.WORDS * 20


@pytest.mark.parametrize(
    ("window", "edges"),
    [(40, [1, 40]), (64, [1, 64]), (65, [1, 64, 65]), (200, [1, 64, 128, 200])],
)
def test_buckets_double_and_average_to_the_perplexity(window, edges):
    model, tokens = tiny.native(), tiny.tokens(1, 3 * window)[0]
    buckets = by_position(token_losses(model, tokens, window))
    assert [x.start for x in buckets] == edges[:-1]
    assert [x.stop for x in buckets] == edges[1:]
    whole, count = perplexity(model, tokens, window), sum(x.tokens for x in buckets)
    assert count == whole.tokens
    mean = sum(x.tokens * x.loss for x in buckets) / count
    assert math.exp(mean) == pytest.approx(whole.perplexity, rel=1e-12)
    assert [x.perplexity for x in buckets] == [math.exp(x.loss) for x in buckets]


def test_a_bucket_holds_the_tokens_with_so_many_before_them():
    losses = torch.arange(1, 100).repeat(2, 1)  # of the token with that many tokens before it
    first, second = by_position(losses)
    assert (first.tokens, first.loss) == (2 * 63, 32.0)
    assert (second.tokens, second.loss) == (2 * 36, (64 + 99) / 2)


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_text_is_as_long_and_the_fact_as_deep_as_asked(begin, depth):
    words = tiny.tokenizer(begin)
    text = words(TEXT, add_special_tokens=False)["input_ids"]
    for length in (120, 201):
        prompt, answer = plant(words, text, length, depth, Random(3))
        assert len(prompt) + len(answer) == length
        assert (prompt[0] == words.bos_token_id) == begin
        whole = words.decode(prompt[begin:])
        before, fact, rest = whole.partition("\n\nThe secret number of ")
        after, asked, nothing = rest.partition("\n\nThe secret number of ")
        said, _, after = after.partition(".\n\n")
        assert (fact, nothing.split(" is")[0]) == (asked, said.split(" is")[0])
        assert nothing.endswith(" is")
        assert said.endswith(f" is{words.decode(answer)}")
        counts = [len(words(x, add_special_tokens=False)["input_ids"]) for x in (before, after)]
        assert counts[0] == pytest.approx(depth * sum(counts), abs=2)  # the cut may split a word


def test_lengths_that_do_not_fit_are_refused():
    words = tiny.tokenizer()
    with pytest.raises(ValueError, match="length is 40: expected 65 tokens"):
        plant(words, [5] * 1000, 40, 0.5, Random(0))
    with pytest.raises(ValueError, match="longer --text"):
        plant(words, [5] * 100, 1000, 0.5, Random(0))
    with pytest.raises(ValueError, match="has 256 learned positions"):
        retrieval(tiny.native("opt"), words, TEXT, [200, 300])


def test_a_text_may_be_as_long_as_the_model_can_read():
    (row,) = retrieval(tiny.native("opt"), tiny.tokenizer(), TEXT, [256], (0.5,), facts=1)
    assert (row.length, row.facts) == (256, 1)


def test_a_model_that_copies_finds_every_fact():
    rows = retrieval(Copier(), tiny.tokenizer(), TEXT, [150, 200], facts=2, seed=1)
    assert [(x.length, x.depth) for x in rows] == [(n, d) for n in (150, 200) for d in DEPTHS]
    assert all((x.facts, x.right) == (2, 1.0) for x in rows)
    assert all(x.loglikelihood == pytest.approx(0, abs=1e-6) for x in rows)


def test_a_model_that_sees_only_recent_tokens_finds_only_late_facts():
    rows = retrieval(Copier(near=100), tiny.tokenizer(), TEXT, [400], facts=2)
    assert [x.right for x in rows] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert rows[0].loglikelihood == pytest.approx(-math.log(320))


def test_a_random_model_finds_nothing_dense_or_compressed():
    dense = tiny.native()
    low = compress(dense, tiny.tokens(8, 64), Settings(keep=0.5, kv_bits=(16,))).model
    for model in (dense, low):
        rows = retrieval(model, tiny.tokenizer(), TEXT, [160], (0.0, 1.0), facts=3)
        assert [x.right for x in rows] == [0.0, 0.0]
        assert all(x.loglikelihood < -3 for x in rows)


def test_recall_is_greedy_decoding_and_teacher_forcing():
    model = compress(tiny.native(), tiny.tokens(8, 64), Settings(keep=0.5, kv_bits=(16,))).model
    prompt = tiny.tokens(1, 50, seed=5)[0].tolist()
    generator = Generator(model, 1, 56, compile=False)
    greedy = [int(x) for x in generator.stream([prompt], 6)]
    wrong = [*greedy[:5], greedy[5] + 1]
    recalled = [recall(generator, Planted(prompt, answer)) for answer in (greedy, wrong)]
    assert [right for right, _ in recalled] == [True, False]
    for answer, (_, mean) in zip((greedy, wrong), recalled, strict=True):
        logs = model(torch.tensor([prompt + answer]))[0, 49:55].log_softmax(-1)
        want = logs.gather(1, torch.tensor(answer)[:, None]).mean()
        assert mean == pytest.approx(float(want), abs=1e-4)


def test_every_depth_is_given_the_same_facts_and_another_seed_others():
    words = tiny.tokenizer()
    text = words(TEXT, add_special_tokens=False)["input_ids"]
    answers = [[plant(words, text, 150, d, Random(s)).answer for d in DEPTHS] for s in (0, 1)]
    assert len({tuple(x) for x in answers[0]}) == len({tuple(x) for x in answers[1]}) == 1
    assert answers[0] != answers[1]
