"""The state of long work in one file, from which it resumes after an interruption."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .replace import replacing


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, and facts as JSON in the header; an older file stays until all is written."""
    with replacing(path) as part:
        save_file(dict(tensors), part, {"facts": json.dumps(facts)})


def read_state(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote. Raises ValueError if the file holds something else."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            facts = json.loads(file.metadata()["facts"])
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be resumed from ({error}): delete it to start again"
        ) from error


def check_same(path: Path, given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless the state was written by the same work."""
    differ = [name for name in given if given[name] != saved.get(name)]
    if differ:
        pairs = ", ".join(f"{name} {saved.get(name)!r}, given {given[name]!r}" for name in differ)
        raise ValueError(
            f"{path} was left by other work ({pairs}): repeat its command to finish that, or "
            "delete it to start again"
        )
