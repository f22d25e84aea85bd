"""Generation over a static cache: one compiled graph for prompts, one for decoding."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from tqdm import tqdm

from ..models.cache import LayerCache, StaticCache
from ..models.model import Model

PART = 2048  # tokens of a prompt at once: more take memory in proportion and are no faster


class Sampling(NamedTuple):
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for settings that make no distribution."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"given {self}: expected temperature >= 0, top_k >= 0 and top_p above 0 up to 1"
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
        rest = p.cumsum(-1) - p >= sampling.top_p  # the likeliest token always stays
        logits = logits.masked_fill(rest.gather(1, order.argsort()), -torch.inf)
    return logits.softmax(-1).multinomial(1, generator=random)[:, 0]


def _step(
    model: Model, tokens: Tensor, pos: Tensor, cache: StaticCache, valid: Tensor | None
) -> Tensor:
    return model(tokens, pos, cache, valid, last=1)[:, -1]


# compiled once for all layers of equal shapes; no limit to how many differ
@torch.compiler.nested_compile_region(max_reuse_entries=sys.maxsize)
def _layer(
    layer: nn.Module, x: Tensor, pos: Tensor, attn_metadata: Any, cache: LayerCache
) -> Tensor:
    return layer(x, pos, attn_metadata, cache)


def _decode(
    model: Model, tokens: Tensor, pos: Tensor, cache: StaticCache, valid: Tensor | None
) -> Tensor:
    """`_step` for one token a sequence, as it is compiled: layer by layer in one graph."""
    x, pos, attn_metadata = model.begin(tokens, pos, cache, valid)
    for i, layer in enumerate(model.layers):
        x = _layer(layer, x, pos, attn_metadata, cache.layer(i))
    return model.head(model.finish(x))[:, -1]


def _prompt(
    model: Model, tokens: Tensor, past: Tensor, cache: StaticCache, valid: Tensor | None
) -> Tensor:
    """A step of many tokens, which reads no slot behind its own.

    past: the slots before; as a number, how many there are would be compiled into the graph.
    """
    end = past.size(0) + tokens.size(1)
    valid = None if valid is None else valid[:, :end]
    return model(tokens, None, cache.first(end), valid, last=1)[:, -1]


def fastest_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes in it, else float32 on a CPU; None: no reason to change.

    float16 is none of a CPU's own, whatever the checkpoint is in.
    """
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else None


class Generator:
    """A model with one cache, for prompt after prompt: nothing is allocated or compiled twice.

    The prompt's graph takes any length; the decoding graph takes one token a sequence. Prompts of
    different lengths are padded on the left, and positions are counted behind the padding.
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
        """compile: decoding; compile_prefill: prompts as well, by default as `compile` says.

        bits: of a number in the cache, 16, 8 or 4, by default as the model's config says.
        Raises ValueError if there is no compiler to compile with.
        """
        self.model, self.batch, self.slots = model, batch, slots
        self.cache = model.new_cache(batch, slots, bits=bits)
        device = model.device
        self.valid = torch.ones(batch, slots, dtype=torch.bool, device=device)
        prefill = compile if compile_prefill is None else compile_prefill
        if (compile or prefill) and device.type == "cpu":
            check_compiler()
        # sizes that differ from a model before must not become symbols, which layers compiled once
        # cannot hold; so every model, and every size of a cache, is compiled by itself
        fixed = {"fullgraph": True, "dynamic": False, "recompile_limit": sys.maxsize}
        self.decode = torch.compile(_decode, **fixed) if compile else _step  # type: ignore[call-overload]
        self.prompt = torch.compile(_prompt, fullgraph=True) if prefill else _prompt

    @torch.inference_mode()
    def advance(self, tokens: Tensor, start: int) -> Tensor:
        """Run tokens (B, T) at slots from `start` on; logits (B, vocabulary) of the last one.

        Raises ValueError, before anything is written, if they do not fit the cache.
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
        valid = self.valid if self.batch > 1 else None  # one sequence is never padded
        if tokens.size(1) == 1:
            pos = torch.arange(start, start + 1, device=tokens.device)
            return self.decode(self.model, tokens, pos, self.cache, valid)
        past = torch.empty(start, device=tokens.device)
        if self.prompt is not _prompt:  # any other length takes the same graph
            torch._dynamo.mark_dynamic(tokens, 1)
            if start > 1:  # none is another graph: then nothing is past
                torch._dynamo.mark_dynamic(past, 0)
        return self.prompt(self.model, tokens, past, self.cache, valid)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Yield the next token of every sequence, (B,), until all have stopped or had enough.

        A sequence that has produced one of `stop` repeats it. Raises ValueError if the prompts
        and the new tokens do not fit the cache.
        """
        sampling = sampling or Sampling()
        sampling.check()
        if len(prompts) != self.batch or not all(len(p) for p in prompts):
            raise ValueError(
                f"given {len(prompts)} prompts of {[len(p) for p in prompts]} tokens: expected "
                f"{self.batch}, none empty"
            )
        longest = max(len(p) for p in prompts)
        if longest + max_new_tokens - 1 > self.slots or max_new_tokens < 1:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit a cache of "
                f"{self.slots} slots: ask for fewer or make a larger cache"
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
    """The new tokens of every prompt, up to and with its end token, and how fast they came."""

    tokens: list[list[int]]
    tokens_per_second: float | None  # None for fewer than three steps
    first_seconds: float  # to the first token of every prompt
    compile_seconds: float  # of all seconds, those in the compiler; few where its cache serves


def answer(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    show: Callable[[Tensor], None] | None = None,
) -> Answer:
    """Run `Generator.stream` to its end; `show` gets every step's tokens (B,) as they come.

    The speed leaves out the prompt and the first step after it, which waits for the compiler.
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


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far, with what it read from its cache."""
    return calculate_time_spent()["total_wall_time"]


def check_compiler() -> None:
    """Raise ValueError if torch.compile would find no C++ compiler for the CPU."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "torch.compile needs a C++ compiler and found none: install g++ or clang, or pass "
            "--no-compile"
        ) from None


def sample_text(model: Model, start: int, samples: int, length: int, seed: int = 0) -> Tensor:
    """Text of the model's own, to calibrate on: (samples, length) tokens that begin with `start`.

    Drawn at temperature 1 from the model's whole distribution, in one batch.
    """
    generator = Generator(model, samples, length, compile=False)
    new = generator.stream([[start]] * samples, length - 1, Sampling(temperature=1.0, seed=seed))
    bar = tqdm(new, desc="sampling", total=length - 1, unit="token", disable=None, leave=False)
    first = torch.full((samples,), start, device=generator.valid.device)
    return torch.stack([first, *(t.clone() for t in bar)], dim=1)
