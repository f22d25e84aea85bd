"""A Llama whose layers may have sliding windows, as Mistral, Qwen2, Qwen3 and Gemma 3 have.

In a layer with a window of W tokens, a token attends to the last W, itself included. Its cache is a
ring of a few more slots (`ring.py`), or keeps all slots if there are no more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .cache import StaticCache
from .llama import Attention, AttentionMetadata, Llama, LlamaConfig
from .mask import CausalMask, DecodeMask, Mask, causal_matrix, decode_mask, hide, whole_rows
from .model import LatentAttention


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(LlamaConfig):
    """Sizes of such a model, named as transformers names them, and what its cache keeps."""

    windows: tuple[int, ...]  # one per layer; 0 means no window

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """As in `LlamaConfig`. Without layer_types, all layers have the same window, or none."""
        width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        sizes = {"full_attention": 0, "sliding_attention": raw["sliding_window"] or 0}
        kinds = raw.get("layer_types") or ["sliding_attention"] * raw["num_hidden_layers"]
        windows = tuple(sizes[kind] for kind in kinds)
        return super().from_hf(raw | {"head_dim": width, "windows": windows})


class WindowedAttention(Attention):
    """Attention to the last `window` tokens only."""

    def __init__(self, config: WindowedConfig, layer: int):
        super().__init__(config, layer)
        self.window = config.windows[layer]

    def own_metadata(self, attn_metadata: dict[int, AttentionMetadata]) -> AttentionMetadata:
        """That of this layer's window."""
        return attn_metadata[self.window]


class WindowedLlama(Llama):
    """A Llama whose layers may have windows."""

    config: WindowedConfig
    attention: ClassVar[Callable[..., LatentAttention]] = WindowedAttention

    def attention_metadata(  # type: ignore[override]
        self, position: Tensor, pos: Tensor, mask: Mask
    ) -> dict[int, AttentionMetadata]:
        """Llama's metadata by window: one for each window of the model, and for none (0)."""
        if isinstance(mask, DecodeMask) and pos.size(-1) > 1 and any(self.config.windows):
            valid = None if mask.bias is None else mask.bias == 0
            mask = causal_matrix(pos, position.size(1), valid)  # each token has a window of its own
        full = super().attention_metadata(position, pos, mask)
        by_window = {0: full}
        for window in set(self.config.windows) - {0}:
            if isinstance(mask, DecodeMask) and mask.bias is None:  # slots are positions
                start, end = mask.span.split(1, 1)
                span = torch.cat((torch.maximum(start, end - window), end), 1)
                by_window[window] = full._replace(mask=mask._replace(span=span))
                continue
            ahead = position[:, None] - position[:, pos, None]  # (B or 1, T, S)
            if isinstance(mask, DecodeMask):
                visible = (ahead > -window)[:, 0] & (mask.bias == 0)
                visible = whole_rows(visible[:, None, None], pos)[:, 0, 0]
                read = decode_mask(pos, visible)
                read = mask._replace(span=read.span, bias=read.bias)
                by_window[window] = full._replace(mask=read)
                continue
            if isinstance(mask, CausalMask):
                mask = causal_matrix(pos, position.size(1), mask.valid)
            near = hide(mask, (ahead <= -window)[:, None])
            by_window[window] = full._replace(mask=whole_rows(near, pos))
        return by_window

    def step_metadata(
        self, position: Tensor, pos: Tensor, mask: Mask, cache: StaticCache | None
    ) -> dict[int, AttentionMetadata]:
        """As in `Model`, by window. The rings of different windows have read other slots."""
        if cache is None or not cache.rings:
            return self.attention_metadata(position, pos, mask)
        by_window: dict[int, AttentionMetadata] = {}
        if not cache.rings.keys() >= set(self.config.windows):
            by_window = self.attention_metadata(position, pos, mask)
        for window, ring in cache.rings.items():
            seen = ring.seen(position, pos, mask, cache.batch)
            by_window[window] = self.attention_metadata(*seen)[window]
        return by_window

    def encoding_metadata(self, new: Tensor) -> dict[int, AttentionMetadata]:
        """Llama's, the same for all windows."""
        return dict.fromkeys((0, *self.config.windows), super().encoding_metadata(new))
