"""The native model of a checkpoint, from the config that vLLM has read."""

from dataclasses import fields
from typing import Any

from ..zoo.models.config import Config
from ..zoo.models.families import FAMILIES


def native_config(hf_config: Any) -> Config:
    """From transformers' config of a compressed model."""
    kind = FAMILIES[hf_config.family].config
    return kind(**{f.name: getattr(hf_config, f.name) for f in fields(kind)})
