"""Files of rows: append, read, and errors that name file and line."""

import json

import pytest

from eigenzoo.zoo.utils.jsonl import BENCH, MEASURED, SWEEP, append, read_rows, remove, resume

ROW = {
    "model": "tiny",
    "context": 64,
    "batch": 1,
    "slots": 64,
    "dtype": "float32",
    "threads": 1,
    "device": "cpu",
    "ops": "auto",
    "compiled": False,
    "command": "eigenzoo bench tiny",
    "failed": "no memory",
}


@pytest.fixture
def file(tmp_path):
    """A file of two rows."""
    path = tmp_path / "bench.jsonl"
    for context in (64, 128):
        append(path, ROW | {"context": context})
    return path


def test_rows_are_read_as_they_were_appended(file):
    assert read_rows(file, BENCH) == [ROW, ROW | {"context": 128}]
    row = append(file, ROW | {"more": (1, 2)})
    assert row["more"] == [1, 2]  # JSON has lists, not tuples
    assert read_rows(file, BENCH)[2] == row


def test_a_row_cut_anywhere_is_skipped_and_removed_before_another_is_appended(file):
    whole = file.read_bytes()
    line = json.dumps(ROW).encode() + b"\n"
    for length in range(len(line) - 1):
        file.write_bytes(whole + line[:length])
        assert len(read_rows(file, BENCH)) == 2
        assert file.read_bytes() == whole + line[:length]  # reading changes nothing
        assert len(resume(file, BENCH)) == 2
        assert file.read_bytes() == whole


def test_a_whole_row_without_its_newline_counts(file):
    file.write_bytes(file.read_bytes().rstrip())
    assert len(read_rows(file, MEASURED)) == len(resume(file, BENCH)) == 2
    append(file, ROW)
    assert len(read_rows(file, BENCH)) == 3


def test_a_missing_file_has_no_rows_to_resume(tmp_path):
    assert resume(tmp_path / "none.jsonl", BENCH) == []
    expected = r"none\.jsonl: does not exist; expected a file in which each line is a row that"
    with pytest.raises(ValueError, match=expected):
        read_rows(tmp_path / "none.jsonl", BENCH)
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder: expected a file"):
        read_rows(tmp_path, BENCH)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"my notes", "line 1: expected a row that eigenzoo bench wrote, but it is no JSON"),
        (b"\xff\xfe\n", "line 1: expected .*, but it is no JSON"),
        (b'{"a": 1}\n', "line 1: expected .*, but it lacks batch, command, compiled, .* and more"),
        (b"[1]\n", "line 1: expected .*, but it lacks"),
        (b'{"versions": ', "line 1: expected .*, but it is no JSON"),  # a cut row, but of a sweep
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text, problem):
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    for read in (read_rows, resume):
        with pytest.raises(ValueError, match=rf"notes\.txt, {problem}"):
            read(path, BENCH)
    assert path.read_bytes() == text


def test_a_damaged_line_between_rows_raises_an_error_that_names_it(file):
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second[:9] + b"\n" + second)
    with pytest.raises(ValueError, match=r"bench\.jsonl, line 2: expected .* no JSON"):
        read_rows(file, BENCH)
    lacking = {k: v for k, v in ROW.items() if k != "command"}
    file.write_bytes(first + second + json.dumps(lacking).encode() + b"\n")
    with pytest.raises(ValueError, match=r"line 3: expected .*, but it lacks command$"):
        read_rows(file, BENCH)
    with pytest.raises(ValueError, match="line 1: expected a row that eigenzoo sweep wrote"):
        read_rows(file, SWEEP)


def test_a_row_that_lost_power_while_it_was_written_is_removed(file):
    whole = file.read_bytes()
    for tail in (bytes(300), json.dumps(ROW).encode()[:50] + bytes(250)):
        file.write_bytes(whole + tail)
        assert len(resume(file, BENCH)) == 2
        assert file.read_bytes() == whole


def test_every_flipped_bit_of_a_row_stops_work_from_going_on(file):
    append(file, ROW | {"code": "1234"})
    whole = file.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for place in range(begin, len(whole) - 1):
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        file.write_bytes(damaged + whole[begin:])
        with pytest.raises(ValueError, match=r"bench\.jsonl, line 3"):
            resume(file, BENCH)
        assert file.read_bytes() == damaged + whole[begin:]


@pytest.mark.parametrize(
    ("name", "value"),
    [("context", "64"), ("batch", None), ("compiled", 1), ("versions", []), ("threads", 1.5),
     ("versions", {"torch": 2}), ("model", ["tiny"]), ("slots", True)],
)  # fmt: skip
def test_a_value_of_another_type_is_named(file, name, value):
    file.write_text(json.dumps(ROW | {name: value}) + "\n")
    with pytest.raises(ValueError, match=rf"line 1: expected .*, but it has no sound {name}$"):
        read_rows(file, BENCH)


def test_rows_that_are_removed_leave_the_others_as_they_were(file):
    first, _ = file.read_bytes().splitlines(keepends=True)
    remove(file, BENCH, lambda row: row["context"] == 128)
    assert file.read_bytes() == first
