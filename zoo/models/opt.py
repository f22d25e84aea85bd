"""OPT with a low-rank KV cache. Keys are not rotated, so attention runs in the low-rank space.

Differences from transformers' `modeling_opt.py`:
- Queries are projected into the basis of the latents and read them directly; keys are not rebuilt.
- Softmax is invariant to a constant added to all keys, so compressed keys have no bias.
- With `joint_kv`, one latent holds keys and values; attention reads it twice.
As there, learned positions begin at row 2 of their table, and OPT-350m norms after each residual
sum, projects its embeddings up and its outputs down.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import absorb
from .cache import Buffer, LayerCache
from .config import Config
from .linear import Projector
from .mask import Mask
from .model import LatentAttention, Model, parameter

OFFSET = 2  # rows of the position table before the first position
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": F.tanh,
}
NAMES = {
    "embed_tokens": "embed",
    "embed_positions": "positions",
    "self_attn": "attn",
    "out_proj": "o_proj",
    "self_attn_layer_norm": "attn_norm",
    "fc1": "up_proj",
    "fc2": "down_proj",
    "lm_head": "head",
}


@dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    """Sizes of an OPT, named as in transformers' OPTConfig, and what its cache keeps."""

    family: ClassVar[str] = "opt"

    ffn_dim: int
    word_embed_proj_dim: int
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    final_norm: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True

    @property
    def learned_positions(self) -> int:
        """The number of learned position embeddings."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' OPTConfig. Raises ValueError naming an unsupported field."""
        activation, heads = raw["activation_function"], raw["num_attention_heads"]
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation_function {activation!r} is not supported: expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if raw["hidden_size"] % heads:
            raise ValueError(
                f"hidden_size is {raw['hidden_size']}: expected a multiple of num_attention_heads, "
                f"{heads}"
            )
        bias = raw["enable_bias"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=raw["hidden_size"] // heads,
            max_position_embeddings=raw["max_position_embeddings"],
            tie_word_embeddings=raw["tie_word_embeddings"],
            query_bias=bias,
            key_bias=bias,
            value_bias=bias,
            output_bias=bias,
            ffn_dim=raw["ffn_dim"],
            word_embed_proj_dim=raw["word_embed_proj_dim"],
            activation_function=activation,
            do_layer_norm_before=raw["do_layer_norm_before"],
            final_norm=raw["do_layer_norm_before"] and not raw["_remove_final_layer_norm"],
            enable_bias=bias,
            layer_norm_elementwise_affine=raw["layer_norm_elementwise_affine"],
        )

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield native (name, tensor) pairs for one tensor of a Hugging Face checkpoint."""
        parts = key.removeprefix("model.").removeprefix("decoder.").split(".")
        names = [NAMES.get(part, part) for part in parts]
        for i, part in enumerate(parts):
            if part == "final_layer_norm":
                names[i] = "norm" if i == 0 else "mlp_norm"
            if part in ("fc1", "fc2"):
                names[i] = f"mlp.{names[i]}"
        yield ".".join(names), tensor


class Attention(LatentAttention):
    """Attention of one layer over latents, which queries read without decoding them."""

    def __init__(self, config: OPTConfig, layer: int):
        super().__init__()
        d, heads, width = config.head_dim, config.num_attention_heads, config.hidden_size
        self.layer, self.heads, self.head_dim, self.scale = layer, heads, d, d**-0.5
        self.k, self.v = k, v = config.latents(layer)
        read = v if v.width else k  # joint latents are in k, and serve as values too
        k_up, v_up = config.lifted(layer)
        shared = config.k_heads_per_latent, config.v_heads_per_latent

        self.q_proj = nn.Linear(width, heads * (d if k_up else k.width), bias=config.query_bias)
        self.k_proj = nn.Linear(width, k.heads * k.width, bias=config.key_bias)
        self.v_proj = nn.Linear(width, v.heads * v.width, config.value_bias) if v.width else None
        self.o_proj = nn.Linear(heads * (d if v_up else read.width), width, config.output_bias)
        self.k_up = parameter(k.heads, k.width, shared[0] * d) if k_up else None
        self.v_up = parameter(read.heads, read.width, shared[1] * d) if v_up else None
        self.add_shifts(config)

    def forward(self, x: Tensor, pos: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """x: (B, T, width), pos: (T,) slots -> (B, T, width)."""
        q = self.project(self.q_proj, x, self.heads)  # (B, H, T, D or R)
        k = self.project(self.k_proj, x, self.k.heads)  # (B, L, T, R)
        v = k[..., :0]
        if self.v_proj is not None:
            v = self.project(self.v_proj, x, self.v.heads)  # (B, L, T, R)
        if self.k_up is not None:
            q = absorb(q, self.k_up, self.head_dim)
        y = self.recall(q, k, v, pos, mask, cache)
        y = y.transpose(1, 2).flatten(2).contiguous()  # DTensor takes no other
        return self.linear(self.o_proj, y)

    def read(self, q: Tensor, k: Buffer, v: Buffer, attn_metadata: Mask) -> Tensor:
        """As in `LatentAttention`, of queries (B, H, T, R)."""
        y = self.attend(q, k, v if self.v.width else k, attn_metadata)
        return self.lift_output(y)


class MLP(Projector):
    """Two-layer feed-forward network."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        width, hidden, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        return self.linear(self.down_proj, self.activation(self.linear(self.up_proj, x)))


class Block(nn.Module):
    """One layer: attention and MLP, each with a residual connection and a norm before or after."""

    def __init__(self, config: OPTConfig, layer: int):
        super().__init__()
        self.norm_before = config.do_layer_norm_before
        self.attn_norm = _norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, pos: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        if self.norm_before:
            x = x + self.attn(self.attn_norm(x), pos, mask, cache)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attn_norm(x + self.attn(x, pos, mask, cache))
        return self.mlp_norm(x + self.mlp(x))


class OPT(Model):
    """An OPT language model."""

    config: OPTConfig

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.config = config
        width, narrow = config.hidden_size, config.word_embed_proj_dim
        self.embed = nn.Embedding(config.vocab_size, narrow)
        self.positions = nn.Embedding(config.max_position_embeddings + OFFSET, width)
        projected = narrow != width
        self.project_in = nn.Linear(narrow, width, bias=False) if projected else nn.Identity()
        blocks = (Block(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = _norm(config) if config.final_norm else nn.Identity()
        self.project_out = nn.Linear(width, narrow, bias=False) if projected else nn.Identity()
        self.head = nn.Linear(narrow, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def start(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embed tokens (B, T) at positions (B or 1, T): (B, T, width)."""
        x = self.linear(self.project_in, self.embeddings(tokens))
        return x + self.positions(position + OFFSET)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm, and the projection to the width of the embeddings."""
        return self.linear(self.project_out, self.norm(x))


def _norm(config: OPTConfig) -> nn.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nn.LayerNorm(config.hidden_size, elementwise_affine=affine)
