"""Read texts: files of plain text, and files with rows of text or of chats."""

import gzip
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import Chat, joined, render
from .python_texts import python_help

COLUMNS = ("text", "messages")
TABLES = (".csv", ".tsv")  # their syntax would be read as text


class Text(NamedTuple):
    """A text that was read. name: of its source, in messages and records."""

    name: str
    rows: Sequence[str | Chat]
    """Texts, or chats for the tokenizer's template."""
    column: str | None = None
    """What the rows were a column of: a name in `COLUMNS`; None if the file is one text."""

    @property
    def chats(self) -> bool:
        """Whether the rows are chats: their template has all special tokens."""
        return self.column == "messages"

    def words(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """All rows as one string: texts with an empty line between them, chats with nothing.

        Raises ValueError where the tokenizer's template does not take a chat.
        """
        rows = [
            row if isinstance(row, str) else self._rendered(tokenizer, row, number)
            for number, row in enumerate(self.rows, start=1)
        ]
        return ("" if self.chats else "\n\n").join(rows)

    def _rendered(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, number: int) -> str:
        try:
            return render(tokenizer, chat)
        except ValueError as error:
            raise ValueError(f"{self.name}, chat {number}: {error}") from error


def read_text(path: str | Path | None) -> Text:
    """The text of a file; None: the part of Python's own help that is never calibrated on.

    - .jsonl, .ndjson: an object a line; .json: a list of objects, or the same; .parquet: needs
      pyarrow. The column `text` is read, or else `messages`, chats for the tokenizer's template.
    - any other name: plain text.

    Text is UTF-8, with or without a byte order mark; .gz behind a name is decompressed. Raises
    ValueError, naming file and row, for anything else.
    """
    if path is None:
        return Text("Python's own help", [python_help(held_out=True)])
    place = _file(path)
    name = place.name.lower().removesuffix(".gz")
    reader = next((READERS[endings] for endings in READERS if name.endswith(endings)), None)
    text = take(str(path), reader(place)) if reader else Text("", [_plain(place)])
    if not any(row.strip() if isinstance(row, str) else row for row in text.rows):
        raise ValueError(f"{path} is empty: expected text")
    return text._replace(name=place.name)


def take(source: str, rows: Iterable[tuple[int, Any]], most: int | None = None) -> Text:
    """The column of numbered rows that a model can read.

    most: stop after so many characters. Raises ValueError, naming source and row, for a row that
    lacks the column which the first row has, or has something else in it.
    """
    column: str | None = None
    taken: list[str | Chat] = []
    size = 0
    for number, row in rows:
        place = f"{source}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place} is {_shown(row)}: expected an object")
        column = column or next((c for c in COLUMNS if c in row), None)
        if column is None or column not in row:
            expected = f"`{column}`" if column else "`text` or `messages`"
            names = ", ".join(map(str, row)) or "none"
            raise ValueError(f"{place} has the columns {names}: expected {expected}")
        read = _chat if column == "messages" else _text
        taken.append(read(row[column], place))
        size += len(str(taken[-1]))
        if most is not None and size >= most:
            break
    return Text(source, taken, column)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: `text` is {_shown(value)}: expected a string")
    return _sound(value, value, place)


def _chat(value: Any, place: str) -> Chat:
    """A list of messages, contents joined to strings."""
    fits = isinstance(value, list) and value
    if not fits or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise ValueError(
            f"{place}: `messages` is {_shown(value)}: expected a list of objects with `role` and "
            "`content`"
        )
    try:
        chat = [{**message, "content": joined(message.get("content"))} for message in value]
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return _sound(chat, json.dumps(chat, ensure_ascii=False, default=str), place)


def _sound(value: Any, words: str, place: str) -> Any:
    """The value, unless its words hold half of a surrogate pair, which JSON can write."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds what is no Unicode text: {error}") from None
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _file(path: str | Path) -> Path:
    """The path of a file that may hold text."""
    place = Path(os.path.expanduser(path))
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if re.match(r"\w\w+:/", str(path)):
            raise ValueError(f"{path} is an address: download it, and give the file") from None
        raise ValueError(f"{path} does not exist: expected a text file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder: expected a text file")
    if not stat.S_ISREG(mode):  # reading a pipe would wait, and the text is read again later
        raise ValueError(f"{path} is no regular file: write the text to a file first")
    if place.name.lower().removesuffix(".gz").endswith(TABLES):
        raise ValueError(f"{path} is a table: write its texts to a .jsonl with a column `text`")
    return place


def _plain(path: Path) -> str:
    """The text of a file. Raises ValueError where it is rows under another name."""
    text = _decoded(path)
    if text.lstrip().startswith(("{", "[")) and _is_rows(text):
        raise ValueError(f"{path} holds rows in JSON: name it .jsonl, or .json if it is one list")
    return text


def _is_rows(text: str) -> bool:
    for part in (text.lstrip().partition("\n")[0], text):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        row = value[0] if isinstance(value, list) and value else value
        if isinstance(row, dict) and any(column in row for column in COLUMNS):
            return True
    return False


def _decoded(path: Path) -> str:
    """The text of a file, line ends as \\n."""
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text file in UTF-8: byte {error.start} is "
            f"{error.object[error.start]:#04x}; convert it"
        ) from None
    except (OSError, EOFError) as error:  # of gzip too
        raise ValueError(f"{path} cannot be read: {error}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not a text file: it holds null bytes")
    return text


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """An object a line."""
    return _by_line(_decoded(path), path)


def _whole(path: Path) -> Iterable[tuple[int, Any]]:
    """A list of objects, one object, or an object a line: all are called .json."""
    text = _decoded(path)
    if text.lstrip().startswith("["):
        return enumerate(_json(text, str(path)), start=1)
    try:
        return [(1, json.loads(text))]
    except (ValueError, RecursionError):
        return _by_line(text, path)


def _by_line(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json(line, f"{path}, row {number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {error}") from None


def _parquet(path: Path) -> Iterable[tuple[int, Any]]:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{path} needs the package pyarrow: pip install 'eigenzoo[data]'")
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        column = next((c for c in COLUMNS if c in names), None)
        if column is None:
            raise ValueError(
                f"{path} has the columns {', '.join(names)}: expected `text` or `messages`"
            )
        rows = parquet.read_table(path, columns=[column]).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no whole parquet file: {error}") from None
    return enumerate(rows, start=1)


READERS: dict[tuple[str, ...], Callable[[Path], Iterable[tuple[int, Any]]]] = {
    (".jsonl", ".ndjson", ".jsonlines"): _lines,
    (".json",): _whole,
    (".parquet",): _parquet,
}
