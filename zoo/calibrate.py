"""Statistics of keys, values, queries and gradients over calibration tokens, streamed.

Only sums and Gram matrices are kept, so memory does not grow with the number of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .llama import Model


class Moments:
    """Count, sum and Gram matrix of row vectors, for L blocks of `width` numbers side by side."""

    def __init__(self, blocks: int, width: int, device: torch.device):
        self.count = 0
        self.sum = torch.zeros(blocks, width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(blocks, width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in x (..., L * width)."""
        rows = x.detach().float().flatten(0, -2).unflatten(-1, self.sum.shape).transpose(0, 1)
        self.count += rows.size(1)
        self.sum += rows.sum(1)
        self.gram += rows.mT @ rows

    @property
    def mean(self) -> Tensor:
        """(L, width)."""
        return self.sum / self.count

    @property
    def second(self) -> Tensor:
        """Mean of x xᵀ, uncentred: (L, width, width)."""
        return self.gram / self.count

    @property
    def covariance(self) -> Tensor:
        """The same, centred."""
        return self.second - self.mean[:, :, None] * self.mean[:, None]


class Statistics(NamedTuple):
    """What one layer showed. Gradients and queries are present only if they were asked for."""

    k: Moments  # keys before the rotation, biases included: (kv heads / heads per latent) blocks
    v: Moments
    q: Moments | None  # queries before the rotation, one block per query head
    k_grad: Moments | None  # gradients of the summed loss at the keys, in the blocks of k
    v_grad: Moments | None


def calibrate(
    model: Model,
    tokens: Tensor,
    heads_per_latent: tuple[int, int] = (1, 1),
    gradients: bool = False,
    queries: bool = False,
) -> list[Statistics]:
    """Run a dense model over tokens (N, T), one sequence at a time; one `Statistics` a layer.

    heads_per_latent: how many kv heads stand side by side in a block, for keys and for values.
    gradients: take the gradients of the summed cross entropy as well, by a backward pass that
    reaches activations only. Raises ValueError where a statistic is not finite.
    """
    c, device = model.config, tokens.device

    def moments(shared: int) -> Moments:
        return Moments(c.num_key_value_heads // shared, shared * c.head_dim, device)

    layers = [
        Statistics(
            moments(heads_per_latent[0]),
            moments(heads_per_latent[1]),
            Moments(c.num_attention_heads, c.head_dim, device) if queries else None,
            moments(heads_per_latent[0]) if gradients else None,
            moments(heads_per_latent[1]) if gradients else None,
        )
        for _ in model.layers
    ]
    with _watch(model, layers), torch.set_grad_enabled(gradients):
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


@contextmanager
def _watch(model: Model, layers: list[Statistics]) -> Iterator[None]:
    """Feed the outputs of the projections, and their gradients, to the statistics."""

    def feed(values: Moments | None, grads: Moments | None):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            if values is not None:
                values.add(out)
            if grads is not None:
                out.register_hook(grads.add)

        return hook

    def start(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out.requires_grad_(torch.is_grad_enabled())

    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)  # the backward pass reaches activations, no weight
    hooks = [model.embed.register_forward_hook(start)]
    for block, s in zip(model.layers, layers, strict=True):
        hooks.append(block.attn.k_proj.register_forward_hook(feed(s.k, s.k_grad)))
        hooks.append(block.attn.v_proj.register_forward_hook(feed(s.v, s.v_grad)))
        hooks.append(block.attn.q_proj.register_forward_hook(feed(s.q, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
