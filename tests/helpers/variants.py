"""Every family in every published variant."""

import tiny
from ropes import rope_parameters

LOCAL = {"rope_type": "default", "rope_theta": 100.0}
VARIANTS = {
    "llama grouped": {},
    "llama multi-query": {"num_key_value_heads": 1},
    "llama multi-head": {"num_key_value_heads": 8},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama wide heads": {"head_dim": 24},
    "llama linear": {"rope_parameters": rope_parameters("linear"), "head_dim": 16},
    "llama dynamic": {
        **{"rope_parameters": rope_parameters("dynamic"), "head_dim": 16},
        "max_position_embeddings": 64,
    },
    "llama llama3": {"rope_parameters": rope_parameters("llama3"), "head_dim": 16},
    "llama yarn": {"rope_parameters": rope_parameters("yarn-mscale"), "head_dim": 16},
    "llama longrope": {"rope_parameters": rope_parameters("longrope"), "head_dim": 16},
    "opt 125m": {},
    "opt 350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "opt no biases": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "opt no final norm": {"_remove_final_layer_norm": True},
    "opt untied gelu": {"tie_word_embeddings": False, "activation_function": "gelu"},
    "opt silu": {"activation_function": "silu"},
    "mpt 7b": {},
    "mpt 30b clip": {"attn_config": {"clip_qkv": 0.4}},
    "mpt 6 heads": {"d_model": 48, "n_heads": 6},
    "mpt scale": {"attn_config": {"softmax_scale": 0.5}},
    "mpt untied": {"tie_word_embeddings": False},
    "qwen2 full": {"tie_word_embeddings": True},
    "qwen2 windows": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen3 windows": {
        **{"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        **{"attention_bias": True, "head_dim": 16},
    },
    "qwen3_moe": {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "qwen3_moe some layers": {
        **{"num_experts_per_tok": 2, "decoder_sparse_step": 2},
        **{"use_sliding_window": True, "sliding_window": 7},
    },
    "mixtral": {},
    "mixtral window": {"sliding_window": 7, "num_local_experts": 3},
    "gemma3_text 270m": {"num_key_value_heads": 1, "query_pre_attn_scalar": 16},
    "gemma3_text 1b": {
        "rope_parameters": {
            "full_attention": rope_parameters("default"),
            "sliding_attention": LOCAL,
        }
    },
    "gemma3_text 4b": {
        "rope_parameters": {
            "full_attention": rope_parameters("linear"),
            "sliding_attention": LOCAL,
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3_text capped": {
        **{"final_logit_softcapping": 2.0, "attention_bias": True, "tie_word_embeddings": False},
        **{"sliding_window_pattern": 2, "head_dim": 24, "sliding_window": 300},
    },
    "mistral window": {"sliding_window": 7},
    "mistral nemo": {"sliding_window": None, "head_dim": 16},
}
FOUNDRY = {
    "foundry 7b": ({}, {}),
    "foundry bias_max": ({"alibi_bias_max": 4}, {}),
    "foundry learned positions": ({"alibi": False}, {"learned_pos_emb": True}),
    "foundry biases": ({}, {"no_bias": False}),
    "foundry qk_ln": ({"qk_ln": True, "clip_qkv": 0.5}, {"no_bias": False}),
    "foundry grouped": ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "foundry multi-query": ({"attn_type": "multiquery_attention", "clip_qkv": 0.4}, {}),
    "foundry logit_scale": ({}, {"logit_scale": "inv_sqrt_d_model", "expansion_ratio": 2}),
    "foundry rmsnorm": ({}, {"norm_type": "low_precision_rmsnorm"}),
}


def save(variant: str, folder):
    """Write the variant's checkpoint to `folder`; return the reference model."""
    if variant in FOUNDRY:
        attn, other = FOUNDRY[variant]
        model = tiny.FoundryMPT(attn, **other)
        model.save(folder)
        return model
    return tiny.save(folder, variant.split()[0], **VARIANTS[variant])
