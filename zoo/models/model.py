"""The base classes of all families: a model, and its attention over latents.

Each family's file (llama.py, opt.py, mpt.py, ...) defines its config, attention, block and model,
and maps the tensors of a Hugging Face checkpoint to them. Parts have the same names in all
families (`embed`, `layers[i].attn.{q,k,v,o}_proj`, `head`), so code elsewhere treats all alike.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .attention import attention_weights, latent_attention, latent_decode, lift_heads
from .cache import Buffer, LayerCache, Pack, ServedLayer, StaticCache, WatchedLayer
from .config import Config
from .linear import Projector
from .mask import CausalMask, DecodeMask, Mask, causal_matrix, counted, decode_mask
from .packing import Latent, Packed, pack, unpack
from .ring import Kept, ring_of


class LatentAttention(Projector):
    """Base class of every family's attention. Calibration and folding use these attributes."""

    # the definition of attention in a decoding step; `kernels.install` replaces it by a fused op
    latent_decode: Callable[..., Tensor] = staticmethod(latent_decode)
    lift_heads: Callable[..., Tensor] = staticmethod(lift_heads)  # likewise
    pack: Pack = staticmethod(pack)
    unpack: Callable[[Packed, torch.dtype], Tensor] = staticmethod(unpack)

    layer: int
    heads: int  # query heads
    head_dim: int
    k: Latent
    v: Latent
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: Any  # a linear layer, or None if joint latents in k hold values too
    o_proj: nn.Linear
    v_up: Tensor | None  # (L, R, G / L * D): from values to heads
    k_shift: Tensor | None  # (L, 1, R): added to latents before they are cached
    v_shift: Tensor | None
    scale: float
    window: int = 0  # a token attends to the last so many, itself included; 0: to all
    share: tuple[int, int] = (0, 1)  # (i, n): this process has part i of n of heads and latents

    def split(self, part: int, parts: int, repeat: bool = False) -> None:
        """Expect projections that hold only part `part` of `parts` equal parts of the heads.

        A latent and its heads stay in one part. repeat: a layer's only latent is in every part.
        Raises ValueError if the latents do not divide evenly.
        """
        latents = self.k, self.v
        counts = [1 if repeat and x.heads == 1 else parts for x in latents]
        if self.heads % parts or any(x.heads % n for x, n in zip(latents, counts, strict=True)):
            raise ValueError(
                f"layer {self.layer} has {self.heads} heads, {self.k.heads} latents of keys and "
                f"{self.v.heads} of values, which {parts} processes cannot share evenly: use a "
                "number of processes that divides all, or compress with another --heads-per-latent"
            )
        self.share = part, parts
        self.heads //= parts
        self.k, self.v = (
            x._replace(heads=x.heads // n) for x, n in zip(latents, counts, strict=True)
        )

    def own(self, x: Tensor) -> Tensor:
        """This process's rows of x, which has one row per head or per latent, or one for all."""
        part, parts = self.share
        return x if parts == 1 or len(x) == 1 else x.chunk(parts)[part]

    def source(self, name: str) -> nn.Module:
        """The module that gives all queries ("q"), keys ("k") or values ("v"), (B, T, outputs)."""
        return getattr(self, f"{name}_proj")

    def project(self, layer: nn.Module, x: Tensor, heads: int) -> Tensor:
        """The output of a linear layer for x (B, T, width), by head or latent: (B, heads, T, n)."""
        return self.linear(layer, x).unflatten(-1, (heads, -1)).transpose(1, 2)

    def add_shifts(self, config: Config) -> None:
        """Make the parameters that center latents: see `Config.centered`."""
        low = config.compressed(self.layer)
        for name, latent, is_low in zip("kv", (self.k, self.v), low, strict=True):
            made = config.centered and is_low and latent.segments
            shift = parameter(latent.heads, 1, latent.width) if made else None
            setattr(self, f"{name}_shift", shift)

    def own_metadata(self, attn_metadata: Any) -> Any:
        """This layer's part of what `Model.attention_metadata` returns."""
        return attn_metadata

    def recall(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos: Tensor,
        attn_metadata: Any,
        cache: LayerCache | WatchedLayer | ServedLayer | None,
    ) -> Tensor:
        """What new tokens read with queries q (B, H, T, width), after keeping their latents.

        k, v, pos, cache: as in `remember`. Returns the input of `o_proj` by head, (B, H, T, n).
        """
        if isinstance(cache, ServedLayer):
            return cache.attend(q, *self.shifted(k, v), self.pack)
        read, v_read = self.remember(k, v, pos, cache)
        if isinstance(cache, WatchedLayer):
            cache.seen.copy_(self.watch(q, read, attn_metadata, cache.window))
        return self.read(q, read, v_read, attn_metadata)

    def read(self, q: Tensor, k: Buffer, v: Buffer, attn_metadata: Any) -> Tensor:
        """Attention of queries over cached keys and values, lifted if `o_proj` expects heads."""
        raise NotImplementedError

    def scored(self, q: Tensor, k: Buffer, attn_metadata: Any) -> tuple[Tensor, Buffer, Any]:
        """What `attend` takes of a prompt: queries and keys whose products are scores, the mask."""
        return q, k, attn_metadata

    def watch(self, q: Tensor, k: Buffer, attn_metadata: Any, window: int) -> Tensor:
        """Mean weight of each slot, (B, S), for the last `window` tokens of a prompt and all heads.

        q, k, attn_metadata: as in `read`.
        """
        q, k, mask = self.scored(q, k, attn_metadata)
        if isinstance(mask, Tensor):
            mask = mask[:, :, -window:]
        k = self.numbers(k, q.dtype)
        return attention_weights(q[:, :, -window:], k, mask, self.scale).mean((1, 2))

    def shifted(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, heads, T, width), centered if they are cached so."""
        k = k if self.k_shift is None else k + self.k_shift
        return k, v if self.v_shift is None else v + self.v_shift

    def remember(
        self, k: Tensor, v: Tensor, pos: Tensor, cache: LayerCache | WatchedLayer | None
    ) -> tuple[Buffer, Buffer]:
        """What new tokens attend to: all slots of the cache, or without one the new tokens.

        k, v: latents of the new tokens, (B, heads, T, width); pos: their slots, (T,).
        """
        k, v = self.shifted(k, v)
        return (k, v) if cache is None else cache.update(pos, k, v, self.pack)

    def lift(self, x: Tensor, up: Tensor, width: int) -> Tensor:
        """`lift_heads`, by the fused op unless gradients may be asked for, which it has not."""
        one = lift_heads if torch.is_grad_enabled() else self.lift_heads
        return one(x, up, width)

    def lift_output(self, y: Tensor) -> Tensor:
        """Decode attention over value latents, (B, H, T, R), where the layer has a decoder."""
        return y if self.v_up is None else self.lift(y, self.v_up, self.head_dim)

    def attend(self, q: Tensor, k: Buffer, v: Buffer, mask: Mask) -> Tensor:
        """Attention of q (B, H, T, R) over k (B, K, S, R) and v (B, L, S, W): (B, H, T, W)."""
        if isinstance(mask, DecodeMask):
            how = mask.span, self.scale, mask.bias, mask.slopes, mask.table
            return self.latent_decode(q, k, v, *how)
        k, v = self.numbers(k, q.dtype), self.numbers(v, q.dtype)
        return latent_attention(q, k, v, mask, self.scale)

    def numbers(self, x: Buffer, dtype: torch.dtype) -> Tensor:
        """The numbers of a buffer, (B, heads, S, width). dtype: of the result if x is packed."""
        return self.unpack(x, dtype) if isinstance(x, Packed) else x


class Model(Projector):
    """A language model. It keeps no state: tokens, their slots and a cache are arguments."""

    config: Config
    embed: nn.Embedding
    layers: Sequence[Any]  # block(x, pos, attn_metadata, cache) -> x; attention is block.attn
    head: nn.Linear
    kept: Kept = Kept()

    def keep(self, window: int, sinks: int = 0) -> Self:
        """Make new caches keep the last `window` tokens and the first `sinks`; return the model.

        Others are evicted, as in StreamingLLM (arXiv 2309.17453), but positions stay those of the
        text. A layer with a smaller window of its own stays as it is. 0: keep all. Without a cache
        nothing is evicted. Raises ValueError for numbers that are out of range, and for keys in a
        single block (`--keys rotated`).
        """
        kept = Kept(window, sinks)
        kept.check()
        block = getattr(self.config, "anchor", 1)
        if window and block >= self.config.max_position_embeddings:
            raise ValueError(
                f"keys are held in one block of {block} positions, of which no window can be kept: "
                "expected a model with keys that are held in another way"
            )
        self.kept = kept
        return self

    def start(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embed tokens (B, T) at positions (B or 1, T): (B, T, width).

        tokens: ids, or their embeddings (B, T, width of `embed`).
        """
        raise NotImplementedError

    def embeddings(self, tokens: Tensor) -> Tensor:
        """The embeddings (B, T, width) of ids (B, T); embeddings are returned as they are."""
        return self.embed(tokens) if tokens.dim() == 2 else tokens

    def attention_metadata(self, position: Tensor, pos: Tensor, mask: Mask) -> Any:
        """What attention needs to know about positions and mask, made once per step.

        position: (B or 1, S), of every slot. pos: (T,), slots of the new tokens, or (B, T) if they
        differ. mask: `DecodeMask` for one token; `CausalMask` for a prompt in the last slots, else
        `causal_matrix`. Families without rotation return a mask.
        """
        return mask

    def step_metadata(
        self, position: Tensor, pos: Tensor, mask: Mask, cache: StaticCache | None
    ) -> Any:
        """`attention_metadata` for a cache, of whose slots a ring keeps some. Others as there."""
        if cache is not None and (ring := cache.rings.get(0)):
            position, pos, mask = ring.seen(position, pos, mask, cache.batch)
        return self.attention_metadata(position, pos, mask)

    def encoding_metadata(self, new: Tensor) -> Any:
        """The same for a `ServedLayer`: what is needed to encode tokens at positions new (B, T)."""
        return None

    def rope(self, position: Tensor, newest: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, in families that rotate keys: see `llama.py`."""
        raise NotImplementedError

    def offset(self, position: Tensor, anchor: int, window: int = 0) -> tuple[Tensor, Tensor]:
        """Angles within blocks of positions, in families that rotate keys: see `llama.py`."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """From the output of the last layer, (B, T, width), to the input of the head."""
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Recompute, on the device of the weights, the buffers that checkpoints do not store."""

    def begin(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
        position: Tensor | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """The first layer's arguments: x (B, T, width), slots (T,) and the attention metadata.

        tokens: ids (B, T), or their embeddings (B, T, width). position: (B or 1, S), of every slot,
        by default counted over `valid`. mask: by default causal, without padding. Every token must
        attend to some slot. Others as in `forward`.
        """
        slots = tokens.size(1) if cache is None else cache.slots
        last = pos is None or slots == tokens.size(1)  # whether the tokens take the last slots
        if pos is None:
            pos = torch.arange(slots - tokens.size(1), slots, device=tokens.device)
        if cache is not None:
            cache.check(tokens, pos)
        slot = torch.arange(slots, device=tokens.device)[None]
        if position is None:
            self.config.check_length(slots)
            position = slot if valid is None else counted(valid)
        elif valid is None and tokens.size(1) == 1:  # else ALiBi takes slots for positions
            valid = torch.ones_like(position, dtype=torch.bool)
        if mask is None and tokens.size(1) == 1:
            mask = decode_mask(pos, None if valid is None else valid | (slot == pos))
        elif mask is None:
            mask = CausalMask(valid) if last else causal_matrix(pos, slots, valid)
        ringed = cache if isinstance(cache, StaticCache) else None
        attn_metadata = self.step_metadata(position, pos, mask, ringed)
        return self.start(tokens, position[:, pos]), pos, attn_metadata

    def hidden(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The input of the head, (B, T, width). Arguments and errors as in `forward`."""
        x, pos, attn_metadata = self.begin(tokens, pos, cache, valid)
        for i, layer in enumerate(self.layers):
            x = layer(x, pos, attn_metadata, None if cache is None else cache.layer(i))
        return self.finish(x)

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
        last: int = 0,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocabulary), or of the last `last` tokens only.

        pos: (T,), the cache slots of the tokens, the same for the whole batch; by default the last
        T slots, which is faster for a prompt: see `StaticCache.first`. In a cache with rings they
        follow one another. Without a cache the tokens attend to one another only. valid: (B, S),
        false at slots that hold padding; positions are counted over the other slots. Rings count
        windows in slots, so there padding comes before a text, not inside it. Raises ValueError if
        the tokens do not fit the cache or the model's positions.
        """
        return self.linear(self.head, self.hidden(tokens, pos, cache, valid)[:, -last:])

    def new_cache(
        self, batch: int, slots: int, dtype: torch.dtype | None = None, bits: int | None = None
    ) -> StaticCache:
        """An empty cache for `batch` sequences of up to `slots` tokens, of which it keeps `kept`.

        dtype: of unpacked numbers, by default the model's. bits: per number, one of `bits.BITS`, by
        default as the config says. Raises ValueError if the model has fewer positions, or if the
        bits do not fit the ranks.
        """
        self.config.check_length(slots)
        attns = [layer.attn for layer in self.layers]
        latents, windows = [(x.k, x.v) for x in attns], [x.window for x in attns]
        block = getattr(self.config, "anchor", 1)
        made = {window: ring_of(window, slots, block, self.kept) for window in windows}
        rings = {window: ring for window, ring in made.items() if ring}
        how = dtype or self.dtype, self.device, bits, windows, rings
        return StaticCache(latents, batch, slots, *how)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialized parameter."""
    return nn.Parameter(torch.empty(*shape))
