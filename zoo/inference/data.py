"""Text for calibration, evaluation and prompts, as token ids."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from .chat import render
from .generate import sample_text
from .hub import FAILURES
from .texts import Text, read_text, take

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


def check_ids(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, name: str
) -> None:
    """Raise ValueError for a token that the model has no embedding for. name: of the text."""
    highest = max(ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"{name} has token {highest}, {tokenizer.convert_ids_to_tokens(highest)!r}, of the "
            f"tokenizer's {len(tokenizer)}, but the model knows {vocabulary}: use the tokenizer "
            "that belongs to the model"
        )


def is_file(source: str) -> bool:
    """Whether a source of calibration text is a file: neither `self` nor `hub:DATASET`."""
    return source != "self" and not source.startswith("hub:")


def check_source(source: str) -> None:
    """Raise ValueError for a file of calibration text that cannot be read."""
    if is_file(source):
        read_text(source)


def calibration_tokens(
    source: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
) -> Tensor:
    """Token ids to calibrate on, (samples, length), on the model's device.

    - source: a file as `texts.read_text` reads it, plain text or rows; `hub:DATASET[:CONFIG]`; or
      `self`. From a text, windows that do not overlap are taken evenly over its whole length, fewer
      than `samples` if it is short. Of a dataset the train split is read, its column `text` or
      `messages`. `self` stands for text sampled from the model, which needs no data.
    - samples, length: number of sequences and tokens in each, at least 2.
    - seed: of the sampling with `self`.

    Raises ValueError if the text cannot be read, has fewer than two windows, or has tokens that the
    model does not know.
    """
    if samples < 2 or length < 2:
        raise ValueError(
            f"given {samples} samples of {length} tokens: expected at least 2 samples of 2 tokens"
        )
    if source == "self":
        return sample_text(model, _start(tokenizer, model), samples, length, seed)
    hub = source.removeprefix("hub:")
    text = read_text(source) if is_file(source) else hub_text(hub, 8 * samples * length)
    tokens = read_tokens(tokenizer, text, model.config.vocab_size)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < 2:
        raise ValueError(
            f"the calibration text {source} has {len(tokens)} tokens: expected at least "
            f"{2 * length}; give a longer text or a smaller --seq-len"
        )
    spread = torch.linspace(0, len(rows) - 1, min(samples, len(rows))).round().long()
    return rows[spread].to(model.device)


def _start(tokenizer: PreTrainedTokenizerBase, model: Model) -> int:
    """The token from which text is sampled."""
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            check_ids([start], tokenizer, model.config.vocab_size, "text sampled from the model")
            return start
    raise ValueError(
        "the tokenizer has no begin or end token, from which text could be sampled: give "
        "--calibration FILE"
    )


def hold_out(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Split tokens (N, T): all rows but the last eighth (at least one), and that eighth."""
    if len(tokens) < 2:
        raise ValueError(f"given {len(tokens)} sequences: expected 2 or more, to hold out one")
    kept, held_out = tokens.tensor_split([len(tokens) - (len(tokens) // 8 or 1)])
    return kept, held_out


def hub_text(name: str, characters: int) -> Text:
    """Rows of a dataset `DATASET[:CONFIG]`, streamed: `text` or `messages` of its train split.

    They have `characters` characters or a little more, or are the whole split. Raises ValueError if
    the dataset cannot be read or has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"hub:{name} needs the package datasets: pip install 'eigenzoo[data]'"
        ) from None
    dataset, _, config = name.partition(":")
    if not dataset:
        raise ValueError("hub: names no dataset: expected hub:DATASET or hub:DATASET:CONFIG")
    failures = (*FAILURES, datasets.exceptions.DatasetsError)
    try:
        stream = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    except (*failures, ValueError) as error:
        raise _unreadable(dataset, error) from error
    with tqdm(stream, desc="reading", unit="row", disable=None, leave=False) as rows:
        try:
            return take(f"hub:{name}", enumerate(rows, start=1), characters)
        except failures as error:  # the network may fail at any row
            raise _unreadable(dataset, error) from error


def _unreadable(dataset: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"the dataset {dataset} could not be read: {reason}")


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
