"""The transformers config of a compressed model. Travels with the checkpoint."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class EigenConfig(PreTrainedConfig):
    """The fields that all families have. Further fields of the native config are kept as they are.

    family: the architecture, by transformers' model_type. k_ranks, v_ranks: the rank of latents,
    one per layer. k_bits, v_bits: bits per cached number, one per layer; 16 means the model's
    dtype, and empty means 16 in all layers. k_segments, v_segments: instead, segments of falling
    bits, as "16x8+96x4", one text per layer. centered: latents with segments are cached without
    their mean. k_heads_per_latent, v_heads_per_latent: kv heads that
    share a latent. joint_kv: one latent holds keys and values. compression: the record of the
    compression, with method, budget, calibration, seed, versions and errors by layer. code:
    SHA-256 of the checkpoint's Python files. ops: which ops decode if eigenzoo is installed, its
    fused ops or the reference in the checkpoint's files; without eigenzoo, always the reference.
    """

    model_type = "eigen"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    family: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    query_bias: bool = False
    key_bias: bool = False
    value_bias: bool = False
    output_bias: bool = False
    k_ranks: list[int] | tuple[int, ...] = ()
    v_ranks: list[int] | tuple[int, ...] = ()
    k_bits: list[int] | tuple[int, ...] = ()
    v_bits: list[int] | tuple[int, ...] = ()
    k_segments: list[str] | tuple[str, ...] = ()
    v_segments: list[str] | tuple[str, ...] = ()
    k_heads_per_latent: int = 1
    v_heads_per_latent: int = 1
    joint_kv: bool = False
    centered: bool = False
    use_cache: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    compression: dict[str, Any] | None = None
    format_version: int = 0
    code: dict[str, str] | None = None
    ops: Literal["fused", "reference"] = "fused"
