"""Llama with a low-rank KV cache (Eigen Attention, Saxena et al., arXiv 2408.05646).

Differences from transformers' `modeling_llama.py`:
- `k_ranks` and `v_ranks` of the config give the width of a latent in each layer. One latent may
  serve several kv heads. A dense model is the same class at full rank, without encoders.
- Full-rank keys are cached rotated, as usual. Compressed keys are cached before the rotation, and
  are lifted and rotated when they are read.
- With `anchor` > 1, keys are rotated relative to the center of their block of positions, then
  encoded.
  Decoding then needs one rotated query per block instead of one lifted key per token.
- With `pairs`, a basis mixes heads but not rotation frequencies, so it commutes with the rotation:
  latents are cached rotated, and queries read them directly.
- With `anchor` > 1, or if a norm follows the projection of keys (see `qwen3.py`), their encoder is
  a matrix of its own, `k_down`. Otherwise it is folded into the projection.
- Values are not lifted before attention in a decoding step. Their decoder is folded into `o_proj`
  if that does not enlarge it; otherwise it is applied after attention, once per query head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import absorb, anchored_decode, lift, rebuild, rotary_decode
from .cache import Buffer, LayerCache
from .config import Config
from .linear import Projector
from .mask import CausalMask, DecodeMask, Mask, at
from .model import LatentAttention, Model, parameter
from .rope import at_length, check_rope, frequencies, rotate, steady_length

NAMES = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "self_attn": "attn",
    "post_attention_layernorm": "mlp_norm",
    "lm_head": "head",
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """Sizes of a Llama, named as in transformers' LlamaConfig, and what its cache keeps.

    anchor: positions in a block; above 1, compressed keys are rotated relative to the center of
    their block when they are cached. key_mean: lifted keys get the part of their mean that the
    basis drops. pairs: the numbers of a key latent are complex, each with one rotation frequency.
    """

    family: ClassVar[str] = "llama"
    rotary: ClassVar[bool] = True
    activation: ClassVar[str] = "silu"

    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10_000.0})
    mlp_bias: bool = False
    anchor: int = 1
    key_mean: bool = False
    pairs: bool = False

    def __post_init__(self) -> None:
        """As in `Config`. Raises ValueError also for ways of caching keys that do not combine."""
        if self.joint_kv:
            raise ValueError(
                f"joint_kv is not supported for {self.family}, which rotates keys: expected false"
            )
        if type(self.anchor) is not int or self.anchor < 1:
            raise ValueError(f"anchor is {self.anchor}: expected 1 or more positions per block")
        if (self.anchor > 1 or self.pairs) and self.steady_length is not None:
            raise ValueError(
                f"with {self.rope_parameters['rope_type']} RoPE, the angles of a position change "
                "when the text becomes long, so compressed keys cannot be cached rotated: rebuild "
                "them, or keep keys in full"
            )
        if self.pairs and (self.anchor > 1 or any(r % 2 for r in self.k_ranks)):
            raise ValueError(
                f"anchor is {self.anchor}, k_ranks is {list(self.k_ranks)}: expected anchor 1 and "
                "even ranks, because latents of keys are pairs"
            )
        super().__post_init__()
        check_rope(self.rope_parameters, self.head_dim)
        frequencies(self.rope_parameters, self.head_dim, self.max_position_embeddings)

    @property
    def steady_length(self) -> int | None:
        """The length of a text up to which angles do not depend on it; None: they never do."""
        return steady_length(self.rope_parameters, self.max_position_embeddings)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From transformers' LlamaConfig. Raises ValueError naming an unsupported field."""
        if raw["hidden_act"] != cls.activation:
            raise ValueError(
                f"hidden_act {raw['hidden_act']!r} is not supported: expected {cls.activation!r}"
            )
        bias = dict.fromkeys(
            ("query_bias", "key_bias", "value_bias", "output_bias"),
            raw.get("attention_bias", False),
        )
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw} | bias)

    def weights(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield native (name, tensor) pairs for one tensor of a Hugging Face checkpoint."""
        parts = key.removeprefix("model.").split(".")
        if parts[-1] != "inv_freq":  # old checkpoints store it; here it is computed
            yield ".".join(NAMES.get(part, part) for part in parts), tensor


Angles = tuple[Tensor, Tensor]  # cos, sin: (B or 1, 1, positions, D / 2)


class AttentionMetadata(NamedTuple):
    """Rotation angles and the mask of one step, made once and used by all layers.

    slot_angles: of every slot; for a prompt with anchored keys, of the center of the slot's block;
    where no key is rebuilt, not used.
    new_angles: of the T new tokens. mask: which slots each new token sees. block_angles: of the
    new tokens, measured from the centers of their blocks. center_angles: of the new tokens,
    measured from the center of every block, (B or 1, T, blocks, D / 2). slot_position: (B or 1, S)
    in int32, the position of every slot; None if it is the slot. The last three are for anchored
    keys, else None.
    """

    slot_angles: Angles
    new_angles: Angles
    mask: Mask
    block_angles: Angles | None = None
    center_angles: Angles | None = None
    slot_position: Tensor | None = None


def center(position: Tensor, anchor: int) -> Tensor:
    """The center of the block of each position; blocks follow positions, so padding has no part."""
    return position // anchor * anchor + anchor // 2


class Attention(LatentAttention):
    """Attention of one layer over latents."""

    anchored_decode: Callable[..., Tensor] = staticmethod(anchored_decode)
    rotary_decode: Callable[..., Tensor] = staticmethod(rotary_decode)
    k_pairs: Tensor | None  # (L, R / 2), which frequency each pair of columns has; int64

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        d, heads, width = config.head_dim, config.num_attention_heads, config.hidden_size
        self.layer, self.heads, self.head_dim, self.scale = layer, heads, d, d**-0.5
        self.k, self.v = k, v = config.latents(layer)
        k_up, v_up = config.lifted(layer)
        shared = config.k_heads_per_latent, config.v_heads_per_latent

        k_down = k_up and (config.anchor > 1 or config.nonlinear[0])
        self.q_proj = nn.Linear(width, heads * d, bias=config.query_bias)
        k_width = config.num_key_value_heads * d if k_down else k.heads * k.width
        self.k_proj = nn.Linear(width, k_width, bias=config.key_bias)
        self.v_proj = nn.Linear(width, v.heads * v.width, bias=config.value_bias)
        self.o_proj = nn.Linear(heads * (d if v_up else v.width), width, bias=config.output_bias)
        self.k_up = parameter(k.heads, k.width, shared[0] * d) if k_up else None
        mean = k_up and config.key_mean
        self.anchor = config.anchor
        self.k_down = parameter(k.heads, shared[0] * d, k.width) if k_down else None
        self.k_mean = parameter(config.num_key_value_heads, 1, d) if mean else None
        # on the device of the weights: if that is meta, zeros on a CPU would pass for loaded ones
        shape, device = (k.heads, k.width // 2), self.k_proj.weight.device
        pairs = torch.zeros(shape, dtype=torch.long, device=device)
        self.register_buffer("k_pairs", pairs if k_up and config.pairs else None)
        self.v_up = parameter(v.heads, v.width, shared[1] * d) if v_up else None
        self.add_shifts(config)

    def forward(
        self, x: Tensor, pos: Tensor, attn_metadata: AttentionMetadata, cache: LayerCache | None
    ) -> Tensor:
        """x: (B, T, width), pos: (T,) slots -> (B, T, width)."""
        attn_metadata = self.own_metadata(attn_metadata)
        q = self.queries(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        k = self._keys_to_cache(self.keys(x), attn_metadata)  # (B, L, T, R)
        v = self.project(self.v_proj, x, self.v.heads)  # (B, L, T, R)
        y = self.recall(q, k, v, pos, attn_metadata, cache)
        y = y.transpose(1, 2).flatten(2).contiguous()  # DTensor takes no other
        return self.linear(self.o_proj, y)

    def queries(self, x: Tensor) -> Tensor:
        """Queries before the rotation: x (B, T, width) -> (B, T, H * D)."""
        return self.linear(self.q_proj, x)

    def keys(self, x: Tensor) -> Tensor:
        """Keys before the rotation, encoded if there is no `k_down`: (B, T, outputs of k_proj)."""
        return self.linear(self.k_proj, x)

    def read(self, q: Tensor, k: Buffer, v: Buffer, attn_metadata: AttentionMetadata) -> Tensor:
        """As in `LatentAttention`, of queries (B, H, T, D) that are not yet rotated."""
        mask = attn_metadata.mask
        if self.v_up is not None and q.size(2) > 1 and not isinstance(mask, DecodeMask):
            # for few tokens, lifting the output costs less than lifting values
            v = lift(self.numbers(v, q.dtype), self.v_up, self.head_dim)
            return self._attend_rotary(q, k, v, attn_metadata)
        return self.lift_output(self._attend_rotary(q, k, v, attn_metadata))

    def _keys_to_cache(self, k: Tensor, metadata: AttentionMetadata) -> Tensor:
        """From `keys` to what the cache keeps of them, (B, L, T, R)."""
        if self.k_down is not None and metadata.block_angles is not None:
            heads = k.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            k = rotate(heads, *metadata.block_angles).transpose(1, 2).flatten(2)
        k = k.unflatten(-1, (self.k.heads, -1)).transpose(1, 2)
        if self.k_down is not None:
            k = self.lift(k, self.k_down, self.k.width)
        if self.k_pairs is not None:
            pairs = self.own(self.k_pairs)
            cos, sin = (x[:, 0][..., pairs].transpose(1, 2) for x in metadata.new_angles)
            return rotate(k, cos, sin)
        return rotate(k, *metadata.new_angles) if self.k_up is None else k

    def _attend_rotary(
        self, q: Tensor, k: Buffer, v: Buffer, metadata: AttentionMetadata
    ) -> Tensor:
        """Attention of queries (B, H, T, D), not yet rotated, over cached keys and values."""
        mask, up, mean = metadata.mask, self.k_up, self.k_mean
        angles = metadata.center_angles
        if self.k_down is not None and angles is not None and isinstance(mask, DecodeMask):
            return self.anchored_decode(
                *(q, k, v, mask.span, self.scale, *angles, up, mean, self.anchor, mask.bias),
                *(metadata.slot_position, mask.table),
            )
        if up is not None and self.k_pairs is None and isinstance(mask, DecodeMask):
            q = rotate(q, *metadata.new_angles)
            return self.rotary_decode(
                *(q, k, v, mask.span, self.scale, *metadata.slot_angles, up, mean, mask.bias),
                mask.table,
            )
        q, k, mask = self.scored(q, k, metadata)
        return self.attend(q, k, v, mask)

    def scored(
        self, q: Tensor, k: Buffer, attn_metadata: AttentionMetadata
    ) -> tuple[Tensor, Buffer, Mask]:
        """As in `LatentAttention`, of queries (B, H, T, D) that are not yet rotated."""
        up, q = self.k_up, rotate(q, *attn_metadata.new_angles)
        if up is not None and self.k_pairs is not None:
            q = absorb(q, up, self.head_dim)
        elif up is not None:
            k = rebuild(self.numbers(k, q.dtype), *attn_metadata.slot_angles, up, self.k_mean)
        return q, k, attn_metadata.mask


class MLP(Projector):
    """Gated feed-forward network (SwiGLU, or with another activation)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        gate = self.activation(self.linear(self.gate_proj, x))
        return self.linear(self.down_proj, gate * self.linear(self.up_proj, x))


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, config: LlamaConfig, attention: LatentAttention, feed_forward: nn.Module):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = attention
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward

    def forward(
        self, x: Tensor, pos: Tensor, attn_metadata: AttentionMetadata, cache: LayerCache | None
    ) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.attn_norm(x), pos, attn_metadata, cache)
        return x + self.mlp(self.mlp_norm(x))


