"""MPT with a low-rank KV cache. ALiBi rotates no keys, so attention runs in the low-rank space.

Differences from llm-foundry's `modeling_mpt.py` and from transformers' version of it:
- The fused `Wqkv` of a checkpoint is split when it is read.
- `clip_qkv` and `qk_ln` are nonlinear and follow the projection. With them, the encoder is a
  separate matrix after them (`k_down`, `v_down`); otherwise it is folded into the projection.
- ALiBi adds a term to the scores that depends on the distance only, so it is part of the mask.
- Queries read the latents directly, and compressed keys have no bias: see `opt.py`.
- Both config layouts are read. transformers ignores `alibi_bias_max`, `alibi: false`, `no_bias`,
  `qk_ln`, `kv_n_heads`, `expansion_ratio`, `logit_scale` and `norm_type`; this file implements
  them as llm-foundry does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import absorb
from .cache import Buffer, LayerCache
from .config import Config
from .linear import Projector
from .mask import CausalMask, DecodeMask, Mask, alibi_slopes
from .model import LatentAttention, Model, parameter

NAMES = {
    "wte": "embed",
    "wpe": "positions",
    "blocks": "layers",
    "norm_1": "attn_norm",
    "norm_2": "mlp_norm",
    "norm_f": "norm",
    "ffn": "mlp",
    "out_proj": "o_proj",
    "q_ln": "q_bound.norm",
    "k_ln": "k_bound.norm",
    "lm_head": "head",
}
# of norms (`qk_ln`) that were parts of projections in older compressed checkpoints: patterns
OLD_NAMES = {rf"\.{x}_proj\.norm\.": f".{x}_bound.norm." for x in "qk"}
MULTI_HEAD = "multihead_attention"
KV_HEADS = {MULTI_HEAD: None, "multiquery_attention": 1}  # None: as many as query heads
NORMS = {
    "layernorm": nn.LayerNorm,
    "low_precision_layernorm": nn.LayerNorm,
    "rmsnorm": nn.RMSNorm,
    "low_precision_rmsnorm": nn.RMSNorm,
}


@dataclass(frozen=True, kw_only=True)
class MPTConfig(Config):
    """Sizes of an MPT and what its cache keeps."""

    family: ClassVar[str] = "mpt"
    foreign: ClassVar[bool] = True

    ffn_hidden_size: int
    bias: bool = False  # of MLPs and norms
    norm_type: str = "low_precision_layernorm"
    norm_eps: float = 1e-5
    alibi: bool = True
    alibi_bias_max: float = 8.0
    learned_pos_emb: bool = False
    softmax_scale: float | None = None
    clip_qkv: float | None = None
    qk_ln: bool = False
    logit_scale: float = 1.0

    @property
    def nonlinear(self) -> tuple[bool, bool]:
        """Whether keys, and values, are nonlinear: clips apply to both, norms to keys only."""
        return self.clip_qkv is not None or self.qk_ln, self.clip_qkv is not None

    @property
    def learned_positions(self) -> int:
        """The number of learned position embeddings; 0 if there are none."""
        return self.max_position_embeddings if self.learned_pos_emb else 0

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' or llm-foundry's config. Raises ValueError naming a bad field."""
        attn, ffn = raw.get("attn_config") or {}, raw.get("ffn_config") or {}
        width, heads, bias = raw["d_model"], raw["n_heads"], not raw["no_bias"]
        _check_supported(raw, attn, ffn)
        kv_heads = attn.get("kv_n_heads") or KV_HEADS[attn.get("attn_type", MULTI_HEAD)] or heads
        alibi, scale = attn.get("alibi", True), raw.get("logit_scale")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=width,
            num_hidden_layers=raw["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width // heads,
            max_position_embeddings=raw["max_seq_len"],
            tie_word_embeddings=raw["tie_word_embeddings"],
            query_bias=bias,
            key_bias=bias,
            value_bias=bias,
            output_bias=bias,
            ffn_hidden_size=ffn.get("ffn_hidden_size") or int(raw["expansion_ratio"] * width),
            bias=bias,
            norm_type=raw["norm_type"].lower(),
            norm_eps=raw.get("norm_eps") or raw["layer_norm_epsilon"],
            alibi=alibi,
            alibi_bias_max=attn.get("alibi_bias_max", 8),
            learned_pos_emb=not alibi and raw["learned_pos_emb"],  # as llm-foundry does
            softmax_scale=attn.get("softmax_scale"),
            clip_qkv=attn.get("clip_qkv") or None,
            qk_ln=attn.get("qk_ln", False),
            logit_scale=width**-0.5 if scale == "inv_sqrt_d_model" else scale or 1.0,
        )

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield native (name, tensor) pairs for one tensor of a checkpoint; three for `Wqkv`."""
        parts = key.removeprefix("model.").removeprefix("transformer.").split(".")
        name = ".".join(NAMES.get(part, part) for part in parts)
        if "Wqkv" not in parts:
            yield name, tensor
            return
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        if len(tensor) != q + 2 * kv:
            raise ValueError(f"weight {key} has {len(tensor)} rows: expected {q + 2 * kv}")
        for part, x in zip("qkv", tensor.split([q, kv, kv]), strict=True):
            yield name.replace("Wqkv", f"{part}_proj"), x.clone()


def _check_supported(raw: dict, attn: dict, ffn: dict) -> None:
    """Raise ValueError naming a field that asks for an unsupported feature."""
    known_type = attn.get("kv_n_heads") or attn.get("attn_type", MULTI_HEAD) in KV_HEADS
    ffn_type = ffn.get("ffn_type", "mptmlp")
    window, activation = attn.get("sliding_window_size"), ffn.get("ffn_act_fn")
    unsupported = {  # None: supported
        "attn_config.attn_type": None if known_type else str(attn["attn_type"]),
        "attn_config.prefix_lm": attn.get("prefix_lm") or None,
        "attn_config.qk_gn": attn.get("qk_gn") or None,
        "attn_config.rope": attn.get("rope") or None,
        "attn_config.sliding_window_size": None if window == -1 else window,
        "attn_config.attn_logit_softcapping": attn.get("attn_logit_softcapping") or None,
        "attn_config.fused_qkv": "false" if attn.get("fused_qkv") is False else None,
        "ffn_config.ffn_type": None if ffn_type == "mptmlp" else str(ffn_type),
        "ffn_config.ffn_act_fn": None if activation == {"name": "gelu"} else activation,
        "block_overrides": raw.get("block_overrides") or None,
        "final_logit_softcapping": raw.get("final_logit_softcapping") or None,
        "use_norm_in_ffn": raw.get("use_norm_in_ffn") or None,
        "norm_type": None if raw["norm_type"].lower() in NORMS else raw["norm_type"],
    }
    for name, value in unsupported.items():
        if value is not None:
            raise ValueError(f"config.json sets {name} to {value!r}, which is not supported")
    if raw["d_model"] % raw["n_heads"]:
        raise ValueError(
            f"d_model is {raw['d_model']}: expected a multiple of n_heads, {raw['n_heads']}"
        )


class Bound(nn.Module):
    """A clip and then a norm of queries, keys or values, if the config asks for them."""

    def __init__(self, config: MPTConfig, outputs: int, norm: bool):
        super().__init__()
        self.clip = config.clip_qkv
        self.norm = _norm(config, outputs) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, outputs) -> the same shape."""
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        return x if self.norm is None else self.norm(x)


