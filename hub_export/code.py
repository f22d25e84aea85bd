"""The Python files that travel with a checkpoint, and a check of those in a folder."""

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from ..zoo import models
from . import remote

RELEASES = Path(__file__).with_name("releases.json")  # hashes by version: see CONTRIBUTING.md


def files() -> dict[str, str]:
    """Their text by name. A Hub folder is flat: files of zoo/models lie beside those of remote/."""
    folders = [Path(folder) for room in (models, remote) for folder in room.__path__]
    paths = sorted(p for folder in folders for p in folder.glob("*.py") if p.stem != "__init__")
    return {path.name: path.read_text().replace("from ...zoo.models.", "from .") for path in paths}


def hashes() -> dict[str, str]:
    """SHA-256 of each, as config.json keeps them."""
    return {name: sha256(text.encode()).hexdigest() for name, text in files().items()}


def verdict(folder: Path, recorded: dict[str, str] | None) -> str:
    """Whether the Python files of a folder are those of a release or of this eigenzoo, unchanged.

    recorded: hashes by config.json; None in old checkpoints, which have none.
    """
    present = {p.name: sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.py")}
    if not present:
        return "none"
    for number, released in json.loads(RELEASES.read_text()).items():
        if present == released:
            return f"that of eigenzoo {number}, released"
    if present == hashes():
        return f"as eigenzoo {version('eigenzoo')} writes it, not released"
    text = f"not that of eigenzoo {version('eigenzoo')}: read {_different(present, hashes())}"
    if recorded is not None and recorded != present:
        text += f"; changed since it was written: {_different(present, recorded)}"
    return text


def _different(present: dict[str, str], wanted: dict[str, str]) -> str:
    return ", ".join(sorted({name for name, _ in present.items() ^ wanted.items()}))
