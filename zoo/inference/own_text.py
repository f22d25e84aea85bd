"""Text that a model writes itself, plain or as chats, to calibrate on."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from .chat import frame
from .generate import Generator, sample_text
from .sampling import Sampling, choose
from .vocabulary import check_ids

NAME = "text sampled from the model"


class Turns(NamedTuple):
    """Tokens of a chat template around the messages of a user and of the model.

    opening: before a user's message; answering: between it and the answer; closing: behind that.
    end: the token that ends any text, None without one.
    """

    opening: list[int]
    answering: list[int]
    closing: list[int]
    end: int | None


def check_own(name: str, model: Model, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raise ValueError if a model cannot write sequences of `self` or `chat`, see `sources.OWN`."""
    if any(x.is_meta for x in model.parameters()):
        raise ValueError(
            "a model that is read layer by layer cannot write its own calibration text: give "
            "--calibration FILE or hub:DATASET"
        )
    if name == "self":
        start_token(tokenizer, model)
        return
    size = len(chat_turns(tokenizer, model).opening)
    if size >= length:
        raise ValueError(
            f"a chat begins with {size} tokens of the template, which leave no room in sequences "
            f"of {length}: give a larger --seq-len"
        )


def sample_own(
    name: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
) -> Tensor:
    """Tokens (samples, length) of `self` or `chat`, see `sources.OWN`; errors as `check_own`."""
    if name == "self":
        return sample_text(model, start_token(tokenizer, model), samples, length, seed)
    return sample_chats(model, chat_turns(tokenizer, model), samples, length, seed)


def start_token(tokenizer: PreTrainedTokenizerBase, model: Model) -> int:
    """The token from which text is sampled. Raises ValueError if there is none."""
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            check_ids([start], tokenizer, model.config.vocab_size, NAME)
            return start
    raise ValueError(
        "the tokenizer has no begin or end token, from which text could be sampled: give "
        "--calibration FILE"
    )


def chat_turns(tokenizer: PreTrainedTokenizerBase, model: Model) -> Turns:
    """The tokens around messages. Raises ValueError if the tokenizer's template has none."""
    opening, answering, closing = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in frame(tokenizer)
    )
    ids = [*opening, *answering, *closing]
    check_ids(ids, tokenizer, model.config.vocab_size, "the chat template")
    return Turns(opening, answering, closing, tokenizer.eos_token_id)


class Dialog:
    """Chats, one after the other, whose messages are drawn and the rest is the template's."""

    def __init__(self, turns: Turns):
        """The first message of the user has begun."""
        self._due = deque[int]()
        ends = [turns.answering, turns.closing + turns.opening]
        self._turns = deque([({end[0], turns.end}, end) for end in ends])

    def take(self, drawn: int) -> int:
        """The next token: what the template demands, or else the drawn one."""
        ends, following = self._turns[0]
        if not self._due and drawn in ends:
            self._due.extend(following)
            self._turns.rotate()
        return self._due.popleft() if self._due else drawn


def sample_chats(model: Model, turns: Turns, samples: int, length: int, seed: int = 0) -> Tensor:
    """Chats sampled from the model, for calibration: tokens (samples, length).

    The model writes the user's messages as well, from their opening on: the method of Magpie
    (arXiv 2406.08464). A message ends with the token by which the template ends it; after an answer
    another chat follows, until the sequence is full. All are sampled in one batch at temperature 1.
    """
    generator = Generator(model, samples, length, compile=False)
    device, opening = generator.valid.device, turns.opening[:length]
    random = torch.Generator(device).manual_seed(seed)
    dialogs = [Dialog(turns) for _ in range(samples)]
    columns = list(torch.tensor(opening, device=device)[:, None].expand(-1, samples))
    logits = generator.advance(torch.stack(columns, dim=1), 0)
    with tqdm(desc="sampling", total=length, unit="token", disable=None, leave=False) as bar:
        bar.update(len(opening))
        while len(columns) < length:
            drawn = choose(logits, Sampling(temperature=1.0), random).tolist()
            taken = [dialog.take(x) for dialog, x in zip(dialogs, drawn, strict=True)]
            columns.append(torch.tensor(taken, device=device))
            bar.update()
            if len(columns) < length:
                logits = generator.advance(columns[-1][:, None], len(columns) - 1)
    return torch.stack(columns, dim=1)
