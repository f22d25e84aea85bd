"""Mixtral with a low-rank KV cache: a Mistral with experts in every layer."""

from dataclasses import dataclass
from typing import ClassVar

from .experts import ExpertsConfig


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(ExpertsConfig):
    """Sizes of a Mixtral, named as in transformers' MixtralConfig, and what its cache keeps."""

    family: ClassVar[str] = "mixtral"
