"""What perplexity alone hides: at which positions tokens get worse, and which facts are retrieved.

A compressed cache may cost little on average, and much for tokens far back in the context.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..inference.data import encode
from ..inference.evict import asking
from ..inference.generate import Generator
from ..inference.texts import Text
from ..models.model import Model

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = (
    "Athens", "Berlin", "Dublin", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Prague", "Rome",
    "Vienna", "Warsaw",
)  # fmt: skip


class Bucket(NamedTuple):
    """Perplexity of the tokens that have from `start` to `stop` - 1 tokens before them."""

    start: int
    stop: int
    tokens: int
    loss: float  # mean negative log-likelihood in nats
    perplexity: float


def by_position(losses: Tensor, first: int = 64) -> list[Bucket]:
    """Losses (windows, window - 1) as of `token_losses` in buckets of positions.

    The buckets end at `first`, twice that, and so on up to the window. The average of their losses,
    weighted by `tokens`, is the loss of all tokens.
    """
    window = losses.size(1) + 1
    doubled = (first << i for i in range(window.bit_length()))
    edges = [1, *(edge for edge in doubled if edge < window), window]
    buckets = []
    for start, stop in pairwise(edges):
        piece = losses[:, start - 1 : stop - 1].double()
        loss = piece.mean().item()
        buckets.append(Bucket(start, stop, piece.numel(), loss, math.exp(loss)))
    return buckets


class Planted(NamedTuple):
    """A text that states a fact and ends with a question about it, and the right answer."""

    prompt: list[int]
    answer: list[int]


def plant(
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    length: int,
    depth: float,
    random: Random,
) -> Planted:
    """`length` tokens, the answer included: a piece of `text` with a fact in it, and a question.

    depth: share of the piece before the fact, 0 to 1. Fact, number and piece are drawn at random.
    Raises ValueError if the length is too short for the fact, or too long for the text.
    """

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    asked = f"\n\nThe secret number of {random.choice(NAMES)} is"
    said = f"{asked} {random.randrange(10_000, 100_000)}"
    start, fact, question = list(tokenizer("")["input_ids"]), ids(f"{said}.\n\n"), ids(asked)
    answer = ids(said)[len(question) :]
    room = length - len(start) - len(fact) - len(question) - len(answer)
    if not 0 <= room <= len(text):
        least, most = length - room, length - room + len(text)
        raise ValueError(
            f"length is {length}: expected {least} tokens at least, for fact and question, and "
            f"{most} at most, which the text has; choose another --length or a longer --text"
        )
    offset, at = random.randint(0, len(text) - room), round(depth * room)
    piece = list(text[offset : offset + room])
    return Planted([*start, *piece[:at], *fact, *piece[at:], *question], answer)


def recall(generator: Generator, planted: Planted) -> tuple[bool, float]:
    """Whether greedy decoding gives the answer, and the mean log-likelihood of its tokens.

    The answer is fed token by token over the cache. Greedy decoding takes the same path up to its
    first mistake, so one pass measures both.
    """
    prompt, answer = (torch.tensor([x], device=generator.valid.device) for x in planted)
    rows = [generator.advance(prompt, 0)]
    for i in range(answer.size(1) - 1):
        rows.append(generator.advance(answer[:, i : i + 1], prompt.size(1) + i))
    logs, target = torch.cat(rows).float().log_softmax(-1), answer[0]
    right = bool((logs.argmax(-1) == target).all())
    return right, logs.gather(1, target[:, None]).mean().item()


class Retrieval(NamedTuple):
    """How well facts at one depth of texts of one length are retrieved."""

    length: int  # tokens
    depth: float  # 0: the fact begins the text; 1: it comes just before the question
    facts: int
    right: float  # share of facts that greedy decoding gives exactly
    loglikelihood: float  # mean per token of the right answer, in nats


def retrieval(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    facts: int = 5,
    seed: int = 0,
    bits: int | None = None,
    keep: int | None = None,
) -> list[Retrieval]:
    """Plant facts in texts of `lengths` tokens, ask for them, decode over the static cache.

    Every length and depth has the same facts. bits: as in `Generator`. keep: the most tokens of a
    text and its question that stay in the cache, as in `EvictingGenerator`; None: all. Raises
    ValueError for lengths that do not fit, and for a model that cannot drop tokens.
    """
    tokens = encode(tokenizer, text, model.config.vocab_size, special=False).tolist()

    def planted(length: int, depth: float) -> list[Planted]:
        random = Random(seed)
        return [plant(tokenizer, tokens, length, depth, random) for _ in range(facts)]

    plan = {length: [planted(length, depth) for depth in depths] for length in lengths}
    rows = []
    total = len(plan) * len(depths) * facts
    with tqdm(desc="asking", total=total, unit="fact", disable=None, leave=False) as bar:
        for length in sorted(
            plan, reverse=True
        ):  # the longest first: what does not fit fails at once
            new = max(len(one.answer) for texts in plan[length] for one in texts)
            generator = asking(model, 1, length, new, keep, bits)
            for depth, texts in zip(depths, plan[length], strict=True):
                answers = []
                for one in texts:
                    answers.append(recall(generator, one))
                    bar.update()
                right, logs = (sum(x) / facts for x in zip(*answers, strict=True))
                rows.append(Retrieval(length, depth, facts, right, logs))
    return sorted(rows)
