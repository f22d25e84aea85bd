"""Generation with a static cache: one compiled graph for prefill, one for decoding."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.model import Model
from .sampling import Sampling, choose
from .speculative import Draft, speculate
from .steps import (
    check_compiler,
    compile_seconds,
    decode_by_layer,
    decode_step,
    prefill,
    verify_by_layer,
)

PART = 2048  # tokens per prefill step: more would take more memory and would not be faster


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


def compiled_step(step: Callable[..., Tensor], graphs: bool) -> Callable[..., Tensor]:
    """A decoding step that is compiled at first use. graphs: as in `Generator`.

    Regions that layers share cannot hold symbolic sizes. So sizes must stay static, and each model
    and each cache size is compiled separately, without a limit on their number.
    """
    static: Any = {"fullgraph": True, "dynamic": False, "recompile_limit": sys.maxsize}
    static |= {"mode": "reduce-overhead"} if graphs else {}
    return torch.compile(step, **static)


class Generator:
    """A model with a static cache, which it uses for one batch of prompts after the other.

    Memory is allocated and graphs are compiled once: the prefill graph takes prompts of any length,
    the decoding graph one token per sequence, and a graph for each length of drafts verifies them.
    Prompts of different lengths are padded on the left; positions are counted after the padding.
    """

    dropped = 0  # tokens of the last prompt that the cache does not hold: see `evict.py`

    def __init__(
        self,
        model: Model,
        batch: int,
        slots: int,
        compile: bool = True,
        compile_prefill: bool | None = None,
        bits: int | None = None,
        graphs: bool = False,
    ):
        """Allocate the cache. Compilation happens at the first use.

        - batch: number of sequences.
        - slots: size of the cache, in tokens of prompt and answer.
        - compile: compile decoding.
        - compile_prefill: compile prefill; None: as `compile`.
        - bits: of a number in the cache, 16, 8 or 4; None: as the model's config says.
        - graphs: where decoding is compiled, a GPU replays it from CUDA graphs. The logits of a
          step are overwritten by the next one.

        Raises ValueError if there is no C++ compiler, if the model has fewer positions, or for
        unsupported bits.
        """
        self.model, self.batch, self.slots = model, batch, slots
        self.cache = model.new_cache(batch, slots, bits=bits)
        self.filled = 0  # slots that were written since slot 0 was
        device = model.device
        self.valid = torch.ones(batch, slots, dtype=torch.bool, device=device)
        if compile_prefill is None:
            compile_prefill = compile
        if (compile or compile_prefill) and device.type == "cpu":
            check_compiler()
        self.decode, self._verify, self._cold = decode_step, verify_by_layer, compile
        if compile:
            self.decode = compiled_step(decode_by_layer, graphs)
            self._verify = compiled_step(verify_by_layer, graphs)
        self.prefill = torch.compile(prefill, fullgraph=True) if compile_prefill else prefill

    @torch.inference_mode()
    def advance(self, tokens: Tensor, start: int) -> Tensor:
        """Process tokens (B, T) at the slots from `start` on; logits (B, vocabulary) of the last.

        Long prompts run in parts of 2048 tokens. Raises ValueError, before anything is written, if
        the tokens do not fit the cache, or if they go back to a slot behind slots that are
        overwritten: see `StaticCache.check_start`.
        """
        batch, count = tokens.shape
        if batch != self.batch or start + count > self.slots:
            raise ValueError(
                f"{batch} sequences of {start + count} tokens do not fit a cache for {self.batch} "
                f"of {self.slots}: shorten the prompt or make a larger cache"
            )
        self.cache.check_start(start, self.filled)
        self._fill(start, start + count)
        for part in tokens.split(PART, dim=1):
            logits = self._advance(part.contiguous(), start)
            start += part.size(1)
        return logits

    def _fill(self, start: int, end: int) -> None:
        self.filled = max(end, self.filled if start else 0)

    def _advance(self, tokens: Tensor, start: int) -> Tensor:
        valid = self.valid if self.batch > 1 else None  # a single sequence has no padding
        if tokens.size(1) == 1:
            pos = torch.arange(start, start + 1, device=tokens.device)
            return self.decode(self.model, tokens, pos, self.cache, valid)
        past = torch.empty(start, device=tokens.device)
        # torch.compile takes a length that fills the cache for a constant
        if start + tokens.size(1) == self.slots:
            return prefill(self.model, tokens, past, self.cache, valid)
        if self.prefill is not prefill:  # one graph for all lengths
            torch._dynamo.mark_dynamic(tokens, 1)
            if start > 1:  # sizes 0 and 1 cannot be dynamic: they have graphs of their own
                torch._dynamo.mark_dynamic(past, 0)
        return self.prefill(self.model, tokens, past, self.cache, valid)

    @torch.inference_mode()
    def verify(self, tokens: Tensor, start: int) -> Tensor:
        """Process tokens (1, T) as decoding does, from slot `start` on; logits (T, vocabulary).

        For a few tokens of a single sequence, which must fit the cache.
        """
        self._fill(start, start + tokens.size(1))
        pos = torch.arange(start, start + tokens.size(1), device=tokens.device)
        return self._verify(self.model, tokens, pos, self.cache)

    def warm(self, start: int, count: int) -> None:
        """At the first call compile decoding, and verifying `count` tokens if that is above 1.

        This runs steps at the slots from `start` on, the first empty one; later steps overwrite it.
        """
        tokens = torch.zeros(1, count, dtype=torch.long, device=self.valid.device)
        if self._cold and start + count <= self.slots:
            self.advance(tokens.new_zeros(1, 1), start)
            if count > 1:
                self.verify(tokens, start)
            self._cold = False

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        draft: Draft | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of every sequence, (B,), up to `max_new_tokens` times.

        - prompts: token ids, one list for each sequence.
        - sampling: None takes the most likely token.
        - stop: tokens that end a sequence, which then repeats its last token until all sequences
          have ended.
        - draft: `Lookup` or `DraftModel`, for speculative decoding of a single prompt. The tokens
          are those of decoding without it, except that with sampling a `DraftModel` draws others,
          of the same distribution.

        Raises ValueError if the prompts and the new tokens do not fit the cache, if `sampling` is
        out of range, if `draft` cannot draft for this model, batch or number of tokens, or for
        prompts of several lengths and a cache with sinks.
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
        sinks = any(ring.sinks for ring in self.cache.rings.values())
        if sinks and min(len(p) for p in prompts) < longest:
            raise ValueError(
                f"given prompts of {[len(p) for p in prompts]} tokens, and a cache with sinks: "
                "expected one length, since sinks are the first slots; generate for one prompt "
                "after the other"
            )
        if draft:
            draft.check(self, max_new_tokens)
        device = self.valid.device
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        self.valid.fill_(True)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            self.valid[i, : longest - len(prompt)] = False
        logits = self.advance(tokens, 0)
        if draft:
            for token in speculate(self, draft, prompts[0], logits, max_new_tokens, sampling, stop):
                yield torch.tensor([token], device=device)
            return
        random = torch.Generator(device).manual_seed(sampling.seed)
        ends = torch.tensor(list(stop), dtype=torch.long, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        last = tokens[:, -1]
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
    draft: Draft | None = None,
) -> Answer:
    """Run `Generator.stream` to its end; arguments and errors as there.

    show: called with the tokens (B,) of every step. The speed excludes prefill and the first
    decoding step, which may wait for the compiler; with a draft, it excludes only prefill, in which
    all is compiled.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    times, start, compiled = [], time.perf_counter(), compile_seconds()
    for tokens in generator.stream(prompts, max_new_tokens, sampling, stop, draft):
        times.append(time.perf_counter())
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not row or row[-1] not in stop:
                row.append(token)
        if show:
            show(tokens)
    first = 0 if draft else 1
    steps = len(times) - 1 - first
    speed = steps * len(rows) / (times[-1] - times[first]) if steps > 0 else None
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
