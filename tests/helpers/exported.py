"""Small random models of transformers' class for compressed models, of every way to hold keys."""

from dataclasses import asdict, replace

import tiny
import torch
from ropes import rope_parameters

from eigenzoo.hub_export.remote.configuration_eigen import EigenConfig
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo.inference.checkpoint import native_config
from eigenzoo.zoo.inference.weights import build
from eigenzoo.zoo.models.families import FAMILIES
from eigenzoo.zoo.models.model import Model

LOW = {"k_ranks": (6,) * 3, "v_ranks": (5, 8, 3)}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
KINDS = {  # family, changes of the dense config, changes of the compressed one
    "full keys": ("llama", {}, {}),
    "rebuilt keys": ("llama", {}, LOW | {"key_mean": True}),
    "anchored keys": ("llama", {}, LOW | {"anchor": 4, "k_heads_per_latent": 2}),
    "pairs": ("llama", {}, LOW | {"pairs": True}),
    "eight bits": ("llama", {}, LOW | {"k_bits": (8, 16, 8), "v_bits": (8,) * 3}),
    "longrope": ("llama", {"rope_parameters": rope_parameters("longrope"), "head_dim": 16}, LOW),
    "windows": ("qwen2", WINDOWS, LOW),
    "learned positions": ("opt", {}, LOW),
    "ALiBi": ("mpt", {}, LOW),
}
NORMED = {"attention_bias": True} | WINDOWS
SERVED = {  # which transformers' class treats as one above
    "dynamic": (
        "llama",
        {"rope_parameters": rope_parameters("dynamic"), "max_position_embeddings": 64},
        LOW,
    ),
    "experts": ("qwen3_moe", {"num_experts_per_tok": 3}, LOW | {"anchor": 4}),
    "one window": ("mistral", {"sliding_window": 5}, LOW),
    "normed, rebuilt keys": ("qwen3", NORMED, LOW | {"key_mean": True}),
    "normed, anchored keys": ("qwen3", {}, LOW | {"anchor": 4, "k_heads_per_latent": 2}),
    "two rotations, rebuilt keys": ("gemma3_text", {"head_dim": 8}, LOW | {"key_mean": True}),
    "two rotations, anchored keys": (
        *("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        LOW | {"anchor": 4, "k_heads_per_latent": 2},
    ),
}


def of_kind(kind: str, **changes) -> EigenForCausalLM:
    """A random model that holds its keys in one of the ways of `KINDS` and `SERVED`."""
    family, dense, low = (KINDS | SERVED)[kind]
    config = replace(tiny.native(family, **dense).config, **low | changes)
    model = FAMILIES[family].model(config)
    tiny.stir(model)
    for layer in model.layers:
        if getattr(layer.attn, "k_pairs", None) is not None:
            layer.attn.k_pairs.copy_(torch.arange(layer.attn.k_pairs.numel()).view(-1, 3) % 4)
    return exported(model)


def exported(native: Model, kind: type = EigenForCausalLM, **options):
    """The weights of a native model in transformers' class."""
    config = EigenConfig(family=native.config.family, **asdict(native.config), **options)
    model = kind(config)
    model.model.load_state_dict(native.state_dict())
    return model.eval().requires_grad_(False)


def dense_and_exported(family: str, **changes):
    """transformers' model and the exported one with the same weights."""
    theirs = tiny.hf(family, **changes)
    native = build(native_config(theirs.config.to_dict()), theirs.state_dict().items())
    return theirs, exported(native)
