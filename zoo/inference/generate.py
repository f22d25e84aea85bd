"""Generation with a static cache: one compiled graph for prefill, one for decoding."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.model import Model
from .steps import check_compiler, compile_seconds, decode_by_layer, decode_step, prefill

PART = 2048  # tokens per prefill step: more would take more memory and would not be faster


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


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator | None = None) -> Tensor:
    """Next tokens (B,) from logits (B, vocabulary): temperature, then top-k, then top-p."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        rest = p.cumsum(-1) - p >= sampling.top_p  # the most likely token always stays
        logits = logits.masked_fill(rest.gather(1, order.argsort()), -torch.inf)
    return logits.softmax(-1).multinomial(1, generator=random)[:, 0]


def fastest_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which a device decodes fastest; None: that of the checkpoint.

    It is bfloat16 if the device computes in bfloat16. Other CPUs get float32, also for a checkpoint
    in float16, in which CPUs do not compute.
    """
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else None


class Generator:
    """A model with a static cache, which it uses for one batch of prompts after the other.

    Memory is allocated and graphs are compiled once: the prefill graph takes prompts of any length,
    the decoding graph one token per sequence. Prompts of different lengths are padded on the left;
    positions are counted after the padding.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        slots: int,
        compile: bool = True,
        compile_prefill: bool | None = None,
        bits: int | None = None,
    ):
        """Allocate the cache. Compilation happens at the first use.

        - batch: number of sequences.
        - slots: size of the cache, in tokens of prompt and answer.
        - compile: compile decoding.
        - compile_prefill: compile prefill; None: as `compile`.
        - bits: of a number in the cache, 16, 8 or 4; None: as the model's config says.

        Raises ValueError if there is no C++ compiler, if the model has fewer positions, or for
        unsupported bits.
        """
        self.model, self.batch, self.slots = model, batch, slots
        self.cache = model.new_cache(batch, slots, bits=bits)
        device = model.device
        self.valid = torch.ones(batch, slots, dtype=torch.bool, device=device)
        if compile_prefill is None:
            compile_prefill = compile
        if (compile or compile_prefill) and device.type == "cpu":
            check_compiler()
        # Regions that layers share cannot hold symbolic sizes. So sizes must stay static, and each
        # model and each cache size is compiled separately, without a limit on their number.
        self.decode = decode_step
        if compile:
            static = {"fullgraph": True, "dynamic": False, "recompile_limit": sys.maxsize}
            self.decode = torch.compile(decode_by_layer, **static)  # type: ignore[call-overload]
        self.prefill = torch.compile(prefill, fullgraph=True) if compile_prefill else prefill

    @torch.inference_mode()
    def advance(self, tokens: Tensor, start: int) -> Tensor:
        """Process tokens (B, T) at the slots from `start` on; logits (B, vocabulary) of the last.

        Long prompts run in parts of 2048 tokens. Raises ValueError, before anything is written, if
        the tokens do not fit the cache.
        """
        batch, count = tokens.shape
        if batch != self.batch or start + count > self.slots:
            raise ValueError(
                f"{batch} sequences of {start + count} tokens do not fit a cache for {self.batch} "
                f"of {self.slots}: shorten the prompt or make a larger cache"
            )
        for part in tokens.split(PART, dim=1):
            logits = self._advance(part.contiguous(), start)
            start += part.size(1)
        return logits

    def _advance(self, tokens: Tensor, start: int) -> Tensor:
        valid = self.valid if self.batch > 1 else None  # a single sequence has no padding
        if tokens.size(1) == 1:
            pos = torch.arange(start, start + 1, device=tokens.device)
            return self.decode(self.model, tokens, pos, self.cache, valid)
        past = torch.empty(start, device=tokens.device)
        if self.prefill is not prefill:  # one graph for all lengths
            torch._dynamo.mark_dynamic(tokens, 1)
            if start > 1:  # sizes 0 and 1 cannot be dynamic: they have graphs of their own
                torch._dynamo.mark_dynamic(past, 0)
        return self.prefill(self.model, tokens, past, self.cache, valid)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Yield the next token of every sequence, (B,), up to `max_new_tokens` times.

        - prompts: token ids, one list for each sequence.
        - sampling: None takes the most likely token.
        - stop: tokens that end a sequence, which then repeats its last token until all sequences
          have ended.

        Raises ValueError if the prompts and the new tokens do not fit the cache, or `sampling` is
        out of range.
        """
        sampling = sampling or Sampling()
        sampling.check()
        if len(prompts) != self.batch or not all(len(p) for p in prompts):
            raise ValueError(
                f"given {len(prompts)} prompts of {[len(p) for p in prompts]} tokens: expected "
                f"{self.batch} prompts, each with one token or more"
            )
        known = self.model.config.vocab_size
        if not all(0 <= token < known for p in prompts for token in p):
            raise ValueError(f"a prompt has tokens that the model does not know: it knows {known}")
        longest = max(len(p) for p in prompts)
        if longest + max_new_tokens - 1 > self.slots or max_new_tokens < 1:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit a cache of "
                f"{self.slots} slots: ask for fewer (at least 1) or make a larger cache"
            )
        device = self.valid.device
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        self.valid.fill_(True)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            self.valid[i, : longest - len(prompt)] = False
        random = torch.Generator(device).manual_seed(sampling.seed)
        ends = torch.tensor(list(stop), dtype=torch.long, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        last = tokens[:, -1]
        logits = self.advance(tokens, 0)
        for slot in range(longest, longest + max_new_tokens):
            last = torch.where(done, last, choose(logits, sampling, random))
            done |= torch.isin(last, ends)
            yield last
            if slot + 1 < longest + max_new_tokens and not done.all():
                logits = self.advance(last[:, None], slot)
            else:
                return


class Answer(NamedTuple):
    """The new tokens of every prompt, its end token included, and the speed of generation."""

    tokens: list[list[int]]
    tokens_per_second: float | None  # of decoding; None for fewer than three steps
    first_seconds: float  # from the start to the first tokens
    compile_seconds: float  # spent in torch.compile, few if its cache holds the graphs


def answer(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    show: Callable[[Tensor], None] | None = None,
) -> Answer:
    """Run `Generator.stream` to its end; arguments and errors as there.

    show: called with the tokens (B,) of every step. The speed excludes prefill and the first
    decoding step, which may wait for the compiler.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    times, start, compiled = [], time.perf_counter(), compile_seconds()
    for tokens in generator.stream(prompts, max_new_tokens, sampling, stop):
        times.append(time.perf_counter())
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not row or row[-1] not in stop:
                row.append(token)
        if show:
            show(tokens)
    steps = len(times) - 2
    speed = steps * len(rows) / (times[-1] - times[1]) if steps > 0 else None
    return Answer(rows, speed, times[0] - start, compile_seconds() - compiled)


def sample_text(model: Model, start: int, samples: int, length: int, seed: int = 0) -> Tensor:
    """Sample text from the model, for calibration: tokens (samples, length).

    Every sequence begins with token `start`. All are sampled in one batch at temperature 1, without
    top-k or top-p.
    """
    generator = Generator(model, samples, length, compile=False)
    new = generator.stream([[start]] * samples, length - 1, Sampling(temperature=1.0, seed=seed))
    bar = tqdm(new, desc="sampling", total=length - 1, unit="token", disable=None, leave=False)
    first = torch.full((samples,), start, device=generator.valid.device)
    return torch.stack([first, *(t.clone() for t in bar)], dim=1)
