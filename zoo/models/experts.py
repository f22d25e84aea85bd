"""Mixtures of experts in place of MLPs, as Mixtral and Qwen3-MoE have them.

A router chooses a few experts for each token, and adds what they give, each times its share. Each
matrix of all experts of a layer is one parameter, whose first axis counts the experts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .llama import MLP
from .model import parameter
from .windows import WindowedConfig, WindowedLlama

FEW = 8  # tokens
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # as Mixtral's files call them


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(WindowedConfig):
    """Sizes of such a model, and what its cache keeps.

    layer_experts: how many experts each layer has; 0: one MLP of `intermediate_size`.
    expert_size: the hidden size of one. num_experts_per_tok: how many a token is given to.
    norm_topk_prob: their shares are scaled so that they add up to 1.
    """

    layer_experts: tuple[int, ...]
    expert_size: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    def __post_init__(self) -> None:
        """As in `LlamaConfig`. Raises ValueError also for numbers of experts that do not fit."""
        super().__post_init__()
        for count in self.layer_experts:
            if count and count < self.num_experts_per_tok:
                raise ValueError(
                    f"num_experts_per_tok is {self.num_experts_per_tok}: expected at most {count}, "
                    "the number of experts"
                )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """As in `WindowedConfig`, for a family whose layers all have experts unless raw says."""
        count = raw.get("num_local_experts") or raw["num_experts"]
        own = {
            "layer_experts": (count,) * raw["num_hidden_layers"],
            "expert_size": raw["intermediate_size"],
            "norm_topk_prob": True,
        }
        return super().from_hf(own | raw)

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As in `Config`. A row of a weight is one expert's."""
        for name, x in super().weights(key.replace("block_sparse_moe", "mlp"), tensor):
            start, experts, rest = name.partition(".experts.")
            if not experts:
                yield name, x
            elif rest == "gate_up_proj":  # as transformers holds them
                for part, half in zip(("gate_proj", "up_proj"), x.chunk(2, 1), strict=True):
                    yield f"{start}.experts.{part}", half
            elif of_one := re.fullmatch(r"(\d+)\.(\w+)\.weight", rest):  # as files hold them
                number, part = of_one.groups()
                yield f"{start}.experts.{PARTS.get(part, part)}[{number}]", x
            else:
                yield name, x


class Experts(nn.Module):
    """The MLPs of all experts."""

    def __init__(self, config: ExpertsConfig, count: int):
        super().__init__()
        width, hidden = config.hidden_size, config.expert_size
        self.gate_proj = parameter(count, hidden, width)
        self.up_proj = parameter(count, hidden, width)
        self.down_proj = parameter(count, width, hidden)

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Sum of what experts `chosen` (N, each) give, times `share`: (N, width).

        x: (N, width). No graph has shapes that depend on values, so under torch.compile every
        expert gets all rows, unless they are few: then the matrices of the chosen are picked.
        """
        graph = torch.compiler.is_compiling()
        if graph and statically_known_true(len(x) <= FEW):
            return (self._picked(x, chosen) * share[..., None]).sum(1)
        y = torch.zeros_like(x, dtype=share.dtype)
        shares = share.new_zeros(len(x), len(self.gate_proj)).scatter(1, chosen, share)
        for i, part in enumerate(shares.unbind(1)):
            if graph:
                y = y + self._one(i, x) * part[:, None]
            elif len(rows := part.nonzero()[:, 0]):
                y = y.index_add(0, rows, self._one(i, x[rows]) * part[rows, None])
        return y

    def _one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert gives of x (N, width): the same shape."""
        gate = F.silu(F.linear(x, self.gate_proj[expert]))
        return F.linear(gate * F.linear(x, self.up_proj[expert]), self.down_proj[expert])

    def _picked(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts give of x (N, width): (N, each, width)."""
        x = x[:, None]
        gate = F.silu(_products(self.gate_proj[chosen], x))
        return _products(self.down_proj[chosen], gate * _products(self.up_proj[chosen], x))


def _products(weight: Tensor, x: Tensor) -> Tensor:
    """Matrices (N, each, m, n) times vectors (N, each or 1, n), as a loop that reads in place."""
    wide = _wide(x)
    return (weight.to(wide) * x[:, :, None].to(wide)).sum(-1).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: fp32 or more."""
    return torch.promote_types(x.dtype, torch.float32)


class Router(nn.Module):
    """Scores of experts. No linear layer, since quantizers would round it, and so the choice."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight = parameter(count, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, experts)."""
        return F.linear(x, self.weight)


class Mixture(nn.Module):
    """A router and its experts, in place of an MLP."""

    def __init__(self, config: ExpertsConfig, count: int):
        super().__init__()
        self.each, self.whole = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config.hidden_size, count)
        self.experts = Experts(config, count)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width). Shares and their sum are in fp32 or more."""
        scores = self.gate(x).flatten(0, 1).softmax(-1, dtype=_wide(x))
        share, chosen = scores.topk(self.each)  # (B T, each)
        if self.whole:
            share = share / share.sum(-1, keepdim=True)
        return self.experts(x.flatten(0, 1), chosen, share).to(x.dtype).view_as(x)


class ExpertsLlama(WindowedLlama):
    """A Llama whose layers may have windows, and experts."""

    config: ExpertsConfig

    def feed_forward(self, layer: int) -> nn.Module:
        """As in `Llama`: experts if the layer has them."""
        count = self.config.layer_experts[layer]
        return Mixture(self.config, count) if count else MLP(self.config)
