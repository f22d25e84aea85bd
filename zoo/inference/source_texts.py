"""The texts of sources of calibration text, other than what the model writes itself."""

import os

from .hub_rows import check_datasets, hub_text
from .python_texts import python_help, python_source
from .sources import HUB, NAMES, OWN, PYTHON, parse
from .texts import Text, read_text

PIECES = 16  # of a long text, of which little is needed


def check_source(calibration: str, samples: int | None = None) -> None:
    """Raise ValueError for calibration text that cannot be had from any model.

    Such are names and shares that are unsound, files that cannot be read, and fewer samples than
    sources.
    """
    for source in parse(calibration, samples):
        if source.name.startswith(HUB):
            check_datasets(source.name.removeprefix(HUB))
        elif source.name not in OWN and not source.optional:
            source_text(source.name, 0)


def known_texts(calibration: str) -> list[Text]:
    """The texts of sources that are on this machine: files, and what Python brings along.

    Raises ValueError if a file cannot be read.
    """
    texts = []
    for source in parse(calibration):
        if source.is_file or source.name in PYTHON:
            try:
                texts.append(source_text(source.name, 0))
            except ValueError:
                if not source.optional:
                    raise
    return texts


def source_text(name: str, characters: int, seed: int = 0) -> Text:
    """The text of a source that the model does not write itself.

    characters: how much to read of a dataset, whose rows are shuffled by the seed, and of what
    Python brings along; 0: all of the latter. Raises ValueError if the text cannot be read.
    """
    if name == "help":
        text = excerpts(python_help(held_out=False), characters)
        return Text("Python's own help, the part to calibrate on", [text])
    if name == "source":
        text = excerpts(python_source(held_out=False), characters)
        return Text("the source of Python's modules", [text])
    if name.startswith(HUB):
        return hub_text(name.removeprefix(HUB), characters, seed)
    if not os.path.lexists(os.path.expanduser(name)) and "/" not in name and "." not in name:
        names = ", ".join(NAMES)
        raise ValueError(
            f"{name} does not exist: expected a text file, {HUB}DATASET[:CONFIG], or one of {names}"
        )
    return read_text(name)


def excerpts(text: str, characters: int) -> str:
    """About so many characters of a text, in pieces spread over it; 0, or more than it has: all."""
    if not characters or characters >= len(text):
        return text
    size, step = characters // PIECES, len(text) // PIECES
    starts = (text.rfind("\n", 0, i * step) + 1 for i in range(PIECES))
    return "".join(text[start : start + size] for start in starts)
