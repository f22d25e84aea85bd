"""Llama with Eigen Attention: the cache holds keys and values in a low-rank basis.

Beside transformers' `modeling_llama.py`, what is peculiar here:
- `Config.k_ranks` and `v_ranks` say how wide a latent is in each layer, and one latent may serve
  several kv heads. A dense model is the same class at full rank: nothing is lifted there.
- Compressed keys are cached before the rotation, and lifted and rotated when they are read;
  whole keys are cached rotated, as everywhere.
- Values stay latent: the lift is folded into `o_proj` where that makes it no larger, else it is
  applied after attention, to one vector a head instead of one a cached token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import causal_mask, latent_attention, lift, lift_heads
from .cache import Latent, StaticCache
from .rope import frequencies, rotate


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama, by the names of transformers' LlamaConfig, and what its cache keeps."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10_000.0})
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases of the query and key projections
    value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    key_mean: bool = False  # lifted keys get back what the basis leaves of their mean
    k_ranks: tuple[int, ...] = ()  # one per layer; empty means full rank
    v_ranks: tuple[int, ...] = ()
    k_heads_per_latent: int = 1
    v_heads_per_latent: int = 1

    def __post_init__(self) -> None:
        """Fill in full ranks and refuse what does not fit together."""
        for name in ("k", "v"):
            shared = getattr(self, f"{name}_heads_per_latent")
            if shared < 1 or self.num_key_value_heads % shared:
                raise ValueError(
                    f"{name}_heads_per_latent is {shared}: expected a divisor of "
                    f"{self.num_key_value_heads} kv heads"
                )
            full = shared * self.head_dim
            ranks = tuple(getattr(self, f"{name}_ranks")) or (full,) * self.num_hidden_layers
            if len(ranks) != self.num_hidden_layers or not all(1 <= r <= full for r in ranks):
                raise ValueError(
                    f"{name}_ranks is {list(ranks)}: expected {self.num_hidden_layers} numbers "
                    f"from 1 to {full}"
                )
            object.__setattr__(self, f"{name}_ranks", ranks)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not divide among "
                f"{self.num_key_value_heads} kv heads"
            )

    def latents(self, layer: int) -> tuple[Latent, Latent]:
        """What the cache keeps of keys and of values per token. Full rank keeps plain heads."""

        def latent(rank: int, shared: int) -> Latent:
            if rank == shared * self.head_dim:
                return Latent(self.num_key_value_heads, self.head_dim)
            return Latent(self.num_key_value_heads // shared, rank)

        return (
            latent(self.k_ranks[layer], self.k_heads_per_latent),
            latent(self.v_ranks[layer], self.v_heads_per_latent),
        )

    @property
    def kv_width(self) -> int:
        """Numbers that the cache keeps per token, over all layers."""
        pairs = (self.latents(layer) for layer in range(self.num_hidden_layers))
        return sum(k.heads * k.width + v.heads * v.width for k, v in pairs)

    @property
    def dense_kv_width(self) -> int:
        """The same for the uncompressed model."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


