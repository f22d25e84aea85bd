"""Rows of results in files: one JSON object a line, appended one by one, read whole."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .records import (
    BenchRow,
    CompressedRow,
    DenseRow,
    EvaluationRow,
    FailedRow,
    RefusedRow,
    SweepRow,
    TimedRow,
)

Row = TypeVar("Row", bound=Mapping[str, object])
SHOWN = 4  # missing keys that an error names


@dataclass(frozen=True)
class Format(Generic[Row]):
    """What the lines of a file hold.

    expected: the same in words, for errors. kinds: TypedDicts; a row has all required keys of one.
    first: the key that every row begins with, by which a line that was cut short is recognized.
    """

    expected: str
    kinds: tuple[type, ...]
    first: str

    def lacks(self, row: object) -> set[str]:
        """Keys that a row lacks to be of the kind that it is nearest to."""
        keys = row.keys() if isinstance(row, dict) else set()
        required = (kind.__required_keys__ for kind in self.kinds)  # type: ignore[attr-defined]
        return min((names - keys for names in required), key=len)

    def begins(self, line: bytes) -> bool:
        """Whether the line may be the beginning of a row."""
        start = f'{{"{self.first}": '.encode()
        return line.startswith(start) or start.startswith(line)


SWEEP: Format[SweepRow] = Format(
    "a row that eigenzoo sweep wrote", (DenseRow, CompressedRow, RefusedRow), "versions"
)
BENCH: Format[BenchRow] = Format("a row that eigenzoo bench wrote", (TimedRow, FailedRow), "model")
MEASURED: Format[EvaluationRow | BenchRow] = Format(
    "what `eigenzoo evaluate --json` printed, or a row that eigenzoo bench wrote",
    (EvaluationRow, TimedRow, FailedRow),
    "model",
)


def read_rows(path: Path, form: Format[Row]) -> list[Row]:
    """The rows of a file, without a last line that was cut short.

    Raises ValueError if there is no such file, and for a line that holds anything else.
    """
    return _read(path, form)[0]


def resume(path: Path, form: Format[Row]) -> list[Row]:
    """The rows that are in the file already, if there is one, which is then ready for `append`.

    A last line that was cut short is removed. Raises ValueError as `read_rows`, and then leaves
    the file alone.
    """
    if not path.exists():
        return []
    rows, whole = _read(path, form)
    os.truncate(path, len(whole))
    if whole and not whole.endswith(b"\n"):
        _write(path, b"\n")
    return rows


def append(path: Path, row: Row) -> Row:
    """Add a row to the file; it is on disk when this returns. Returns the row as JSON has it."""
    line = json.dumps(row)
    _write(path, line.encode() + b"\n")
    return json.loads(line)


def _write(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def _read(path: Path, form: Format[Row]) -> tuple[list[Row], bytes]:
    """The rows of a file, and its content up to a last line that was cut short."""
    try:
        whole = path.read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(
            f"{path}: {reason}; expected a file in which each line is {form.expected}"
        ) from None
    *lines, last = whole.split(b"\n")
    if form.begins(last) and not _is_json(last):
        whole = whole[: len(whole) - len(last)]
    else:
        lines.append(last)
    numbered = enumerate(lines, start=1)
    rows = [_row(line, f"{path}, line {n}", form) for n, line in numbered if line.strip()]
    return rows, whole


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _row(line: bytes, place: str, form: Format[Row]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: expected {form.expected}, but it is no JSON: {error}") from None
    if lacking := sorted(form.lacks(row)):
        names = ", ".join(lacking[:SHOWN]) + " and more" * (len(lacking) > SHOWN)
        raise ValueError(f"{place}: expected {form.expected}, but it lacks {names}")
    return row
