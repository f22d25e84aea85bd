"""The base class of all configs: sizes of a model, and what its cache keeps per token."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypedDict

import torch
from torch import Tensor

from .bits import Segment, check_bits, parse_segments
from .packing import Latent
from .ring import ring_of

MOST_LAYERS = 1000  # several times as many as any model has; building 10,000,000 never ends
LARGEST = 2**31 - 1
SIZES = {  # fields of config.json that are positive integers, in all families, and their limits
    **dict.fromkeys(("num_hidden_layers", "n_layers"), MOST_LAYERS),
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "d_model", "head_dim", "intermediate_size"), LARGEST
    ),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads", "ffn_dim"), LARGEST),
    **dict.fromkeys(("word_embed_proj_dim", "max_position_embeddings", "max_seq_len"), LARGEST),
}


def check_sizes(raw: dict[str, Any]) -> None:
    """Raise ValueError naming a size in config.json that is not an integer in its range.

    Fields that are absent or null have defaults, so they pass.
    """
    for name, limit in SIZES.items():
        value = raw.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= limit):
            raise ValueError(f"{name} is {value!r}: expected an integer from 1 to {limit}")
    for size, count in (("hidden_size", "num_attention_heads"), ("d_model", "n_heads")):
        width, heads = raw.get(size) or 0, raw.get(count) or 1
        if width % heads and raw.get("head_dim") is None:
            raise ValueError(f"{size} is {width}: expected a multiple of {count}, {heads}")


def _check_field(name: str, kind: Any, value: Any) -> None:
    """Raise ValueError if a field of a config has another type, or is out of its range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        limit = SIZES.get(name, LARGEST)
        fits, want = type(value) is int and 1 <= value <= limit, f"an integer from 1 to {limit}"
    elif kind in (float, float | None) and (kind is float or value is not None):
        fits, want = number and 0 <= value < math.inf, "a finite number, 0 or more"
    elif kind == tuple[int, ...]:
        whole = isinstance(value, tuple) and all(type(x) is int and x >= 0 for x in value)
        fits, want = whole, "a list of integers, 0 or more"
    elif kind == tuple[str, ...]:
        texts = isinstance(value, tuple) and all(type(x) is str for x in value)
        fits, want = texts, "a list of strings"
    elif isinstance(kind, type):
        fits, want = isinstance(value, kind), f"a {kind.__name__}"
    else:
        return
    if not fits:
        raise ValueError(f"{name} is {value!r}: expected {want}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that all families have, and what their caches keep.

    k_ranks, v_ranks: the rank of latents, one per layer; empty means full rank.
    k_bits, v_bits: bits per cached number, one per layer; empty means 16, the model's dtype.
    k_segments, v_segments: instead of bits, segments of the latents as `bits.parse_segments` reads
    them, one text per layer, empty where a layer has none; their widths add up to the rank. A
    latent with segments is one even at full rank, where others are whole heads.
    k_heads_per_latent, v_heads_per_latent: kv heads that share one latent.
    joint_kv: one latent holds keys and values; its ranks are k_ranks, and v_ranks are 0.
    centered: the mean is subtracted from latents with segments, so that rounding them costs less;
    lifts and biases add it back.
    """

    family: ClassVar[str]  # the key in `families.FAMILIES`, which is transformers' model_type
    foreign: ClassVar[bool] = False  # config.json may hold fields that transformers' class rejects
    begun: ClassVar[bool] = False  # predicts badly what has no first token (BOS) before it
    rotary: ClassVar[bool] = False  # keys are rotated (RoPE), so queries cannot read latents

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
    k_segments: tuple[str, ...] = ()
    v_segments: tuple[str, ...] = ()
    k_heads_per_latent: int = 1
    v_heads_per_latent: int = 1
    joint_kv: bool = False
    centered: bool = False

    def __post_init__(self) -> None:
        """Fill in full ranks. Raises ValueError for fields that do not fit together."""
        for f in fields(self):  # JSON has lists, not tuples
            if isinstance(value := getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(value))
        for f in fields(self):
            _check_field(f.name, f.type, getattr(self, f.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}: expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.joint_kv and self.k_heads_per_latent != self.v_heads_per_latent:
            raise ValueError(
                f"joint_kv with {self.k_heads_per_latent} and {self.v_heads_per_latent} heads per "
                "latent of keys and of values: expected equal numbers"
            )
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
            self._check_bits(name, ranks, full)

    def _check_bits(self, name: str, ranks: tuple[int, ...], full: int) -> None:
        bits, segments = getattr(self, f"{name}_bits"), getattr(self, f"{name}_segments")
        for what, given, kind in (("bits", bits, "numbers"), ("segments", segments, "texts")):
            if len(given) not in (0, self.num_hidden_layers):
                raise ValueError(
                    f"{name}_{what} is {list(given)}: expected {self.num_hidden_layers} {kind}"
                )
        if bits and any(segments):
            raise ValueError(f"given {name}_bits and {name}_segments: expected one of them")
        for count, rank in zip(bits, ranks, strict=bool(bits)):
            check_bits(count, rank if rank < full else self.head_dim)
        for text, rank in zip(segments, ranks, strict=bool(segments)):
            width = sum(segment.width for segment in parse_segments(text))
            if text and width != rank:
                raise ValueError(
                    f"{name}_segments has {text!r} for a rank of {rank}: expected widths that add "
                    "up to it"
                )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read the config of a dense checkpoint. raw: config.json with defaults filled in.

        Raises ValueError naming an unsupported field.
        """
        raise NotImplementedError

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield native (name, tensor) pairs for one tensor of a Hugging Face checkpoint.

        A name that ends in [3] is that of row 3 of a weight, of which other tensors are the rest.
        """
        raise NotImplementedError

    @property
    def full_ranks(self) -> tuple[int, int]:
        """The width of an uncompressed latent of keys, and of values."""
        k, v = self.k_heads_per_latent * self.head_dim, self.v_heads_per_latent * self.head_dim
        return (k + v, 0) if self.joint_kv else (k, v)

    @property
    def learned_positions(self) -> int:
        """The number of learned position embeddings; 0 if the model has none."""
        return 0

    def check_length(self, slots: int) -> None:
        """Raise ValueError if the model has fewer learned positions than `slots`."""
        limit = self.learned_positions
        if limit and slots > limit:
            raise ValueError(
                f"the model has {limit} learned positions, given {slots} tokens or slots: use "
                "fewer tokens, a smaller window or a smaller cache"
            )

    @property
    def steady_length(self) -> int | None:
        """The length of a text up to which angles do not depend on it; None: they never do."""
        return None

    @property
    def nonlinear(self) -> tuple[bool, bool]:
        """Whether keys, and values, are nonlinear in the layer's input."""
        return False, False

    @property
    def least_bits(self) -> int:
        """The smallest number of bits per cached number in any layer."""
        pairs = (self.latents(layer) for layer in range(self.num_hidden_layers))
        return min(latent.bits for pair in pairs for latent in pair)

    def segments(self, layer: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """The segments of a layer's latents of keys, and of values."""
        k, v = self.k_segments, self.v_segments
        return parse_segments(k[layer] if k else ""), parse_segments(v[layer] if v else "")

    def compressed(self, layer: int) -> tuple[bool, bool]:
        """Whether a layer's keys, and its values, are latents rather than whole heads."""
        ranks, segments = (self.k_ranks[layer], self.v_ranks[layer]), self.segments(layer)
        k, v = (
            rank < full or bool(parts)
            for rank, full, parts in zip(ranks, self.full_ranks, segments, strict=True)
        )
        return k, k if self.joint_kv else v

    def latents(self, layer: int) -> tuple[Latent, Latent]:
        """What a layer caches per token of keys and of values; at full rank, whole heads."""
        heads = self.num_key_value_heads
        low_k, low_v = self.compressed(layer)
        k_segments, v_segments = self.segments(layer)
        k = Latent(heads // self.k_heads_per_latent, self.k_ranks[layer], k_segments)
        v = Latent(heads // self.v_heads_per_latent, self.v_ranks[layer], v_segments)
        whole = Latent(heads, self.head_dim)
        k, v = k if low_k else whole, v if low_v else whole
        if self.k_bits:
            k = k.rounded(self.k_bits[layer])
        if self.v_bits:
            v = v.rounded(self.v_bits[layer])
        return k, v

    def lifted(self, layer: int) -> tuple[bool, bool]:
        """Whether the decoders of keys, and of values, are separate matrices in this layer.

        Folding a decoder of rank R into the projections of its query heads makes them R / head_dim
        times as large. So a decoder is folded only if R <= head_dim, and if no rotation, norm or
        clip lies between projection and decoder.
        """
        low_k, low_v = self.compressed(layer)
        k = self.k_ranks[layer]
        v = k if self.joint_kv else self.v_ranks[layer]
        between = self.rotary or self.nonlinear[0]
        return low_k and (between or k > self.head_dim), low_v and v > self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers in the cache per token, summed over all layers."""
        pairs = (self.latents(layer) for layer in range(self.num_hidden_layers))
        return sum(k.heads * k.width + v.heads * v.width for k, v in pairs)

    @property
    def uncompressed(self) -> bool:
        """Whether the cache is what the model began with: whole heads, in the model's dtype."""
        return self.least_bits == 16 and not any(
            low for layer in range(self.num_hidden_layers) for low in self.compressed(layer)
        )

    @property
    def dense_kv_width(self) -> int:
        """As `kv_width`, for the uncompressed model."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def kept_slots(config: Config, slots: int) -> list[int]:
    """How many slots each layer's cache has for a text of some slots: a ring has fewer."""
    windows = getattr(config, "windows", ()) or (0,) * config.num_hidden_layers
    rings = (ring_of(window, slots, getattr(config, "anchor", 1)) for window in windows)
    return [ring.places if ring else slots for ring in rings]


def cache_bytes(config: Config, slots: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a cache for one text of some slots. dtype: of numbers that are not packed."""
    kept = kept_slots(config, slots)
    return sum(x.nbytes(dtype) * n for i, n in enumerate(kept) for x in config.latents(i))


class KvBytes(TypedDict):
    """Bytes of cache per token, of a model and uncompressed, and the share of the one in the other.

    They are those beside 16 bits: numbers that are not packed count as 2 bytes in any dtype.
    """

    kv_bytes_per_token: int
    kv_bytes_per_token_dense: int
    kv_share: float


def kv_bytes(config: Config, bits: int | None = None) -> KvBytes:
    """Size of the cache, scales included, beside an uncompressed one of 16 bits a number.

    All that says a share or bytes per token counts them here, as `keep` does. A cache in float32
    takes more memory: twice the bytes for what is not packed. bits: for all numbers, by default as
    the config says.
    """
    pairs = (config.latents(layer) for layer in range(config.num_hidden_layers))
    latents = [x if bits is None else x.rounded(bits) for pair in pairs for x in pair]
    kept = sum(latent.nbytes(torch.bfloat16) for latent in latents)
    dense = config.dense_kv_width * torch.bfloat16.itemsize
    return {
        "kv_bytes_per_token": kept,
        "kv_bytes_per_token_dense": dense,
        "kv_share": kept / dense,
    }
