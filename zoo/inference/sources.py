"""Sources of calibration text: how they are named, shared out, ordered and told in records."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import NamedTuple

HUB = "hub:"
OWN = {
    "self": "text sampled from the model",
    "chat": "chats sampled from the model, both sides, through its tokenizer's chat template",
}
PYTHON = {"help": "English from Python's own help", "source": "the source of Python's modules"}
MIXED = {"self": 1, "chat": 1, "help": 1, "source": 1}  # shares of `mixed`
NAMES = {
    "mixed": "self, chat, help and source; needs no data, and leaves out what cannot be had",
    **OWN,
    **PYTHON,
}


class Source(NamedTuple):
    """A source of calibration text. share: against those of the others.

    optional: it is a part of `mixed`, which does without what cannot be had.
    """

    name: str
    share: Fraction = Fraction(1)
    optional: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the name is that of a file."""
        return self.name not in NAMES and not self.name.startswith(HUB)

    @property
    def told(self) -> str:
        """The name without the folder of a file, or of a dataset on this machine."""
        dataset = Path(self.name.removeprefix(HUB)).expanduser()
        if self.is_file:
            return Path(self.name).name
        return (
            f"{HUB}{dataset.name}" if self.name.startswith(HUB) and _exists(dataset) else self.name
        )


def parse(calibration: str, samples: int | None = None) -> list[Source]:
    """The sources that `--calibration` names, with commas between them, `mixed` as its parts.

    A number behind a last colon is a share, 1 without one. A file that is called just so, commas
    and colons included, wins over that; the names in `NAMES` win over files. Shares of a source
    that is named twice add up. samples: the number of sequences to come. Raises ValueError for a
    source without a name, a share that is not positive, and fewer samples than sources.
    """
    parts: dict[str, Source] = {}
    for name, share in map(_shared, _split(calibration)):
        for part in _parts(name, share):
            old = parts.get(part.name, Source(part.name, Fraction(0), True))
            total, optional = old.share + part.share, old.optional and part.optional
            parts[part.name] = Source(part.name, total, optional)
    if samples is not None and samples < len(parts):
        names = ", ".join(part.told for part in parts.values())
        raise ValueError(
            f"given {samples} samples for {len(parts)} sources of calibration text ({names}): "
            "expected at least one for each"
        )
    return list(parts.values())


def files(calibration: str) -> list[str]:
    """The files among the sources. Raises ValueError as `parse`."""
    return [source.name for source in parse(calibration) if source.is_file]


def title(calibration: str) -> str:
    """What the text is called in a sentence: `mixed`, or the names of its sources."""
    sources = parse(calibration)
    mixed = len(sources) > 1 and all(source.optional for source in sources)
    return "mixed" if mixed else ", ".join(source.told for source in sources)


def told(calibration: str, rows: Sequence[str]) -> str:
    """The text in a record, source by source. rows: the source that each sequence came from.

    A single source is told by its name.
    """
    if len(parse(calibration)) == 1:
        return title(calibration)
    counts = Counter(rows)
    names = dict.fromkeys(source.told for source in parse(calibration))
    parts = ", ".join(f"{name} {counts[name]}" for name in names if counts[name])
    return f"{_prefix(calibration)}{parts} sequences"


def described(calibration: str) -> str:
    """The sources and shares in a record that is written before their text is read."""
    sources = parse(calibration)
    equal = len({source.share for source in sources}) == 1
    parts = (s.told if equal else f"{s.told}:{float(s.share):g}" for s in sources)
    return f"{_prefix(calibration)}{', '.join(parts)}"


def divide(total: int, shares: Sequence[Fraction]) -> list[int]:
    """A total in whole numbers by shares, each at least 1: the method of largest remainders.

    total: at least the number of shares.
    """
    left, above = total, dict(enumerate(shares))
    while few := [i for i, share in above.items() if share * left < sum(above.values())]:
        left -= len(few)  # each gets 1
        above = {i: share for i, share in above.items() if i not in few}
    quotas = {i: share * left / sum(above.values()) for i, share in above.items()}
    counts = [int(quotas.get(i, 1)) for i in range(len(shares))]
    by_remainder = sorted(quotas, key=lambda i: int(quotas[i]) - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (source, row) of sources with so many rows, mixed evenly.

    The last row of every source is among the last, which are held out, unless it is its only one.
    """
    keys = [
        ((row + 1) / count if count > 1 else 0, source, row)
        for source, count in enumerate(counts)
        for row in range(count)
    ]
    return [(source, row) for _, source, row in sorted(keys)]


def _parts(name: str, share: Fraction) -> list[Source]:
    if name != "mixed":
        return [Source(name, share)]
    whole = sum(MIXED.values())
    return [Source(part, share * Fraction(x) / whole, True) for part, x in MIXED.items()]


def _split(calibration: str) -> Iterator[str]:
    """The parts between commas, of which several may be the name of one file."""
    words = calibration.split(",")
    while words:
        runs = ((n, ",".join(words[:n])) for n in range(len(words), 1, -1))
        size = next((n for n, run in runs if _exists(run) or _exists(_cut(run)[0])), 1)
        yield ",".join(words[:size])
        words = words[size:]


def _shared(word: str) -> tuple[str, Fraction]:
    """Name and share of a source."""
    name, number = _cut(word)
    if number is None or (_exists(word) and Source(name).is_file):
        name, number = word, 1.0
    if name in ("", HUB) or name.startswith(f"{HUB}:"):
        expected = f"a file, {HUB}DATASET[:CONFIG], or one of {', '.join(NAMES)}"
        raise ValueError(f"{word!r} names no source of calibration text: expected {expected}")
    if not 0 < number < inf:  # nan is neither
        raise ValueError(f"{word} has the share {number:g}: expected a positive number")
    return name, Fraction(number)


def _cut(word: str) -> tuple[str, float | None]:
    """The word without a number behind its last colon, and that number."""
    start = len(HUB) if word.startswith(HUB) else 0
    name, _, number = word[start:].rpartition(":")
    try:
        return (word[:start] + name, float(number)) if name else (word, None)
    except ValueError:
        return word, None


def _prefix(calibration: str) -> str:
    return "mixed: " if title(calibration) == "mixed" else ""


def _exists(path: str | Path) -> bool:
    return os.path.exists(os.path.expanduser(path))
