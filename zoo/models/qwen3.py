"""Qwen3 with a low-rank KV cache: a Llama with norms of queries and keys, and windows.

Differences from `windows.py`:
- Each head of queries and of keys is normed behind its projection, before the rotation.
- So keys are not linear in the layer's input, and their encoder is a matrix of its own behind the
  norm, `k_down`. It is there however compressed keys are held.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .windows import WindowedAttention, WindowedConfig, WindowedLlama


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(WindowedConfig):
    """Sizes of a Qwen3, named as in transformers' Qwen3Config, and what its cache keeps."""

    family: ClassVar[str] = "qwen3"

    @property
    def nonlinear(self) -> tuple[bool, bool]:
        """Keys are nonlinear in the layer's input, by their norm; values are not."""
        return True, False


class HeadNorm(nn.RMSNorm):
    """A norm of each head, with the same weights (head_dim,) for all."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, heads * head_dim) -> the same shape."""
        return super().forward(x.unflatten(-1, (-1, len(self.weight)))).flatten(-2)


class Attention(WindowedAttention):
    """Attention of one layer over latents, with normed queries and keys."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__(config, layer)
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps)

    def source(self, name: str) -> nn.Module:
        """As in `LatentAttention`: after norms."""
        return super().source(name) if name == "v" else getattr(self, f"{name}_norm")

    def queries(self, x: Tensor) -> Tensor:
        """As in `llama.Attention`, normed."""
        return self.q_norm(super().queries(x))

    def keys(self, x: Tensor) -> Tensor:
        """As in `llama.Attention`, normed."""
        return self.k_norm(super().keys(x))


class Qwen3(WindowedLlama):
    """A Qwen3 language model."""

    config: Qwen3Config
    attention = Attention
