"""The tokenizer of a checkpoint folder, read by transformers."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..utils.escape import told
from ..utils.regular import readable
from .files import read_json

OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}


def read_tokenizer(
    folder: Path,
    trust_remote_code: bool = False,
    named: Path | None = None,
    reader: Any = AutoTokenizer,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    named: what errors call it, by default the folder. reader: a class of transformers, and options
    of its `from_pretrained`.

    Raises ValueError if there is none, a file is damaged, or a package is missing that it needs.
    """
    for name in (*OBJECTS, *OTHERS):
        path = folder / name
        if path.exists() or path.is_symlink():
            (read_json if name in OBJECTS else readable)(path)
    try:
        tokenizer = reader.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
        tokenizer("a", verbose=False)  # some values in its files are looked at only here
        return tokenizer
    except Exception as error:  # the package tokenizers raises nothing narrower for a broken file
        reason = told(error)
        raise ValueError(
            f"{named or folder} has no tokenizer: {_advice(folder)} ({reason})"
        ) from error


def read_gguf_tokenizer(path: Path, foreign: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file; files beside it may belong to another model.

    foreign: transformers does not know the architecture, and cannot choose a class by it.

    Raises ValueError as `read_tokenizer`.
    """
    with TemporaryDirectory() as folder:
        alone = Path(folder) / path.name
        alone.symlink_to(path.resolve())
        reader = PreTrainedTokenizerFast if foreign else AutoTokenizer
        tokenizer = read_tokenizer(alone.parent, False, path, reader, gguf_file=alone.name)
    tokenizer.name_or_path = path.name
    return tokenizer


def _advice(folder: Path) -> str:
    """What to do: install a package if the only tokenizer is one that it reads."""
    slow = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    missing = [name for name, module in PACKAGES.items() if not _installed(module)]
    if slow and missing:
        return f"tokenizer.model needs packages that are missing, pip install {' '.join(missing)}"
    return "add its files, or replace them"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package
        return False
