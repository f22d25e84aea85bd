"""GGUF files of llama.cpp as checkpoints: what their metadata and tensors mean.

Names and layouts follow llama.cpp's `convert_hf_to_gguf.py`. Metadata that asks for something the
models do not compute raises an error that names it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from . import gguf_gemma3
from .gguf_file import GGUF
from .gguf_rope import FACTORS, decimal, rope_parameters

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")  # a Mistral is a llama there
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
}
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
READ = {
    *SIZES,
    *HEAD_SIZES,
    "attention.layer_norm_rms_epsilon",
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
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
REMARKS = {"rope.scaling.finetuned", "tensor_data_layout"}  # what they say changes nothing
# Splits of text before BPE that transformers knows, and those whose merges make GPT-2's split equal
SPLITS = {
    *("default", "gpt-2", "smollm", "refact", "starcoder"),
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "qwen35"),
    *("gpt-4o", "llama4", "kanana2"),
}


def gguf_config(path: Path, file: GGUF) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Raises ValueError for an architecture, metadata or a rotation that is not supported.
    """
    family, kind = (file.metadata.get(f"general.{x}") for x in ("architecture", "type"))
    if family not in FAMILIES or kind not in (None, "model"):
        raise ValueError(
            f"{path} holds a {kind or 'model'} of architecture {family!r}: expected a model of "
            f"{' or '.join(FAMILIES)}; load the checkpoint that it was made from instead"
        )
    values = {
        key.removeprefix(f"{family}."): _one(key, value)
        for key, value in file.metadata.items()
        if key.startswith(f"{family}.")
    }
    sizes = _sizes(path, family, values, file)
    _check_supported(path, family, values)
    _check_split(path, file.metadata)
    bias = {
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    rope = rope_parameters(path, values, file, sizes)
    own: dict[str, Any] = {"model_type": family, "hidden_act": "silu", "rope_parameters": rope}
    if family == "gemma3":
        own = gguf_gemma3.gemma3_fields(values, rope, sizes)
    return {
        **own,
        **sizes,
        **(bias if family != "qwen2" else {}),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
        **_ends(file.metadata),
    }


def gguf_tensors(file: GGUF, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in fp32, by their names in a Hugging Face checkpoint, each read when asked for.

    config: as `gguf_config` returns it. A tensor without a counterpart keeps its name.
    """
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    gemma = config["model_type"] == "gemma3_text"
    names = NAMES | (gguf_gemma3.NAMES if gemma else {})
    for name, stored in file.tensors.items():
        if name in FACTORS:
            continue  # in config
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = layer[2] if layer else stem
        tensor = stored.read()
        if config["model_type"] == "llama" and part in heads:
            tensor = _halves(tensor, heads[part])
        if gemma and part.endswith("norm"):
            tensor = tensor - 1
        start = f"model.layers.{layer[1]}." if layer else ""
        yield (f"{start}{names[part]}.{kind}" if part in names else name), tensor


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


def _sizes(path: Path, family: str, values: dict[str, Any], file: GGUF) -> dict[str, Any]:
    embed = file.tensors.get("token_embd.weight")
    found = {"vocab_size": embed.shape[0] if embed else None, **values}
    found.setdefault("attention.head_count_kv", found.get("attention.head_count"))
    missing = [
        key for key in (*SIZES, "attention.layer_norm_rms_epsilon") if found.get(key) is None
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(f'{family}.{key}' for key in missing)}")
    sizes = {name: found[key] for key, name in SIZES.items()}
    bad = [key for key in (*SIZES, *HEAD_SIZES) if key in found and not _positive(found[key])]
    if bad:
        raise ValueError(f"{family}.{bad[0]} is {found[bad[0]]!r}: expected a positive integer")
    width = values.get("attention.key_length") or values.get("rope.dimension_count")
    width = width or sizes["hidden_size"] // sizes["num_attention_heads"]
    for key in HEAD_SIZES:
        if values.get(key, width) != width:
            raise ValueError(
                f"{family}.{key} is {values[key]} and heads have {width} numbers: heads of "
                "different widths, or rotated in part, are not supported"
            )
    epsilon = values["attention.layer_norm_rms_epsilon"]
    return sizes | {"head_dim": width, "rms_norm_eps": decimal(epsilon)}


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _check_supported(path: Path, family: str, values: dict[str, Any]) -> None:
    neutral = HARMLESS | {"attention.scale": decimal(_width(values) ** -0.5)}
    read = READ | REMARKS | (gguf_gemma3.READ if family == "gemma3" else set())
    for key, value in values.items():
        seen_whole = key == "attention.sliding_window" and value >= values["context_length"]
        if key in read or seen_whole or not value or decimal(value) == neutral.get(key):
            continue
        raise ValueError(
            f"{path} has {family}.{key} = {value}, which is not supported: load the checkpoint "
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
