"""Statistics of keys, values, queries and gradients over calibration tokens, streamed.

Only sums and Gram matrices are kept, so memory does not grow with the number of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models.model import Model
from ..models.rope import rotate
from .moments import Lengths, Moments, Needs, Statistics

DAMPING = 0.3  # of the Fisher metric, in units of its mean diagonal: gradients are heavy-tailed


def calibrate(
    model: Model,
    tokens: Tensor,
    heads_per_latent: tuple[int, int] = (1, 1),
    gradients: bool = False,
    queries: bool = False,
    joint: bool = False,
    anchor: int = 1,
    weights: bool = False,
    plain: bool = True,
    weighted: bool = True,
) -> list[Statistics]:
    """Run a dense model over tokens (N, T), one sequence at a time; one `Statistics` a layer.

    heads_per_latent: how many kv heads stand side by side in a block, for keys and for values.
    gradients: take the gradients of the summed cross entropy as well, by a backward pass that
    reaches activations only. joint: keys and values of a block side by side. anchor: keys are
    turned within blocks of so many tokens. weights: take the gradients of the key and the value
    weights, by the same backward pass. plain, weighted: which sums to take of gradients, those
    where all tokens are alike, those where they are weighed, or both. Raises ValueError where a
    statistic is not finite.

    With gradients g, what an error εx costs is E[(gᵀ ε x)²] = tr of ε against E[g gᵀ ⊗ x xᵀ], and
    g and x of a token are far from independent: the longest keys are those of sinks, which the
    loss hardly minds. The product that fits this best, C ⊗ F, takes x xᵀ weighed by gᵀ F⁻¹ g and
    g gᵀ weighed by xᵀ C⁻¹ x; we weigh by the roots of these, which bear heavy tails. Two passes
    over every fourth sequence find C and F for the weights, each by those before it.

    So weighted sums cost 1.5 times the passes over the tokens, others just one, forward and, with
    gradients, backward. Memory is that of the model, of the activations of one sequence, turned
    keys among them, and of the sums of all layers, since each pass feeds all. A sum of keys, or of
    values, has L w² numbers a layer, for L blocks of width w: one of 8 bytes a number, with `plain`
    gradients one more, with `weighted` two more and two factors of 4 bytes. For `fisher` this is 32
    bytes a number, whatever N is. Means and counts add about 2 / w of it, and making the factors
    takes the work of one layer beside.
    """
    needs = Needs(heads_per_latent, gradients, queries, joint, anchor, weights, plain, weighted)
    backward = gradients or weights

    def read(step: int, doing: str) -> None:
        for row in tqdm(tokens[::step], desc=doing, unit="seq", disable=None, leave=False):
            if not backward:
                model.hidden(row[None])
                continue
            # the logits have no name, so that they are freed before the backward pass
            loss = F.cross_entropy(model(row[None, :-1])[0].float(), row[1:], reduction="sum")
            loss.backward()

    def start(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out.requires_grad_(torch.is_grad_enabled())

    hook = model.embed.register_forward_hook(start)
    try:
        return gather_sums(model, list(model.layers), needs, read, bool(len(tokens)))
    finally:
        hook.remove()


def gather_sums(
    model: Model,
    blocks: Sequence[Any],
    needs: Needs,
    read: Callable[[int, str], None],
    data: bool = True,
    first: int = 0,
) -> list[Statistics]:
    """What `blocks` of a model show while `read(step, doing)` runs them: one `Statistics` each.

    read: runs the blocks over every `step`-th sequence, with gradients also backward; called
    once, or thrice where sums are weighed. data: whether there is anything to read. first: the
    number of the first block, for messages. See `calibrate`.
    """
    width = model.config.head_dim * (2 if needs.joint else 1)
    k_shared, v_shared = needs.heads_per_latent
    plain, weighted = needs.gradients and needs.plain, needs.gradients and needs.weighted
    before: list[_Before] = [{} for _ in blocks]

    def empty(plain: bool, weighted: bool, final: bool) -> list[Statistics]:
        c, heads = model.config, model.config.num_key_value_heads
        k = partial(Moments, heads // k_shared, k_shared * width, model.device)
        v = partial(Moments, heads // v_shared, v_shared * width, model.device)
        q = partial(Moments, c.num_attention_heads, c.head_dim, model.device)
        one = partial(Moments, 1, 1, model.device)
        both, neither = (k, None if needs.joint else v), (None, None)
        order = (
            both[1],
            q if final and needs.queries else None,
            *(both if plain else neither),
            *(both if weighted else neither) * 2,
            *((one, one) if final and needs.weights else neither),
        )
        return [Statistics(k(), *(make and make() for make in order)) for _ in blocks]

    def run(layers: list[Statistics], step: int, doing: str) -> list[Statistics]:
        backward = needs.gradients or needs.weights
        with _watch(model, blocks, layers, before, needs.anchor), torch.set_grad_enabled(backward):
            read(step, doing)
        for i, layer in enumerate(layers, first):
            for name, m in layer._asdict().items():
                if m is not None and not m.gram.isfinite().all():
                    raise ValueError(
                        f"layer {i}: the statistics of {name} are not finite: the weights or the "
                        "dtype are unsound; try --dtype float32"
                    )
        return layers

    def weigh(first: bool) -> None:
        """Replace `before` layer by layer, so that there are never two of it."""
        for i, layer in enumerate(run(empty(first, not first, False), 4, "weighing")):
            before[i] = _lengths(layer)

    if weighted and data:
        weigh(first=True)
        weigh(first=False)
    return run(empty(plain, weighted, True), 1, "calibrating")


# by what rows, and by what gradients, are measured, for `k` and for `v` of a layer
_Before = dict[str, tuple[Lengths, Lengths]]


def _lengths(layer: Statistics) -> _Before:
    """Of keys and of values, by what was gathered: weighted sums where they are there."""
    found = {}
    for name in ("k", "v"):
        x, grad, x_weighted, grad_weighted = _four(layer, name)
        if x is not None:
            found[name] = (
                Lengths(x_weighted or x, True, 1e-3),
                Lengths(grad_weighted or grad, False, DAMPING),
            )
    return found


class _Feed:
    """Hands rows, and their gradients, to moments once all that stands side by side is here."""

    def __init__(self, layer: Statistics, before: _Before, name: str, parts: int):
        self.x, self.grad, self.x_weighted, self.grad_weighted = _four(layer, name)
        self.lengths: Any = before.get(name)
        self.parts = parts
        self.held: dict[int, Tensor] = {}
        self.last: Any = None

    def put(self, part: int, x: Tensor) -> None:
        """Take in one part of the rows, (..., blocks * width / parts)."""
        if (rows := self._whole(part, x)) is not None:
            self.x.add(rows)
            self.last = rows if self.x_weighted else None

    def put_grad(self, part: int, grad: Tensor) -> None:
        """Take in one part of the gradients of the rows that came last."""
        if (grads := self._whole(part, grad)) is None:
            return
        if self.grad:
            self.grad.add(grads)
        if self.x_weighted:
            of_rows, of_grads = self.lengths
            self.x_weighted.add(self.last, of_grads.of(grads))
            self.grad_weighted.add(grads, of_rows.of(self.last))
            self.last = None

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return bool(self.grad or self.x_weighted)

    def _whole(self, part: int, x: Tensor) -> Tensor | None:
        self.held[part] = x.detach().unflatten(-1, (len(self.x.gram), -1))
        if len(self.held) < self.parts:
            return None
        rows = [self.held.pop(i) for i in range(self.parts)]
        return (torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]).flatten(-2)


def _four(s: Statistics, name: str) -> list[Any]:
    return [getattr(s, name + end) for end in ("", "_grad", "_weighted", "_grad_weighted")]


@contextmanager
def _watch(
    model: Model,
    blocks: Sequence[Any],
    layers: list[Statistics],
    before: list[_Before],
    anchor: int,
) -> Iterator[None]:
    """Feed the outputs of the blocks' projections, and their gradients, to the statistics."""

    def same(x: Tensor) -> Tensor:
        return x

    @cache  # the same for all layers and sequences
    def angles(length: int) -> Any:
        pos = torch.arange(length, device=model.device)
        return model.offset(pos[None], pos, anchor)[1]

    def turned(x: Tensor) -> Tensor:  # keys, and their gradients alike
        heads = x.detach().unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
        return rotate(heads, *angles(x.size(1))).transpose(1, 2).flatten(2)

    def feed(to: _Feed, part: int = 0, seen: Callable = same):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            to.put(part, seen(out))
            if to.backward:
                out.register_hook(lambda grad: to.put_grad(part, seen(grad)))

        return hook

    def queries(to: Moments):
        return lambda module, args, out: to.add(out)

    def taken(moments: Moments) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            if weight.grad is not None:
                moments.add(weight.grad[..., None])
            weight.grad = None  # freed before the next layer's is made

        return hook

    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)  # the backward pass reaches activations, and weights if asked
    hooks = []
    for block, s, earlier in zip(blocks, layers, before, strict=True):
        parts = 2 if s.v is None else 1
        k = _Feed(s, earlier, "k", parts)
        v = k if s.v is None else _Feed(s, earlier, "v", 1)
        attn = block.attn
        keys = feed(k, seen=turned if anchor > 1 else same)
        hooks.append(attn.k_proj.register_forward_hook(keys))
        hooks.append(attn.v_proj.register_forward_hook(feed(v, parts - 1)))
        if s.q is not None:
            hooks.append(attn.q_proj.register_forward_hook(queries(s.q)))
        for weight, moments in (
            (attn.k_proj.weight, s.k_weight),
            (attn.v_proj.weight, s.v_weight),
        ):
            if moments is not None:
                weight.requires_grad_(True)
                hooks.append(weight.register_post_accumulate_grad_hook(taken(moments)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
