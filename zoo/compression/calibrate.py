"""Statistics of keys, values, queries and gradients over calibration tokens, streamed.

Only sums and Gram matrices are kept, so memory does not grow with the number of tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models.model import Model
from .hooks import LayerLengths, feeding, moments_of
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
    unweighted: bool = True,
    weighted: bool = True,
) -> list[Statistics]:
    """Run a dense model over tokens (N, T), one sequence at a time; one `Statistics` a layer.

    heads_per_latent: how many kv heads stand side by side in a block, for keys and for values.
    gradients: take the gradients of the summed cross entropy as well, by a backward pass that
    reaches activations only. joint: keys and values of a block side by side. anchor: keys are
    turned within blocks of so many tokens. weights: take the gradients of the key and the value
    weights, by the same backward pass. unweighted, weighted: which sums of gradients to take:
    those in which all tokens count alike, those in which each counts by its importance, or both.
    Raises ValueError if a statistic is not finite.

    With gradients g, an error εx costs E[(gᵀ ε x)²], which is tr of ε against E[g gᵀ ⊗ x xᵀ], and
    g and x of a token are far from independent: attention sinks have the longest keys, and they
    barely affect the loss. The product C ⊗ F that fits this best weights x xᵀ by gᵀ F⁻¹ g, and
    g gᵀ by xᵀ C⁻¹ x. We weight by their square roots, which are robust to heavy tails. Two passes
    over every fourth sequence estimate C and F for these weights, the second with those of the
    first.

    Weighted sums therefore cost 1.5 passes over the tokens, all others one; a pass is forward, and
    with gradients also backward. Memory is that of the model, of one sequence's activations with
    turned keys, and of the sums of all layers, since each pass feeds all of them. A sum of keys,
    or of values, has L w² numbers a layer, for L blocks of width w. There is one of 8 bytes a
    number, with unweighted gradients one more, with weighted ones two more and two factors of 4
    bytes. For `fisher` this is 32 bytes a number, whatever N is. Means and counts add about 2 / w
    of it, and computing the factors adds the work of one layer.
    """
    needs = Needs(
        heads_per_latent, gradients, queries, joint, anchor, weights, unweighted, weighted
    )
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
    """The statistics of `blocks` of a model while `read(step, doing)` runs them, one each.

    read: runs the blocks over every `step`-th sequence, with gradients also backward; called
    once, or three times for weighted sums. data: whether there is anything to read. first: the
    number of the first block, for messages. See `calibrate`.
    """
    width = model.config.head_dim * (2 if needs.joint else 1)
    k_shared, v_shared = needs.heads_per_latent
    unweighted, weighted = (needs.gradients and x for x in (needs.unweighted, needs.weighted))
    lengths: list[LayerLengths] = [{} for _ in blocks]

    def empty(unweighted: bool, weighted: bool, final: bool) -> list[Statistics]:
        c, heads = model.config, model.config.num_key_value_heads
        k = partial(Moments, heads // k_shared, k_shared * width, model.device)
        v = partial(Moments, heads // v_shared, v_shared * width, model.device)
        q = partial(Moments, c.num_attention_heads, c.head_dim, model.device)
        one = partial(Moments, 1, 1, model.device)
        both, neither = (k, None if needs.joint else v), (None, None)
        order = (
            both[1],
            q if final and needs.queries else None,
            *(both if unweighted else neither),
            *(both if weighted else neither) * 2,
            *((one, one) if final and needs.weights else neither),
        )
        layers = [Statistics(k(), *(make and make() for make in order)) for _ in blocks]
        return [layer._replace(anchor=needs.anchor) for layer in layers]

    def run(layers: list[Statistics], step: int, doing: str) -> list[Statistics]:
        backward = needs.gradients or needs.weights
        with (
            feeding(model, blocks, layers, lengths, needs.anchor),
            torch.set_grad_enabled(backward),
        ):
            read(step, doing)
        for i, layer in enumerate(layers, first):
            _check_finite(layer, i)
        return layers

    def weigh(first: bool) -> None:
        """Replace `lengths` layer by layer, so that only one layer has two of them."""
        for i, layer in enumerate(run(empty(first, not first, False), 4, "weighing")):
            lengths[i] = _lengths(layer)

    if weighted and data:
        weigh(first=True)
        weigh(first=False)
    return run(empty(unweighted, weighted, True), 1, "calibrating")


def _check_finite(layer: Statistics, number: int) -> None:
    for name, moments in layer.moments.items():
        if not moments.gram.isfinite().all():
            raise ValueError(
                f"layer {number}: the statistics of {name} are not finite: the weights or the "
                "dtype are unsound; try --dtype float32"
            )


def _lengths(layer: Statistics) -> LayerLengths:
    """Of keys and of values, by the sums of a layer: by weighted ones if there are any."""
    lengths = {}
    for name in ("k", "v"):
        x, grad, x_weighted, grad_weighted = moments_of(layer, name)
        if x is not None:
            lengths[name] = (
                Lengths(x_weighted or x, True, 1e-3),
                Lengths(grad_weighted or grad, False, DAMPING),
            )
    return lengths
