"""Rows of results in a file, one JSON object a line."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
START = b'{"versions": '  # every row of a sweep begins so
RUN = ("model", "weights", "dtype", "evaluation")  # what all rows of one file have in common


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a last line that was not finished is left out.

    Raises ValueError if there is no such file, or if it holds anything else.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: expected what eigenzoo sweep wrote") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: expected a .jsonl file of eigenzoo sweep") from None
    begun = last.startswith(START) or START.startswith(last)
    if not (begun and all(line.startswith(START) for line in lines)):
        raise ValueError(f"{path} holds something else: expected a file that eigenzoo sweep wrote")
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def resume(path: Path, run: Mapping[str, Any], force: bool = False) -> list[Row]:
    """The rows that are in the file already; what is half-written is cut off.

    run: what the rows must have in common with those to come, `RUN`. force: start anew. Raises
    ValueError where the rows are of another run.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} does not exist: make it, or choose another file")
    if not path.exists():
        return []
    if force and path.is_file():
        path.unlink()
        return []
    rows = read_rows(path)
    for row in rows:
        for name in RUN:
            if row[name] != run[name]:
                raise ValueError(
                    f"{path} holds rows with {name} {row[name]}, this run has {run[name]}: choose "
                    "another file, or pass --force to start it anew"
                )
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)
    return rows


def append(path: Path, row: Row) -> Row:
    """Add a row to the file, whole, and on disk when this returns: the row as JSON has it."""
    line = json.dumps(row)
    with path.open("ab", buffering=0) as file:
        file.write(line.encode() + b"\n")
        os.fsync(file.fileno())
    return json.loads(line)
