"""The Python files that travel with a checkpoint, and whether those of a folder are ours."""

import inspect
import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from ..zoo.models import attention, cache, families, linear, llama, model, mpt, opt, qwen2, rope
from .remote import configuration_eigen, modeling_eigen

NATIVE = (attention, cache, families, linear, llama, model, mpt, opt, qwen2, rope)
TRAVELS = (*NATIVE, configuration_eigen, modeling_eigen)
RELEASES = Path(__file__).with_name("releases.json")  # hashes by version: see CONTRIBUTING.md


def files() -> dict[str, str]:
    """Their text by name. A Hub folder is flat: what comes from the zoo lies beside it there."""
    paths = [Path(inspect.getfile(module)) for module in TRAVELS]
    return {path.name: path.read_text().replace("from ...zoo.models.", "from .") for path in paths}


def hashes() -> dict[str, str]:
    """SHA-256 of each, as config.json keeps them."""
    return {name: sha256(text.encode()).hexdigest() for name, text in files().items()}


def verdict(folder: Path, recorded: dict[str, str] | None) -> str:
    """Whether the Python files of a folder are those of a release or this eigenzoo, and untouched.

    recorded: hashes by config.json; None in checkpoints that are older than them.
    """
    found = {p.name: sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.py")}
    if not found:
        return "none"
    for number, released in json.loads(RELEASES.read_text()).items():
        if found == released:
            return f"that of eigenzoo {number}, released"
    if found == hashes():
        return f"as eigenzoo {version('eigenzoo')} writes it, not released"
    text = f"not that of eigenzoo {version('eigenzoo')}: read {_other(found, hashes())}"
    if recorded is not None and recorded != found:
        text += f"; changed since it was written: {_other(found, recorded)}"
    return text


def _other(found: dict[str, str], wanted: dict[str, str]) -> str:
    return ", ".join(sorted({name for name, _ in found.items() ^ wanted.items()}))
