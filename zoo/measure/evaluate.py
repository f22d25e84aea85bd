"""What a model costs and how good it is: perplexity, bytes of cache, decode speed."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..inference.domains import Domain, all_rows, domains_record
from ..inference.generate import Generator, answer
from ..inference.perplexity import window_losses
from ..inference.texts import Text, read_text
from ..models.config import kv_bytes
from ..models.model import Model
from ..utils.provenance import fingerprint
from ..utils.records import DomainsRecord, EvaluationText, KvBytes


class Comparison(KvBytes):
    """One of several models, as `compare` measures them: increases are over the first."""

    domains: DomainsRecord
    answer: Any  # token ids; the command line puts their text in their place
    cache_bytes: int
    decode_tokens_per_second: float


class Evaluation(NamedTuple):
    """What to measure perplexity on: a file, or None for Python's own help; see `perplexity`.

    domains: texts to measure on instead, so many windows of each.
    """

    text: Path | None = None
    window: int = 2048
    windows: int = 0
    domains: Sequence[Text] = ()

    def read(self) -> list[Text]:
        """The texts. Raises ValueError if the file cannot be read."""
        return list(self.domains) or [read_text(self.text)]

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> EvaluationText:
        """The same, a file by its last name, with a digest of the text, chats as a template's."""
        texts = self.read()
        return {
            "text": " and ".join(text.name for text in texts),
            "window": self.window,
            "windows": self.windows,
            "digest": fingerprint(*(text.words(tokenizer) for text in texts)),
        }


def decode_speed(generators: Sequence[Generator], steps: int = 32, rounds: int = 3) -> list[float]:
    """Median tokens per second of each, decoding at the end of its cache; rounds interleave."""
    times: list[list[float]] = [[] for _ in generators]
    for _ in range(rounds):
        for generator, seconds in zip(generators, times, strict=True):
            token = torch.zeros(generator.batch, 1, dtype=torch.long, device=generator.valid.device)
            first = generator.slots - steps
            generator.filled = 0  # what slots hold does not matter here
            generator.advance(token, first)  # compiles, and warms up
            for slot in range(first, generator.slots):
                start = time.perf_counter()
                generator.advance(token, slot)[0, 0].item()  # waits for the device
                seconds.append(time.perf_counter() - start)
    return [g.batch / median(s) for g, s in zip(generators, times, strict=True)]


def compare(
    models: Mapping[str, Model],
    domains: Sequence[Domain],
    context: int,
    prompt: Sequence[int],
    stop: Sequence[int],
    compile: bool = True,
) -> dict[str, Comparison]:
    """Perplexity, bytes, an answer to `prompt` and decode speed of each model.

    Perplexity is that on each domain, its increase that over the first model's. The cache has
    `context` slots.
    """
    generators = [Generator(m, 1, context, compile, False) for m in models.values()]
    answers, qualities, rows = [], list[DomainsRecord](), all_rows(domains)
    dense: list[float] | None = None
    for model, generator in zip(models.values(), generators, strict=True):
        new = min(48, context - len(prompt))
        answers.append(answer(generator, [prompt], new, stop=stop).tokens[0])
        qualities.append(domains_record(domains, window_losses(model, rows), dense))
        dense = dense or [x["perplexity"] for x in qualities[0]["texts"]]
    speeds = decode_speed(generators)
    return {
        name: {
            "domains": quality,
            **kv_bytes(model.config),
            "answer": said,
            "cache_bytes": generator.cache.nbytes,
            "decode_tokens_per_second": speed,
        }
        for (name, model), generator, said, quality, speed in zip(
            models.items(), generators, answers, qualities, speeds, strict=True
        )
    }
