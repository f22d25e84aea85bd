"""Files of a checkpoint: JSON must be one object."""

import json
from pathlib import Path
from typing import Any

from ..utils.regular import readable


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
