"""The families that eigenzoo knows, by transformers' model_type."""

from collections.abc import Callable
from typing import NamedTuple

from .llama import Llama, LlamaConfig
from .model import Config, Model
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
