"""Write a file beside the old one, then rename: whoever reads it finds the old one or the new."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path to write instead of `path`, in the same folder.

    If the block ends well, what it wrote becomes `path`, and both file and name are on disk when
    this returns. If not, `path` stays as it was, and what was written is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)
