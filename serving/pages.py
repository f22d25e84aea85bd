"""The latents of one layer in vLLM's pages, and attention that reads them.

A token is a row of bytes: its keys, then its values. T new tokens, of all texts in a step.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend, AttentionImplBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ..zoo.models.cache import Buffer, Pack, ServedLayer, as_bytes, of_bytes
from ..zoo.models.model import LatentAttention, Model
from .steps import PagedBackend, Part, Step


class PagedLayer(ServedLayer, AttentionLayerBase):
    """A layer's cache. It is known to vLLM by its name."""

    def __init__(self, model: Model, attn: LatentAttention, name: str, config: VllmConfig):
        """config: of vLLM, which learns of the layer by it."""
        self.model, self.attn, self.name = model, attn, name
        self.latents = self.attn.k, self.attn.v
        self.dtype = model.dtype  # asking the model anew takes longer than attention to a page
        self.widths = [latent.nbytes(self.dtype) for latent in self.latents]
        self.impl = PagedImpl()
        self.kv_cache = torch.empty(0, dtype=torch.uint8)
        config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """As vLLM asks."""
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """The bytes of a token: of keys and of values."""
        keys, values = self.widths
        size = vllm_config.cache_config.block_size
        return FullAttentionSpec(
            block_size=size, num_kv_heads=1, head_size=keys, head_size_v=values, dtype=torch.uint8
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """As in `ServedLayer`; compiled but for what reads pages, which is one op to a compiler."""
        parts = (as_bytes(x, y, pack)[0] for x, y in zip((k, v), self.latents, strict=True))
        rows = torch.cat([*parts], -1)
        queries = q[0].transpose(0, 1)  # (T, H, width)
        width = self.attn.o_proj.weight.size(1) // self.attn.heads
        out = queries.new_empty(*queries.shape[:2], width)
        torch.ops.vllm.unified_attention_with_output(
            queries, rows, rows, out, _encode_layer_name(self.name)
        )
        return out.transpose(0, 1)[None]

    def read(self, queries: Tensor, rows: Tensor, out: Tensor, step: Step) -> None:
        """Keep rows (T, bytes), and write what queries (T, H, width) read to out (T, H, n)."""
        pages = self.kv_cache[:, 0]  # (pages, page, bytes)
        pages[step.page, step.slot] = rows[: len(step.page)]
        for part in step.parts:
            q = queries[part.tokens].unflatten(0, (-1, part.new)).transpose(1, 2)
            metadata = self.attn.own_metadata(part.attn_metadata)
            y = self.attn.read(q, *self._buffers(part, pages, rows), metadata)
            out[part.tokens] = y.transpose(1, 2).flatten(0, 1)

    def _buffers(self, part: Part, pages: Tensor, rows: Tensor) -> list[Buffer]:
        """Keys and values that a part reads: pages as they are, or one text's slots in order."""
        if part.pages is not None:
            pages = pages[part.pages].flatten(0, 1)[None, : part.slots]
        elif part.slots:  # all that it reads is new
            pages = rows[None, part.tokens]
        return [
            of_bytes(x, latent, self.dtype)
            for x, latent in zip(pages.split(self.widths, -1), self.latents, strict=True)
        ]


class PagedImpl(AttentionImplBase):
    """What vLLM's attention op calls."""

    def forward(
        self,
        layer: PagedLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        **options: Any,
    ) -> None:
        """query (T, H, width), key: rows (T, bytes), output (T, H, n), which is written."""
        if attn_metadata is None:  # vLLM measures memory
            output.zero_()
        else:
            layer.read(query, key, output, attn_metadata)
