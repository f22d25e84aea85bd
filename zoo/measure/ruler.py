"""How much of what long texts ask for a model's answers name: the tasks of `ruler_tasks`."""

import re
from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import fmean, stdev

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..inference.evict import asking, check_alone
from ..inference.generate import answer
from ..models.model import Model
from ..utils.records import RulerRecord, RulerScore
from .ruler_tasks import TASKS, Prompt, prompt


def named(said: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that an answer has as whole words, in any case."""
    found = (re.search(rf"(?<!\w){re.escape(x)}(?!\w)", said, re.IGNORECASE) for x in expected)
    return fmean(x is not None for x in found)


def ruler(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    samples: int = 20,
    seed: int = 0,
    stop: Sequence[int] = (),
    batch: int = 1,
    bits: int | None = None,
    keep: int | None = None,
) -> list[RulerRecord]:
    """Ask `samples` questions of every task in texts of `lengths` tokens, answers included.

    Answers are greedy and end at a token of `stop`, or at the most tokens of the task. batch:
    questions at once. bits: as in `Generator`. keep: the most tokens of a text and its question
    that stay in the cache, as in `EvictingGenerator`; None: all. Every length has the same
    questions. Raises ValueError, before the first answer, for lengths that fit neither the model
    nor the tasks, and for a batch of which tokens would be dropped.
    """
    if keep is not None:
        check_alone(batch)
    known, most = model.config.vocab_size, model.config.max_position_embeddings
    if max(lengths) > most:
        raise ValueError(
            f"length is {max(lengths)}: expected {most} at most, the positions of the model; "
            "choose a shorter --length"
        )
    cells = [(length, name) for length in sorted({*lengths}) for name in TASKS]
    total, plan = len(cells) * samples, dict[tuple[int, str], list[Prompt]]()
    with tqdm(desc="writing", total=total, unit="text", disable=None, leave=False) as bar:
        for length, name in cells:  # the shortest first: what is too short fails at once
            plan[length, name] = []
            for i in range(samples):
                one = prompt(tokenizer, name, length, f"{seed} {name} {i}", known)
                plan[length, name].append(one)
                bar.update()
    shares = dict[tuple[int, str], list[float]]()
    with tqdm(desc="asking", total=total, unit="text", disable=None, leave=False) as bar:
        for cell in reversed(cells):  # the longest first: what does not fit memory fails at once
            shares[cell] = []
            for share in _answered(model, tokenizer, cell, plan[cell], stop, batch, bits, keep):
                shares[cell].append(share)
                bar.update()
    chat = bool(tokenizer.chat_template)
    rows = list[RulerRecord]()
    for length in sorted({*lengths}):
        tasks = {name: _score(shares[length, name]) for name in TASKS}
        row: RulerRecord = {
            "length": length,
            "samples": samples,
            "chat": chat,
            "tasks": tasks,
            "mean": _mean([*tasks.values()]),
        }
        rows.append(row)
    return rows


def _answered(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    cell: tuple[int, str],
    prompts: Sequence[Prompt],
    stop: Sequence[int],
    batch: int,
    bits: int | None,
    keep: int | None,
) -> Iterator[float]:
    """The share of what it should name, of every answer."""
    length, name = cell
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        new = TASKS[name].new
        generator = asking(model, len(some), length, new, keep, bits)
        said = answer(generator, [x.tokens for x in some], new, stop=stop).tokens
        del generator  # its memory is for the next one
        for one, tokens in zip(some, said, strict=True):
            yield named(str(tokenizer.decode(tokens, skip_special_tokens=True)), one.expected)


def _score(shares: Sequence[float]) -> RulerScore:
    error = stdev(shares) / sqrt(len(shares)) if len(shares) > 1 else None
    return {"recall": fmean(shares), "standard_error": error}


def _mean(scores: Sequence[RulerScore]) -> RulerScore:
    """The mean over tasks, whose errors are independent."""
    errors = [x["standard_error"] for x in scores]
    known = [x for x in errors if x is not None]
    error = sqrt(sum(x * x for x in known)) / len(scores) if len(known) == len(scores) else None
    return {"recall": fmean(x["recall"] for x in scores), "standard_error": error}
