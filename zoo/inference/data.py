"""Text for calibration, evaluation and prompts, as token ids."""

import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from .generate import sample_text


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError if it is missing, empty or not text."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: expected a text file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected text")
    return text


def python_docs() -> str:
    """English text that is part of Python: the topics of its help."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (N,) of a text, with the special tokens that the tokenizer adds by default."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def calibration_tokens(
    source: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
) -> Tensor:
    """Token ids to calibrate on, (samples, length), on the model's device.

    - source: a text file in UTF-8, `hub:DATASET[:CONFIG]`, or `self`. From a text, windows that do
      not overlap are taken evenly over its whole length, fewer than `samples` if it is short. Of a
      dataset the column `text` of its train split is read. `self` stands for text sampled from the
      model, which needs no data.
    - samples, length: number of sequences and tokens in each, at least 2.
    - seed: of the sampling with `self`.

    Raises ValueError if the text cannot be read, or has fewer than two windows.
    """
    if samples < 2 or length < 2:
        raise ValueError(
            f"given {samples} samples of {length} tokens: expected at least 2 samples of 2 tokens"
        )
    if source == "self":
        start = tokenizer.bos_token_id
        if start is None:
            start = tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                "the tokenizer has no begin or end token, from which text could be sampled: give "
                "--calibration FILE"
            )
        return sample_text(model, start, samples, length, seed)
    if source.startswith("hub:"):
        text = hub_text(source.removeprefix("hub:"), 8 * samples * length)
    else:
        text = read_text(source)
    tokens = encode(tokenizer, text)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < 2:
        raise ValueError(
            f"the calibration text {source} has {len(tokens)} tokens: expected at least "
            f"{2 * length}; give a longer text or a smaller --seq-len"
        )
    spread = torch.linspace(0, len(rows) - 1, min(samples, len(rows))).round().long()
    return rows[spread].to(model.device)


def hold_out(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Split tokens (N, T): all rows but the last eighth (at least one), and that eighth."""
    if len(tokens) < 2:
        raise ValueError(f"given {len(tokens)} sequences: expected 2 or more, to hold out one")
    kept, held_out = tokens.tensor_split([len(tokens) - (len(tokens) // 8 or 1)])
    return kept, held_out


def hub_text(name: str, characters: int) -> str:
    """Text of a dataset `DATASET[:CONFIG]`, streamed: column `text` of its train split.

    It has `characters` characters or a little more, or the whole split. Raises ValueError if the
    dataset cannot be read or has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"hub:{name} needs the package datasets: pip install 'eigenzoo[data]'"
        ) from None
    dataset, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the dataset {dataset} could not be read: {reason}") from error
    pieces: list[str] = []
    size = 0
    bar = tqdm(desc="reading", total=characters, unit="char", disable=None, leave=False)
    for row in stream:
        if "text" not in row:
            raise ValueError(f"the dataset {dataset} has columns {list(row)}: expected `text`")
        pieces.append(row["text"])
        size += len(row["text"])
        bar.update(len(row["text"]))
        if size >= characters:
            break
    bar.close()
    return "\n\n".join(pieces)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None = None
) -> list[int]:
    """Token ids of a prompt, as a user's message if the tokenizer has a chat template.

    chat: False does not use the template, True requires it. Raises ValueError if it is required
    but missing, or if the prompt has no tokens.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: omit --chat")
    if tokenizer.chat_template and chat is not False:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: expected text")
    return ids
