"""The families that eigenzoo knows, by transformers' model_type."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Config
from .llama import Llama, LlamaConfig
from .model import Model
from .mpt import MPT, MPTConfig
from .opt import OPT, OPTConfig
from .qwen2 import Qwen2, Qwen2Config


class Family(NamedTuple):
    """Config and model of a family."""

    config: type[Config]
    model: Callable[..., Model]


FAMILIES = {
    "llama": Family(LlamaConfig, Llama),
    "opt": Family(OPTConfig, OPT),
    "mpt": Family(MPTConfig, MPT),
    "qwen2": Family(Qwen2Config, Qwen2),
}


def new_model(config: Config) -> Model:
    """An uninitialised model of the config's family."""
    return FAMILIES[config.family].model(config)


def model_of(config: Config, weights: Mapping[str, Tensor], whole: bool = True) -> Model:
    """A model of these weights, which it shares and does not copy, ready for inference.

    whole: False leaves on meta what has no weight.
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
