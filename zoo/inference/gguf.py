"""GGUF files of llama.cpp as checkpoints: what their metadata and tensors mean.

Names and layouts follow llama.cpp's `convert_hf_to_gguf.py`. Metadata that asks for something the
models do not compute raises an error that names it.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gguf_gemma3 as gemma3
from . import gguf_mpt as mpt
from .gguf_file import GGUF, Stored
from .gguf_rope import FACTORS, decimal, rope_parameters
from .tensor_files import Lazy

FAMILIES = {  # by architecture; a Mistral is a llama there, and so is a Mixtral, with experts
    "gemma3": "gemma3_text",
    "llama": "llama",
    "mpt": "mpt",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
NAMES = {  # of tensors, in a file and in a Hugging Face checkpoint
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {f"ffn_{x}_exps": f"mlp.experts.{x}_proj" for x in ("gate", "up", "down")}  # of all
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
MIXTURES = {  # sizes of families with experts
    "mixtral": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "qwen3_moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
}
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
EPSILON = "attention.layer_norm_rms_epsilon"
READ = {
    *SIZES,
    *HEAD_SIZES,
    EPSILON,
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
HARMLESS = {  # values that change nothing, beside 0 and false
    "attention.causal": True,
    "expert_count": 1,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
REMARKS = {"rope.scaling.finetuned", "tensor_data_layout"}  # what they say changes nothing
# Splits of text before BPE that transformers knows, and those whose merges make GPT-2's split equal
SPLITS = {
    *("default", "gpt-2", "mpt", "smollm", "refact", "starcoder"),
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "qwen35"),
    *("gpt-4o", "llama4", "kanana2"),
}


def gguf_config(path: Path, file: GGUF) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Raises ValueError for an architecture, metadata or a rotation that is not supported.
    """
    arch, kind = (file.metadata.get(f"general.{x}") for x in ("architecture", "type"))
    if arch not in FAMILIES or kind not in (None, "model"):
        raise ValueError(
            f"{path} holds a {kind or 'model'} of architecture {arch!r}: expected a model of "
            f"{' or '.join(FAMILIES)}; load the checkpoint that it was made from instead"
        )
    values = {
        key.removeprefix(f"{arch}."): _one(key, value)
        for key, value in file.metadata.items()
        if key.startswith(f"{arch}.")
    }
    experts = values.get("expert_count") not in (None, 0, 1)
    family = "mixtral" if experts and arch == "llama" else FAMILIES[arch]
    own = MIXTURES.get(family, {})
    epsilon, read = (mpt.EPSILON, mpt.READ) if family == "mpt" else (EPSILON, READ)
    read = read | (gemma3.READ if arch == "gemma3" else set())
    sizes = _sizes(path, arch, values, file, SIZES | own, epsilon)
    _check_supported(path, arch, values, {*SIZES, epsilon, *read, *own})
    _check_split(path, file.metadata)
    tied, ends = "output.weight" not in file.tensors, _ends(file.metadata)
    if family == "mpt":
        return mpt.config(values, sizes, file) | {"tie_word_embeddings": tied} | ends
    bias = {
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    rope = rope_parameters(path, values, file, sizes)
    more: dict[str, Any] = {"model_type": family, "hidden_act": "silu", "rope_parameters": rope}
    if family == "gemma3_text":
        more = gemma3.gemma3_fields(values, rope, sizes)
    return {
        **more,
        **sizes,
        **(bias if family != "qwen2" else {}),
        **({"norm_topk_prob": True} if family == "qwen3_moe" else {}),  # not in files
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **ends,
    }


def gguf_tensors(
    file: GGUF, config: dict[str, Any], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Lazy]]:
    """The tensors by their names in a Hugging Face checkpoint.

    config: as `gguf_config` returns it. dtype: that to cast to later. A tensor without a
    counterpart keeps its name.
    """
    # bf16 now, as it halves the memory; of fp16 it could not be told later that numbers exceed it
    read_as = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    family = config["model_type"]
    layers, names = ("model.layers", NAMES) if family != "mpt" else (mpt.LAYERS, mpt.NAMES)
    gemma = family == "gemma3_text"
    names = names | (gemma3.NAMES if gemma else {})
    heads = {}
    if family in ("llama", "mixtral"):
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
    for name, stored in file.tensors.items():
        if name in FACTORS:
            continue  # in config
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = layer[2] if layer else stem
        start = f"{layers}.{layer[1]}." if layer else ""
        if part in names:
            name = f"{start}{names[part]}.{kind}"
        elif part in EXPERTS:
            name = start + EXPERTS[part]
        meta = torch.empty(stored.shape, dtype=read_as, device="meta")
        added = 1 if gemma and part.endswith("norm") else 0
        yield name, Lazy(meta, partial(_read, stored, read_as, heads.get(part), added))


