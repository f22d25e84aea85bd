"""Qwen2 with a low-rank KV cache: a Llama with biases on q, k, v, and windows in some layers."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from .windows import WindowedConfig


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    """Sizes of a Qwen2, named as in transformers' Qwen2Config, and what its cache keeps."""

    family: ClassVar[str] = "qwen2"

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' Qwen2Config. Raises ValueError naming an unsupported field."""
        config = super().from_hf(raw)
        return replace(config, query_bias=True, key_bias=True, value_bias=True)
