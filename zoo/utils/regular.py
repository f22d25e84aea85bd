"""Only regular files are read: opening a pipe would wait for ever, and a device may have no end."""

import stat
from pathlib import Path


def regular(path: Path) -> Path:
    """The path, if it leads to a regular file. Raises ValueError, or OSError as `stat` does."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"{path} is {kind}: expected a file")
    return path


def readable(path: Path) -> Path:
    """As `regular`, and raises ValueError also for a path that leads nowhere."""
    if "\0" in str(path):
        raise ValueError(f"{path} cannot be read: no name has a zero byte")
    try:
        return regular(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