class Llama(Model):
    """A Llama language model."""

    config: LlamaConfig
    inv_freq: Tensor
    attention: ClassVar[Callable[..., LatentAttention]] = Attention
    block: ClassVar[Callable[..., nn.Module]] = Block

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (
            self.block(config, self.attention(config, i), self.feed_forward(i))
            for i in range(config.num_hidden_layers)
        )
        self.layers = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", torch.empty(0), persistent=False)
        self.reset_buffers()

    def feed_forward(self, layer: int) -> nn.Module:
        """What follows attention in a layer."""
        return MLP(self.config)

    def reset_buffers(self) -> None:
        """Recompute the rotary frequencies in fp32, on the device of the weights.

        They are never on the meta device: no checkpoint holds them, so they could not be loaded.
        """
        c = self.config
        with torch.device("cpu"):
            inv_freq, self.rope_scale = frequencies(
                c.rope_parameters, c.head_dim, c.max_position_embeddings
            )
        self.inv_freq = inv_freq if self.device.type == "meta" else inv_freq.to(self.device)

    def _apply(self, fn, recurse=True):  # `.to(bfloat16)` would round the frequencies too
        super()._apply(fn, recurse)
        self.reset_buffers()
        return self

    def rope(self, position: Tensor, newest: Tensor, window: int = 0) -> Angles:
        """Cosines and sines (B or 1, 1, S, D / 2) of positions (B or 1, S), in fp32.

        newest: positions of the new tokens; with some types, angles depend on the largest. window:
        of the layer; a family may rotate by it.
        """
        c = self.config
        # weights that were on the meta device may have been loaded one by one to another
        inv_freq = self.inv_freq.to(position.device)
        inv_freq = at_length(inv_freq, c.rope_parameters, c.max_position_embeddings, newest)
        angle = position[:, None, :, None].float() * inv_freq
        return angle.cos() * self.rope_scale, angle.sin() * self.rope_scale

    def offset(self, position: Tensor, anchor: int, window: int = 0) -> Angles:
        """Angles of positions (B or 1, T), measured from the centers of their blocks.

        window: as in `rope`. These cosines and sines are without RoPE's factor (YaRN, longrope),
        which is applied with the angles of the center.
        """
        cos, sin = self.rope(position - center(position, anchor), position, window)
        return cos / self.rope_scale, sin / self.rope_scale

    def start(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embed tokens (B, T): (B, T, width). Positions enter in attention only."""
        return self.embeddings(tokens)

    def attention_metadata(
        self, position: Tensor, pos: Tensor, mask: Mask, window: int = 0
    ) -> AttentionMetadata:
        """Rotation angles and the mask, for all layers. window: as in `rope`."""
        new, anchor = at(position, pos), self.config.anchor
        metadata = self._of_new(new, window)._replace(mask=mask)
        if self.config.pairs:
            return metadata
        if anchor == 1 or not isinstance(mask, DecodeMask):
            read = position if anchor == 1 else center(position, anchor)
            return metadata._replace(slot_angles=self.rope(read, new, window))
        last = position.size(1) - 1  # fused ops read the angles of the block of each position
        padded = mask.bias is not None  # else the slots of a block are side by side
        every = torch.arange(last + 1, device=pos.device)[None] if padded else position
        middle = center(every[:, ::anchor], anchor)  # of every block, (B or 1, blocks)
        if padded and mask.shift is not None:
            middle = middle + mask.shift[:, ::anchor]
            position = position - mask.shift
        ahead = (new[:, :, None] - middle[:, None]).flatten(1)  # (B or 1, T * blocks)
        angles = self.rope(ahead, new, window)
        cos, sin = (x[:, 0].unflatten(1, (-1, middle.size(1))) for x in angles)
        return metadata._replace(
            center_angles=(cos * self.rope_scale, sin * self.rope_scale),
            slot_position=position.clamp(max=last).int() if padded else None,
        )

    def encoding_metadata(self, new: Tensor) -> Any:
        """Rotation angles of new tokens."""
        return self._of_new(new)

    def _of_new(self, new: Tensor, window: int = 0) -> AttentionMetadata:
        angles, anchor = self.rope(new, new, window), self.config.anchor
        inside = self.offset(new, anchor, window) if anchor > 1 else None
        return AttentionMetadata(angles, angles, CausalMask(), inside)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.norm(x)
