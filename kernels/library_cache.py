"""The cache of compiled ops. What is loaded from it is whole, and written by this user or root.

A library is code: whoever can write it, or rename a folder above it, can run code as this user. And
the system ends a process that maps a library which was cut short. So a library's name ends with the
hash of its content, and owner, mode and content are checked before it is loaded.
"""

import hashlib
import os
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

MEND = "mend it, or set XDG_CACHE_HOME to a folder of your own"
STALE = 3600  # seconds after which the folder of a build is taken for one that was interrupted


def folder() -> Path:
    """The folder of the cache, `eigenzoo` in $XDG_CACHE_HOME or ~/.cache; created if missing.

    Raises ValueError if it cannot be created, if other users can write to it or to a folder above
    it, and if nothing in it may be executed.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        place = (given if given.is_absolute() else Path.home() / ".cache") / "eigenzoo"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = place.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise ValueError(f"the cache of ops cannot be created ({error}): {MEND}") from error
    for path in (place, *place.parents):
        check_owner(path)
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        raise ValueError(f"nothing in {place} may be executed (it is mounted noexec): {MEND}")
    return place


def check_owner(path: Path) -> None:
    """Raise ValueError if another user than root owns a file or folder or can write to it.

    In a sticky folder, as /tmp is, others can create files, but not rename or remove this user's.
    """
    found = path.lstat()
    if found.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path} belongs to another user, who could change the ops in it: {MEND}")
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise ValueError(f"other users can write to {path} (chmod go-w {path}): {MEND}")


def find(place: Path, kind: str) -> Path | None:
    """The library of a kind in the cache, if there is a whole one. Damaged ones are removed.

    Raises ValueError if another user could have written it.
    """
    for path in sorted(place.glob(f"{kind}-*.so")):
        with suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):  # else no library, and reading it might wait
                check_owner(path)
                if path.stem == f"{kind}-{_hash(path)}":
                    return path
            path.unlink()
    return None


def keep(built: Path, place: Path, kind: str) -> None:
    """Move a library that was built to the cache."""
    built.chmod(0o700)
    os.replace(built, place / f"{kind}-{_hash(built)}.so")


def remove_interrupted(place: Path, prefix: str) -> None:
    """Remove the folders of builds that were killed."""
    for path in place.glob(f"{prefix}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > STALE:
                shutil.rmtree(path)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
