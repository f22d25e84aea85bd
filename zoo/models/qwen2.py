"""Qwen2 with Eigen Attention: a Llama with biases before attention, and windows in some layers.

A layer with a window sees that many tokens, its own included. The cache keeps all of them.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from .attention import Causal, Mask, Seen, causal_mask, one_token
from .cache import LayerCache
from .llama import AttentionMetadata, Block, Llama, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Sizes of a Qwen2, by the names of transformers' Qwen2Config, and what its cache keeps."""

    family: ClassVar[str] = "qwen2"

    windows: tuple[int, ...]  # one a layer; 0 sees everything

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' Qwen2Config. Raises ValueError for what is not supported."""
        width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        sizes = {"full_attention": 0, "sliding_attention": raw["sliding_window"]}
        windows = tuple(sizes[kind] for kind in raw["layer_types"])
        config = super().from_hf(raw | {"head_dim": width, "windows": windows})
        return replace(config, query_bias=True, key_bias=True, value_bias=True)


class WindowedBlock(Block):
    """A layer of Llama that sees as far as its window."""

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__(config, layer)
        self.window = config.windows[layer]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        pos: Tensor,
        attn_metadata: dict[int, AttentionMetadata],
        cache: LayerCache | None,
    ) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        return super().forward(x, pos, attn_metadata[self.window], cache)


class Qwen2(Llama):
    """A Qwen2 for language modelling."""

    config: Qwen2Config
    block = WindowedBlock

    def attention_metadata(  # type: ignore[override]
        self, position: Tensor, pos: Tensor, mask: Mask
    ) -> dict[int, AttentionMetadata]:
        """What Llama's attention needs, for every window there is."""
        full = super().attention_metadata(position, pos, mask)
        found = {0: full}
        for window in set(self.config.windows) - {0}:
            ahead = position[:, None] - position[:, pos, None]  # (B or 1, T, S)
            if isinstance(mask, Seen):
                near = (ahead > -window)[:, 0]
                visible = near if mask.bias is None else near & (mask.bias == 0)
                found[window] = full._replace(mask=one_token(pos, visible))
                continue
            if isinstance(mask, Causal):
                mask = causal_mask(pos, position.size(1), mask.valid)
            found[window] = full._replace(mask=mask & (ahead > -window)[:, None])
        return found
