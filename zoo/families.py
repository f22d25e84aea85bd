"""The families that eigenzoo knows, by transformers' model_type."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .llama import Llama, LlamaConfig
from .llama import weights as llama_weights
from .model import Config, Model


class Family(NamedTuple):
    """Config and model of a family, and how tensors of its Hugging Face checkpoints map to it."""

    config: type[Config]
    model: Callable[..., Model]
    weights: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


FAMILIES = {
    "llama": Family(LlamaConfig, Llama, llama_weights),
}


def new_model(config: Config) -> Model:
    """An uninitialised model of the config's family."""
    return FAMILIES[config.family].model(config)
