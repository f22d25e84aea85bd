"""How sources of calibration text are named, shared out, ordered and told."""

from fractions import Fraction

import pytest

from eigenzoo.zoo.inference import sources
from eigenzoo.zoo.inference.data import hold_out
from eigenzoo.zoo.inference.source_texts import check_source
from eigenzoo.zoo.inference.sources import described, divide, files, interleaved, parse, title, told


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with files whose names are hard to read."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "a,b.txt", "a:2", "self", "c"):
        (tmp_path / name).write_text("the cat sat")
    return tmp_path


def names(calibration):
    return [(source.name, float(source.share)) for source in parse(calibration)]


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ("self", [("self", 1)]),
        ("a.txt,self,hub:org/set:2", [("a.txt", 1), ("self", 1), ("hub:org/set", 2)]),
        ("hub:org/set:main", [("hub:org/set:main", 1)]),
        ("hub:org/set:main:2", [("hub:org/set:main", 2)]),
        ("hub:org/set:2024:1,c:.5", [("hub:org/set:2024", 1), ("c", 0.5)]),
        ("a.txt,b.txt:3", [("a.txt", 1), ("b.txt", 3)]),
        ("a.txt,self,a.txt:2", [("a.txt", 3), ("self", 1)]),
        ("hub:2", [("hub:2", 1)]),
        ("help:1e-300,source:1e300", [("help", 1e-300), ("source", 1e300)]),
    ],
)
def test_a_number_behind_the_last_colon_is_a_share(calibration, expected, here):
    assert names(calibration) == expected


def test_a_file_that_is_called_just_so_wins_over_commas_and_shares(here):
    assert names("a,b.txt") == [("a,b.txt", 1)]
    assert names("self,a,b.txt:2,c") == [("self", 1), ("a,b.txt", 2), ("c", 1)]
    assert names("a:2") == [("a:2", 1)]
    assert names("a:2:3,a:4") == [("a:2", 3), ("a", 4)]
    (here / "a,b.txt").unlink()
    (here / "a:2").unlink()
    assert names("a,b.txt") == [("a", 1), ("b.txt", 1)]
    assert names("a:2") == [("a", 2)]


def test_the_own_names_win_over_files(here):
    assert not parse("self")[0].is_file
    (here / "self:2").write_text("the cat sat")
    assert names("self:2,./self") == [("self", 2), ("./self", 1)]
    assert files("self,./self,c,hub:a") == ["./self", "c"]


def test_mixed_stands_for_its_parts_which_may_be_left_out():
    assert names("mixed") == [("self", 0.25), ("chat", 0.25), ("help", 0.25), ("source", 0.25)]
    assert all(source.optional for source in parse("mixed"))
    shares = {"self": 2.25, "chat": 0.75, "help": 0.75, "source": 0.75, "a.txt": 1}
    assert dict(names("mixed:3,a.txt,self:1.5")) == shares
    assert [s.name for s in parse("mixed,self") if not s.optional] == ["self"]


def test_the_shares_of_mixed_are_one_table(monkeypatch):
    monkeypatch.setattr(sources, "MIXED", {"self": 3, "help": 1})
    assert names("mixed") == [("self", 0.75), ("help", 0.25)]
    assert described("mixed") == "mixed: self:0.75, help:0.25"


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ("a.txt:0", "a.txt:0 has the share 0: expected a positive number"),
        ("a.txt:-1", "has the share -1: expected"),
        ("self:nan", "has the share nan: expected"),
        ("hub:org/set:inf", "has the share inf: expected"),
        ("self:9e999", "has the share inf: expected"),
        ("", "'' names no source of calibration text: expected a file, hub:"),
        ("self,,c", "'' names no source"),
        ("hub:", "'hub:' names no source"),
        ("hub::2", "'hub::2' names no source"),
        ("none.txt,self", "none.txt does not exist: expected a text file"),
        ("a.txt,mixd", "mixd does not exist: expected a text file, hub:.*, or one of mixed, self"),
        ("a.txt:two", "a.txt:two does not exist"),
        ("mixed:2,none.txt", "none.txt does not exist"),
    ],
)
def test_sources_that_cannot_be_had_are_refused_by_name(calibration, says, here):
    with pytest.raises(ValueError, match=says):
        check_source(calibration)


def test_fewer_samples_than_sources_are_refused(here):
    check_source("a.txt,b.txt,self", 3)
    with pytest.raises(ValueError, match=r"given 2 samples for 3 sources .*a.txt, b.txt, self"):
        check_source("a.txt,b.txt,self", 2)


def test_a_part_of_mixed_that_python_lacks_is_not_refused(monkeypatch):
    monkeypatch.setattr("eigenzoo.zoo.inference.python_texts.MODULES", ("sys",))
    check_source("mixed")
    with pytest.raises(ValueError, match="without the source of its module sys"):
        check_source("mixed,source")


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (32, [1, 1, 1, 1], [8, 8, 8, 8]),
        (10, [9, 1], [9, 1]),
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [2, 3, 3], [2, 4, 4]),  # 2.5, 3.75, 3.75
        (3, [1000, 1, 1], [1, 1, 1]),
        (10, [1000, 1, 1], [8, 1, 1]),
        (7, [100, 50, 1, 1], [3, 2, 1, 1]),
        (5, [1], [5]),
    ],
)
def test_samples_are_divided_by_largest_remainder_and_each_source_has_one(total, shares, counts):
    assert divide(total, [Fraction(x) / 7 for x in shares]) == counts


@pytest.mark.parametrize("counts", [(8, 8, 8, 8), (16, 8, 8), (28, 2, 2), (5, 5), (2, 2, 30)])
def test_rows_are_mixed_so_that_every_source_is_held_out(counts):
    import torch

    order = interleaved(counts)
    assert sorted(order) == [(s, row) for s, n in enumerate(counts) for row in range(n)]
    kept, held_out = hold_out(torch.tensor(order))
    missing = max(0, len(counts) - len(held_out))
    assert len({*held_out[:, 0].tolist()}) == len(counts) - missing
    assert {*kept[:, 0].tolist()} == {*range(len(counts))}


def test_the_only_row_of_a_source_is_calibrated_on():
    assert interleaved([30, 1, 1])[:3] == [(1, 0), (2, 0), (0, 0)]
    assert [row for _, row in interleaved([6])] == [*range(6)]


def test_the_first_rows_are_of_every_source():
    assert [source for source, _ in interleaved([8, 8, 8, 8])[:4]] == [0, 1, 2, 3]


def test_records_tell_of_texts_source_by_source_without_folders(here):
    rows = ["self", "help"] * 2 + ["source"]
    assert told("mixed", rows) == "mixed: self 2, help 2, source 1 sequences"
    assert described("mixed") == "mixed: self, chat, help, source"
    assert title("mixed") == title("mixed:2") == "mixed"
    path = str(here / "a.txt")
    assert told(path, ["a.txt"] * 3) == described(path) == title(path) == "a.txt"
    mixture = f"{path}:2,self"
    assert told(mixture, ["a.txt", "self", "a.txt"]) == "a.txt 2, self 1 sequences"
    assert described(mixture) == "a.txt:2, self:1"
    assert title(mixture) == "a.txt, self"
    assert title(f"hub:{here}") == f"hub:{here.name}"
    assert title("hub:org/set:main") == "hub:org/set:main"
