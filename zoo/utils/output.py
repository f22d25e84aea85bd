"""Write a folder whole: whoever looks finds the old one or the new, whenever the work is cut off.

What belongs to a folder OUT lies beside it, under one name each: the lock, the new folder while it
is written (`.OUT.new`), and the old one while it is replaced (`.OUT.old`). Whoever claims OUT next
puts back or clears what a kill has left there.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors import SafetensorError

from .escape import told
from .jsonl import Format, read_rows
from .lock import locked
from .replace import sync

ROOM = 32  # names beside an output are at most so many bytes longer than its own
FOLDERS = {"figures", "additional_chat_templates", "__pycache__"}  # that a checkpoint may hold


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if the block ends well, and is removed if not.

    `out` is claimed meanwhile. Raises ValueError as `claimed`, and for errors of writing.
    """
    with claimed(out, force) as place, scratch(place) as fresh:
        yield fresh
        try:
            put(fresh, place, force)
        except (OSError, ValueError) as error:
            kept = mkdtemp(prefix=f"{place.name}.new-", dir=place.parent)
            fresh.rename(kept)
            raise ValueError(
                f"{_reason(error)}; what was to be {out} is whole in {kept}"
            ) from error


@contextmanager
def claimed(out: Path, force: bool = False) -> Iterator[Path]:
    """Keep others from writing the folder `out`, which is free; yields its place, behind links.

    What a kill has left beside it is put back or cleared. Raises ValueError if `out` cannot be
    written, or is taken: by another process, by a file, by a folder that is not empty without
    `force`, or by a folder that is no checkpoint or report, or is in use.
    """
    with writing(out):
        place = _place(out)
    with locked(place):
        try:
            with writing(out):
                _mend(place)
                _check_taken(out, place, force)
            yield place
        finally:
            _mend(place)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, which is claimed; it is removed if it is there at the end."""
    (fresh,) = _beside(place, "new")
    try:
        with writing(place):
            fresh.mkdir()
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def discard(folder: Path, place: Path) -> None:
    """Delete a folder beside `place`, which is claimed: all of it or nothing, for later work."""
    (gone,) = _beside(place, "new")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def put(fresh: Path, place: Path, force: bool) -> None:
    """Rename the folder `fresh` to `place`, which is claimed, and an older one away before.

    All is on disk before. The end of `claimed` deletes the older one, or puts it back. Raises
    ValueError as `claimed` if something has come there meanwhile.
    """
    for path in (*fresh.rglob("*"), fresh, fresh.parent):
        sync(path)
    _check_taken(place, place, force)
    (old,) = _beside(place, "old")
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    sync(place.parent)


def check_folder(out: Path, force: bool = False, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise ValueError where `claimed` would, and if `out` is, holds or lies in what is read.

    inputs: what is read; what is no local file or folder is passed over.
    """
    with writing(out):
        place = _place(out)
        ours = [place, place.with_name(f"{place.name}.partial"), *_beside(place, "new", "old")]
        for given in inputs:
            path = os.path.expanduser(given or "")
            if path and os.path.exists(path):  # those of Path raise errors
                real = Path(path).resolve()
                if any(_inside(real, x) or _inside(x, real) for x in ours):
                    raise ValueError(
                        f"{out} would be written over {given}, which is read, or into it: choose "
                        "a folder apart from it"
                    )
    with claimed(out, force):
        pass


def check_disk(out: Path, need: int) -> None:
    """Raise ValueError if fewer than `need` bytes are free on the disk of `out`."""
    free = shutil.disk_usage(Path(os.path.realpath(out)).parent).free
    if need > free:
        raise ValueError(
            f"{out} takes about {need / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free there: make "
            "room, or choose another disk"
        )


@contextmanager
def claimed_rows(file: Path, form: Format[Any], force: bool = False) -> Iterator[None]:
    """Keep others from writing a file of rows. Raises ValueError, before work that makes rows,
    if it cannot be written, or holds anything else; with `force` only its first line is read."""
    with writing(file):
        place = _place(file)
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is no file: expected the name of a file to write")
    with locked(place):
        with writing(file):
            if file.exists():
                _check_rows(file, form, force)
        yield


def _check_rows(file: Path, form: Format[Any], force: bool) -> None:
    with file.open("r+b") as opened:  # an error if it is read-only
        first = opened.readline()
    if not force:
        read_rows(file, form)
    elif first.strip() and not form.begins(first):
        raise ValueError(
            f"{file} does not begin with {form.expected}: --force deletes nothing else, choose "
            "another file"
        )


@contextmanager
def writing(out: Path, then: str = "") -> Iterator[None]:
    """Raise a ValueError of one line for any error of the disk while `out` is written.

    then: what it says of what was written already.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} cannot be written: {_reason(error)}{then}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or told(error)


def _place(out: Path) -> Path:
    """Where an output lies, behind links. Raises ValueError where nothing can lie."""
    if os.path.islink(out) and not os.path.exists(out):  # those of Path raise errors
        raise ValueError(
            f"{out} is a link to {os.readlink(out)}, which does not exist: make that, or remove "
            "the link"
        )
    place = Path(os.path.realpath(out))
    if not place.name:
        raise ValueError(f"{out} is the root of all files: choose a folder in it")
    try:
        if not stat.S_ISDIR(os.stat(place.parent).st_mode):
            raise ValueError(f"{out.parent} is no folder: choose another output")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{out.parent} does not exist: make it, or choose another output"
        ) from None
    most = os.pathconf(place.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(place.name)) > most - ROOM:
        raise ValueError(
            f"the name {place.name[:20]}... takes {len(os.fsencode(place.name))} bytes: expected "
            f"at most {most - ROOM}, so that names of unfinished work can be longer"
        )
    return place


def _check_taken(out: Path, place: Path, force: bool) -> None:
    if not place.exists():
        return
    if not place.is_dir():
        raise ValueError(f"{out} is a file: expected the name of a folder to write")
    if place.is_mount() or _inside(Path.cwd(), place):
        raise ValueError(f"{out} is in use, as a disk or working folder: choose a folder in it")
    if any(place.iterdir()):
        if not force:
            raise ValueError(f"{out} exists: choose another folder, or pass --force to replace it")
        if not _is_ours(place):
            raise ValueError(
                f"{out} is not replaced, since it holds more than a checkpoint or a report of "
                "eigenzoo: choose another folder, or delete this one"
            )


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or the report of a sweep, and no more."""
    entries = list(folder.iterdir())
    if any(x.name == ".git" or (x.is_dir() and x.name not in FOLDERS) for x in entries):
        return False
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        names = {path.name for path in entries if path.suffix != ".png"}
        return names == {"report.md"}
    return isinstance(config, dict) and "model_type" in config


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or lies in it, however the two are spelled."""
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))


def _beside(place: Path, *what: str) -> list[Path]:
    return [place.with_name(f".{place.name}.{name}") for name in what]


def _mend(place: Path) -> None:
    """Put back the old folder if the new one did not take its place, and clear what is left."""
    new, old = _beside(place, "new", "old")
    if old.exists() and not (place.exists() and any(place.iterdir())):
        old.rename(place)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
