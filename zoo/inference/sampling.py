"""How the next token is chosen from logits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How the next token is chosen: by temperature, then top-k, then top-p."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 stands for all."""
    top_p: float = 1.0
    """Sample from the most likely tokens of this total probability, in (0, 1]."""
    seed: int = 0
    """Of the random numbers."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        warm = 0 <= self.temperature < math.inf  # nan is neither
        if not warm or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"given {self}: expected a finite temperature >= 0, top_k >= 0 and top_p above 0 "
                "up to 1"
            )


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, vocabulary) of the next tokens at a temperature above 0, from logits."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        rest = p.cumsum(-1) - p >= sampling.top_p  # the most likely token always stays
        logits = logits.masked_fill(rest.gather(1, order.argsort()), -torch.inf)
    return logits.softmax(-1)


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator | None = None) -> Tensor:
    """Next tokens (B,) from logits (B, vocabulary): temperature, then top-k, then top-p."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return distribution(logits, sampling).multinomial(1, generator=random)[:, 0]
