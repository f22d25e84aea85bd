"""Statistics of keys, values, queries and gradients over calibration tokens, streamed.

Only sums and Gram matrices are kept, so memory does not grow with the number of tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .model import Model
from .rope import rotate


class Moments:
    """Count, mean and Gram matrix of row vectors, for L blocks of `width` numbers side by side.

    Sums are kept about the mean of the first rows: about zero, a large mean would leave little of
    the covariance in fp32.
    """

    def __init__(self, blocks: int, width: int, device: torch.device):
        self.count = 0
        self.origin = torch.zeros(blocks, width, device=device)
        self.sum = torch.zeros(blocks, width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(blocks, width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in x (..., L * width)."""
        rows = x.detach().float().flatten(0, -2).unflatten(-1, self.sum.shape).transpose(0, 1)
        if self.count == 0:
            self.origin = rows.mean(1)
        rows = rows - self.origin[:, None]
        self.count += rows.size(1)
        self.sum += rows.sum(1)
        self.gram += rows.mT @ rows

    def split(self, parts: int, sides: int = 1) -> "Moments":
        """The moments of blocks cut into `parts`: what narrower blocks would have gathered.

        sides: 2 where a block is keys and then values; a part takes its share of either.
        """
        blocks, width = self.sum.shape
        cut = blocks, sides, parts, width // (sides * parts)
        small = Moments(blocks * parts, width // parts, self.sum.device)
        small.count = self.count
        small.origin, small.sum = (
            x.view(cut).transpose(1, 2).reshape(small.sum.shape) for x in (self.origin, self.sum)
        )
        pairs = self.gram.view(*cut, *cut[1:]).diagonal(dim1=2, dim2=5)  # of a part with itself
        small.gram = pairs.movedim(-1, 1).reshape(small.gram.shape)
        return small

    @property
    def mean(self) -> Tensor:
        """(L, width)."""
        return self.origin + self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Mean of x xᵀ, centred: (L, width, width)."""
        return self.gram / self.count - _outer(self.sum / self.count)

    @property
    def second(self) -> Tensor:
        """The same, uncentred."""
        return self.covariance + _outer(self.mean)


def _outer(x: Tensor) -> Tensor:
    return x[:, :, None] * x[:, None]


class Statistics(NamedTuple):
    """What one layer showed. Gradients and queries are present only if they were asked for.

    Where one latent is to hold keys and values, k has both, side by side, and v is None.
    """

    k: Moments  # keys before the rotation, biases included: (kv heads / heads per latent) blocks
    v: Moments | None
    q: Moments | None  # queries before the rotation, one block per query head
    k_grad: Moments | None  # gradients of the summed loss at the keys, in the blocks of k
    v_grad: Moments | None

    def split(self, k_parts: int, v_parts: int) -> "Statistics":
        """The statistics of latents that so many times fewer heads share."""
        sides = 2 if self.v is None else 1
        return Statistics(
            self.k.split(k_parts, sides),
            self.v and self.v.split(v_parts),
            self.q,
            self.k_grad and self.k_grad.split(k_parts, sides),
            self.v_grad and self.v_grad.split(v_parts),
        )


class Needs(NamedTuple):
    """Which statistics: the arguments of `calibrate`."""

    heads_per_latent: tuple[int, int] = (1, 1)
    gradients: bool = False
    queries: bool = False
    joint: bool = False
    anchor: int = 1


def calibrate(
    model: Model,
    tokens: Tensor,
    heads_per_latent: tuple[int, int] = (1, 1),
    gradients: bool = False,
    queries: bool = False,
    joint: bool = False,
    anchor: int = 1,
) -> list[Statistics]:
    """Run a dense model over tokens (N, T), one sequence at a time; one `Statistics` a layer.

    heads_per_latent: how many kv heads stand side by side in a block, for keys and for values.
    gradients: take the gradients of the summed cross entropy as well, by a backward pass that
    reaches activations only. joint: keys and values of a block side by side. anchor: keys are
    turned within blocks of so many tokens. Raises ValueError where a statistic is not finite.
    """
    c, device = model.config, tokens.device

    def moments(shared: int) -> Moments:
        width = shared * c.head_dim * (2 if joint else 1)
        return Moments(c.num_key_value_heads // shared, width, device)

    k_shared, v_shared = heads_per_latent
    layers = [
        Statistics(
            moments(k_shared),
            None if joint else moments(v_shared),
            Moments(c.num_attention_heads, c.head_dim, device) if queries else None,
            moments(k_shared) if gradients else None,
            moments(v_shared) if gradients and not joint else None,
        )
        for _ in model.layers
    ]
    with _watch(model, layers, anchor), torch.set_grad_enabled(gradients):
        for row in tqdm(tokens, desc="calibrating", unit="seq", disable=None, leave=False):
            if not gradients:
                model.hidden(row[None])
                continue
            logits = model(row[None, :-1]).float()
            F.cross_entropy(logits.flatten(0, 1), row[1:], reduction="sum").backward()
    for i, layer in enumerate(layers):
        for name, m in layer._asdict().items():
            if m is not None and not m.gram.isfinite().all():
                raise ValueError(
                    f"layer {i}: the statistics of {name} are not finite: the weights or the "
                    "dtype are unsound; try --dtype float32"
                )
    return layers


class _Feed:
    """Hands rows to moments, if any, once all parts that stand side by side in a block are here."""

    def __init__(self, moments: Moments | None, parts: int = 1):
        self.moments, self.parts = moments, parts
        self.held: dict[int, Tensor] = {}

    def put(self, part: int, x: Tensor) -> None:
        """Take in one part, (..., blocks * width / parts)."""
        if self.moments is None:
            return
        self.held[part] = x.detach().unflatten(-1, (len(self.moments.gram), -1))
        if len(self.held) == self.parts:
            rows = [self.held.pop(i) for i in range(self.parts)]
            self.moments.add(torch.cat(rows, dim=-1).flatten(-2))


@contextmanager
def _watch(model: Model, layers: list[Statistics], anchor: int) -> Iterator[None]:
    """Feed the outputs of the projections, and their gradients, to the statistics."""

    def same(x: Tensor) -> Tensor:
        return x

    def turned(x: Tensor) -> Tensor:  # keys, and their gradients alike
        pos = torch.arange(x.size(1), device=x.device)
        _, angles = model.offset(pos[None], pos, anchor)
        heads = x.detach().unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
        return rotate(heads, *angles).transpose(1, 2).flatten(2)

    def feed(values: _Feed, grads: _Feed, part: int = 0, seen: Callable = same):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            values.put(part, seen(out))
            if grads.moments is not None:
                out.register_hook(lambda grad: grads.put(part, seen(grad)))

        return hook

    def start(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out.requires_grad_(torch.is_grad_enabled())

    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)  # the backward pass reaches activations, no weight
    hooks = [model.embed.register_forward_hook(start)]
    for block, s in zip(model.layers, layers, strict=True):
        parts = 2 if s.v is None else 1
        k = _Feed(s.k, parts), _Feed(s.k_grad, parts)
        v = k if s.v is None else (_Feed(s.v), _Feed(s.v_grad))
        q = _Feed(s.q), _Feed(None)
        for name, to in (
            ("q_proj", feed(*q)),
            ("k_proj", feed(*k, seen=turned if anchor > 1 else same)),
            ("v_proj", feed(*v, parts - 1)),
        ):
            hooks.append(getattr(block.attn, name).register_forward_hook(to))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