def _read(stored: Stored, dtype: torch.dtype, heads: int | None, added: int) -> Tensor:
    """A tensor as the model has it. added: what the file has added to all numbers."""
    if added:
        return (stored.read(torch.float32) - added).to(dtype)
    x = stored.read(dtype)
    return x if heads is None else _halves(x, heads)


def _halves(x: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose rotated pairs are neighbors, to pairs in two halves of a head."""
    if len(x) % (2 * heads):
        return x  # of a wrong shape, which is an error of its own
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(x.shape)


def _one(key: str, value: Any) -> Any:
    """The value that a list with one number per layer repeats. Raises ValueError if it differs."""
    if isinstance(value, list) and value:
        if any(x != value[0] for x in value):
            raise ValueError(f"{key} differs from layer to layer, {value}: not supported")
        return value[0]
    return value


def _sizes(
    path: Path,
    arch: str,
    values: dict[str, Any],
    file: GGUF,
    wanted: dict[str, str],
    epsilon: str,
) -> dict[str, Any]:
    """The sizes in a config. wanted: their names in the metadata and in the config."""
    embed = file.tensors.get("token_embd.weight")
    found = {"vocab_size": embed.shape[0] if embed else None, **values}
    found.setdefault("attention.head_count_kv", found.get("attention.head_count"))
    missing = [key for key in (*wanted, epsilon) if found.get(key) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(f'{arch}.{key}' for key in missing)}")
    sizes = {name: found[key] for key, name in wanted.items()}
    bad = [key for key in (*wanted, *HEAD_SIZES) if key in found and not _positive(found[key])]
    if bad:
        raise ValueError(f"{arch}.{bad[0]} is {found[bad[0]]!r}: expected a positive integer")
    width = values.get("attention.key_length") or values.get("rope.dimension_count")
    width = width or sizes["hidden_size"] // sizes["num_attention_heads"]
    for key in HEAD_SIZES:
        if values.get(key, width) != width:
            raise ValueError(
                f"{arch}.{key} is {values[key]} and heads have {width} numbers: heads of "
                "different widths, or rotated in part, are not supported"
            )
    return sizes | {"head_dim": width, "rms_norm_eps": decimal(values[epsilon])}


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _check_supported(path: Path, arch: str, values: dict[str, Any], read: set[str]) -> None:
    neutral = HARMLESS | {"attention.scale": decimal(_width(values) ** -0.5)}
    for key, value in values.items():
        seen_whole = key == "attention.sliding_window" and value >= values["context_length"]
        if key in read | REMARKS or seen_whole or not value or decimal(value) == neutral.get(key):
            continue
        raise ValueError(
            f"{path} has {arch}.{key} = {value}, which is not supported: load the checkpoint "
            "that it was made from instead"
        )


def _width(values: dict[str, Any]) -> int:
    own = next((values[key] for key in HEAD_SIZES if key in values), None)
    return own or values["embedding_length"] // values["attention.head_count"]


def _check_split(path: Path, metadata: dict[str, Any]) -> None:
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in SPLITS | {None}:
        raise ValueError(
            f"{path} has tokenizer.ggml.pre = {split!r}, which would be tokenized wrongly: load "
            "the checkpoint that it was made from instead"
        )


def _ends(metadata: dict[str, Any]) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad a text; ends include those of a turn."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ends = [
        ids["eos"],
        *(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")),
    ]
    ends = sorted({e for e in ends if e is not None})
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
