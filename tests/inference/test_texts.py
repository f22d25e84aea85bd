"""Files of text, of rows with text, and of rows with chats; and what is no text."""

import gzip
import io
import json
import os
import re
import zipfile

import pytest
import tiny

from eigenzoo.zoo.compression.record import calibrated_on
from eigenzoo.zoo.inference.data import calibration_text, calibration_tokens, encode
from eigenzoo.zoo.inference.python_texts import python_help
from eigenzoo.zoo.inference.texts import read_text

ROWS = [{"id": 1, "text": "the cat sat"}, {"id": 2, "text": ""}, {"id": 3, "text": "on a mat"}]
WORDS = "the cat sat\n\n\n\non a mat"
CHATS = [
    {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": "a mat"}]}
    for x in ("the cat", "12 birds")
]
RENDERED = "<user>the cat<assistant>a mat<assistant><user>12 birds<assistant>a mat<assistant>"


def lines(rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def parquet(rows) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMS = {
    "a.jsonl": lines,
    "b.JSONL": lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\r\n") + b"\r\n",
    "c.ndjson": lines,
    "d.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "e.json": lines,
    "f.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "g.parquet": parquet,
}


def written(folder, name: str, content: bytes):
    (folder / name).write_bytes(content)
    return folder / name


def test_the_default_text_is_english_and_long():
    text = python_help(held_out=True)
    assert len(text) > 200_000
    assert " the " in text
    assert read_text(None).rows == [text]


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_text_are_read_and_not_the_syntax_around_them(tmp_path, name):
    text = read_text(written(tmp_path, name, FORMS[name](ROWS)))
    assert (text.name, text.column, len(text.rows)) == (name, "text", 3)
    assert text.words(tiny.tokenizer()) == WORDS


@pytest.mark.parametrize("name", FORMS)
def test_chats_go_through_the_chat_template_with_its_tokens_only(tmp_path, name):
    text, tokenizer = read_text(written(tmp_path, name, FORMS[name](CHATS))), tiny.tokenizer(True)
    tokenizer.chat_template = tiny.CHAT
    assert text.words(tokenizer) == RENDERED
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == RENDERED  # without a begin token, which a template has itself
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=f"{name}, chat 1: the tokenizer has no chat template"):
        encode(tokenizer, text)


def test_one_object_is_one_row_and_text_goes_before_messages(tmp_path):
    file = written(tmp_path, "a.json", json.dumps(CHATS[0] | ROWS[0], indent=1).encode())
    assert read_text(file).rows == ["the cat sat"]


def test_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    text = read_text(written(tmp_path, "a.jsonl", lines([row])))
    assert text.rows == [[{"role": "user", "content": "the cat"}]]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_a_byte_order_mark_is_no_text_and_line_ends_are_alike(tmp_path, name):
    text = read_text(written(tmp_path, name, b"\xef\xbb\xbfthe cat\r\nsat"))
    assert (text.rows, text.column) == (["the cat\nsat"], None)
    assert read_text(written(tmp_path, "a.txt.gz", gzip.compress(b"the cat"))).rows == ["the cat"]


def test_text_that_begins_like_json_is_text(tmp_path):
    for words in ('{"id": 3}\nthe cat', "[1] the cat", '{"text": '):
        assert read_text(written(tmp_path, "a.txt", words.encode())).rows == [words]


def no_chat(**message) -> bytes:
    return lines([{"messages": [message]}])


BAD = {
    "empty.txt": (b" \n", "empty.txt is empty"),
    "empty.jsonl": (b"\n\n", "empty.jsonl is empty"),
    "empty.json": (b"", "empty.json is empty"),
    "none.json": (b"[]", "none.json is empty"),
    "blank.jsonl": (b'{"text": ""}', "blank.jsonl is empty"),
    "list.jsonl": (b'{"text": "a"}\n["b"]', "row 2 is of type list: expected an object"),
    "word.json": (b'"the cat"', "word.json, row 1 is of type str"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b', "cut.jsonl, row 3 is no JSON"),
    "cut.json": (b'[{"text": "a"}', "cut.json is no JSON"),
    "deep.json": (b"[" * 100_000, "deep.json is no JSON"),
    "columns.jsonl": (b'{"id": 1, "words": "a"}', "row 1 has the columns id, words: expected `te"),
    "bare.jsonl": (b"{}", "row 1 has the columns none"),
    "mixed.jsonl": (b'{"text": "a"}\n{"messages": []}', "row 2 has the columns messages: expec"),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}', "row 2: `text` is null: expected a string"),
    "number.json": (b'[{"text": 3}]', "row 1: `text` is of type int"),
    "half.jsonl": (b'{"text": "\\ud800"}', "row 1 holds what is no Unicode text"),
    "talk.jsonl": (b'{"messages": "hello"}', "row 1: `messages` is of type str"),
    "silent.jsonl": (b'{"messages": []}', "row 1: `messages` is of type list"),
    "share.jsonl": (no_chat(**{"from": "human"}), "expected a list of objects with `role`"),
    "image.jsonl": (
        no_chat(role="user", content=[{"type": "image"}]),
        "row 1: a message has parts that are not text",
    ),
    "latin.txt": ("naïve".encode("latin-1"), "latin.txt is not a text file in UTF-8: byte 2"),
    "wide.txt": ("\ufeffthe cat".encode("utf-16"), "UTF-8: byte 0 is 0xff"),
    "wide.jsonl": (lines(ROWS).decode().encode("utf-16"), "UTF-8: byte 0 is 0xff"),
    "bare.txt": ("the cat".encode("utf-16-le"), "bare.txt is not a text file: it holds null bytes"),
    "model.safetensors": (b"\x10\0\0\0\0\0\0\0{}", "model.safetensors is not a text file"),
    "text.txt.zst": (b"\x28\xb5\x2f\xfd\x00", "text.txt.zst is not a text file"),
    "cut.txt.gz": (gzip.compress(b"the cat" * 99)[:-9], "cut.txt.gz cannot be read"),
    "text.jsonl.gz": (b'{"text": "a"}', "text.jsonl.gz cannot be read: Not a gzipped file"),
    "rows.txt": (b'{"text": "a"}\n{"text": "b"}', "rows.txt holds rows in JSON: name it .jsonl"),
    "rows": (json.dumps(ROWS, indent=1).encode(), "holds rows in JSON"),
    "table.csv": (b"id,text\n1,a", "table.csv is a table"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused_with_file_and_row(tmp_path, name):
    content, named = BAD[name]
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        read_text(written(tmp_path, name, content))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_that_is_cut_or_has_no_text_is_refused(tmp_path):
    whole = parquet([{"id": 1, "words": "a"}])
    with pytest.raises(ValueError, match="has the columns id, words: expected `text` or"):
        read_text(written(tmp_path, "a.parquet", whole))
    with pytest.raises(ValueError, match=r"b\.parquet is no whole parquet file"):
        read_text(written(tmp_path, "b.parquet", whole[:-8]))
    with pytest.raises(ValueError, match=r"c\.parquet, row 2: `text` is null"):
        read_text(written(tmp_path, "c.parquet", parquet([{"text": "a"}, {"text": None}])))


def test_without_pyarrow_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("eigenzoo.zoo.inference.texts.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package pyarrow: pip install 'eigenzoo\[data"):
        read_text(written(tmp_path, "a.parquet", b""))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as file:
        file.writestr("a", "the cat")
    cases = {
        tmp_path / "none.txt": "does not exist",
        tmp_path: "is a folder",
        tmp_path / "pipe": "is no regular file",
        tmp_path / "loop": "cannot be read: Too many levels",
        tmp_path / ("long" * 99): "cannot be read: File name too long",
        tmp_path / "a.txt" / "b": "does not exist",
        tmp_path / "a.txt": "is not a text file",
        "https://example.org/a.txt": "is an address: download it",
        "~nobody-here/a.txt": "does not exist",
    }
    for path, named in cases.items():
        with pytest.raises(ValueError, match=named):
            read_text(path)


def test_too_few_tokens_are_refused_with_the_file(tmp_path, dense):
    file = written(tmp_path, "few.jsonl", lines([{"text": "the cat"}]))
    with pytest.raises(ValueError, match=r"few\.jsonl has \d+ tokens: expected at least 64"):
        calibration_tokens(str(file), dense.model, dense.tokenizer, 2, 32)


def test_commands_read_rows_and_say_what_they_read(run, dense_folder, tmp_path):
    chats = written(tmp_path, "chats.jsonl", lines(CHATS * 60))
    rows = written(tmp_path, "rows.json", json.dumps([{"text": tiny.WORDS}] * 20).encode())
    plain = written(tmp_path, "plain.txt", "\n\n".join([tiny.WORDS] * 20).encode())
    words = ["--window", "64", "--windows", "2", "--json"]
    outputs = []
    for file in (rows, plain):
        code, text, said = run("evaluate", dense_folder, "--text", file, *words)
        assert code == 0, said
        outputs.append(json.loads(text)["perplexity"])
    assert outputs[0] == outputs[1]
    assert "read plain.txt: " in said
    out = ["compress", dense_folder, tmp_path / "low", "--calibration", chats, "--text", rows]
    code, text, said = run(*out, "--samples", 8, "--seq-len", 64, "--json")
    assert code == 0, said
    assert "read chats.jsonl: 120 rows of `messages`, " in said
    assert "read rows.json: 20 rows of `text`, " in said
    assert json.loads(text)["calibration"]["source"] == "chats.jsonl"


def test_texts_are_read_before_the_model_is(run, tmp_path):
    file, model = written(tmp_path, "table.csv", b"text\na"), tmp_path / "no-model"
    for words in (["compress", model, tmp_path / "o"], ["refine", model, tmp_path / "o"]):
        for option in ("--text", "--calibration"):
            assert "table.csv is a table" in run(*words, option, file)[2]
    for option in ("--text", "--calibration"):
        assert "table.csv is a table" in run("sweep", model, tmp_path / "o.jsonl", option, file)[2]
    assert "table.csv is a table" in run("evaluate", model, "--text", file)[2]


def test_a_file_is_named_without_its_folder(tmp_path, monkeypatch, dense):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "text.txt", tiny.WORDS.encode())
    (tmp_path / "selfish").mkdir()
    os.rename("text.txt", "selfish/text.txt")
    rows = calibration_text("selfish/text.txt", dense.model, dense.tokenizer, 2, 8)
    assert calibrated_on(rows.told(2), rows.tokens)["source"] == "text.txt"


def test_a_file_with_one_token_is_refused_before_the_long_work(run, dense_folder, tmp_path):
    file = written(tmp_path, "one.txt", b"a")
    out = ["compress", dense_folder, tmp_path / "low", "--text", file]
    code, _, said = run(*out, "--samples", 8, "--seq-len", 64)
    assert (code, "one.txt has 1 tokens: expected at least 2" in said) == (2, True)
