"""Speculative decoding: cheap drafts of the next tokens, which the model verifies in one step.

The tokens are those of plain decoding, or with sampling, of its distribution (rejection as in
Leviathan et al. 2023, arXiv 2211.17192). A rejected token leaves its slot of the cache filled. The
next step starts at that slot and writes it before any token reads it, so nothing is undone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .sampling import Sampling, choose, distribution

if TYPE_CHECKING:
    from .generate import Generator

NGRAMS = (3, 2)  # tokens at the end of the text that are looked up, the longest first


class Proposal(NamedTuple):
    """Drafted tokens, and the probabilities (N, vocabulary) that each was sampled from.

    probabilities: None if the tokens were certain, as with a lookup or without sampling.
    """

    tokens: list[int]
    probabilities: Tensor | None = None


class Draft(ABC):
    """What proposes the next tokens of one sequence: `Lookup` or `DraftModel`."""

    def __init__(self, tokens: int):
        """tokens: how many to draft for one step of the model.

        `proposed` and `accepted` count the drafted tokens of the last sequence.
        """
        self.tokens = tokens
        self.proposed = self.accepted = 0

    def check(self, generator: Generator, count: int) -> None:
        """Raise ValueError if this cannot draft for a generator that makes up to `count` tokens."""
        check_drafts(self.tokens, generator.batch, count)
        if self.tokens > generator.cache.spare:
            raise ValueError(
                f"given drafts of {self.tokens} tokens: expected at most {generator.cache.spare}, "
                "since rejected ones overwrite old slots of layers with windows"
            )

    @abstractmethod
    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence, and read the prompt of the next."""

    @abstractmethod
    def propose(
        self, text: Sequence[int], sampling: Sampling, random: torch.Generator
    ) -> Proposal | None:
        """`tokens` tokens that may follow the text, or None. The text extends the last one."""


class Lookup(Draft):
    """Prompt lookup: drafts what followed the last tokens where they were in the text before.

    It pays where the answer repeats the prompt or itself, as in edits, code and summaries. Where
    the last tokens are new, the model decodes one token as without drafts.
    """

    def begin(self, prompt: Sequence[int]) -> None:
        """As in `Draft`."""
        self.read = 0
        self.after: dict[tuple[int, ...], int] = {}  # n-gram: where its latest continuation begins

    def propose(
        self, text: Sequence[int], sampling: Sampling, random: torch.Generator
    ) -> Proposal | None:
        """As in `Draft`. A continuation that is too short goes on from its beginning."""
        for end in range(self.read, len(text)):
            self.after.update((tuple(text[end - n : end]), end) for n in NGRAMS if n <= end)
        self.read = len(text)
        for n in NGRAMS:
            if start := self.after.get(tuple(text[-n:])):
                return Proposal(
                    (list(text[start : start + self.tokens]) * self.tokens)[: self.tokens]
                )
        return None


class DraftModel(Draft):
    """A smaller model with the same vocabulary, which drafts by its own sampling."""

    def __init__(self, generator: Generator, tokens: int):
        """generator: of the smaller model, for one sequence. tokens, errors: as in `Draft`."""
        super().__init__(tokens)
        self.generator = generator

    def check(self, generator: Generator, count: int) -> None:
        """As in `Draft`. Raises ValueError also for another vocabulary, or too small a cache."""
        super().check(generator, count)
        super().check(self.generator, count)
        if self.generator is generator:
            raise ValueError("the draft is the model's own generator: give it one of its own")
        ours, theirs = (g.model.config.vocab_size for g in (self.generator, generator))
        if ours != theirs:
            raise ValueError(
                f"the draft model knows {ours} tokens, and the model {theirs}: expected a draft "
                "model with the same vocabulary"
            )
        if self.generator.slots < generator.slots:
            raise ValueError(
                f"the cache of the draft model has {self.generator.slots} slots: expected "
                f"{generator.slots}, as many as that of the model"
            )

    def begin(self, prompt: Sequence[int]) -> None:
        """As in `Draft`."""
        self._read(prompt, 0)
        self.filled = len(prompt)
        self.generator.warm(self.filled, 1)

    def propose(
        self, text: Sequence[int], sampling: Sampling, random: torch.Generator
    ) -> Proposal | None:
        """As in `Draft`."""
        # the slots up to the last token hold the text; those after it held rejected tokens
        for slot in range(min(self.filled, len(text) - 1), len(text)):
            logits = self._read(text[slot : slot + 1], slot)
        drafted = [int(choose(logits, sampling, random))]
        rows = [logits]
        for slot in range(len(text), len(text) + self.tokens - 1):
            rows.append(self._read(drafted[-1:], slot))
            drafted.append(int(choose(rows[-1], sampling, random)))
        self.filled = len(text) + self.tokens - 1
        certain = sampling.temperature == 0
        return Proposal(drafted, None if certain else distribution(torch.cat(rows), sampling))

    def _read(self, tokens: Sequence[int], slot: int) -> Tensor:
        """Logits (1, vocabulary) after tokens at the slots from `slot` on."""
        return self.generator.advance(_row(tokens, self.generator), slot)


