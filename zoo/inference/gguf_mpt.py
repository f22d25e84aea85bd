"""MPT in GGUF files: names of tensors, and the config.

llama.cpp's converter keeps neither `logit_scale`, `softmax_scale` nor the kind of norm, and
llama.cpp computes with their defaults.
"""

from typing import Any

from .gguf_file import GGUF
from .gguf_rope import decimal

LAYERS = "transformer.blocks"
NAMES = {  # of tensors, in a file and in a Hugging Face checkpoint
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
    "attn_norm": "norm_1",
    "attn_qkv": "attn.Wqkv",
    "attn_q_norm": "attn.q_ln",
    "attn_k_norm": "attn.k_ln",
    "attn_output": "attn.out_proj",
    "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj",
    "ffn_down": "ffn.down_proj",
}
EPSILON = "attention.layer_norm_epsilon"
READ = {"attention.clamp_kqv", "attention.max_alibi_bias"}


def config(values: dict[str, Any], sizes: dict[str, Any], file: GGUF) -> dict[str, Any]:
    """The config.json of an MPT, without what all families have.

    values: the metadata of the architecture, without its prefix. sizes: fields of the config of
    other families.
    """
    alibi = decimal(values.get("attention.max_alibi_bias") or 0.0)
    return {
        "model_type": "mpt",
        "vocab_size": sizes["vocab_size"],
        "d_model": sizes["hidden_size"],
        "n_layers": sizes["num_hidden_layers"],
        "n_heads": sizes["num_attention_heads"],
        "max_seq_len": sizes["max_position_embeddings"],
        "layer_norm_epsilon": sizes["rms_norm_eps"],
        "no_bias": "blk.0.attn_qkv.bias" not in file.tensors,
        "learned_pos_emb": "position_embd.weight" in file.tensors,
        "attn_config": {
            "attn_type": "multihead_attention",
            "kv_n_heads": sizes["num_key_value_heads"],
            "clip_qkv": decimal(values.get("attention.clamp_kqv")) or None,
            "alibi": bool(alibi),
            "alibi_bias_max": alibi,
            "qk_ln": "blk.0.attn_q_norm.weight" in file.tensors,
        },
        "ffn_config": {"ffn_hidden_size": sizes["intermediate_size"]},
        "dtype": "float32",
    }
