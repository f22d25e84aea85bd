"""Text of others, as it may stand in a terminal or in Markdown: names, licenses, rows of files."""

import re
import unicodedata
from collections.abc import Iterable

MARKDOWN = re.compile(r"([\\`*\[\]<|&])")


def printable(text: object) -> str:
    """The text in one line: characters that are not printed are written as Python writes them.

    Those are line ends, what a terminal obeys, and marks that change the order of letters.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def told(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def prose(text: str) -> str:
    """A text of several lines; characters that a terminal obeys are written as Python writes them.

    Marks that scripts and emoji need stay.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else _escaped(c)
        for c in text
    )


def markdown(text: object) -> str:
    """The text as Markdown shows it, in one line: no links, no HTML, no cells of a table."""
    return MARKDOWN.sub(r"\\\1", printable(text))


def code_span(text: object) -> str:
    """The text as code within a line of Markdown."""
    return f"`{printable(text).replace('`', chr(39))}`"


def code_block(lines: Iterable[object], language: str = "bash") -> str:
    """Lines as a block of code in Markdown, which none of them ends."""
    body, fence = "\n".join(map(printable, lines)), "```"
    while fence in body:
        fence += "`"
    return f"{fence}{language}\n{body}\n{fence}"


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode()
