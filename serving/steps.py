"""What attention must know of a step: which tokens belong to which text, made once for all layers.

B texts, T new tokens of each, S slots, P pages of a text.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ..zoo.models.mask import CausalMask, DecodeMask
from ..zoo.models.ring import PAGE


class Part(NamedTuple):
    """Some texts with the same number of new tokens, which attend in one call per layer.

    tokens: which of the step's they are, text after text. new: T. attn_metadata: the native
    model's. slots, pages: of a prompt, how many slots it reads, and the pages that hold them, (P,);
    None if all are new. Decoding reads pages by the table of its mask.
    """

    tokens: slice | Tensor
    new: int
    attn_metadata: Any
    slots: int = 0
    pages: Tensor | None = None


@dataclass
class Step(AttentionMetadata):
    """One step. page, slot: where each token's row goes, (tokens,)."""

    page: Tensor
    slot: Tensor
    parts: list[Part]


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the metadata of a step from vLLM's."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.model = layer.model
        # a window begins at another slot for each token, so the ops read windows for one only
        windows = any(getattr(self.model.config, "windows", ()))
        self.few = 1 if windows else max_decode_query_len(vllm_config)
        self.reorder_batch_threshold = self.few

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """As vLLM calls it: once for all layers of one width, so the last result is kept."""
        of, step = vars(self.model).get("last_step", (None, None))
        if of is not common_attn_metadata:
            step = self._step(common_attn_metadata)
            vars(self.model)["last_step"] = common_attn_metadata, step
        return step

    def _step(self, c: CommonAttentionMetadata) -> Step:
        starts = c.query_start_loc_cpu[: c.num_reqs + 1].tolist()
        counts = [end - start for start, end in pairwise(starts)]
        lengths = c.seq_lens_cpu_upper_bound[: c.num_reqs].tolist()
        texts: dict[int, list[int]] = {}
        for text, count in enumerate(counts):
            texts.setdefault(count, []).append(text)
        parts = []
        for count, which in texts.items():
            if 0 < count <= self.few:
                parts.append(self._decoding(c, count, which, starts, lengths))
            elif count:
                parts += [self._prompt(c, count, i, starts[i], lengths[i]) for i in which]
        page = self.kv_cache_spec.block_size
        place = c.slot_mapping[: c.num_actual_tokens]
        return Step(place // page, place % page, parts)

    def _decoding(
        self,
        c: CommonAttentionMetadata,
        count: int,
        which: list[int],
        starts: list[int],
        lengths: list[int],
    ) -> Part:
        """Texts with few new tokens each: the ops read their pages."""
        page, device = self.kv_cache_spec.block_size, c.seq_lens.device
        pages = -(-max(lengths[i] for i in which) // page)
        slots = torch.arange(pages * page, device=device)[None]
        new = torch.arange(count, device=device)
        first, last = starts[which[0]], which[-1] + 1
        tokens: slice | Tensor = slice(first, first + len(which) * count)
        texts: slice | Tensor = slice(which[0], last)
        if last - which[0] > len(which):  # others are between them
            texts = torch.tensor(which, device=device)
            tokens = (
                torch.tensor([starts[i] for i in which], device=device)[:, None] + new
            ).flatten()
        end = c.seq_lens[texts].long()[:, None]
        table = c.block_table_tensor[texts, :pages].contiguous()
        mask = DecodeMask(torch.cat((torch.zeros_like(end), end), 1), table=table)
        metadata = self.model.attention_metadata(slots, end - count + new, mask)
        return Part(tokens, count, metadata)

    def _prompt(
        self, c: CommonAttentionMetadata, count: int, text: int, start: int, length: int
    ) -> Part:
        """One text with many new tokens."""
        page, device = self.kv_cache_spec.block_size, c.seq_lens.device
        slots = torch.arange(length, device=device)
        metadata = self.model.attention_metadata(slots[None], slots[-count:], CausalMask())
        table = c.block_table_tensor[text, : -(-length // page)].long()
        read = None if length == count else table
        return Part(slice(start, start + count), count, metadata, length, read)


class PagedBackend(AttentionBackend):
    """What vLLM asks about attention over latents."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """Shown in vLLM's log."""
        return "EIGENZOO"

    @staticmethod
    def get_impl_cls() -> Any:
        """What attends."""
        from .pages import PagedImpl

        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """What makes metadata."""
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Slots of a page."""
        return [MultipleOf(PAGE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of one layer side by side."""
        return (KVCacheLayout.LBHNC,)