class Attention(LatentAttention):
    """Attention of one layer over latents, which queries read without decoding them."""

    def __init__(self, config: MPTConfig, layer: int):
        super().__init__()
        d, heads, width = config.head_dim, config.num_attention_heads, config.hidden_size
        kv_width = config.num_key_value_heads * d
        self.layer, self.heads, self.head_dim = layer, heads, d
        self.scale = d**-0.5 if config.softmax_scale is None else config.softmax_scale
        self.k, self.v = k, v = config.latents(layer)
        read = v if v.width else k  # joint latents are in k, and serve as values too
        k_up, v_up = config.lifted(layer)
        k_down, v_down = (
            low and nonlinear
            for low, nonlinear in zip(config.compressed(layer), config.nonlinear, strict=True)
        )
        k_n, v_n = config.k_heads_per_latent * d, config.v_heads_per_latent * d
        k_width = kv_width if k_down else k.heads * k.width
        v_width = kv_width if v_down else v.heads * v.width

        q_width = heads * (d if k_up else k.width)
        self.q_proj = nn.Linear(width, q_width, config.query_bias)
        self.k_proj = nn.Linear(width, k_width, config.key_bias)
        self.v_proj = nn.Linear(width, v_width, config.value_bias) if v.width else None
        self.q_bound = Bound(config, q_width, config.qk_ln)
        self.k_bound = Bound(config, k_width, config.qk_ln)
        self.v_bound = Bound(config, v_width, False)
        self.o_proj = nn.Linear(heads * (d if v_up else read.width), width, config.output_bias)
        self.k_up = parameter(k.heads, k.width, k_n) if k_up else None
        self.v_up = parameter(read.heads, read.width, v_n) if v_up else None
        self.k_down = parameter(k.heads, k_n, k.width) if k_down else None
        self.v_down = parameter(v.heads, v_n, v.width) if v_down else None
        self.add_shifts(config)

    def source(self, name: str) -> nn.Module:
        """As in `LatentAttention`: after clips and norms."""
        return getattr(self, f"{name}_bound")

    def split(self, part: int, parts: int, repeat: bool = False) -> None:
        """As in `LatentAttention`. Raises ValueError also for `qk_ln`, a norm over all heads."""
        if self.q_bound.norm is not None:
            raise ValueError(
                "qk_ln norms queries and keys over all heads, but each of several processes holds "
                "only some: load this model in one process"
            )
        super().split(part, parts, repeat)

    def forward(self, x: Tensor, pos: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """x: (B, T, width), pos: (T,) slots -> (B, T, width)."""
        q = self.q_bound(self.linear(self.q_proj, x))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D or R)
        k = self.k_bound(self.linear(self.k_proj, x))
        k = _encode(k, self.k.heads, self.k_down)  # (B, L, T, R)
        v = k[..., :0]
        if self.v_proj is not None:
            v = self.v_bound(self.linear(self.v_proj, x))
            v = _encode(v, self.v.heads, self.v_down)
        if self.k_up is not None:
            q = absorb(q, self.k_up, self.head_dim)
        y = self.recall(q, k, v, pos, mask, cache)
        y = y.transpose(1, 2).flatten(2).contiguous()  # DTensor takes no other
        return self.linear(self.o_proj, y)

    def read(self, q: Tensor, k: Buffer, v: Buffer, attn_metadata: Mask) -> Tensor:
        """As in `LatentAttention`, of queries (B, H, T, R)."""
        y = self.attend(q, k, v if self.v.width else k, attn_metadata)
        return self.lift_output(y)


