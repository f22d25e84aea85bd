"""GGUF files as llama.cpp's converter writes them, from models of transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import tiny
import torch


def write(
    path: Path,
    model,
    rope: dict | None = None,
    parts: int = 1,
    drop: tuple[str, ...] = (),
    more: dict[str, torch.Tensor] | None = None,
    pre: str = "gpt-2",
    **extra,
) -> Path:
    """Write model and the tiny tokenizer. Returns the path, of the first part.

    model: of Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE or Gemma 3. rope: `rope_parameters`
    to write, by default the model's. parts: files to split into. drop, more: tensors left out and
    added. pre: how the file says that text is split. extra: metadata of the architecture that is
    added, or left out where None; __ stands for a dot.
    """
    config, arch = model.config, model.config.model_type
    named = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
    arch = (named | {"gemma3_text": "gemma3"}).get(arch, arch)
    rope = rope or config.rope_parameters
    if arch == "gemma3":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        period = config.layer_types.index("full_attention") + 1
        extra |= {
            "attention__sliding_window": config.sliding_window,
            "attention__sliding_window_pattern": period if period != 6 else None,
            "rope__freq_base_swa": local["rope_theta"] if local["rope_theta"] != 10000 else None,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    writer = gguf.GGUFWriter(path, arch)
    tensors = dict(_tensors(model, arch)) | _scaling(writer, arch, rope, config) | (more or {})
    for name in drop:
        del tensors[name]
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
        "attention.key_length": getattr(config, "head_dim", None),
        "rope.dimension_count": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "expert_count": getattr(config, "num_local_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
    }
    return _write(writer, path, arch, values | _dotted(extra), tensors, parts, pre)


def write_mpt(path: Path, model: tiny.FoundryMPT, **extra) -> Path:
    """As `write`, with what llama.cpp keeps of an MPT."""
    raw, attn = model.raw(), model.attn
    values = {
        "context_length": raw["max_seq_len"],
        "embedding_length": raw["d_model"],
        "block_count": raw["n_layers"],
        "feed_forward_length": 4 * raw["d_model"],
        "attention.head_count": raw["n_heads"],
        "attention.head_count_kv": attn.get("kv_n_heads"),
        "attention.layer_norm_epsilon": 1e-5,
        "attention.clamp_kqv": attn.get("clip_qkv"),
        "attention.max_alibi_bias": float(attn.get("alibi_bias_max", 8) if attn["alibi"] else 0),
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, raw["n_layers"])
    tensors = {}
    for key, x in model.weights().items():
        stem, kind = key.rsplit(".", 1)
        tensors[f"{names.get_name(stem)}.{kind}"] = x
    writer = gguf.GGUFWriter(path, "mpt")
    return _write(writer, path, "mpt", values | _dotted(extra), tensors, pre="mpt")


def _dotted(extra: dict) -> dict:
    return {key.replace("__", "."): x for key, x in extra.items()}


def _write(writer, path: Path, arch: str, values: dict, tensors: dict, parts=1, pre="gpt-2"):
    for key, value in values.items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add[type(value)](f"{arch}.{key}", value)
    _tokenizer(writer, pre)
    if parts > 1:
        writer.split_max_tensors = -(-len(tensors) // parts)
    for name, x in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(x.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def _tensors(model, arch: str):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    tied = model.config.tie_word_embeddings
    for key, x in model.state_dict().items():
        stem, kind = key.rsplit(".", 1)
        if stem.endswith(".experts"):  # of all experts, without .weight
            halves = zip(("gate_proj", "up_proj"), x.chunk(2, 1), strict=True)
            for name, part in halves if kind == "gate_up_proj" else [(kind, x)]:
                yield f"{names.get_name(f'{stem}.{name}')}.weight", part
            continue
        part = stem.rsplit(".", 1)[-1]
        if arch == "llama" and part in heads:  # pairs that rotate become neighbors
            x = x.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).reshape(x.shape)
        if arch == "gemma3" and part.endswith("norm"):
            x = x + 1
        if not (tied and key == "lm_head.weight"):
            yield f"{names.get_name(stem)}.{kind}", x


def _scaling(writer, arch: str, rope: dict, config) -> dict[str, torch.Tensor]:
    """Write the metadata of a scaling, and return its tensors."""
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        if "attention_factor" in rope:
            writer.add_rope_scaling_attn_factors(rope["attention_factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name in ("beta_fast", "beta_slow", "attention_factor"):
        if kind == "yarn" and name in rope:
            own = name.replace("attention", "attn")
            writer.add_float32(f"{arch}.rope.scaling.yarn_{own}", rope[name])
    if kind == "longrope":
        return {
            f"rope_factors_{n}.weight": torch.tensor(rope[f"{n}_factor"]) for n in ("long", "short")
        }
    return {"rope_freqs.weight": llama3_factors(rope, config)} if kind == "llama3" else {}


def llama3_factors(rope: dict, config) -> torch.Tensor:
    """What the default frequencies are divided by."""
    width = config.head_dim
    wave = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, width, 2) / width)
    turns = rope["original_max_position_embeddings"] / wave
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _tokenizer(writer, pre: str) -> None:
    words = tiny.tokenizer()
    vocabulary = sorted(words.get_vocab().items(), key=lambda pair: pair[1])
    model = json.loads(words.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i < 2 else 1 for _, i in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
