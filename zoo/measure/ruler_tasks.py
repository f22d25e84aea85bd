"""Texts of any length that ask for something in them, after RULER (arXiv 2404.06654).

Every text is drawn from a seed and needs no data. Its `size` is the number of words that fill it:
what is asked for is drawn first, so that texts of one seed ask for the same at every size.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..inference.chat import render
from ..inference.data import encode
from .probe import NAMES

ADJECTIVES = (
    "big", "bright", "brown", "calm", "cold", "dark", "dry", "fresh", "gentle", "green", "heavy",
    "hungry", "little", "lonely", "loud", "narrow", "old", "plain", "quick", "quiet", "red", "slow",
    "small", "soft", "strange", "strong", "tall", "tired", "warm", "young",
)  # fmt: skip
VERBS = (
    "admires", "avoids", "carries", "covers", "draws", "finds", "follows", "greets", "guards",
    "hears", "holds", "ignores", "leaves", "lifts", "meets", "misses", "moves", "needs", "paints",
    "passes", "pulls", "pushes", "reaches", "sees", "sells", "shows", "touches", "wants", "watches",
)  # fmt: skip
NOUNS = (
    "apple", "artist", "baker", "basket", "bear", "bell", "bird", "boat", "book", "bottle", "bread",
    "bridge", "brother", "button", "candle", "carpet", "castle", "cat", "chair", "cheese", "child",
    "clock", "cloud", "coat", "corner", "cow", "cup", "dancer", "doctor", "dog", "door", "dress",
    "driver", "farmer", "feather", "fence", "field", "fish", "flower", "forest", "fox", "friend",
    "garden", "gate", "glass", "goat", "grandmother", "guest", "hammer", "hat", "hill", "horse",
    "hunter", "island", "jacket", "judge", "kettle", "king", "kitchen", "ladder", "lake", "lamp",
    "leaf", "letter", "lion", "market", "milk", "mirror", "mountain", "mouse", "nurse", "ocean",
    "orange", "painter", "paper", "pencil", "piano", "pilot", "plate", "pocket", "poet", "queen",
    "rabbit", "river", "road", "sailor", "school", "shadow", "sheep", "ship", "shoe", "singer",
    "spoon", "star", "stone", "table", "tailor", "tower", "tree", "valley", "village", "wagon",
    "window", "winter",
)  # fmt: skip
COMMON = 10  # words that are asked for


class Question(NamedTuple):
    """A text, a question about it, how an answer begins, and what the answer should name."""

    text: str
    asked: str
    begun: str
    expected: list[str]


def filled(random: Random, size: int, facts: Sequence[tuple[float, str]]) -> str:
    """`size` words of plain sentences, and among them facts, each at its depth, 0 to 1."""
    words: list[str] = []
    while len(words) < size:
        nouns = random.sample(NOUNS, 2)
        adjectives = random.sample(ADJECTIVES, 2)
        words += ["The", adjectives[0], nouns[0], random.choice(VERBS)]
        words += ["the", adjectives[1], f"{nouns[1]}."]
    words = words[:size]
    sentences = [" ".join(words[i : i + 7]) for i in range(0, size, 7)]
    placed = [((i + 0.5) / len(sentences), sentence) for i, sentence in enumerate(sentences)]
    return " ".join(sentence for _, sentence in sorted([*placed, *facts], key=lambda x: x[0]))


def numbers(random: Random, size: int, cities: int = 1, each: int = 1) -> Question:
    """Secret numbers of cities, `each` of every city; those of one city are asked for."""
    names = random.sample(NAMES, cities)
    drawn = [str(x) for x in random.sample(range(10_000, 100_000), cities * each)]
    facts = [
        (random.random(), f"The secret number of {names[i // each]} is {number}.")
        for i, number in enumerate(drawn)
    ]
    what = f"secret number of {names[0]}" if each == 1 else f"{each} secret numbers of {names[0]}"
    verb = "is" if each == 1 else "are"
    return Question(
        f"Remember the secret numbers in this text.\n\n{filled(random, size, facts)}",
        f"What {verb} the {what} in the text above?",
        f"The {what} {verb}",
        drawn[:each],
    )


def variables(random: Random, size: int, chains: int = 2, links: int = 5) -> Question:
    """Chains of assignments, each variable set to the one before; those of one value are asked."""
    values = random.sample(range(10_000, 100_000), chains)
    codes = random.sample(range(26**4), chains * links)
    names = ["".join(chr(65 + code // 26**i % 26) for i in range(4)) for code in codes]
    facts = []
    for chain, value in enumerate(values):
        depths = sorted(random.random() for _ in range(links))
        own = names[chain * links :][:links]
        given = [str(value), *(f"the value of {name}" for name in own)]
        facts += [
            (d, f"Set the variable {x} to {y}.")
            for d, x, y in zip(depths, own, given, strict=False)
        ]
    return Question(
        f"Follow which variables are set in this text.\n\n{filled(random, size, facts)}",
        f"Which {links} variables have the value {values[0]} in the text above?",
        f"The {links} variables with the value {values[0]} are",
        names[:links],
    )


def words(random: Random, size: int) -> Question:
    """A list of `size` words, half of it ten common ones, equally often; they are asked for."""
    drawn = random.sample(NOUNS, len(NOUNS))
    common, rare = drawn[:COMMON], drawn[COMMON:]
    listed = common * (size // (2 * COMMON))
    listed += [rare[i % len(rare)] for i in range(size - len(listed))]
    random.shuffle(listed)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return Question(
        f"Some words are more frequent than others in this list.\n\n{text}",
        f"What are the {COMMON} most frequent words of the list above?",
        f"The {COMMON} most frequent words are",
        common,
    )


class Task(NamedTuple):
    """How to draw a question of some size, its least size, and tokens that an answer may have."""

    draw: Callable[[Random, int], Question]
    least: int
    new: int


TASKS = {
    "single": Task(numbers, 0, 32),
    "keys": Task(partial(numbers, cities=8), 0, 32),
    "values": Task(partial(numbers, each=4), 0, 64),
    "variables": Task(variables, 0, 64),
    "words": Task(words, 4 * COMMON, 128),  # then common ones come twice, the others once
}


class Prompt(NamedTuple):
    """The tokens of a question, and what its answer should name."""

    tokens: Sequence[int]
    expected: list[str]


def prompt(
    tokenizer: PreTrainedTokenizerBase, name: str, length: int, seed: str, vocabulary: int
) -> Prompt:
    """A question of the task `name` that leaves room for its answer in `length` tokens.

    The text is as long as fits. The question is a user's message where the tokenizer has a chat
    template; the answer is begun. seed: any text. vocabulary: number of tokens that the model
    knows. Raises ValueError if the length is too short, for an unknown token, and for a template
    that fails.
    """
    task = TASKS[name]

    def encoded(size: int) -> Prompt:
        text, asked, begun, expected = task.draw(Random(seed), size)
        message, chat = f"{text}\n\n{asked}", bool(tokenizer.chat_template)
        if chat:
            whole = render(tokenizer, [{"role": "user", "content": message}], begun=True) + begun
        else:
            whole = f"{message}\n\n{begun}"
        tokens = encode(tokenizer, whole, vocabulary, special=not chat)
        return Prompt(array("l", tokens.tolist()), expected)

    room = length - task.new
    best, least, over = encoded(task.least), task.least, task.least + max(room, 0) + 1
    if len(best.tokens) > room:
        raise ValueError(
            f"length is {length}: expected {len(best.tokens) + task.new} tokens at least, for "
            f"question and answer of the task `{name}`; choose a longer --length"
        )
    slope = 1.0  # tokens that a word takes
    while over - least > 1:  # `least` words fit and `over` do not
        size = min(over - 1, least + max(1, int((room - len(best.tokens)) / slope)))
        tried = encoded(size)
        slope = max(1.0, (len(tried.tokens) - len(best.tokens)) / (size - least))
        if len(tried.tokens) <= room:
            best, least = tried, size
        else:
            over = size
    return best