def check_drafts(tokens: int, batch: int, count: int) -> None:
    """Raise ValueError unless drafts of `tokens` tokens suit a batch and `count` new tokens."""
    if batch != 1:
        raise ValueError(
            f"given {batch} sequences and a draft: expected one, since each would accept another "
            "number of tokens; omit the draft, or generate for one prompt after the other"
        )
    if not 1 <= tokens < count:
        raise ValueError(
            f"given drafts of {tokens} tokens for up to {count} new ones: expected at least 1, and "
            "fewer than the new ones"
        )


def speculate(
    generator: Generator,
    draft: Draft,
    prompt: Sequence[int],
    logits: Tensor,
    count: int,
    sampling: Sampling,
    stop: Collection[int],
) -> Iterator[int]:
    """Yield up to `count` tokens that follow a prompt, up to the first in `stop`.

    The prompt is in the cache, and `logits` (1, vocabulary) are those of its last token.
    """
    random = torch.Generator(logits.device).manual_seed(sampling.seed)
    text, last = list(prompt), len(prompt) + count
    generator.warm(len(prompt), draft.tokens + 1)
    draft.begin(prompt)
    draft.proposed = draft.accepted = 0
    proposal = None
    while True:
        tokens = accept(logits, proposal or Proposal([]), sampling, random)
        if proposal:
            draft.proposed += draft.tokens
            draft.accepted += len(tokens) - 1
        for token in tokens:
            text.append(token)
            yield token
            if token in stop or len(text) == last:
                return
        slot = len(text) - 1
        fits = slot + draft.tokens < generator.slots
        proposal = draft.propose(text, sampling, random) if fits else None
        if proposal:
            row = _row([text[-1], *proposal.tokens], generator)
            logits = generator.verify(row, slot)
        else:
            logits = generator.advance(_row(text[-1:], generator), slot)


def accept(
    logits: Tensor, proposal: Proposal, sampling: Sampling, random: torch.Generator
) -> list[int]:
    """The drafted tokens up to the first that is rejected, then one that the model chooses.

    logits: (N + 1, vocabulary), before each of the N drafted tokens and after the last. A token
    that was certain is accepted if the model's own choice is the same: with the probability that
    the model gives it. So the tokens are those of plain decoding, with the same seed too.
    """
    drafted, q = proposal
    tokens: list[int] = []
    for i, row in enumerate(logits.split(1)):
        if q is None or i == len(drafted):
            tokens.append(int(choose(row, sampling, random)))
            if i == len(drafted) or tokens[-1] != drafted[i]:
                break
            continue
        p, token = distribution(row, sampling)[0], drafted[i]
        if torch.rand((), generator=random, device=p.device) * q[i, token] < p[token]:
            tokens.append(token)
            continue
        rest = (p - q[i]).clamp(min=0)
        # by rounding alone nothing may be left, where both distributions are one
        tokens.append(int((rest if rest.any() else p).multinomial(1, generator=random)))
        break
    return tokens


def _row(tokens: Sequence[int], generator: Generator) -> Tensor:
    return torch.tensor([list(tokens)], device=generator.valid.device)
