import json

import pytest
import tiny
import torch

from eigenzoo.zoo.inference import hub_rows
from eigenzoo.zoo.inference.data import calibration_tokens, encode, encode_prompt
from eigenzoo.zoo.inference.hub_rows import hub_text


def test_windows_of_a_file_spread_over_its_length(tmp_path, dense):
    path = tmp_path / "text.txt"
    path.write_text(tiny.WORDS * 50)
    rows = calibration_tokens(str(path), dense.model, dense.tokenizer, 5, 20)
    every = encode(dense.tokenizer, path.read_text())
    every = every[: len(every) // 20 * 20].view(-1, 20)
    assert rows.shape == (5, 20)
    assert torch.equal(rows[0], every[0])
    assert torch.equal(rows[-1], every[-1])


def test_windows_for_gemma_3_all_begin_as_its_texts_do(tmp_path, dense):
    path = tmp_path / "text.txt"
    path.write_text(tiny.WORDS * 50)
    rows = calibration_tokens(str(path), tiny.native("gemma3_text"), dense.tokenizer, 5, 20)
    every = encode(dense.tokenizer, path.read_text())
    assert rows.shape == (5, 20)
    assert rows[:, 0].tolist() == [every[0]] * 5
    last = 1 + (len(every) - 1) // 19 * 19
    assert torch.equal(rows[0], every[:20])
    assert torch.equal(rows[-1, 1:], every[last - 19 : last])


def test_a_short_file_gives_fewer_windows_and_one_is_too_few(tmp_path, dense):
    path = tmp_path / "text.txt"
    path.write_text(tiny.WORDS)
    count = len(encode(dense.tokenizer, tiny.WORDS))
    rows = calibration_tokens(str(path), dense.model, dense.tokenizer, 50, count // 3)
    assert len(rows) == 3
    with pytest.raises(ValueError, match=f"has {count} tokens: expected at least"):
        calibration_tokens(str(path), dense.model, dense.tokenizer, 50, count // 2 + 1)


def test_the_model_writes_its_own_text(dense):
    rows = calibration_tokens("self", dense.model, dense.tokenizer, 3, 16, seed=5)
    assert rows.shape == (3, 16)
    assert (rows[:, 0] == dense.tokenizer.bos_token_id).all()


def test_a_dataset_is_streamed(tmp_path, dense, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [json.dumps({"text": f"{i} {tiny.WORDS}"}) for i in range(40)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    rows = calibration_tokens(f"hub:{tmp_path}/set", dense.model, dense.tokenizer, 4, 16)
    assert rows.shape == (4, 16)
    assert "the cat" in dense.tokenizer.decode(rows[0])


def test_rows_of_a_dataset_are_shuffled_by_the_seed(tmp_path, dense, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [json.dumps({"text": str(i)}) for i in range(hub_rows.BUFFER + 200)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    first, again, other = (hub_text(f"{tmp_path}/set", 300, seed).rows for seed in (0, 0, 1))
    assert first == again
    assert first != other
    numbers = [int(row) for row in first]
    assert numbers != sorted(numbers)
    assert max(numbers) > 2 * len(numbers)  # not of the first rows alone
    rows = [
        calibration_tokens(f"hub:{tmp_path}/set", dense.model, dense.tokenizer, 4, 16, seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_dataset_without_text_raises_an_error_that_names_it(tmp_path, dense):
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    (tmp_path / "train.jsonl").write_text(json.dumps({"words": "none"}))
    with pytest.raises(ValueError, match="expected `text`"):
        calibration_tokens(f"hub:{tmp_path}", dense.model, dense.tokenizer, 4, 16)


def test_a_prompt_goes_through_the_chat_template_if_there_is_one(dense):
    ids = encode_prompt(dense.tokenizer, "the cat")
    assert dense.tokenizer.decode(ids) == "<user>the cat<assistant>"
    assert (
        dense.tokenizer.decode(encode_prompt(dense.tokenizer, "the cat", chat=False)) == "the cat"
    )


def test_a_prompt_that_cannot_be_encoded_is_refused():
    tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, "x", chat=True)
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(tokenizer, "")
    with pytest.raises(ValueError, match="prompt is not text in UTF-8"):
        encode_prompt(tokenizer, "caf\udce9")  # as Python gives the byte 0xe9 of a command line
    tokenizer.chat_template = tiny.CHAT
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(tokenizer, " \n")


def test_a_token_that_the_model_does_not_know_is_named(dense):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(320 - len(tokenizer))])
    tokenizer.add_tokens(["zebra"])
    said = r"has token 320, 'zebra', of the tokenizer's 321, but the model knows 320"
    with pytest.raises(ValueError, match=f"the prompt {said}"):
        encode_prompt(tokenizer, "the zebra", vocabulary=320)
    with pytest.raises(ValueError, match=f"the text {said}"):
        encode(tokenizer, "the zebra", 320)
    tokenizer.bos_token = "zebra"
    with pytest.raises(ValueError, match=f"text sampled from the model {said}"):
        calibration_tokens("self", dense.model, tokenizer, 2, 8)
