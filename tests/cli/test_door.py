import importlib

import fresh
import pytest
import torch
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError

from eigenzoo.zoo import cli
from eigenzoo.zoo.cli.refusal import LONGEST, one_line, reason

ENTRY = "from eigenzoo.zoo.cli import main; main()"
PIPED = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, {number})
from eigenzoo.zoo.cli import main
main()
"""


@pytest.fixture
def raising(run, monkeypatch):
    """Call the command line, which raises an error at its first step."""

    def call(error, *words):
        def locate(*_):
            raise error

        importlib.import_module("eigenzoo.zoo.measure.plan")  # keeps the `locate` that it finds
        monkeypatch.setattr("eigenzoo.zoo.inference.checkpoint.locate", locate)
        return run(*words, "inspect", "model")

    return call


ERRORS = {
    "a full disk": (OSError(28, "No space left on device", "out"), "No space left on device: out"),
    "two names": (OSError(18, "Cross-device link", "a", None, "b"), "Cross-device link: a: b"),
    "words of a library": (OSError("no tokenizer\nat all"), "no tokenizer at all"),
    "memory": (MemoryError(), "not enough memory"),
    "memory of torch": (
        RuntimeError("[enforce fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        "not enough memory: [enforce fail",
    ),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory: CUDA"),
    "a template": (TemplateSyntaxError("unexpected end", 1), "unexpected end"),
    "safetensors": (SafetensorError("header too large"), "header too large"),
    "a package": (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'"),
    "nothing to say": (ValueError(), "ValueError"),
    "escapes": (ValueError("a\x1b[2J\u202eb\x00"), "a\\x1b[2J\\u202eb\\x00"),
    "invalid UTF-8": (ValueError("a\udcffb"), "a\\udcffb"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_input_or_machine_is_one_line(raising, name):
    error, said = ERRORS[name]
    code, text, stderr = raising(error)
    assert (code, text) == (2, "")
    assert stderr.startswith(f"error: {said}")
    assert stderr.count("\n") == 1
    assert stderr.removesuffix("\n").isprintable()


@pytest.mark.parametrize("kind", [TypeError, KeyError, AssertionError, IndexError, RuntimeError])
def test_a_bug_stays_a_traceback_and_asks_to_be_reported(raising, kind):
    with pytest.raises(kind) as raised:
        raising(kind("shapes differ"))
    assert "please report it" in raised.value.__notes__[0]


def test_a_module_of_our_own_that_is_missing_is_a_bug():
    assert reason(ImportError("no", name="eigenzoo.zoo.frob")) is None


@pytest.mark.parametrize("way", ["--debug", "EIGENZOO_DEBUG"])
def test_debug_shows_the_traceback_of_refused_input(raising, monkeypatch, way):
    if way == "EIGENZOO_DEBUG":
        monkeypatch.setenv(way, "1")
    code, _, error = raising(ValueError("frob"), *[way] * (way == "--debug"))
    assert code == 2
    assert error.startswith("Traceback")
    assert error.endswith("error: frob\n")


def test_a_message_is_not_endless():
    line = one_line("a" * 10**6 + " b")
    assert len(line) < LONGEST + 20
    assert line.endswith("b")


@pytest.mark.parametrize("number", [1, 2])
def test_a_reader_that_is_gone_ends_a_command_quietly(dense_folder, number):
    words = ["inspect", dense_folder, "--json"] if number == 1 else ["inspect", "none"]
    done = fresh.python("-c", PIPED.format(number=number), *words)
    assert done.returncode in (1, 2)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    "words", [["--version"], ["inspect", "MODEL"], ["inspect", "MODEL", "--json"]]
)
def test_a_full_disk_behind_standard_output_is_one_line(dense_folder, words):
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
    named = [dense_folder if word == "MODEL" else word for word in words]
    done = fresh.python("-c", full + ENTRY, *named)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_every_command_is_behind_the_door():
    assert cli.app.info.cls is cli.Door
