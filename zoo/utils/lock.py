"""One process at a time: a lock beside the file or folder that is written."""

import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # only Windows lacks it
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes, and other calls, from writing `path` until the block ends.

    The system frees the lock of a process that dies. The lock file, which says who holds it, lies
    beside `path` and is removed. Raises ValueError if the lock is held, or nothing can be written
    there. Where a file system has no locks, a warning says so.
    """
    if fcntl is None:
        warnings.warn(f"{path} is not locked: this system has no flock", stacklevel=3)
        yield
        return
    file = path.with_name(f".{path.name}.lock")
    try:
        lock = _take(file, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is free: no one else has this file yet
        os.close(lock)


def _take(file: Path, path: Path) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(lock, path)
            if file.exists() and os.path.samestat(os.fstat(lock), file.stat()):
                about = {"pid": os.getpid(), "host": platform.node(), "since": _now()}
                os.ftruncate(lock, 0)
                os.write(lock, json.dumps(about).encode())
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder has removed the file meanwhile


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path} is being written by {_holder(os.pread(lock, 1000, 0))}: wait until that is "
            "done, or choose another output"
        ) from None
    except OSError as error:
        warnings.warn(f"{path} is not locked: {error.strerror}", stacklevel=4)


def _holder(content: bytes) -> str:
    try:
        about = json.loads(content)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has not written that yet
        return "another process"


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")