def _encode(x: Tensor, heads: int, down: Tensor | None) -> Tensor:
    """From a projection's output (B, T, heads * n) to latents (B, heads, T, R)."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if down is None else x @ down


class MLP(Projector):
    """Two-layer feed-forward network."""

    def __init__(self, config: MPTConfig):
        super().__init__()
        width, hidden = config.hidden_size, config.ffn_hidden_size
        self.up_proj = nn.Linear(width, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        return self.linear(self.down_proj, F.gelu(self.linear(self.up_proj, x)))


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, config: MPTConfig, layer: int):
        super().__init__()
        self.attn_norm = _norm(config, config.hidden_size)
        self.attn = Attention(config, layer)
        self.mlp_norm = _norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, pos: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.attn_norm(x), pos, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class MPT(Model):
    """An MPT language model."""

    config: MPTConfig

    def __init__(self, config: MPTConfig):
        super().__init__()
        self.config = config
        width, count = config.hidden_size, config.learned_positions
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(count, width) if count else None
        blocks = (Block(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = _norm(config, width)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def start(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embed tokens (B, T) at positions (B or 1, T): (B, T, width)."""
        x = self.embeddings(tokens)
        return x if self.positions is None else x + self.positions(position)

    def attention_metadata(self, position: Tensor, pos: Tensor, mask: Mask) -> Mask:
        """The mask, with ALiBi's slopes added; a matrix becomes (B or 1, H, T, S) in fp32."""
        if not self.config.alibi:
            return mask
        slopes = alibi_slopes(self.config.num_attention_heads, self.config.alibi_bias_max)
        slopes = self.layers[0].attn.own(slopes).to(position.device)
        if isinstance(mask, DecodeMask):  # bias None: no padding, so slots are positions
            bias = mask.bias
            if bias is not None:  # distances to the last token, as good for the others
                bias = bias + (position - position[:, pos[-1:]])
            return mask._replace(bias=bias, slopes=slopes)
        if isinstance(mask, CausalMask):
            return mask._replace(position=position, slopes=slopes)
        ahead = position[:, None] - position[:, pos, None]  # (B or 1, T, S), <= 0 up to the token
        bias = slopes[:, None, None] * ahead[:, None]
        return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask

    def finish(self, x: Tensor) -> Tensor:
        """The final norm, times the scale of the logits."""
        return self.norm(x) * self.config.logit_scale


def _norm(config: MPTConfig, width: int) -> nn.Module:
    if NORMS[config.norm_type] is nn.RMSNorm:
        return nn.RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, config.norm_eps, bias=config.bias)
