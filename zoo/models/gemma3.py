"""Gemma 3, its text model, with a low-rank KV cache: a Qwen3 with local and global layers.

Differences from `qwen3.py`:
- Layers with a window rotate by frequencies of their own, without scaling.
- Norms multiply by 1 + weight. Attention and MLP have one before and one behind them.
- Embeddings are multiplied by the root of their width. Logits may have a soft cap.
- The factor on scores is a field of the config; MLPs have another activation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import LayerCache
from .llama import Angles, AttentionMetadata, Llama
from .mask import Mask
from .model import LatentAttention
from .qwen3 import Attention as NormedAttention
from .qwen3 import HeadNorm as PlainHeadNorm
from .qwen3 import Qwen3Config
from .rope import check_rope, frequencies
from .windows import WindowedLlama

NAMES = {
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
ONLY = {"attn_logit_softcapping": None, "use_bidirectional_attention": False}


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Qwen3Config):
    """Sizes of a Gemma 3, named as in transformers' Gemma3TextConfig, and what its cache keeps.

    rope_parameters: of layers without a window. rope_local_base_freq: rope_theta of the others.
    """

    family: ClassVar[str] = "gemma3_text"
    activation: ClassVar[str] = "gelu_pytorch_tanh"
    begun: ClassVar[bool] = True

    rope_local_base_freq: float = 10_000.0
    query_pre_attn_scalar: float = 256.0
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        """As in `LlamaConfig`. Raises ValueError also for rotations that depend on the length."""
        super().__post_init__()
        check_rope({"rope_theta": self.rope_local_base_freq}, self.head_dim)
        kind = self.rope_parameters.get("rope_type", "default")
        if kind not in ("default", "linear"):
            raise ValueError(
                f"rope_type {kind!r} is not supported in {self.family}: expected default, linear"
            )
        for name in ("query_pre_attn_scalar", "final_logit_softcapping"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0: expected a larger number")

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' Gemma3TextConfig. Raises ValueError naming an unsupported field."""
        for name, value in ONLY.items():
            if (raw.get(name) or value) != value:
                raise ValueError(f"{name} {raw[name]!r} is not supported: expected {value!r}")
        if "sliding_attention" in raw["layer_types"] and not raw["sliding_window"]:
            raise ValueError("sliding_window is absent: expected that of the sliding layers")
        ropes = raw["rope_parameters"]
        if foreign := ropes.keys() - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"rope_parameters have {', '.join(sorted(foreign))}: expected full_attention and "
                "sliding_attention, with such fields of their own"
            )
        rope, local = ropes["full_attention"], ropes["sliding_attention"]
        if rope.get("rope_type", "default") == "default" and "factor" in rope:
            raise ValueError("the rotation has a factor but no rope_type: expected 'linear' there")
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type {local['rope_type']!r} of sliding layers is not supported: expected "
                "'default'"
            )
        own = {"rope_parameters": rope, "rope_local_base_freq": local["rope_theta"]}
        return super().from_hf(raw | own | {"hidden_act": raw["hidden_activation"]})

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As in `LlamaConfig`."""
        yield from super().weights(".".join(NAMES.get(x, x) for x in key.split(".")), tensor)


class Norm(nn.RMSNorm):
    """A norm that multiplies by 1 + weight, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> the same shape."""
        scale = 1 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, scale, self.eps).type_as(x)


class HeadNorm(PlainHeadNorm, Norm):
    """A norm of each head, as of Qwen3, that multiplies by 1 + weight."""


class Embedding(nn.Embedding):
    """Embeddings times the root of their width, which is rounded to their dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, width)."""
        return super().forward(ids) * self.scale

    @property
    def scale(self) -> float:
        """The factor."""
        return rounded_root(self.embedding_dim, self.weight.dtype)


def rounded_root(width: int, dtype: torch.dtype) -> float:
    """The square root of a width as a dtype holds it."""
    root = math.sqrt(width)
    step = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(root))
    return round(root / step) * step


class CappedHead(nn.Linear):
    """A head whose logits x become cap * tanh(x / cap)."""

    def __init__(self, width: int, vocabulary: int, cap: float):
        super().__init__(width, vocabulary, bias=False)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> (..., vocabulary)."""
        return torch.tanh(super().forward(x) / self.cap) * self.cap


class Attention(NormedAttention):
    """Attention of one layer over latents, with a factor on scores of its own."""

    def __init__(self, config: Gemma3Config, layer: int):
        super().__init__(config, layer)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps)


class Block(nn.Module):
    """One layer: attention and MLP, each between two norms and with a residual connection."""

    def __init__(self, config: Gemma3Config, attention: LatentAttention, feed_forward: nn.Module):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attn_norm, self.attn_post_norm = Norm(width, eps), Norm(width, eps)
        self.attn = attention
        self.mlp_norm, self.mlp_post_norm = Norm(width, eps), Norm(width, eps)
        self.mlp = feed_forward

    def forward(
        self, x: Tensor, pos: Tensor, attn_metadata: AttentionMetadata, cache: LayerCache | None
    ) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), pos, attn_metadata, cache))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class Gemma3(WindowedLlama):
    """A Gemma 3 language model."""

    config: Gemma3Config
    attention = Attention
    block = Block

    def __init__(self, config: Gemma3Config):
        super().__init__(config)
        vocabulary, width, cap = (
            *(config.vocab_size, config.hidden_size),
            config.final_logit_softcapping,
        )
        self.embed = Embedding(vocabulary, width)
        self.norm = Norm(width, config.rms_norm_eps)
        if cap is not None:
            self.head = CappedHead(width, vocabulary, cap)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def reset_buffers(self) -> None:
        """As in `Llama`: the frequencies of layers without a window, then those of the others."""
        super().reset_buffers()
        c = self.config
        rope = {"rope_theta": c.rope_local_base_freq}
        with torch.device("cpu"):
            local, _ = frequencies(rope, c.head_dim, c.max_position_embeddings)
        self.inv_freq = torch.cat((self.inv_freq, local.to(self.inv_freq.device)))

    def rope(self, position: Tensor, newest: Tensor, window: int = 0) -> Angles:
        """As in `Llama`, for layers with this window, or for those without one (0)."""
        if not window:
            return super().rope(position, newest)
        angle = position[:, None, :, None].float() * self.inv_freq[1].to(position.device)
        return angle.cos(), angle.sin()

    def attention_metadata(  # type: ignore[override]
        self, position: Tensor, pos: Tensor, mask: Mask
    ) -> dict[int, AttentionMetadata]:
        """As in `WindowedLlama`, where layers with a window have angles of their own."""
        by_window = super().attention_metadata(position, pos, mask)
        mask = by_window[0].mask
        for window in by_window.keys() - {0}:
            local = Llama.attention_metadata(self, position, pos, mask, window)
            by_window[window] = local._replace(mask=by_window[window].mask)
        return by_window

    def encoding_metadata(self, new: Tensor) -> dict[int, AttentionMetadata]:
        """As in `Llama`, by window."""
        return {window: self._of_new(new, window) for window in {0, *self.config.windows}}
