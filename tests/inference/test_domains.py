"""Texts of several domains: how they are read, cut and measured."""

import pytest
import tiny
import torch

from eigenzoo.zoo.inference import domains
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.domains import (
    Domain,
    all_rows,
    check_apart,
    domain,
    domains_record,
    python_domains,
    read_domains,
)
from eigenzoo.zoo.inference.perplexity import perplexity, window_losses
from eigenzoo.zoo.inference.python_texts import python_help, python_source
from eigenzoo.zoo.inference.texts import Text


@pytest.fixture(scope="module")
def model():
    return tiny.native()


@pytest.fixture
def files(tmp_path):
    for name in ("a.txt", "b=c.txt"):
        (tmp_path / name).write_text(f"{name} says: {tiny.WORDS}")
    return tmp_path


def test_domains_of_every_python_are_the_parts_that_nothing_is_calibrated_on():
    texts = python_domains()
    assert [x.rows for x in texts] == [[python_help(True)], [python_source(True)]]
    calibrated = python_help(False) + python_source(False)
    for text in texts:
        pieces = [x for x in text.rows[0].split("\n\n") if len(x) > 200]
        assert not [x for x in pieces if x in calibrated]


def test_a_domain_is_called_as_its_file_or_as_it_is_named(files):
    texts = read_domains(False, [str(files / "a.txt"), f"code={files / 'a.txt'}"])
    assert [x.name for x in texts] == ["a.txt", "code"]
    assert texts[0].rows == texts[1].rows
    texts = read_domains(False, [str(files / "b=c.txt"), f"x={files / 'b=c.txt'}"])
    assert [x.name for x in texts] == ["b=c.txt", "x"]
    assert [x.name for x in read_domains(True, [f"x={files / 'a.txt'}"])] == [
        "Python's own help",
        "Python's own source",
        "x",
    ]
    assert read_domains(False) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["none.txt"], "none.txt does not exist: expected a text file"),
        (["wiki=none.txt"], "none.txt does not exist: expected a text file"),
        (["wiki="], "the domain is 'wiki=': expected FILE or NAME=FILE"),
        (["=a.txt"], "the domain is '=a.txt': expected FILE or NAME=FILE"),
        (["a.txt", "a.txt"], "two domains are called a.txt: name them, as --domain NAME=FILE"),
    ],
)
def test_domains_that_are_none_are_refused(files, monkeypatch, given, said):
    monkeypatch.chdir(files)
    with pytest.raises(ValueError, match=said):
        read_domains(False, given)


def test_windows_of_the_beginning_are_those_of_the_whole_text(model):
    tokenizer = tiny.tokenizer()
    for text in python_domains():
        whole = encode(tokenizer, text)
        for windows in (1, 3):
            rows = domain(text, tokenizer, model, 64, windows).rows
            assert torch.equal(rows, whole[: 64 * windows].view(windows, 64))
    short = Text("short", ["x\n" * 200])  # fewer tokens than windows
    assert domain(short, tokenizer, model, 64, 100).rows.shape == (400 // 64, 64)


def test_a_text_of_long_tokens_is_read_whole(model, monkeypatch):
    monkeypatch.setattr(domains, "CHARACTERS", 1)  # so that the beginning has too few tokens
    tokenizer, text = tiny.tokenizer(), Text("words", [f"{tiny.WORDS}\n" * 20])
    rows = domain(text, tokenizer, model, 64, 2).rows
    assert torch.equal(rows, encode(tokenizer, text)[:128].view(2, 64))


def test_a_domain_without_a_window_is_refused_by_name(model):
    with pytest.raises(ValueError, match="wiki has 2 tokens: expected at least one window of 64"):
        domain(Text("wiki", ["the cat"]), tiny.tokenizer(), model, 64)


def test_perplexities_of_domains_are_those_of_their_texts_alone(model):
    other = tiny.native(seed=5)
    both = [Domain("a", "1", tiny.tokens(3, 32)), Domain("b", "2", tiny.tokens(1, 32, 7))]
    rows = all_rows(both)
    dense = [perplexity(model, x.rows.flatten(), 32).perplexity for x in both]
    after = [perplexity(other, x.rows.flatten(), 32).perplexity for x in both]
    record = domains_record(both, window_losses(other, rows), dense)
    assert [x["text"] for x in record["texts"]] == ["a", "b"]
    assert [x["tokens"] for x in record["texts"]] == [3 * 31, 31]
    assert [x["perplexity"] for x in record["texts"]] == pytest.approx(after)
    assert [x["dense_perplexity"] for x in record["texts"]] == dense
    more = [b / a - 1 for a, b in zip(dense, after, strict=True)]
    assert [x["increase"] for x in record["texts"]] == pytest.approx(more)
    assert record["increase"] == pytest.approx({"mean": sum(more) / 2, "worst": max(more)})
    alone = domains_record(both, window_losses(other, rows))
    assert "increase" not in alone
    assert "increase" not in alone["texts"][0]
    assert alone["perplexity"] == pytest.approx({"mean": sum(after) / 2, "worst": max(after)})


def test_a_text_that_is_calibrated_on_is_not_measured_on(files, tmp_path):
    same = tmp_path / "copy.txt"
    same.write_text((files / "a.txt").read_text())
    texts = read_domains(False, [str(files / "a.txt")])
    check_apart(texts, ["self", str(files / "b=c.txt")])
    with pytest.raises(ValueError, match=r"copy\.txt is calibrated on, so a\.txt would not show"):
        check_apart(texts, ["self", str(same)])


def test_windows_of_a_domain_begin_as_its_text_does_for_gemma_3(dense):
    text = Text("words", [tiny.WORDS * 4])
    found = domain(text, dense.tokenizer, tiny.native("gemma3_text"), 16, 3).rows
    tokens = encode(dense.tokenizer, text)
    assert found.shape == (3, 16)
    assert torch.equal(found[:, 0], tokens[:1].expand(3))
    assert torch.equal(found[:, 1:].flatten(), tokens[1:46])
