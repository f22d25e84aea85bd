"""Text for calibration, evaluation and prompts, as token ids."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from .chat import render
from .own_text import check_own, sample_own
from .perplexity import cut
from .source_texts import source_text
from .sources import OWN, Source, divide, interleaved, parse, told
from .texts import Text
from .vocabulary import check_ids

log = logging.getLogger(__name__)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str,
    vocabulary: int | None = None,
    special: bool = True,
) -> Tensor:
    """Token ids (N,) of a text, with the special tokens that the tokenizer adds by default.

    vocabulary: number of tokens that the model knows; None: not checked. special: False adds none,
    and chats have those of their template. Raises ValueError for a token that the model does not
    know.
    """
    if isinstance(text, str):
        text = Text("the text", [text])
    words, special = text.words(tokenizer), special and not text.chats
    ids = tokenizer(words, add_special_tokens=special, verbose=False)["input_ids"]
    check_ids(ids, tokenizer, vocabulary, text.name)
    return torch.tensor(ids, dtype=torch.long)


def read_tokens(tokenizer: PreTrainedTokenizerBase, text: Text, vocabulary: int) -> Tensor:
    """As `encode`, and say what was read: the log shows rows and tokens."""
    tokens = encode(tokenizer, text, vocabulary)
    rows = f"{len(text.rows)} rows of `{text.column}`, " if text.column else ""
    log.info("read %s: %s%d tokens", text.name, rows, len(tokens))
    return tokens


class CalibrationRows(NamedTuple):
    """Text to calibrate on. names: the source of each row of tokens (N, T), as records tell it."""

    source: str
    tokens: Tensor
    names: Sequence[str]

    def told(self, rows: int) -> str:
        """What the first rows came from, as records tell it."""
        return told(self.source, self.names[:rows])


def calibration_tokens(
    source: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
) -> Tensor:
    """Token ids to calibrate on, (samples, length), on the model's device.

    As `calibration_text`, without the sources of the rows.
    """
    return calibration_text(source, model, tokenizer, samples, length, seed).tokens


def calibration_text(
    source: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
) -> CalibrationRows:
    """Tokens to calibrate on, (samples, length), on the model's device, of one source or several.

    - source: sources with commas between them, each with a share behind a colon or without one, see
      `sources.parse`: a file as `texts.read_text` reads it, plain text or rows;
      `hub:DATASET[:CONFIG]`; or a name in `sources.NAMES`. From a text, windows that do not overlap
      are taken evenly over its whole length, fewer than asked for if it is short. Of a dataset the
      train split is read, its column `text` or `messages`. `self` and `chat` stand for text sampled
      from the model, which needs no data.
    - samples, length: number of sequences and tokens in each, at least 2.
    - seed: of the sampling, and of the order of a dataset's rows.

    Samples are divided among sources by their shares, at least one for each, and their rows are
    mixed evenly: see `sources.divide` and `sources.interleaved`. Raises ValueError if a text cannot
    be read or sampled, is too short, or has tokens that the model does not know.
    """
    if samples < 2 or length < 2:
        raise ValueError(
            f"given {samples} samples of {length} tokens: expected at least 2 samples of 2 tokens"
        )
    parts = available(parse(source, samples), model, tokenizer, length)
    counts = divide(samples, [part.share for part in parts])
    asked = dict(zip(parts, counts, strict=True))
    pieces: dict[Source, Tensor] = {}
    for part in sorted(parts, key=lambda part: part.name in OWN):  # what may fail comes first
        least = 1 if len(parts) > 1 else 2  # a single one is held out from as well
        pieces[part] = (
            sample_own(part.name, model, tokenizer, asked[part], length, seed)
            if part.name in OWN
            else _windows(part.name, model, tokenizer, asked[part], length, seed, least)
        )
    order = interleaved([len(pieces[part]) for part in parts])
    tokens = torch.stack([pieces[parts[of]][row] for of, row in order])
    return CalibrationRows(source, tokens, [parts[of].told for of, _ in order])


def available(
    sources: Sequence[Source], model: Model, tokenizer: PreTrainedTokenizerBase, length: int
) -> list[Source]:
    """The sources without those parts of `mixed` that cannot be had, which the log names.

    Raises ValueError for other sources that cannot be had.
    """
    kept = []
    for source in sources:
        try:
            if source.name in OWN:
                check_own(source.name, model, tokenizer, length)
            elif source.optional:
                source_text(source.name, 0)
        except ValueError as error:
            if not source.optional:
                raise
            log.warning("mixed: without %s, since %s", source.name, error)
        else:
            kept.append(source)
    return kept


def _windows(
    name: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    least: int,
) -> Tensor:
    """Windows (samples, length) spread over a text, or fewer, but at least `least`."""
    text = source_text(name, 8 * samples * length, seed)
    tokens = read_tokens(tokenizer, text, model.config.vocab_size)
    enough = len(tokens) >= length
    rows = cut(tokens, length, begun=model.config.begun) if enough else tokens[:0]
    if len(rows) < least:
        raise ValueError(
            f"the calibration text {name} has {len(tokens)} tokens: expected at least "
            f"{least * length}; give a longer text or a smaller --seq-len"
        )
    if len(rows) < samples:
        log.info("%s gives %d sequences instead of %d", text.name, len(rows), samples)
    spread = torch.linspace(0, len(rows) - 1, min(samples, len(rows))).round().long()
    return rows[spread].to(model.device)


def hold_out(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Split tokens (N, T): all rows but the last eighth (at least one), and that eighth."""
    if len(tokens) < 2:
        raise ValueError(f"given {len(tokens)} sequences: expected 2 or more, to hold out one")
    kept, held_out = tokens.tensor_split([len(tokens) - (len(tokens) // 8 or 1)])
    return kept, held_out


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chat: bool | None = None,
    vocabulary: int | None = None,
) -> list[int]:
    """Token ids of a prompt, as a user's message if the tokenizer has a chat template.

    chat: False does not use the template, True requires it. vocabulary: number of tokens that the
    model knows; None: not checked. Raises ValueError if the template is required but missing, or
    fails, and if the prompt has no tokens, or one that the model does not know.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: omit --chat")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python passes on bytes of a command line that are no UTF-8
        raise ValueError("the prompt is not text in UTF-8") from None
    if tokenizer.chat_template and chat is not False:
        if not prompt.strip():
            raise ValueError("the prompt is empty: expected text")
        try:
            text = render(tokenizer, [{"role": "user", "content": prompt}], begun=True)
        except ValueError as error:
            raise ValueError(f"{error}; --no-chat does not use it") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: expected text")
    check_ids(ids, tokenizer, vocabulary, "the prompt")
    return ids
