"""Write an MPT with merged heads as an ordinary grouped-query checkpoint.

Merged heads need no latents: the folded weights are those of an MPT with fewer kv heads, which
llm-foundry's config has a field for. Names and fused `Wqkv` are llm-foundry's as well.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from ..zoo.compression.methods import METHODS, methods_that
from ..zoo.compression.settings import Settings
from ..zoo.inference.checkpoint import Checkpoint
from ..zoo.models.config import Config
from ..zoo.models.model import Model
from ..zoo.models.mpt import NAMES, MPTConfig
from ..zoo.utils.records import CompressionRecord
from .export import naming, write_kept

FOUNDRY = {ours: theirs for theirs, ours in NAMES.items()}


def check_plain(config: Config, settings: Settings) -> None:
    """Raise ValueError unless an ordinary checkpoint can hold such a model, compressed so."""
    reason = None
    if not METHODS[settings.method].merged:
        others = methods_that(lambda m: m.merged)
        reason = (
            f"{settings.method} keeps latents, which no ordinary model has: use --method {others}"
        )
    elif settings.rounded:
        reason = "it has no bits of its own: leave kv bits out"
    elif config.rotary:
        reason = f"one basis of the keys does not fit all their rotations in {config.family}"
    elif not isinstance(config, MPTConfig):
        reason = f"the config of {config.family} has no field for fewer kv heads"
    elif any(config.nonlinear):
        reason = "clip_qkv or qk_ln changes keys before they are merged"
    if reason:
        raise ValueError(f"no plain checkpoint: {reason}; or leave --plain out")


def export_plain(
    folder: Path,
    low: Model,
    original: Checkpoint,
    compression: CompressionRecord,
    shard_size: str = "5GB",
) -> None:
    """Write a dense MPT with fewer kv heads into an empty folder: weights, config and tokenizer.

    Arguments as for `export.export`; `check_plain` must have passed.
    """
    save_torch_state_dict(_weights(low), folder, max_shard_size=shard_size)
    write_about_plain(folder, low, original, compression)


def write_about_plain(
    folder: Path, low: Model, original: Checkpoint, compression: CompressionRecord
) -> None:
    """Write all but the weights. Arguments and errors as in `export.write_about`."""
    with naming("config.json"):
        config = _config(low, original.config) | {"compression": compression}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_kept(folder, original)


def _config(low: Model, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json, with every field that has other defaults in transformers than in llm-foundry."""
    c, dtype = low.config, str(low.dtype).removeprefix("torch.")
    assert isinstance(c, MPTConfig)
    whole, rest = divmod(c.ffn_hidden_size, c.hidden_size)
    attn = {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": c.num_key_value_heads // c.k_heads_per_latent,
        "alibi": c.alibi,
        "alibi_bias_max": c.alibi_bias_max,
        "softmax_scale": c.softmax_scale,
        "clip_qkv": None,
        "qk_ln": False,
    }
    fields = {
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "n_heads": c.num_attention_heads,
        "n_layers": c.num_hidden_layers,
        "max_seq_len": c.max_position_embeddings,
        "expansion_ratio": c.ffn_hidden_size / c.hidden_size if rest else whole,
        "no_bias": not c.bias,
        "learned_pos_emb": c.learned_pos_emb,
        "norm_type": c.norm_type,
        "norm_eps": c.norm_eps,
        "logit_scale": None if c.logit_scale == 1 else c.logit_scale,
        "tie_word_embeddings": c.tie_word_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    kept = {key: value for key, value in raw.items() if key != "auto_map"}  # names absent files
    return kept | fields | {"attn_config": (raw.get("attn_config") or {}) | attn}


def _weights(low: Model) -> dict[str, Tensor]:
    """The weights by llm-foundry's names."""
    weights = {}
    for key, x in low.state_dict().items():
        parts = key.split(".")
        tied = parts[0] == "head" and low.config.tie_word_embeddings
        # folding a model without biases leaves an output bias of zeros
        empty = parts[-2:] == ["o_proj", "bias"] and not low.config.query_bias
        if not (tied or empty or parts[-2] in ("q_proj", "k_proj", "v_proj")):
            name = ".".join(FOUNDRY.get(part, part) for part in parts)
            weights[name if parts[0] == "head" else f"transformer.{name}"] = x.contiguous()
    for i, layer in enumerate(low.layers):
        three = [getattr(layer.attn, f"{name}_proj") for name in "qkv"]
        place = f"transformer.blocks.{i}.attn.Wqkv"
        weights[f"{place}.weight"] = torch.cat([p.weight for p in three])
        if low.config.query_bias:
            weights[f"{place}.bias"] = torch.cat([_bias(p) for p in three])
    return weights


def _bias(linear: nn.Linear) -> Tensor:
    """The bias, zeros if folding has moved it."""
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
