"""The supported families, by transformers' model_type, and how to make their models."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Config
from .experts import ExpertsLlama
from .gemma3 import Gemma3, Gemma3Config
from .llama import Llama, LlamaConfig
from .mistral import MistralConfig
from .mixtral import MixtralConfig
from .model import Model
from .mpt import MPT, MPTConfig
from .opt import OPT, OPTConfig
from .qwen2 import Qwen2Config
from .qwen3 import Qwen3, Qwen3Config
from .qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from .windows import WindowedLlama


class Family(NamedTuple):
    """The config class and the model class of a family."""

    config: type[Config]
    model: Callable[..., Model]


FAMILIES = {
    "llama": Family(LlamaConfig, Llama),
    "opt": Family(OPTConfig, OPT),
    "mpt": Family(MPTConfig, MPT),
    "qwen2": Family(Qwen2Config, WindowedLlama),
    "qwen3": Family(Qwen3Config, Qwen3),
    "qwen3_moe": Family(Qwen3MoeConfig, Qwen3Moe),
    "mistral": Family(MistralConfig, WindowedLlama),
    "mixtral": Family(MixtralConfig, ExpertsLlama),
    "gemma3_text": Family(Gemma3Config, Gemma3),
}


def new_model(config: Config) -> Model:
    """A model of the config's family, its weights uninitialized."""
    return FAMILIES[config.family].model(config)


def model_of(config: Config, weights: Mapping[str, Tensor], whole: bool = True) -> Model:
    """A model with these weights (shared, not copied), ready for inference.

    whole: False permits missing weights, which stay on meta.
    """
    with torch.device("meta"):
        model = new_model(config)
    if config.tie_word_embeddings:
        weights = {**weights, "head.weight": weights["embed.weight"]}
    model.load_state_dict(weights, strict=whole, assign=True)
    if config.tie_word_embeddings:
        model.head.weight = model.embed.weight
    model.reset_buffers()
    return model.eval().requires_grad_(False)
