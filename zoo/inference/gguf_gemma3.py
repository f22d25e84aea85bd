"""Gemma 3 in GGUF files: what they say in other words than files of other families.

Weights of norms are stored with the 1 that the model adds to them. The rotation in the metadata is
that of layers without a window. Of the factor on scores there is nothing: llama.cpp knows it by the
number of layers, as published.
"""

from typing import Any

from .gguf_rope import decimal

NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
LOCAL, CAP = "rope.freq_base_swa", "final_logit_softcapping"
READ = {WINDOW, PATTERN, LOCAL, CAP}
LAYERS_27B = 62  # of the only size whose factor on scores is not that of its heads


def gemma3_fields(
    values: dict[str, Any], rope: dict[str, Any], sizes: dict[str, Any]
) -> dict[str, Any]:
    """Fields of config.json that other families do not have, or have with other values.

    values: the metadata of the architecture, without its prefix. rope: of layers without a window.
    sizes: fields of the config. Raises ValueError for a pattern of layers that is not supported.
    """
    layers, window = sizes["num_hidden_layers"], values.get(WINDOW)
    period = values.get(PATTERN, 6) if window else 1
    if type(period) is not int or period < 1:
        raise ValueError(f"gemma3.{PATTERN} is {period!r}: expected a positive integer")
    local = {"rope_type": "default", "rope_theta": decimal(values.get(LOCAL, 10_000.0))}
    whole = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {
        "model_type": "gemma3_text",
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "query_pre_attn_scalar": whole if layers == LAYERS_27B else sizes["head_dim"],
        "final_logit_softcapping": decimal(values.get(CAP)) or None,
    }
