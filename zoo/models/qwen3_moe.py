"""Qwen3-MoE with a low-rank KV cache: a Qwen3 with experts, in some layers or all."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .experts import ExpertsConfig, ExpertsLlama
from .qwen3 import Attention, Qwen3Config


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(ExpertsConfig, Qwen3Config):
    """Sizes of a Qwen3-MoE, named as in transformers' Qwen3MoeConfig, and what its cache keeps."""

    family: ClassVar[str] = "qwen3_moe"

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' Qwen3MoeConfig. Raises ValueError naming an unsupported field."""
        count = raw.get("num_local_experts") or raw["num_experts"]
        sparse = tuple(
            count * (i not in raw["mlp_only_layers"] and (i + 1) % raw["decoder_sparse_step"] == 0)
            for i in range(raw["num_hidden_layers"])
        )
        own = {"layer_experts": sparse, "expert_size": raw["moe_intermediate_size"]}
        return super().from_hf(raw | own)


class Qwen3Moe(ExpertsLlama):
    """A Qwen3-MoE language model."""

    config: Qwen3MoeConfig
    attention = Attention
