"""Token eviction: of a prompt, the cache keeps only the tokens that its end attends to.

After SnapKV (Li et al., arXiv 2404.14469): the last tokens of a prompt, the observation window,
give a weight to each slot. In each layer, the slots with the largest weights stay, with their
neighbors and the window. The prompt is read in a cache of its length. The rows that stay are copied
to a smaller cache, in which tokens are decoded.

Differences from the paper: a latent serves several heads, so a token stays or goes for all heads of
a layer, by the mean of their weights. Anchored keys are read by blocks of positions, so there whole
blocks stay or go.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.cache import StaticCache, WatchedLayer
from ..models.config import Config
from ..models.mask import decode_mask
from ..models.model import Model
from .generate import PART, Generator, compiled_step
from .moved import by_slot
from .sampling import Sampling
from .speculative import Draft
from .steps import layer_step

WINDOW = 16  # tokens of the observation window
NEIGHBORS = 11  # slots whose weights are pooled, an odd number: five tokens on each side


class ReadPrompt(NamedTuple):
    """A prompt that was read whole: logits (1, vocabulary) of its last token, and all its rows.

    seen: (layers, T), how much the observation window attends to each token; see `WatchedLayer`.
    """

    logits: Tensor
    cache: StaticCache
    seen: Tensor


class EvictingGenerator(Generator):
    """A `Generator` for one prompt at a time, whose cache keeps only some tokens of the prompt.

    A cache of all slots exists only while a prompt is read. Positions stay those of the whole text.
    One graph reads prompts, and another decodes. Of a prompt of at most `keep` tokens all are kept.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        new: int,
        keep: int,
        window: int = WINDOW,
        compile: bool = True,
        compile_prefill: bool | None = None,
        bits: int | None = None,
        graphs: bool = False,
    ):
        """Allocate the small cache, of `keep` + `new` slots. Others as in `Generator`.

        - slots: the most tokens of prompt and answer.
        - new: the most tokens after a prompt.
        - keep: the most tokens of a prompt that stay. Of anchored keys, these are whole blocks, and
          the last tokens, which fill no block.
        - window: tokens at the end of a prompt which say what stays. They stay too.

        Raises ValueError also if `keep` has no room for the window, and for models whose rows
        cannot be dropped.
        """
        self.block = check_eviction(model, slots, keep, window)
        super().__init__(model, 1, min(slots, keep + new), compile, compile_prefill, bits, graphs)
        self.slots, self.new, self.keep, self.window, self.bits = slots, new, keep, window, bits
        shape = model.config.num_hidden_layers, self.cache.slots
        self.position = torch.zeros(shape, dtype=torch.long, device=model.device)
        torch._dynamo.mark_static_address(self.position)
        self._step = compiled_step(kept_step, graphs) if compile else kept_step
        compile_prefill = compile if compile_prefill is None else compile_prefill
        self._read = torch.compile(watched, fullgraph=True) if compile_prefill else watched

    @torch.inference_mode()
    def advance(self, tokens: Tensor, start: int) -> Tensor:
        """Read a prompt (1, T) at slot 0, or decode tokens from slot `start` on; as in `Generator`.

        Slots count dropped tokens too. Later tokens are decoded as `verify` does, so few at once.
        """
        if start or tokens.size(1) == 1:
            return self.verify(tokens, start)[-1:]
        prompt = self.read(tokens)
        self.take(prompt)
        return prompt.logits

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> ReadPrompt:
        """Read a prompt (1, T) of two tokens or more into a cache of its own.

        Raises ValueError if it has more tokens than `slots`.
        """
        batch, count = tokens.shape
        if batch != 1 or count > self.slots:
            raise ValueError(
                f"{batch} sequences of {count} tokens do not fit: expected one, of at most "
                f"{self.slots}; shorten the prompt or make a generator for more slots"
            )
        cache = self.model.new_cache(1, self.slots, bits=self.bits)
        seen = torch.zeros(len(self.position), self.slots, device=tokens.device)
        start = 0
        for part in tokens.tensor_split(-(-count // PART), dim=1):  # none is shorter than a window
            logits = self._watched(part.contiguous(), start, cache, seen)
            start += part.size(1)
        return ReadPrompt(logits, cache, seen[:, :count])

    @torch.inference_mode()
    def take(self, prompt: ReadPrompt) -> None:
        """Go on behind a prompt: copy the rows of the tokens that stay to the small cache."""
        kept = kept_slots(prompt.seen, self.keep, self.window, self.block)
        self._begin(kept, prompt.seen.size(1))
        copy_slots(prompt.cache, kept, self.cache)

    def _watched(self, part: Tensor, start: int, cache: StaticCache, seen: Tensor) -> Tensor:
        past = torch.empty(start, device=part.device)
        if start + part.size(1) == self.slots:  # a length that the compiler takes for a constant
            return watched(self.model, part, past, cache, seen, self.window)
        if self._read is not watched:  # one graph for all lengths
            torch._dynamo.mark_dynamic(part, 1)
            if start > 1:
                torch._dynamo.mark_dynamic(past, 0)
        return self._read(self.model, part, past, cache, seen, self.window)

    def _begin(self, kept: Tensor, count: int) -> None:
        """Take the positions of a prompt of `count` tokens, of which slots (layers, N) are kept."""
        first = kept.size(1)
        self.dropped = count - first
        later = torch.arange(count, count + self.cache.slots - first, device=kept.device)
        self.position.copy_(torch.cat((kept, later.expand(len(kept), -1)), 1))

    @torch.inference_mode()
    def verify(self, tokens: Tensor, start: int) -> Tensor:
        """As in `Generator`. Raises ValueError if the tokens do not fit the small cache."""
        if not start:  # a prompt of one token
            self._begin(torch.zeros_like(self.position[:, :0]), 0)
        first, count = start - self.dropped, tokens.size(1)
        if len(tokens) != 1 or first < 0 or first + count > self.cache.slots:
            raise ValueError(
                f"{len(tokens)} sequences of tokens {start} to {start + count - 1} do not fit: "
                f"expected one, and at most {self.new} tokens after the prompt; make a generator "
                "for more new tokens"
            )
        pos = torch.arange(first, first + count, device=tokens.device)
        return self._step(self.model, tokens, pos, self.cache, self.position)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        draft: Draft | None = None,
    ) -> Iterator[Tensor]:
        """As in `Generator`. Raises ValueError also for more new tokens than `new`."""
        if max_new_tokens > self.new:
            raise ValueError(
                f"given {max_new_tokens} new tokens: expected at most {self.new}; make a generator "
                "for more new tokens"
            )
        yield from super().stream(prompts, max_new_tokens, sampling, stop, draft)


def asking(
    model: Model, batch: int, slots: int, new: int, keep: int | None, bits: int | None
) -> Generator:
    """A generator that is not compiled, which keeps `keep` tokens of a prompt; None keeps all.

    Others as in `EvictingGenerator`. Raises ValueError for a batch of which tokens are dropped.
    """
    if keep is None:
        return Generator(model, batch, slots, compile=False, bits=bits)
    check_alone(batch)
    return EvictingGenerator(model, slots, new, keep, compile=False, bits=bits)


def check_alone(batch: int) -> None:
    """Raise ValueError for several prompts at once, whose tokens stay in different numbers."""
    if batch > 1:
        raise ValueError(
            f"given {batch} prompts at once, of which only some tokens shall stay: expected one "
            "prompt; keep all tokens, or give prompts one by one"
        )


def check_eviction(model: Model, slots: int, keep: int, window: int = WINDOW) -> int:
    """Tokens are dropped by so many at once, for texts of `slots` tokens: 1, or a block of keys.

    Raises ValueError for a model whose rows cannot be dropped, and for sizes that do not fit.
    """
    config = model.config
    config.check_length(slots)
    narrow = [x for x in getattr(config, "windows", ()) if 0 < x < slots]
    if narrow:
        raise ValueError(
            f"this {config.family} has windows of {min(narrow)} tokens, and the text has {slots}: "
            "tokens can be dropped only where the text fits the window; leave eviction out"
        )
    if model.kept.window:
        raise ValueError(
            "given a window of the last tokens to keep, and a number of tokens that a prompt's end "
            "attends to: expected one of them"
        )
    if model.layers[0].attn.share[1] > 1:
        raise ValueError("tokens cannot be dropped where several processes share a model: use one")
    if not 1 <= window <= PART // 2:
        raise ValueError(f"the observation window is {window}: expected 1 to {PART // 2} tokens")
    block = drop_step(config, slots)
    if keep < window + block - 1:
        blocks = f" and a block of {block} keys" if block > 1 else ""
        raise ValueError(
            f"{keep} tokens to keep are too few: expected {window + block - 1} or more, which hold "
            f"the observation window of {window} tokens{blocks}"
        )
    return block


def drop_step(config: Config, slots: int) -> int:
    """Tokens of texts of `slots` tokens stay or go by so many: a block of anchored keys, else 1."""
    anchor = getattr(config, "anchor", 1)
    return anchor if anchor < slots else 1  # a single block may have gaps


def kept_slots(seen: Tensor, keep: int, window: int, block: int) -> Tensor:
    """The slots that stay of a prompt, in order, as many in each layer: (layers, N), N <= keep.

    seen: (layers, T), the weight of each slot. The weights of neighbors are pooled as the paper
    does, so that tokens stay with what is around them. A block counts as its heaviest slot.
    """
    count = seen.size(1)
    slots = torch.arange(count, device=seen.device).expand(len(seen), -1)
    if count <= keep:
        return slots
    pooled = F.max_pool1d(seen[:, None], NEIGHBORS, 1, NEIGHBORS // 2)[:, 0]
    pooled[:, -window:] = torch.inf
    tail = count % block
    weight = pooled[:, : count - tail].unflatten(1, (-1, block)).amax(2)
    best = weight.topk((keep - tail) // block).indices.sort().values
    blocks = slots[:, : count - tail].unflatten(1, (-1, block))
    chosen = blocks.take_along_dim(best[:, :, None], 1).flatten(1)
    return torch.cat((chosen, slots[:, count - tail :]), 1)


def copy_slots(source: StaticCache, kept: Tensor, cache: StaticCache) -> None:
    """Copy slots kept (layers, N) of each layer to the first slots of a smaller cache.

    Rows of bytes are copied as they are.
    """
    for to, of in ((cache.keys, source.keys), (cache.values, source.values)):
        for small, large, slots in zip(to, of, kept, strict=True):
            rows = by_slot(large).index_select(-2, slots)
            by_slot(small).narrow(-2, 0, len(slots)).copy_(rows)


def watched(
    model: Model, tokens: Tensor, past: Tensor, cache: StaticCache, seen: Tensor, window: int
) -> Tensor:
    """As `steps.prefill` for one sequence. What each layer attends to is written to `seen`.

    seen: (layers, S). window: see `WatchedLayer`.
    """
    end = past.size(0) + tokens.size(1)
    filled = cache.first(end)
    x, pos, attn_metadata = model.begin(tokens, None, filled)
    for i, layer in enumerate(model.layers):
        cell = WatchedLayer(filled.layer(i), window, seen[i : i + 1, :end])
        x = layer(x, pos, attn_metadata, cell)
    return model.linear(model.head, model.finish(x)[:, -1:])[:, -1]


def kept_step(
    model: Model, tokens: Tensor, pos: Tensor, cache: StaticCache, position: Tensor
) -> Tensor:
    """Process tokens (1, T) at slots pos (T,) of a small cache; logits (T, vocabulary).

    position: (layers, S), of the slots of each layer. New tokens have the same in all layers.
    """
    # without a rotation there may be ALiBi, which takes positions only where there is a bias
    visible = None if model.config.rotary else torch.ones_like(position[:1], dtype=torch.bool)
    mask = decode_mask(pos, visible)
    x = model.start(tokens, position[:1, pos])
    for i, layer in enumerate(model.layers):
        attn_metadata = model.attention_metadata(position[i : i + 1], pos, mask)
        x = layer_step(layer, x, pos, attn_metadata, cache.layer(i))
    return model.linear(model.head, model.finish(x))[0]
