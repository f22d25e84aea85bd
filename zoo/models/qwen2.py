"""Qwen2 with a low-rank KV cache: a Llama with biases on q, k, v and sliding-window layers.

In a layer with a window of W tokens, a token attends to the last W, itself included. The cache
keeps all tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from .cache import LayerCache
from .llama import AttentionMetadata, Block, Llama, LlamaConfig
from .mask import CausalMask, DecodeMask, Mask, causal_matrix, decode_mask, hide, whole_rows


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Sizes of a Qwen2, named as in transformers' Qwen2Config, and what its cache keeps."""

    family: ClassVar[str] = "qwen2"

    windows: tuple[int, ...]  # one per layer; 0 means no window

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' Qwen2Config. Raises ValueError naming an unsupported field."""
        width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        sizes = {"full_attention": 0, "sliding_attention": raw["sliding_window"]}
        windows = tuple(sizes[kind] for kind in raw["layer_types"])
        config = super().from_hf(raw | {"head_dim": width, "windows": windows})
        return replace(config, query_bias=True, key_bias=True, value_bias=True)


class WindowedBlock(Block):
    """A Llama block whose tokens attend only to the last `window` tokens."""

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
        """x (B, T, width) -> (B, T, width). attn_metadata: by window."""
        return super().forward(x, pos, attn_metadata[self.window], cache)


class Qwen2(Llama):
    """A Qwen2 language model."""

    config: Qwen2Config
    block = WindowedBlock

    def attention_metadata(  # type: ignore[override]
        self, position: Tensor, pos: Tensor, mask: Mask
    ) -> dict[int, AttentionMetadata]:
        """Llama's metadata by window: one for each window of the model, and for none (0)."""
        if isinstance(mask, DecodeMask) and len(pos) > 1 and any(self.config.windows):
            valid = None if mask.bias is None else mask.bias == 0
            mask = causal_matrix(pos, position.size(1), valid)  # each token has a window of its own
        full = super().attention_metadata(position, pos, mask)
        by_window = {0: full}
        for window in set(self.config.windows) - {0}:
            ahead = position[:, None] - position[:, pos, None]  # (B or 1, T, S)
            if isinstance(mask, DecodeMask):
                near = (ahead > -window)[:, 0]
                visible = near if mask.bias is None else near & (mask.bias == 0)
                visible = whole_rows(visible[:, None, None], pos)[:, 0, 0]
                by_window[window] = full._replace(mask=decode_mask(pos, visible))
                continue
            if isinstance(mask, CausalMask):
                mask = causal_matrix(pos, position.size(1), mask.valid)
            near = hide(mask, (ahead <= -window)[:, None])
            by_window[window] = full._replace(mask=whole_rows(near, pos))
        return by_window
