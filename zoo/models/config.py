"""What every family's config says: sizes, and what the cache keeps of each token."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .cache import Latent, check_bits


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
        """What the cache keeps of keys and of values per token; at full rank, whole heads."""
        heads = self.num_key_value_heads
        low_k, low_v = self.compressed(layer)
        k = Latent(heads // self.k_heads_per_latent, self.k_ranks[layer])
        v = Latent(heads // self.v_heads_per_latent, self.v_ranks[layer])
        whole = Latent(heads, self.head_dim)
        k, v = k if low_k else whole, v if low_v else whole
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


def kv_bytes(config: Config, dtype: torch.dtype, bits: int | None = None) -> dict[str, Any]:
    """Bytes that the cache takes per token, scales included, and those of the uncompressed model.

    bits: of all numbers, by default as the config says. A share is of the same dtype: beside
    float32, 8 bits are a quarter.
    """
    pairs = (config.latents(layer) for layer in range(config.num_hidden_layers))
    latents = [x if bits is None else x._replace(bits=bits) for pair in pairs for x in pair]
    kept = sum(latent.nbytes(dtype) for latent in latents)
    dense = config.dense_kv_width * dtype.itemsize
    return {
        "kv_bytes_per_token": kept,
        "kv_bytes_per_token_dense": dense,
        "kv_share": kept / dense,
    }
