"""Texts that every Python brings along: English from its help, and the source of its modules.

Each has a part to calibrate on and a part held out, to measure on: the two never overlap.
"""

import pydoc_data.topics
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HELD_OUT_FROM = 200_000  # the character of the help from which on it is only measured on
MODULES = ("inspect", "tarfile", "pathlib", "subprocess", "difflib", "optparse", "ast", "doctest")
HELD_OUT_MODULES = ("argparse", "heapq", "shutil", "zipfile", "textwrap")


@cache
def python_help(held_out: bool) -> str:
    """The topics of its help: those to measure on if `held_out`, else those to calibrate on.

    Topics repeat one another, so what is also held out is left out of the latter.
    """
    text = "\n\n".join(pydoc_data.topics.topics.values())
    kept = text[HELD_OUT_FROM:]
    if held_out:
        return kept
    return "\n\n".join(x for x in text[:HELD_OUT_FROM].split("\n\n") if x not in kept)


def python_source(held_out: bool) -> str:
    """The source of modules of Python: `HELD_OUT_MODULES` if `held_out`, else `MODULES`.

    Raises ValueError where this Python comes without the source of its modules.
    """
    sources = []
    for name in HELD_OUT_MODULES if held_out else MODULES:
        spec = find_spec(name)
        path = Path(spec.origin) if spec and spec.origin else None
        if path is None or path.suffix != ".py" or not path.is_file():
            raise ValueError(
                f"this Python comes without the source of its module {name}: give a text file"
            )
        sources.append(path.read_text(encoding="utf-8"))
    return "\n\n".join(sources)
