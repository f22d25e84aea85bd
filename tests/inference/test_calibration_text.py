"""Calibration text of several sources, and the model's own chats."""

import logging
from collections import Counter

import pytest
import tiny
import torch

from eigenzoo.zoo.inference import own_text
from eigenzoo.zoo.inference.data import calibration_text, calibration_tokens, hold_out
from eigenzoo.zoo.inference.own_text import Dialog, Turns, chat_turns, sample_chats
from eigenzoo.zoo.inference.texts import read_text


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny.WORDS * 30)
    return str(path)


def sampled(dense, source, samples=8, length=24, tokenizer=None, **more):
    words = tokenizer or dense.tokenizer
    return calibration_text(source, dense.model, words, samples, length, **more)


def test_every_source_gives_its_share_of_rows(dense, text):
    rows = sampled(dense, f"{text}:5,self,help:2", samples=16)
    assert rows.tokens.shape == (16, 24)
    assert Counter(rows.names) == {"text.txt": 10, "self": 2, "help": 4}
    assert {*hold_out(torch.arange(16))[1].tolist()} == {14, 15}
    assert rows.names[14:] == ["self", "help"]
    assert rows.told(14) == "text.txt 10, self 1, help 3 sequences"


def test_the_rows_of_a_mixture_are_those_of_its_sources(dense, text):
    rows = sampled(dense, f"{text},self", seed=3)
    alone = {
        "text.txt": calibration_tokens(text, dense.model, dense.tokenizer, 4, 24),
        "self": calibration_tokens("self", dense.model, dense.tokenizer, 4, 24, seed=3),
    }
    for name, want in alone.items():
        mine = [row for row, of in zip(rows.tokens, rows.names, strict=True) if of == name]
        assert torch.equal(torch.stack(mine), want)


def test_chats_of_a_file_go_through_the_template_in_a_mixture(dense, text, tmp_path):
    chats = tmp_path / "chats.jsonl"
    line = '{"messages": [{"role": "user", "content": "the cat"}]}\n'
    chats.write_text(line * 40)
    rows = sampled(dense, f"{chats},{text}", samples=4)
    first = dense.tokenizer.decode(rows.tokens[rows.names.index("chats.jsonl")])
    assert first.startswith("<user>the cat<assistant>")


def test_mixed_is_own_text_and_what_python_brings_along(dense):
    rows = sampled(dense, "mixed")
    assert Counter(rows.names) == {"self": 2, "chat": 2, "help": 2, "source": 2}
    first = [dense.tokenizer.decode(rows.tokens[rows.names.index(x)]) for x in ("chat", "source")]
    assert first[0].startswith("<user>")
    assert first[1].startswith('"""Get useful')


def test_what_is_measured_on_is_in_no_row_of_mixed(dense):
    rows = sampled(dense, "help,source", samples=64, length=120)
    measured = read_text(None).rows[0]
    for row in rows.tokens:
        assert dense.tokenizer.decode(row[10:-10]) not in measured


def test_mixed_does_without_what_cannot_be_had_and_says_so(dense, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    plain = tiny.tokenizer()
    rows = sampled(dense, "mixed", samples=9, tokenizer=plain)
    assert Counter(rows.names) == {"self": 3, "help": 3, "source": 3}
    assert rows.told(9) == "mixed: self 3, help 3, source 3 sequences"
    assert "mixed: without chat, since the tokenizer has no chat template" in caplog.text
    monkeypatch.setattr("eigenzoo.zoo.inference.python_texts.MODULES", ("sys",))
    plain.bos_token = plain.eos_token = None
    assert {*sampled(dense, "mixed", tokenizer=plain).names} == {"help"}
    assert "mixed: without self, since the tokenizer has no begin or end token" in caplog.text
    assert "mixed: without source, since this Python comes without" in caplog.text


@pytest.mark.parametrize("name", ["chat", "mixed,chat"])
def test_chats_that_were_asked_for_need_a_template(dense, name):
    with pytest.raises(ValueError, match="no chat template"):
        sampled(dense, name, tokenizer=tiny.tokenizer())


def test_a_short_source_gives_fewer_rows_and_says_so(dense, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "short.txt"
    path.write_text(tiny.WORDS)
    rows = sampled(dense, f"{path},help", samples=20)
    count = rows.names.count("short.txt")
    assert 1 < count < 10 == rows.names.count("help")
    assert f"short.txt gives {count} sequences instead of 10" in caplog.text
    path.write_text("the cat")
    with pytest.raises(ValueError, match=r"short.txt has \d tokens: expected at least 24;"):
        sampled(dense, f"{path},help")


def test_texts_are_read_before_anything_is_sampled(dense, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("the cat")
    monkeypatch.setattr(own_text, "sample_text", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="expected at least 24"):
        sampled(dense, f"self,{tmp_path}/short.txt")


TURNS = Turns([1, 2], [9, 3, 4], [9, 5], end=0)


def test_the_template_speaks_between_the_messages_of_a_chat():
    dialog = Dialog(TURNS)
    drawn = [7, 8, 9, 7, 7, 6, 9, 7, 7, 7, 7, 0, 8, 8, 6]
    #        user  ends      answer  ends, next chat user ends
    want = [7, 8, 9, 3, 4, 6, 9, 5, 1, 2, 7, 9, 3, 4, 6]
    assert [dialog.take(x) for x in drawn] == want


def test_chats_are_written_by_the_model_from_the_opening_of_a_user(dense):
    turns = chat_turns(dense.tokenizer, dense.model)
    texts = [dense.tokenizer.decode(x) for x in (turns.opening, turns.answering, turns.closing)]
    assert texts == ["<user>", "<assistant>", "<assistant>"]
    rows = sample_chats(dense.model, turns, 3, 64, seed=1)
    assert rows.shape == (3, 64)
    size = len(turns.opening)
    assert (rows[:, :size] == torch.tensor(turns.opening)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert torch.equal(rows, sample_chats(dense.model, turns, 3, 64, seed=1))
    assert not torch.equal(rows, sample_chats(dense.model, turns, 3, 64, seed=2))


def test_messages_are_drawn_as_the_model_predicts_them(dense):
    turns = chat_turns(dense.tokenizer, dense.model)
    never = turns._replace(answering=[319, 318], closing=[319], end=None)
    (row,) = sample_chats(dense.model, never, 1, 40, seed=5)
    random, start = torch.Generator().manual_seed(5), len(turns.opening)
    for place in range(start, 12):
        logits = dense.model(row[None, :place])[:, -1].float()
        drawn = logits.softmax(-1).multinomial(1, generator=random).item()
        if drawn == 319:
            break
        assert drawn == row[place]
    assert place > start


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not mark where messages"),
        ("{{ raise_exception('no') }}", "the chat template of the tokenizer fails: no"),
        ("<user>{{ messages[0].content }}", "does not mark where messages begin"),
    ],
)
def test_a_template_that_marks_no_messages_is_refused_and_mixed_does_without(dense, template, says):
    words = tiny.tokenizer()
    words.chat_template = template
    with pytest.raises(ValueError, match=says):
        sampled(dense, "chat", tokenizer=words)
    assert "chat" not in sampled(dense, "mixed", tokenizer=words).names


def test_a_template_that_fills_a_sequence_leaves_no_room_for_chats(dense):
    with pytest.raises(ValueError, match=r"a chat begins with .* leave no room in sequences of 4"):
        sampled(dense, "chat", length=4)
    assert "chat" not in sampled(dense, "mixed", length=4).names
