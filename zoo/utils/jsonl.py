"""Rows of results in files: one JSON object a line, appended one by one, read whole."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Generic,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from .records import (
    BenchRow,
    CompressedRow,
    CompressionRecord,
    DenseRow,
    EvaluationRow,
    FailedRow,
    RefusedRow,
    SweepRow,
    TimedRow,
)
from .regular import regular
from .replace import replacing, sync
from .resume import CHECKSUM, sealed, unsealed

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

    def problem(self, row: Any) -> str:
        """What is wrong with a row of the kind that it is nearest to; empty if nothing is."""
        keys = row.keys() if isinstance(row, dict) else set()
        lacking = {kind: sorted(_required(kind) - keys) for kind in self.kinds}
        names = min(lacking.values(), key=len)
        if names:
            return "lacks " + ", ".join(names[:SHOWN]) + " and more" * (len(names) > SHOWN)
        wrong = min((_wrong(row, kind) for kind in self.kinds if not lacking[kind]), key=len)
        return f"has no sound {', '.join(wrong)}" if wrong else ""

    def begins(self, line: bytes) -> bool:
        """Whether the line may be the beginning of a row."""
        start = f'{{"{self.first}": '.encode()
        return line.startswith(start) or start.startswith(line)


SWEEP: Format[SweepRow] = Format(
    "a row that eigenzoo sweep wrote", (DenseRow, CompressedRow, RefusedRow), "versions"
)
BENCH: Format[BenchRow] = Format("a row that eigenzoo bench wrote", (TimedRow, FailedRow), "model")
COMPRESSION: Format[CompressionRecord] = Format(
    "what eigenzoo compress wrote", (CompressionRecord,), "base_model"
)
REPORTED: Format[SweepRow | EvaluationRow] = Format(
    "a row that eigenzoo sweep wrote, or what `eigenzoo evaluate --domains --json` printed",
    (*SWEEP.kinds, EvaluationRow),
    "versions",
)
MEASURED: Format[EvaluationRow | BenchRow] = Format(
    "what `eigenzoo evaluate --json` printed, or a row that eigenzoo bench wrote",
    (EvaluationRow, TimedRow, FailedRow),
    "model",
)


def read_rows(path: Path, form: Format[Row]) -> list[Row]:
    """The rows of a file, without a last line that was cut short.

    Raises ValueError if there is no such file, and for a line that holds anything else.
    """
    lines, _ = _read(path, form)
    return [_row(line, place, form) for place, line in lines]


def resume(path: Path, form: Format[Row]) -> list[Row]:
    """The rows that are in the file already, if there is one, which is then ready for `append`.

    A last line that was cut short is removed. Raises ValueError as `read_rows`, and for a row that
    was changed after it was written; then leaves the file alone.
    """
    if not path.exists():
        return []
    lines, whole = _read(path, form)
    rows = [_row(line, place, form, checked=True) for place, line in lines]
    os.truncate(path, len(whole))
    if whole and not whole.endswith(b"\n"):
        _write(path, b"\n")
    return rows


def append(path: Path, row: Row) -> Row:
    """Add a row to the file; it is on disk when this returns. Returns the row as JSON has it.

    The line ends with a checksum of the row, which is not part of the row.
    """
    as_read = json.loads(json.dumps(row))
    _write(path, json.dumps(sealed(as_read)).encode() + b"\n")
    return as_read


def remove(path: Path, form: Format[Row], unwanted: Callable[[Row], bool]) -> None:
    """Write the file again without some of its rows; the others stay as they are."""
    lines, _ = _read(path, form)
    stay = [line for place, line in lines if not unwanted(_row(line, place, form))]
    with replacing(path) as part:
        part.write_bytes(b"".join(line + b"\n" for line in stay))


def _write(path: Path, data: bytes) -> None:
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def _read(path: Path, form: Format[Row]) -> tuple[list[tuple[str, bytes]], bytes]:
    """The lines of a file with their places, and its content up to what was cut short.

    A row is cut short where it has no end, and where a disk that lost power kept its length but
    not its content, which then is zeros.
    """
    try:
        whole = regular(path).read_bytes()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(
            f"{path}: {reason}; expected a file in which each line is {form.expected}"
        ) from None
    *lines, last = whole.split(b"\n")
    begun = last.rstrip(b"\0")
    if form.begins(begun) and (begun != last or not _is_json(last)):
        whole = whole[: len(whole) - len(last)]
    else:
        lines.append(last)
    numbered = enumerate(lines, start=1)
    return [(f"{path}, line {n}", line) for n, line in numbered if line.strip()], whole


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _row(line: bytes, place: str, form: Format[Row], checked: bool = False) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected {form.expected}, but it is no JSON: {error}") from None
    if problem := form.problem(row):
        raise ValueError(f"{place}: expected {form.expected}, but it {problem}")
    if checked and (CHECKSUM in row or "code" in row):  # older rows have neither
        try:
            unsealed(row)
        except ValueError as error:
            raise ValueError(f"{place} was changed after it was written: {error}") from None
    row.pop(CHECKSUM, None)
    return row


def _required(kind: Any) -> frozenset[str]:
    return kind.__required_keys__


def _wrong(row: dict[str, Any], kind: type) -> list[str]:
    """Names of values that are not what a TypedDict says."""
    hints = _hints(kind)
    return [name for name, value in row.items() if not _fits(value, hints.get(name, Any))]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value that JSON holds is what a type hint says."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if is_typeddict(hint):
        whole = isinstance(value, dict) and _required(hint) <= value.keys()
        return whole and not _wrong(cast(dict[str, Any], value), hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(x, args[1]) for x in value.values())
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(x, args[0]) for x in value)
    if hint in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (hint is float or float(cast(float, value)).is_integer())
    return isinstance(value, hint)
