"""Texts of several domains to measure perplexity on: one number in-domain hides what users lose."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from ..utils.provenance import fingerprint
from ..utils.records import DomainRecord, DomainsRecord, MeanWorst
from .data import encode, read_tokens
from .perplexity import Perplexity, cut, mean_perplexity
from .python_texts import python_source
from .source_texts import known_texts
from .texts import Text, read_text

CHARACTERS = 16  # of a token, at most, on average: what is read of a text for so many tokens
MARGIN = 16  # tokens at the end of a beginning that may differ from those of the whole text


class Domain(NamedTuple):
    """A text to measure on: its name, its `digest`, and windows (M, W) of its tokens."""

    name: str
    digest: str
    rows: Tensor


def python_domains() -> list[Text]:
    """What every Python brings along and nothing is calibrated on: its help, and source code.

    Raises ValueError where this Python comes without the source of its modules.
    """
    return [read_text(None), Text("Python's own source", [python_source(held_out=True)])]


def read_domains(python: bool, files: Sequence[str] = ()) -> list[Text]:
    """The texts of domains: those of `python_domains` if `python`, and files, as FILE or NAME=FILE.

    Raises ValueError for a file that cannot be read, and for two domains of one name.
    """
    texts = python_domains() if python else []
    texts += map(_named, files)
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two domains are called {name}: name them, as --domain NAME=FILE")
    return texts


def _named(given: str) -> Text:
    """The text of FILE or of NAME=FILE; a file whose own name has an = in it is read as FILE."""
    name, equals, file = given.partition("=")
    if not equals or Path(given).expanduser().exists():
        return read_text(given)
    if not name or not file:
        raise ValueError(f"the domain is {given!r}: expected FILE or NAME=FILE")
    return read_text(file)._replace(name=name)


def check_apart(texts: Sequence[Text], calibration: Sequence[str]) -> None:
    """Raise ValueError for a text to measure on that is also one to calibrate on."""
    for known in (text for sources in calibration for text in known_texts(sources)):
        for text in texts:
            if text.rows == known.rows:
                raise ValueError(
                    f"{known.name} is calibrated on, so {text.name} would not show how good other "
                    "text is: measure on another text, or calibrate on another"
                )


def digest(text: Text, tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of a text, chats as the tokenizer's template has them."""
    return fingerprint(text.words(tokenizer))


def domain(
    text: Text, tokenizer: PreTrainedTokenizerBase, model: Model, window: int, windows: int = 0
) -> Domain:
    """A text as windows of tokens on the model's device, at most `windows`; 0 stands for all.

    Raises ValueError if it is shorter than one window or has tokens that the model does not know.
    """
    size = model.config.vocab_size
    begun = _beginning(text, window * windows)
    tokens = encode(tokenizer, begun, size) if begun is not text else None
    if tokens is None or len(tokens) < window * windows + MARGIN:
        tokens = read_tokens(tokenizer, text, size)
    rows = cut(tokens, window, windows, text.name, model.config.begun)
    return Domain(text.name, digest(text, tokenizer), rows.to(model.device))


def _beginning(text: Text, tokens: int) -> Text:
    """So much of a plain text that it very likely has so many tokens, to a line's end; 0: all."""
    (first, *more), most = text.rows, CHARACTERS * (tokens + MARGIN)
    if not tokens or more or not isinstance(first, str) or len(first) <= most:
        return text
    return text._replace(rows=[first[: first.rfind("\n", 0, most) + 1] or first])


def all_rows(domains: Sequence[Domain]) -> Tensor:
    """The windows (M, W) of all domains, one after the other."""
    return torch.cat([x.rows for x in domains])


def by_domain(domains: Sequence[Domain], losses: Tensor) -> list[Perplexity]:
    """The perplexity on each domain. losses: of `all_rows`, (M, W - 1) in nats."""
    return [mean_perplexity(x) for x in losses.split([len(x.rows) for x in domains])]


def domains_record(
    domains: Sequence[Domain], losses: Tensor, dense: Sequence[float] | None = None
) -> DomainsRecord:
    """Perplexity on every domain, with mean and worst.

    losses: of `all_rows`, (M, W - 1) in nats. dense: perplexities of the uncompressed model, for
    the increase over them.
    """
    rows: list[DomainRecord] = [
        {"text": x.name, "digest": x.digest, "perplexity": on.perplexity, "tokens": on.tokens}
        for x, on in zip(domains, by_domain(domains, losses), strict=True)
    ]
    record: DomainsRecord = {"texts": rows, "perplexity": _spread([x["perplexity"] for x in rows])}
    if dense is not None:
        for row, before in zip(rows, dense, strict=True):
            row["dense_perplexity"] = before
            row["increase"] = row["perplexity"] / before - 1
        record["increase"] = _spread([x["increase"] for x in rows])
    return record


def _spread(numbers: Sequence[float]) -> MeanWorst:
    return {"mean": sum(numbers) / len(numbers), "worst": max(numbers)}
