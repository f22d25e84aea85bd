"""What the site takes from the code: where docstrings are read, and the page of the commands."""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
PACKAGES = ("zoo", "kernels", "hub_export")
COMMANDS = "<!-- commands -->"  # in reference/commands.md
CHOICES = re.compile(
    r"^(?P<help>\* `--.*)(?P<names>(?:\n\n- .*)+?)  (?P<default>\[default: .*\])$", re.MULTILINE
)
source = TemporaryDirectory()  # removed when the process ends


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> None:
    """Let docstrings be read from this working tree, by the names under which it is imported."""
    package = Path(source.name) / "eigenzoo"
    package.mkdir(exist_ok=True)
    for name in PACKAGES:
        if not (package / name).exists():
            (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [source.name]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what typer says of the commands in place of the mark."""
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def commands() -> str:
    """Arguments and options of every command, in Markdown. Raises CalledProcessError."""
    words = ["-m", "typer", "eigenzoo.zoo.cli", "utils", "docs", "--name", "eigenzoo"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    page = done.stdout.partition("\n")[2]  # the page has a title of its own
    return CHOICES.sub(_nested, page)


def _nested(option: re.Match[str]) -> str:
    """An option whose help lists names: its default, then the names as a list of their own."""
    names = re.sub(r"\n\n- ([\w-]+):", r"\n    - `\1`:", option["names"])
    return f"{option['help'].removesuffix(':')}. {option['default']}\n{names}\n"
