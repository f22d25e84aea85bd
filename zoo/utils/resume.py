"""The state of long work in files, from which it resumes after an interruption."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .provenance import fingerprint
from .regular import regular
from .replace import replacing

VERSIONS = {"eigenzoo", "code", "torch", "transformers"}  # as `provenance.work` names them
CHECKSUM = "checksum"


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, and facts as JSON in the header; an older file stays until all is written."""
    told = json.dumps(facts)
    with replacing(path) as part:
        save_file(dict(tensors), part, {"facts": told, CHECKSUM: _checksum(told, tensors)})


def read_state(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote. Raises ValueError if the file holds anything else by a bit."""
    try:
        with safe_open(regular(path), "pt", device=str(device)) as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told = about.get("facts", "")
        _compare(about.get(CHECKSUM), _checksum(told, tensors))
        return tensors, json.loads(told)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start again") from error


def _checksum(told: str, tensors: Mapping[str, Tensor]) -> str:
    return fingerprint(told, *(x for name in sorted(tensors) for x in (name, tensors[name])))


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with a checksum of themselves, ready for JSON."""
    return {**facts, CHECKSUM: fingerprint(json.dumps(facts))}


def unsealed(read: Any) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError if JSON holds anything else."""
    if not isinstance(read, dict):
        raise ValueError("it is no JSON object")
    facts = {name: value for name, value in read.items() if name != CHECKSUM}
    _compare(read.get(CHECKSUM), fingerprint(json.dumps(facts)))
    return facts


def _compare(saved: str | None, found: str) -> None:
    if saved != found:
        raise ValueError("it has no checksum" if saved is None else "its checksum differs")


def check_same(
    path: Path,
    given: Mapping[str, Any],
    saved: Mapping[str, Any],
    else_do: str = "delete it to start again",
) -> None:
    """Raise ValueError, naming what differs, unless the state was written by the same work.

    given, saved: as `provenance.work` returns them.
    """
    differ = [name for name in {**given, **saved} if given.get(name) != saved.get(name)]
    if not differ:
        return
    pairs = ", ".join(f"{name} {saved.get(name)!r}, given {given.get(name)!r}" for name in differ)
    work, way = "other work", "repeat its command to finish that"
    if not VERSIONS.isdisjoint(differ):
        work, way = "work with other versions", "go on with those that began it"
    raise ValueError(f"{path} was left by {work} ({pairs}): {way}, or {else_do}")


class KeptFiles:
    """Safetensors in a folder that long work goes on from, with a checksum of each.

    A name is a path within the folder, without suffix. sums: checksums by name.
    """

    def __init__(self, folder: Path):
        """The folder need not exist yet."""
        self.folder = folder
        self.sums: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.folder / f"{name}.safetensors"

    def write(
        self, name: str, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None
    ) -> None:
        """Write tensors to a file; it is on disk when this returns."""
        with replacing(self.path(name)) as part:
            save_file({key: x.contiguous() for key, x in tensors.items()}, part, about)
        self.sums[name] = fingerprint(self.path(name))

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of a file."""
        return load_file(self.path(name), device=str(device))

    def forget(self, names: Collection[str]) -> None:
        """Expect these files no longer."""
        for name in names:
            self.sums.pop(name, None)

    def delete(self, names: Collection[str]) -> None:
        """Remove files, some of which may be gone already."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def check(self) -> None:
        """Raise ValueError unless all files are as they were written."""
        for name, wanted in self.sums.items():
            path = self.path(name)
            reason = "is damaged" if path.is_file() else "is missing"
            if not path.is_file() or fingerprint(path) != wanted:
                raise ValueError(
                    f"{path} {reason}: the work cannot go on; delete {self.folder} to start again"
                )
