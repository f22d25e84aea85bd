import pytest

from eigenzoo.zoo.inference import python_texts
from eigenzoo.zoo.inference.python_texts import python_help, python_source
from eigenzoo.zoo.inference.source_texts import excerpts


@pytest.mark.parametrize("read", [python_help, python_source])
def test_what_is_measured_on_is_never_calibrated_on(read):
    held_out, rest = read(held_out=True), read(held_out=False)
    assert min(len(held_out), len(rest)) > 50_000
    pieces = [rest[i : i + 300] for i in range(0, len(rest), 300)]
    assert not any(piece in held_out for piece in pieces if len(piece.strip()) > 100)


def test_a_module_without_source_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(python_texts, "MODULES", ("sys",))
    with pytest.raises(ValueError, match="without the source of its module sys"):
        python_source(held_out=False)


def test_little_of_a_long_text_is_taken_from_all_over_it():
    text = "".join(f"line {i}\n" for i in range(10_000))
    taken = excerpts(text, 4000)
    assert 3900 <= len(taken) <= 4000
    numbers = [int(line.split()[1]) for line in taken.splitlines() if line.count(" ") == 1][::20]
    assert numbers[0] == 0
    assert numbers[-1] > 9000
    assert excerpts(text, 0) == excerpts(text, len(text)) == text
