"""Mistral with a low-rank KV cache: a Llama with one window for all layers, or none."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .windows import WindowedConfig


@dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowedConfig):
    """Sizes of a Mistral, named as in transformers' MistralConfig, and what its cache keeps."""

    family: ClassVar[str] = "mistral"

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' MistralConfig. Raises ValueError naming an unsupported field."""
        if raw.get("layer_types"):  # transformers' Mistral ignores them, others do not
            raise ValueError("config.json sets layer_types, which is not supported in a mistral")
        return super().from_hf(raw)
