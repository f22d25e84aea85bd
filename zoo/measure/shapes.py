"""Models of random weights in published shapes: they decode as fast as trained ones."""

from collections.abc import Callable
from functools import partial
from math import lcm
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from ..compression.allocate import Ranks
from ..compression.fold import low_config
from ..compression.settings import Settings
from ..models.config import Config
from ..models.families import new_model
from ..models.model import Model
from ..models.packing import Latent


def _opt(width: int, layers: int, heads: int) -> PreTrainedConfig:
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _mpt(width: int, layers: int, heads: int, positions: int = 2048) -> PreTrainedConfig:
    return MptConfig(
        vocab_size=50432, d_model=width, n_layers=layers, n_heads=heads, max_seq_len=positions
    )


def _llama(
    *sizes: int,
    positions: int,
    tied: bool = False,
    kind: Callable[..., PreTrainedConfig] = LlamaConfig,
    **more: Any,
) -> PreTrainedConfig:
    """sizes: width, layers, heads, kv heads, hidden size of MLPs, vocabulary."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return kind(
        **dict(zip((*names, "intermediate_size", "vocab_size"), sizes, strict=True)),
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        **more,
    )


_mistral = partial(_llama, kind=MistralConfig, sliding_window=None, positions=32768)
_qwen3 = partial(_llama, kind=Qwen3Config, head_dim=128, positions=40960)
_gemma3 = partial(_llama, kind=Gemma3TextConfig, tied=True, head_dim=256)
_gemma3_short = partial(_gemma3, positions=32768, sliding_window=512)
_gemma3_long = partial(
    _gemma3,
    positions=131072,
    sliding_window=1024,
    rope_scaling={"rope_type": "linear", "factor": 8.0},
)
_gemma3_27b = partial(_gemma3_long, head_dim=128, query_pre_attn_scalar=168)

# From config.json of the models on the Hub, of the OPTs also from the sizes in metaseq's
# `launcher/opt_job_constants.py`. Their parameters add up to the published numbers (see tests).
# Mistral is v0.3, which has no sliding window and a vocabulary of 32768. Gemma 3 are
# the text models.
SHAPES = {
    "opt-125m": partial(_opt, 768, 12, 12),
    "opt-1.3b": partial(_opt, 2048, 24, 32),
    "opt-6.7b": partial(_opt, 4096, 32, 32),
    "opt-66b": partial(_opt, 9216, 64, 72),
    "mpt-1b": partial(_mpt, 2048, 24, 16),
    "mpt-7b": partial(_mpt, 4096, 32, 32),
    "mpt-30b": partial(_mpt, 7168, 48, 64, 8192),
    "smollm2-135m": partial(_llama, 576, 30, 9, 3, 1536, 49152, positions=8192, tied=True),
    "llama-3.2-1b": partial(_llama, 2048, 16, 32, 8, 8192, 128256, positions=131072, tied=True),
    "llama-2-7b": partial(_llama, 4096, 32, 32, 32, 11008, 32000, positions=4096),
    "llama-3.1-8b": partial(_llama, 4096, 32, 32, 8, 14336, 128256, positions=131072),
    "llama-3.1-70b": partial(_llama, 8192, 80, 64, 8, 28672, 128256, positions=131072),
    "qwen3-8b": partial(_qwen3, 4096, 36, 32, 8, 12288, 151936),
    "qwen3-32b": partial(_qwen3, 5120, 64, 64, 8, 25600, 151936),
    "gemma-3-270m": partial(_gemma3_short, 640, 18, 4, 1, 2048, 262144),
    "gemma-3-1b": partial(_gemma3_short, 1152, 26, 4, 1, 6912, 262144),
    "gemma-3-4b": partial(_gemma3_long, 2560, 34, 8, 4, 10240, 262208),
    "gemma-3-12b": partial(_gemma3_long, 3840, 48, 16, 8, 15360, 262208),
    "gemma-3-27b": partial(_gemma3_27b, 5376, 62, 32, 16, 21504, 262208),
    "mistral-7b": partial(_mistral, 4096, 32, 32, 8, 14336, 32768),
}


def shaped(name: str, layers: int | None = None, context: int = 0) -> PreTrainedConfig:
    """transformers' config of a published model with `layers` layers that reads `context` tokens.

    Raises ValueError for a name that is not in `SHAPES`.
    """
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown: expected one of {', '.join(SHAPES)}")
    config = SHAPES[name]()
    if layers is not None and not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}: expected 1 to {config.num_hidden_layers}")
    config.num_hidden_layers = layers or config.num_hidden_layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[: config.num_hidden_layers]
    longest = "max_seq_len" if isinstance(config, MptConfig) else "max_position_embeddings"
    setattr(config, longest, max(context, getattr(config, longest)))
    return config


def uniform(config: Config, settings: Settings) -> Config:
    """The config of the same model with one rank in all layers, keeping at most `settings.keep`.

    settings: fitted to the config; only the shape of the latents matters. Raises ValueError if
    keys stay full and so little cannot be kept.
    """
    shared, keep = settings.heads_per_latent or (1, 1), settings.keep
    shares, step = (keep, keep), settings.rank_multiple
    if settings.keys == "full":
        shares = 1.0, 2 * keep - 1
        if keep <= 0.5:
            raise ValueError(f"keep is {keep}: keys that stay full are half of it, expected more")
    if settings.keys == "pairs":
        step = lcm(step, 2)
    low = partial(low_config, config, heads_per_latent=shared, joint=settings.latent == "joint-kv")
    full = low(Ranks((), ())).full_ranks
    ranks = [int(share * n) // step * step for share, n in zip(shares, full, strict=True)]
    room = sum(ranks) + step <= keep * sum(full)  # for one more step, which keys need more
    if room and settings.latent == "separate" and settings.keys != "full":
        ranks[0] += step
    k, v = ((rank,) * config.num_hidden_layers for rank in ranks)
    return low(Ranks(k, v), **settings.rotary(config))


def segmented(config: Config, settings: Settings, segments: str) -> Config:
    """The config of the same model with latents in segments, "keys/values", equal in all layers.

    settings: as in `uniform`, but for `keep`. Raises ValueError for segments that do not fit.
    """
    texts = segments.split("/")
    if len(texts) != 2 or not all(texts):
        raise ValueError(
            f"segments {segments!r}: expected those of keys and of values, as 64x4/32x8"
        )
    k, v = texts
    many = config.num_hidden_layers
    k_ranks, v_ranks = ((Latent.of_layout(f"1:{text}").width,) * many for text in texts)
    kept = Ranks(k_ranks, v_ranks, k_segments=(k,) * many, v_segments=(v,) * many)
    return low_config(config, kept, settings.heads_per_latent or (1, 1), **settings.rotary(config))


def random_model(config: Config, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Model:
    """A model of random weights, which decodes as fast as a trained one."""
    with torch.device("meta"):
        model = new_model(config).to(dtype)
    model.to_empty(device=device)
    random = torch.Generator(device).manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02, generator=random)
    for b in model.buffers():
        b.zero_()  # any frequencies will do
    if config.tie_word_embeddings:
        model.head.weight = model.embed.weight
    model.reset_buffers()
    return model.eval().requires_grad_(False)
