import re
import zlib
from collections import Counter
from math import sqrt
from random import Random

import pytest
import tiny
from copier import Copier

from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.measure.ruler import named, ruler
from eigenzoo.zoo.measure.ruler_tasks import NOUNS, TASKS, prompt

every_task = pytest.mark.parametrize("name", TASKS)
FACT = re.compile(r"The secret number of (\w+) is (\d{5})\.")


def draw(name: str, size: int, seed: int | str = 0):
    return TASKS[name].draw(Random(seed), size)


@every_task
@pytest.mark.parametrize("begin", [False, True])
def test_a_prompt_and_its_answer_are_just_as_long_as_asked(name, begin):
    words = tiny.tokenizer(begin)
    for length in (1000, 1501):
        for seed in "abc":
            tokens, expected = prompt(words, name, length, seed, 320)
            assert 0 <= length - TASKS[name].new - len(tokens) < 20  # a word of 11 letters is one
            assert (tokens[0] == words.bos_token_id) == begin
            assert named(words.decode(tokens), expected) == 1


@every_task
def test_a_question_stands_in_the_chat_template_and_its_answer_is_begun(name):
    words = tiny.tokenizer()
    words.chat_template = tiny.CHAT
    tokens, _ = prompt(words, name, 1000, "0", 320)
    question, begun = words.decode(tokens).split("<assistant>")
    assert question.startswith("<user>")
    assert question.endswith(draw(name, 50).asked[-6:])
    assert begun.startswith("The ")
    assert 0 <= 1000 - TASKS[name].new - len(tokens) < 20


@every_task
def test_a_seed_asks_for_the_same_at_every_size_and_others_for_other_things(name):
    asked = [[draw(name, size, seed).expected for size in (60, 600)] for seed in range(5)]
    assert all(short == long for short, long in asked)
    assert len({tuple(short) for short, _ in asked}) == 5
    assert draw(name, 60).text == draw(name, 60).text


def test_questions_are_the_same_in_every_process():
    drawn = "".join("".join(map(str, draw(name, 200, "a"))) for name in TASKS)
    assert zlib.crc32(drawn.encode()) == 4289550808  # a change here changes what results are about


@pytest.mark.parametrize(("name", "cities", "each"), [("single", 1, 1), ("keys", 8, 1)])
def test_a_number_is_asked_of_one_of_several_cities(name, cities, each):
    text, asked, begun, expected = draw(name, 200)
    facts = FACT.findall(text)
    assert len({city for city, _ in facts}) == len(facts) == cities
    (city,) = (city for city, number in facts if number in expected)
    assert city in asked
    assert begun == f"The secret number of {city} is"
    assert len(expected) == each


def test_all_numbers_of_one_city_are_asked_for():
    text, asked, _, expected = draw("values", 200)
    ((city, _), *_) = facts = FACT.findall(text)
    assert {x for x, _ in facts} == {city}
    assert {number for _, number in facts} == {*expected}
    assert len({*expected}) == 4
    assert city in asked


@pytest.mark.parametrize("seed", range(5))
def test_who_follows_the_assignments_finds_the_variables_with_the_value(seed):
    text, asked, _, expected = draw("variables", 200, seed)
    known: dict[str, str] = {}
    for variable, given in re.findall(r"Set the variable (\w+) to (?:the value of )?(\w+)\.", text):
        known[variable] = known.get(given, given)
    (value,) = {x for x in known.values() if x in asked}
    assert len(known) == 10
    assert all(value.isdigit() for value in known.values())
    assert {x for x, given in known.items() if given == value} == {*expected}


@pytest.mark.parametrize("size", [40, 59, 200, 5001])
def test_the_words_that_are_asked_for_are_twice_as_frequent_as_others(size):
    text, _, _, expected = draw("words", size)
    counts = Counter(re.findall(r"\d+\. (\w+)", text))
    assert counts.total() == size
    assert {word for word, _ in counts.most_common(10)} == {*expected}
    (_, tenth), (_, next_one) = counts.most_common(11)[-2:]
    assert tenth >= 2 * next_one


def test_words_of_a_list_are_distinct():
    assert len({*NOUNS}) == len(NOUNS) >= 100


def test_an_answer_is_worth_the_share_of_whole_words_that_it_names():
    assert named(" 12345. That is all.", ["12345"]) == 1
    assert named("it is 123456", ["12345"]) == 0
    assert named("CAT, bell and concatenate", ["cat", "bell", "river", "goat"]) == 0.5
    assert named("", ["cat"]) == 0


def test_a_model_that_copies_finds_single_numbers_and_no_words():
    (row,) = ruler(Copier(), tiny.tokenizer(), [700], samples=2)
    assert (row["length"], row["samples"], row["chat"]) == (700, 2, False)
    shares = {name: score["recall"] for name, score in row["tasks"].items()}
    assert shares["single"] == shares["keys"] == 1
    assert shares["words"] < 1
    assert row["mean"]["recall"] == pytest.approx(sum(shares.values()) / len(TASKS))
    errors = [x["standard_error"] for x in row["tasks"].values()]
    assert row["mean"]["standard_error"] == pytest.approx(sqrt(sum(e * e for e in errors)) / 5)


def test_what_is_out_of_sight_is_not_found():
    (row,) = ruler(Copier(near=30), tiny.tokenizer(), [900], samples=2)
    assert row["tasks"]["single"] == {"recall": 0, "standard_error": 0}


def test_batches_answer_as_single_texts_do_dense_and_compressed(monkeypatch):
    dense = tiny.native(max_position_embeddings=500)
    low = compress(dense, tiny.tokens(8, 64), Settings(keep=0.5, kv_bits=(16,))).model
    few = {name: TASKS[name] for name in ("single", "keys")}
    monkeypatch.setattr("eigenzoo.zoo.measure.ruler.TASKS", few)
    said: list[str] = []
    monkeypatch.setattr("eigenzoo.zoo.measure.ruler.named", lambda text, _: said.append(text) or 0)
    for model in (dense, low):
        for batch in (1, 2):
            ruler(model, tiny.tokenizer(), [450], samples=3, batch=batch)
    dense_one, dense_two, low_one, low_two = (said[i : i + 6] for i in range(0, 24, 6))
    assert dense_one == dense_two != low_one == low_two


def test_lengths_that_fit_neither_model_nor_task_are_refused():
    with pytest.raises(ValueError, match="length is 900: expected 256 at most, the positions"):
        ruler(tiny.native(), tiny.tokenizer(), [200, 900])
    with pytest.raises(ValueError, match=r"length is 200: expected \d+ tokens at least.*`keys`"):
        ruler(tiny.native(), tiny.tokenizer(), [200])
