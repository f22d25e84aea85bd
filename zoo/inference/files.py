"""Files of a checkpoint: only regular files are read, and JSON must be one object."""

import json
import stat
from pathlib import Path
from typing import Any


def readable(path: Path) -> Path:
    """The path, if it leads to a regular file. Raises ValueError for anything else.

    Opening a pipe would wait for ever.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"{path} is {kind}: expected a file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError if the file cannot be read, holds anything else, or gives one name two
    different values.
    """
    try:
        value = json.loads(readable(path).read_bytes(), object_pairs_hook=_object)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    except _TwiceError as error:
        raise ValueError(f"{path} gives {error} twice, with different values") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: it holds {json.dumps(value)[:40]}")
    return value


class _TwiceError(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and repr(values[key]) != repr(value):
            raise _TwiceError(key)
        values[key] = value
    return values
