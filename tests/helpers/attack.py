"""Bad input: small changes to good files, and what a command that refuses them must do and leave.

A change is a function of a folder, `place`, in which commands run. It holds `dense` (a Llama),
`low` (the same, compressed), `low.partial` and `ref.state.safetensors` (unfinished work towards
`low2` and `ref`), the texts `a.txt` and `b.txt`, and what
`sweep` and `evaluate --json` wrote: `rows.jsonl`, with `rows.statistics`, and `sheet.json`.
"""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from eigenzoo.zoo import cli

Change = Callable[[Path], object]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LIMIT = 10  # seconds in which a command must have refused
QUICK = "--samples 4 --seq-len 16 --calibration a.txt --text b.txt"
COMMANDS = {
    "inspect": "inspect dense",
    "evaluate": "evaluate dense --windows 1 --text a.txt",
    "generate": "generate dense -p cat --no-compile --max-new-tokens 2 --ops reference",
    "inspect low": "inspect low",
    "evaluate low": "evaluate low --windows 1 --text b.txt",
    "generate low": "generate low -p cat --no-compile --max-new-tokens 2 --ops reference",
    "compress": f"compress dense out {QUICK}",
    "force": f"compress dense low --force {QUICK}",
    "stream": f"compress dense out --stream {QUICK}",
    "resume": f"compress dense low2 --stream --resume {QUICK}",
    "refine": f"refine low out --original dense --steps 1 --batch 1 --every 1 {QUICK}",
    "continue": f"refine low ref --original dense --steps 2 --batch 1 --every 1 {QUICK}",
    "sweep": f"sweep dense out.jsonl --keep 0.5 --windows 1 --ops reference {QUICK}",
    "bench": "bench dense low --context 16 --steps 1 --rounds 1 --no-compile --ops reference",
    "report": "report rows.jsonl --out out",
    "card": "card low sheet.json",
    "push": "push low org/name --dry-run",
    "pull": "pull org/name out",
    "demo": "demo --out out",
    "plan": "plan dense",
}
NOTES = (
    "read ",
    "keys: ",
    "progress is kept in ",
    "going on from ",
    "stopped",
    "compiling at ",
    *("there is nothing to resume", "1 cells are in ", "[1/2] dense: "),
)


class Row(NamedTuple):
    """A command, and a change that makes its input bad."""

    name: str
    change: Change
    words: str


def rows(changes: dict[str, Change], commands: Iterable[str]) -> list[Row]:
    """Every change with every command."""
    return [
        Row(f"{command}: {name}", change, COMMANDS[command])
        for name, change in changes.items()
        for command in commands
    ]


def table(rows: Iterable[Row]) -> Any:
    """The rows as parameters of a test."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows])


# changes


def both(*changes: Change) -> Change:
    """One after the other."""
    return lambda place: [change(place) for change in changes]


def nothing(place: Path) -> None:
    """No change: the command line itself is bad."""


def write(name: str, data: bytes | str) -> Change:
    """A file with other content."""
    raw = data if isinstance(data, bytes) else data.encode()
    return lambda place: (place / name).write_bytes(raw)


def set_json(name: str, **fields: Any) -> Change:
    """Other fields in a JSON object."""

    def change(place: Path) -> None:
        path = place / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def drop_json(name: str, *fields: str) -> Change:
    """Fewer fields in a JSON object."""

    def change(place: Path) -> None:
        path = place / name
        held = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in held.items() if k not in fields}))

    return change


def truncate(name: str, size: float) -> Change:
    """A file cut to a number of bytes, or to a share of them."""

    def change(place: Path) -> None:
        whole = (place / name).stat().st_size
        os.truncate(place / name, size if isinstance(size, int) else int(size * whole))

    return change


def overwrite(name: str, at: float, data: bytes) -> Change:
    """Other bytes at a share of a file."""

    def change(place: Path) -> None:
        path = place / name
        raw = bytearray(path.read_bytes())
        start = int(at * len(raw))
        raw[start : start + len(data)] = data
        path.write_bytes(raw)

    return change


def remove(*names: str) -> Change:
    """Fewer files."""
    return lambda place: [(place / name).unlink() for name in names]


def link(name: str, target: str) -> Change:
    """A link instead of a file or a folder."""

    def change(place: Path) -> None:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)

    return change


def folder(name: str) -> Change:
    """An empty folder instead of a file."""

    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir()

    return change


def fifo(name: str) -> Change:
    """A pipe that nobody writes to instead of a file."""

    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return change


def weights(alter: Callable[[dict[str, torch.Tensor]], object], folder: str = "dense") -> Change:
    """Other weights: `alter` changes them in place, or returns others."""

    def change(place: Path) -> None:
        path = place / folder / "model.safetensors"
        tensors = load_file(path)
        save_file(alter(tensors) or tensors, path)

    return change


def pickled(content: Any) -> Change:
    """Anything as `pytorch_model.bin`, instead of safetensors."""

    def change(place: Path) -> None:
        (place / "dense" / "model.safetensors").unlink()
        torch.save(content, place / "dense" / "pytorch_model.bin")

    return change


def sharded(index: Any) -> Change:
    """An index of shards beside the one file, which it may name."""
    return write("dense/model.safetensors.index.json", json.dumps(index))


# what a refusal is


class TooLongError(BaseException):
    """The command neither refused nor ended in time. No other code catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TooLongError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def snapshot(place: Path) -> dict[str, str]:
    """All names below a folder, each with what it is: a digest of a file, a link's target."""
    return {str(path.relative_to(place)): _kind(path) for path in sorted(place.rglob("*"))}


def _kind(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_file():
        return sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "special"


def run(words: Iterable[str]) -> int:
    """The exit code of the command line in this process."""
    before, sys.argv = sys.argv, ["eigenzoo", *words]
    try:
        with limited(LIMIT):
            cli.main()
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        sys.argv = before
    return 0


def check_refusal(error: str) -> None:
    """Assert that standard error holds one line that begins `error: `, after notes at most."""
    *notes, last = error.splitlines() or [""]
    assert last.startswith("error: "), error
    assert len(last) > len("error: "), error
    assert last.isprintable(), error
    assert all(note.startswith(NOTES) for note in notes), error


def assert_refused(row: Row, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a row; assert that it ends in one line and exit code 2, and leaves all files alone."""
    row.change(place)
    before = snapshot(place)
    capsys.readouterr()
    code = run(shlex.split(row.words))
    text, error = capsys.readouterr()
    assert code == 2, error or text
    assert text == ""
    check_refusal(error)
    assert snapshot(place) == before


# good files


def make_place(place: Path) -> None:
    """Write the good files that changes are made to."""
    tiny.save(place / "dense", chat=True, **SIZES)
    (place / "a.txt").write_text(tiny.WORDS * 8)
    (place / "b.txt").write_text(tiny.WORDS[::-1] * 8)
    (place / "tmp").mkdir()
    with chdir(place):
        _good(f"compress dense low {QUICK}")
        _good(COMMANDS["sweep"].replace("out.jsonl", "rows.jsonl"))
        with (place / "sheet.json").open("w") as sheet, redirect_stdout(sheet):
            _good("evaluate low --windows 1 --text b.txt --json")
        with patch(
            "eigenzoo.zoo.compression.stream.Stream._measure", side_effect=KeyboardInterrupt
        ):
            run(COMMANDS["resume"].split())
        with patch("eigenzoo.hub_export.refine.evaluation", side_effect=KeyboardInterrupt):
            run(COMMANDS["continue"].split())


def _good(words: str) -> None:
    assert run(words.split()) == 0, words
