"""Rivals' caches in few bits, simulated: keys and values are rounded on their way into attention.

One function a rival. Each has scales and zero points of 16 bits, and reads dense models, whose
cached keys are rotated. Nothing is packed: bytes are counted, not allocated.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eigenzoo.zoo.inference.perplexity import row_losses
from eigenzoo.zoo.models.model import Model

GROUP = 32  # numbers that share a scale and a zero point, with KIVI and SQuat
STEPS = {3: 0.586, 2: 0.996}  # between the levels, in lengths: least squared error for normal x
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)
Rounding = Callable[[int, Tensor], Tensor]  # a layer, and what it caches of tokens (B, G, T, D)


class Rival(NamedTuple):
    """A cache in few bits: how it rounds, and what it leaves in 16 bits.

    bits: of a rounded number, with its part of scales and zero points. window, sink: the newest
    and the first tokens, which stay in 16 bits. group: tokens are rounded so many at a time.
    """

    keys: Rounding
    values: Rounding
    bits: float
    window: int = 0
    sink: int = 0
    group: int = 1

    def share(self, context: int) -> float:
        """Bytes over those of 16 bits a number, once so many tokens are cached, window included."""
        whole = min(1.0, (self.window + self.sink) / context)
        return whole + (1 - whole) * self.bits / 16


class RivalLayer:
    """What one layer has cached: tokens that are done with, rounded, and newer ones, exact."""

    def __init__(self, rival: Rival, layer: int):
        self.rival, self.layer, self.count = rival, layer, 0
        self.done: list[list[Tensor]] = [[], []]
        self.new: list[list[Tensor]] = [[], []]

    def update(
        self, pos: Tensor, k: Tensor, v: Tensor, _pack: object = None
    ) -> tuple[Tensor, Tensor]:
        """Take in k and v (B, G, T, D) of the next tokens; return what attention reads of all."""
        rival, pairs = self.rival, zip(self.new, (k, v), strict=True)
        exact = [torch.cat((*x, y), 2) for x, y in pairs]
        leaving = max(0, exact[0].size(2) - rival.window) // rival.group * rival.group
        first = min(leaving, max(0, rival.sink - self.count))
        for done, x, rounded in zip(self.done, exact, (rival.keys, rival.values), strict=True):
            if leaving:
                done += [x[:, :, :first], rounded(self.layer, x[:, :, first:leaving])]
        self.count, self.new = self.count + leaving, [[x[:, :, leaving:]] for x in exact]
        read_k, read_v = (torch.cat((*x, *y), 2) for x, y in zip(self.done, self.new, strict=True))
        return read_k, read_v


class RivalCache:
    """Stands in for `StaticCache`: the model writes the newest tokens and reads all so far."""

    def __init__(self, rival: Rival, layers: int):
        self.layers, self.slots = [RivalLayer(rival, i) for i in range(layers)], 0

    def layer(self, index: int) -> RivalLayer:
        """The tokens of one layer."""
        return self.layers[index]

    def check(self, tokens: Tensor, pos: Tensor) -> None:
        """As of `StaticCache`; here everything fits."""


@torch.inference_mode()
def rival_losses(model: Model, rows: Tensor, rival: Rival) -> Tensor:
    """Losses (N, T - 1) in nats of windows (N, T), read over a rival's cache.

    With a window they are read in parts of `GROUP` tokens, so a query finds between `window` and
    `window - GROUP + 1` of its newest tokens exact. Otherwise in one: a token reads itself rounded.
    """
    cache, hidden = RivalCache(rival, len(model.layers)), []
    for part in rows[:, :-1].split(GROUP if rival.window else rows.size(1), 1):
        cache.slots += part.size(1)
        hidden.append(model.hidden(part, cache=cache))
    pairs = zip(torch.cat(hidden, 1), rows[:, 1:], strict=True)
    return torch.stack([row_losses(model, x, targets) for x, targets in pairs])


@torch.inference_mode()
def readers(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """Gram matrices of what reads a kv head's cache, and of what is read, (layers, G, D, D).

    `queries`: of the group's queries, rotated. `outputs`: of the averages of values that its heads
    take. Per token of `tokens` (N, T), summed over heads, in fp64.
    """
    g, d = model.config.num_key_value_heads, model.config.head_dim
    grams = {x: torch.zeros(len(model.layers), g, d, d).double() for x in ("queries", "outputs")}

    def watched(layer: int, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watch(q: Tensor, *rest: object) -> Tensor:
            y = attend(q, *rest)
            for name, x in (("queries", q), ("outputs", y)):
                rows = x[0].unflatten(0, (g, -1)).flatten(1, 2)
                grams[name][layer] += (rows.mT @ rows).double().cpu() / tokens.numel()
            return y

        return watch

    for i, block in enumerate(model.layers):
        block.attn.attend = watched(i, block.attn.attend)
    try:
        for row in tokens:
            model.hidden(row[None])
    finally:
        for block in model.layers:
            del block.attn.attend
    return grams


def asymmetric(x: Tensor, bits: int, dim: int, clips: tuple[float, ...] = (1.0,)) -> Tensor:
    """x rounded to 2^bits even levels from the least to the largest number along `dim`.

    Scale and zero point are in 16 bits. clips: of the range, the part that loses least is taken.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    best, least = x, torch.full_like(low, torch.inf)
    for clip in clips:
        middle, half = (low + high) / 2, (high - low) / 2 * clip
        step = (2 * half / (2**bits - 1)).clamp(min=1e-6).half().float()
        zero = (middle - half).half().float()
        rounded = ((x - zero) / step).round().clamp(0, 2**bits - 1) * step + zero
        error = (x - rounded).square().sum(dim, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Vectors (..., D) rounded to 2^bits levels around zero under one scale of 16 bits.

    From 4 bits on the scale is that of the largest number, as in `StaticCache`; below, of the
    length, since the largest numbers are worth cutting off.
    """
    most = (2**bits - 1) / 2
    if bits in STEPS:
        scale = x.square().mean(-1, keepdim=True).sqrt() * STEPS[bits]
    else:
        scale = x.abs().amax(-1, keepdim=True) / most
    scale = scale.clamp(min=1e-30).bfloat16().float()
    return ((x / scale - 0.5).round() + 0.5).clamp(-most, most) * scale


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix whose size is a power of 2."""
    if size & (size - 1):
        raise ValueError(f"heads have {size} numbers: expected a power of 2 for Hadamard matrices")
    x = torch.ones(1, 1)
    while len(x) < size:
        x = torch.cat((torch.cat((x, x), 1), torch.cat((x, -x), 1))) / 2**0.5
    return x


def rotated(bits: int, heads: int, head_dim: int) -> Rival:
    """Bits alone: every head turned by a random Hadamard matrix, one scale a token and head.

    As in QuaRot (Ashkboos et al., arXiv 2404.00456), which has zero points and cuts ranges, too.
    """
    signs = torch.randint(2, (heads, head_dim, 1), generator=torch.Generator().manual_seed(0))
    turn = (2 * signs - 1) * hadamard(head_dim)

    def rounded(layer: int, x: Tensor) -> Tensor:
        return symmetric(x @ turn, bits) @ turn.mT

    return Rival(rounded, rounded, bits + 16 / head_dim)


def by_channel(x: Tensor, bits: int) -> Tensor:
    """x (B, G, T, D) rounded channel by channel, in groups of `GROUP` tokens."""
    return asymmetric(x.unflatten(2, (-1, GROUP)), bits, 3).flatten(2, 3)


def by_token(x: Tensor, bits: int) -> Tensor:
    """x (B, G, T, D) rounded token by token, in groups of `GROUP` channels."""
    return asymmetric(x.unflatten(3, (-1, min(GROUP, x.size(3)))), bits, 4).flatten(3)


def kivi(bits: int, head_dim: int, window: int = 128) -> Rival:
    """KIVI (Liu et al., arXiv 2402.02750): keys rounded by channel, values by token.

    There the window of keys grows to 128 tokens and is then rounded as a whole; here it always has
    the newest 128, as that of values has.
    """
    extra = 16 / GROUP + 16 / min(GROUP, head_dim)  # a scale and a zero point, keys and values
    return Rival(
        lambda layer, x: by_channel(x, bits),
        lambda layer, x: by_token(x, bits),
        bits + extra,
        window,
        group=GROUP,
    )


def squat(bits: int, queries: Tensor, window: int = 128, tokens: int = 2048) -> Rival:
    """SQuat (Wang et al., arXiv 2503.24358): KIVI with errors of keys kept from the queries.

    Keys are rounded some channels at a time; then the rest moves to where, given the errors e so
    far, |e|² + λ |Q e|² is least, for the first 5 singular directions Q of the queries and
    λ = 0.001, as in the authors' example. There Q is of the prompt, here of calibration tokens,
    scaled to a prompt of `tokens`; keys are rounded after the rotation, the authors can do both;
    and 16 channels at a time, fewer than theirs.
    """
    values, vectors = torch.linalg.eigh(queries)
    main = vectors[..., -5:] * (tokens * values[..., None, -5:]).sqrt()
    metric = torch.eye(queries.size(-1)).double() + 0.001 * main @ main.mT  # (layers, G, D, D)

    def keys(layer: int, x: Tensor) -> Tensor:
        target, out, a = x, [], metric[layer]
        for end in range(16, x.size(3) + 16, 16):
            out.append(by_channel(target[..., end - 16 : end], bits))
            if end < x.size(3):
                error = torch.cat(out, 3) - x[..., :end]
                move = torch.linalg.solve(a[:, end:, end:], a[:, end:, :end]).float()
                target = torch.cat((x[..., :end], x[..., end:] - error @ move.mT), 3)
        return torch.cat(out, 3)

    return kivi(bits, queries.size(-1), window)._replace(keys=keys)


def oscar(bits: int, queries: Tensor, outputs: Tensor) -> Rival:
    """OSCAR (Zhou et al., arXiv 2605.17757): heads turned by what attention reads, then Hadamard.

    Keys by the eigenvectors of the queries' Gram matrix, values by those of the values as
    attention averages them; token by token with a zero point. The first 64 and the newest 256
    tokens stay in 16 bits. There the range is cut by a calibrated threshold, here for each token
    where it loses least. Their last permutation changes nothing, since one group holds a head.
    """
    size = queries.size(-1)
    turns = [
        (torch.linalg.eigh(x).eigenvectors.float() @ hadamard(size)) for x in (queries, outputs)
    ]

    def side(turn: Tensor) -> Rounding:
        return lambda layer, x: asymmetric(x @ turn[layer], bits, 3, CLIPS) @ turn[layer].mT

    return Rival(side(turns[0]), side(turns[1]), bits + 32 / size, window=256, sink=64)
