"""What every family's model is: its sizes, what its cache keeps, and how state passes through it.

A family's file (llama.py, opt.py, mpt.py, ...) defines `Config`, `Attention`, `Block` and `Model`,
and says how a Hugging Face checkpoint maps to them. Parts are named alike everywhere: `embed`,
`layers[i].attn.{q,k,v,o}_proj`, `head`, so that no step asks which family it is given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .attention import Causal, Mask, Seen, causal_mask, latent_attention, latent_decode, one_token
from .cache import Buffer, Latent, StaticCache, check_bits


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that all families share, and what their caches keep.

    k_ranks, v_ranks: numbers per token and latent, one a layer; empty means full rank.
    k_bits, v_bits: of each of these numbers in a cache, one a layer; empty means 16, which is
    the model's own dtype.
    joint_kv: one latent holds keys and values; its ranks are k_ranks, those of v_ranks are 0.
    """

    family: ClassVar[str]  # its name in `families.FAMILIES`, which is transformers' model_type
    foreign: ClassVar[bool] = False  # config.json may hold what transformers' class refuses
    rotary: ClassVar[bool] = False  # a rotation between projection and score: keys are lifted

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    query_bias: bool = False
    key_bias: bool = False
    value_bias: bool = False
    output_bias: bool = False
    k_ranks: tuple[int, ...] = ()
    v_ranks: tuple[int, ...] = ()
    k_bits: tuple[int, ...] = ()
    v_bits: tuple[int, ...] = ()
    k_heads_per_latent: int = 1
    v_heads_per_latent: int = 1
    joint_kv: bool = False

    def __post_init__(self) -> None:
        """Fill in full ranks and refuse what does not fit together."""
        for f in fields(self):  # JSON knows lists only
            if isinstance(value := getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(value))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not divide among "
                f"{self.num_key_value_heads} kv heads"
            )
        if self.joint_kv and self.k_heads_per_latent != self.v_heads_per_latent:
            raise ValueError("joint_kv: expected as many heads per latent for keys as for values")
        for name, shared in (("k", self.k_heads_per_latent), ("v", self.v_heads_per_latent)):
            if shared < 1 or self.num_key_value_heads % shared:
                raise ValueError(
                    f"{name}_heads_per_latent is {shared}: expected a divisor of "
                    f"{self.num_key_value_heads} kv heads"
                )
            full = self.full_ranks[name == "v"]
            ranks = getattr(self, f"{name}_ranks") or (full,) * self.num_hidden_layers
            least = min(1, full)
            if len(ranks) != self.num_hidden_layers or not all(least <= r <= full for r in ranks):
                raise ValueError(
                    f"{name}_ranks is {list(ranks)}: expected {self.num_hidden_layers} numbers "
                    f"from {least} to {full}"
                )
            object.__setattr__(self, f"{name}_ranks", ranks)
            bits = getattr(self, f"{name}_bits")
            if len(bits) not in (0, self.num_hidden_layers):
                raise ValueError(
                    f"{name}_bits is {list(bits)}: expected {self.num_hidden_layers} numbers"
                )
            for count, rank in zip(bits, ranks, strict=bool(bits)):
                check_bits(count, rank if rank < full else self.head_dim)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From config.json of a dense checkpoint, defaults filled in. Refuses what it cannot run.

        Raises ValueError that names the field.
        """
        raise NotImplementedError

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parts of one tensor of a Hugging Face checkpoint, by their names here."""
        raise NotImplementedError

    @property
    def full_ranks(self) -> tuple[int, int]:
        """Numbers of an uncompressed latent of keys, and of values."""
        k, v = self.k_heads_per_latent * self.head_dim, self.v_heads_per_latent * self.head_dim
        return (k + v, 0) if self.joint_kv else (k, v)

    @property
    def learned_positions(self) -> int:
        """How many positions the model has a vector for; 0 where it needs none."""
        return 0

    def check_length(self, slots: int) -> None:
        """Raise ValueError if the model does not know as many positions."""
        limit = self.learned_positions
        if limit and slots > limit:
            raise ValueError(
                f"the model knows {limit} positions, {slots} tokens or slots do not fit: take "
                "fewer, a smaller window or a smaller cache"
            )

    @property
    def fixed_angles(self) -> bool:
        """Whether a rotation, if there is one, never depends on the length of the text."""
        return True

    @property
    def nonlinear(self) -> tuple[bool, bool]:
        """Whether keys, and values, are more than a linear map of the layer's input."""
        return False, False

    @property
    def least_bits(self) -> int:
        """The fewest bits of a number in the cache."""
        return min((16, *self.k_bits, *self.v_bits))

    def compressed(self, layer: int) -> tuple[bool, bool]:
        """Whether a layer holds less than whole keys, and less than whole values."""
        k, v = self.k_ranks[layer] < self.full_ranks[0], self.v_ranks[layer] < self.full_ranks[1]
        return k, k if self.joint_kv else v

    def latents(self, layer: int) -> tuple[Latent, Latent]:
        """What the cache keeps of keys and of values per token. Full rank keeps plain heads."""
        heads = self.num_key_value_heads
        low_k, low_v = self.compressed(layer)
        k = Latent(heads // self.k_heads_per_latent, self.k_ranks[layer])
        v = Latent(heads // self.v_heads_per_latent, self.v_ranks[layer])
        plain = Latent(heads, self.head_dim)
        k, v = k if low_k else plain, v if low_v else plain
        if self.k_bits:
            k = k._replace(bits=self.k_bits[layer])
        if self.v_bits:
            v = v._replace(bits=self.v_bits[layer])
        return k, v

    def lifted(self, layer: int) -> tuple[bool, bool]:
        """Whether the lifts of keys, and of values, stay matrices of their own in this layer.

        Folding the lift of a latent of R numbers into the projections of its query heads makes
        them R / head_dim times as large: it is done where that is no larger than 1, and where
        nothing stands between projection and lift.
        """
        low_k, low_v = self.compressed(layer)
        k = self.k_ranks[layer]
        v = k if self.joint_kv else self.v_ranks[layer]
        between = self.rotary or self.nonlinear[0]
        return low_k and (between or k > self.head_dim), low_v and v > self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers that the cache keeps per token, over all layers."""
        pairs = (self.latents(layer) for layer in range(self.num_hidden_layers))
        return sum(k.heads * k.width + v.heads * v.width for k, v in pairs)

    @property
    def dense_kv_width(self) -> int:
        """The same for the uncompressed model."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


class LatentAttention(nn.Module):
    """What fold and calibrate rely on in the attention of every family."""

    # what defines attention at decoding; `kernels.install` puts fused ops in their place
    latent_decode: Callable[..., Tensor] = staticmethod(latent_decode)

    layer: int
    heads: int  # of queries
    head_dim: int
    k: Latent
    v: Latent
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: Any  # a linear layer, or None where k holds values as well
    o_proj: nn.Linear
    scale: float
    share: tuple[int, int] = (0, 1)  # which part of heads and latents is here, and of how many

    def split(self, part: int, parts: int) -> None:
        """From here on be given one of `parts` equal parts of the projections' heads and latents.

        Raises ValueError where they do not divide: a latent and its heads stay together.
        """
        if self.k.heads % parts or self.v.heads % parts:
            raise ValueError(
                f"layer {self.layer} holds {self.k.heads} latents of keys and {self.v.heads} of "
                f"values, which {parts} processes cannot share evenly: take as many processes as "
                "divide both, or compress with a smaller --heads-per-latent"
            )
        self.share = part, parts
        self.heads //= parts
        self.k, self.v = (x._replace(heads=x.heads // parts) for x in (self.k, self.v))

    def own(self, x: Tensor) -> Tensor:
        """What is here of x, which has a row for every head, or for every latent."""
        part, parts = self.share
        return x if parts == 1 else x.chunk(parts)[part]

    def attend(self, q: Tensor, k: Buffer, v: Buffer, mask: Mask) -> Tensor:
        """What queries (B, H, T, R) read of keys and values: (B, H, T, W)."""
        if isinstance(mask, Seen):
            return self.latent_decode(q, k, v, mask.span, self.scale, mask.bias, mask.slopes)
        return latent_attention(q, k, v, mask, self.scale)


class Model(nn.Module):
    """A language model. State is passed in: tokens, their slots and a cache."""

    config: Config
    embed: nn.Embedding
    layers: Sequence[Any]  # blocks: block(x, pos, where, cache) -> x, with attention in block.attn
    head: nn.Linear

    def start(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens (B, T) at positions (B or 1, T) as vectors (B, T, width)."""
        raise NotImplementedError

    def where(self, position: Tensor, pos: Tensor, mask: Mask) -> Any:
        """What the layers' attention needs of positions and masks, made once for all of them.

        position: (B or 1, S) of every slot; pos: (T,) slots of the new tokens; mask: for one
        token `Seen`; for a prompt `Causal`, or what `causal_mask` makes where the new tokens may
        not be the last.
        """
        return mask

    def rope(self, position: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, where keys are rotated: see `llama.py`."""
        raise NotImplementedError

    def offset(self, position: Tensor, pos: Tensor, anchor: int) -> tuple[Tensor, Any]:
        """Angles within blocks of slots, where keys are rotated: see `llama.py`."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """Output of the last layer, (B, T, width), to what the head reads."""
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Compute anew what is computed and not stored, where the weights are."""

    def begin(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """What the first layer is given: x (B, T, width), slots (T,), and what `where` returns."""
        slots = tokens.size(1) if cache is None else cache.slots
        last = pos is None or slots == tokens.size(1)  # then the new tokens take the last slots
        if pos is None:
            pos = torch.arange(slots - tokens.size(1), slots, device=tokens.device)
        self.config.check_length(slots)
        if cache is not None:
            cache.check(tokens, pos)
        slot = torch.arange(slots, device=tokens.device)[None]
        position = slot if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        mask: Mask
        if tokens.size(1) == 1:
            mask = one_token(pos, None if valid is None else valid | (slot == pos))
        else:
            mask = Causal(valid) if last else causal_mask(pos, slots, valid)
        where = self.where(position, pos, mask)
        return self.start(tokens, position[:, pos]), pos, where

    def hidden(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, width). Arguments as in `forward`."""
        x, pos, where = self.begin(tokens, pos, cache, valid)
        for i, layer in enumerate(self.layers):
            x = layer(x, pos, where, None if cache is None else cache.layer(i))
        return self.finish(x)

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
        the last T, which is faster for a prompt: see `StaticCache.first`. Without a cache the
        tokens see one another only. valid: (B, S), false at slots that hold padding; positions
        are counted over the true ones. Raises ValueError if the tokens do not fit the cache.
        """
        return self.head(self.hidden(tokens, pos, cache, valid)[:, -last:])

    def new_cache(
        self, batch: int, slots: int, dtype: torch.dtype | None = None, bits: int | None = None
    ) -> StaticCache:
        """An empty cache for `batch` sequences of up to `slots` tokens, in the model's dtype.

        bits: of a number, 16, 8 or 4; None leaves it to the config.
        """
        self.config.check_length(slots)
        latents = [(layer.attn.k, layer.attn.v) for layer in self.layers]
        return StaticCache(latents, batch, slots, dtype or self.dtype, self.device, bits)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape))
