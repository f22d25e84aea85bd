"""Numbers that are none, and prompts on standard input."""

import io
from types import SimpleNamespace

import pytest
from typer.main import get_command

from eigenzoo.zoo.cli import app
from eigenzoo.zoo.cli.generate import _stdin

COMMANDS = get_command(app).commands


def of_floats() -> list[tuple[str, str, int]]:
    """Every option of every command that takes a float, and the arguments before it."""
    return [
        (name, p.opts[0], sum(x.required for x in command.params))
        for name, command in COMMANDS.items()
        for p in command.params
        if "float" in str(p.type_descriptor.annotation)
    ]


def test_no_option_takes_nan_or_infinity(run):
    assert len(of_floats()) > 10
    for command, option, arguments in of_floats():
        for number in ("nan", "-1e999"):
            code, text, said = run(command, *["x"] * arguments, option, number)
            assert (code, text) == (2, ""), (command, option)
            assert said.splitlines()[-1].startswith(f"error: Invalid value for '{option}'"), said
            assert "is no usable number" in said


@pytest.mark.parametrize("number", ["-1", str(2**64), "nan", "1.5"])
def test_a_seed_is_a_number_that_torch_takes(run, number):
    code, _, said = run("generate", "x", "-p", "a", "--seed", number)
    assert (code, "Invalid value for '--seed'" in said) == (2, True)


PROMPTS = {
    b"the cat\n": "the cat",
    b"the cat\r\n": "the cat",
    b"the cat\n\n": "the cat\n",
    b"the cat": "the cat",
    b"\xef\xbb\xbfna\xc3\xafve\nsat\n": "naïve\nsat",
}
NO_PROMPTS = {
    b"": "standard input is empty",
    b" \n": "standard input is empty",
    b"caf\xe9\n": "standard input is not text in UTF-8: byte 3 is 0xe9",
}


def piped(monkeypatch, content: bytes | None):
    stdin = None if content is None else io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr("sys.stdin", stdin)


def test_a_prompt_from_a_pipe_loses_its_last_line_end(monkeypatch):
    for content, prompt in PROMPTS.items():
        piped(monkeypatch, content)
        assert _stdin() == prompt


def test_a_pipe_without_a_prompt_is_refused(monkeypatch):
    for content, named in NO_PROMPTS.items():
        piped(monkeypatch, content)
        with pytest.raises(ValueError, match=named):
            _stdin()
    piped(monkeypatch, None)
    with pytest.raises(ValueError, match="no prompt: give --prompt"):
        _stdin()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ValueError, match="no prompt: give --prompt"):
        _stdin()