class Attention(nn.Module):
    """Attention of one layer over latents. Weights are named as in a Hugging Face checkpoint."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        d, heads, width = config.head_dim, config.num_attention_heads, config.hidden_size
        self.layer, self.heads, self.head_dim, self.scale = layer, heads, d, d**-0.5
        self.k, self.v = k, v = config.latents(layer)
        shared = config.k_heads_per_latent, config.v_heads_per_latent
        lift_keys = config.k_ranks[layer] < shared[0] * d
        lift_values = d < config.v_ranks[layer] < shared[1] * d  # narrower ones fold into o_proj
        read = d if lift_values else v.width

        def linear(outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(width, outputs, bias=bias)

        self.q_proj = linear(heads * d, config.attention_bias)
        self.k_proj = linear(k.heads * k.width, config.attention_bias)
        self.v_proj = linear(v.heads * v.width, config.value_bias)
        self.o_proj = nn.Linear(heads * read, width, bias=config.output_bias)
        self.k_up = parameter(k.heads, k.width, shared[0] * d) if lift_keys else None
        mean = lift_keys and config.key_mean
        self.k_mean = parameter(config.num_key_value_heads, 1, d) if mean else None
        self.v_up = parameter(v.heads, v.width, shared[1] * d) if lift_values else None

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticCache | None,
    ) -> Tensor:
        """x: (B, T, width), pos: (T,) slots, rope: cos and sin of every slot -> (B, T, width)."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).unflatten(-1, (self.k.heads, -1)).transpose(1, 2)  # (B, L, T, R)
        v = self.v_proj(x).unflatten(-1, (self.v.heads, -1)).transpose(1, 2)  # (B, L, T, R)

        here = rope if cache is None else (rope[0][:, :, pos], rope[1][:, :, pos])
        q = rotate(q, *here)
        if self.k_up is None:
            k = rotate(k, *here)
        if cache is not None:
            k, v = cache.update(self.layer, pos, k, v)
        if self.k_up is not None:
            k = lift(k, self.k_up, self.head_dim)
            k = rotate(k if self.k_mean is None else k + self.k_mean, *rope)

        prompt = x.size(1) > 1  # for one token, lifting what it read is less work than all values
        if self.v_up is not None and prompt:
            v = lift(v, self.v_up, self.head_dim)
        y = latent_attention(q, k, v, mask, self.scale)
        if self.v_up is not None and not prompt:
            y = lift_heads(y, self.v_up, self.head_dim)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: Config):
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: StaticCache | None,
    ) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.attn_norm(x), pos, rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """A Llama for language modelling. State is passed in: tokens, their slots and a cache."""

    inv_freq: Tensor
    layers: Sequence[Block]

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", torch.empty(0), persistent=False)
        self.reset_rope()

    def reset_rope(self) -> None:
        """Compute the rotary frequencies anew, in fp32, where the weights are."""
        c = self.config
        inv_freq, self.rope_scale = frequencies(
            c.rope_parameters, c.head_dim, c.max_position_embeddings
        )
        self.inv_freq = inv_freq.to(self.device)

    def _apply(self, fn, recurse=True):  # `.to(bfloat16)` would round the angles as well
        super()._apply(fn, recurse)
        self.reset_rope()
        return self

    def rope(self, position: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B or 1, 1, S, D / 2) of positions (B or 1, S), in fp32.

        newest: the positions of the new tokens; the largest chooses longrope's frequencies.
        """
        inv_freq = self.inv_freq[0]
        if len(self.inv_freq) == 2:
            short = self.config.rope_parameters["original_max_position_embeddings"]
            inv_freq = torch.where(newest.max() >= short, self.inv_freq[1], inv_freq)
        angle = position[:, None, :, None].float() * inv_freq
        return angle.cos() * self.rope_scale, angle.sin() * self.rope_scale

    def hidden(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The last layer's normed output (B, T, width). Arguments as in `forward`."""
        slots = tokens.size(1) if cache is None else cache.slots
        if pos is None:
            pos = torch.arange(tokens.size(1), device=tokens.device)
        if cache is not None:
            cache.check(tokens, pos)
        slot = torch.arange(slots, device=tokens.device)[None]
        position = slot if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        rope = self.rope(position, position[:, pos])
        plain = cache is None and valid is None
        mask = None if plain else causal_mask(pos, slots, valid)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, pos, rope, mask, cache)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
        last: int = 0,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocabulary), or of the `last` tokens only.

        pos: (T,) slots that the tokens take in the cache, one row for the whole batch; by default
        the first T. Without a cache the tokens see one another only. valid: (B, S), false at
        slots that hold padding; positions are counted over the true ones. Raises ValueError if
        the tokens do not fit the cache.
        """
        return self.head(self.hidden(tokens, pos, cache, valid)[:, -last:])

    def new_cache(self, batch: int, slots: int, dtype: torch.dtype | None = None) -> StaticCache:
        """An empty cache for `batch` sequences of up to `slots` tokens, in the model's dtype."""
        latents = [self.config.latents(i) for i in range(self.config.num_hidden_layers)]
        return StaticCache(latents, batch, slots, dtype or self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape))
