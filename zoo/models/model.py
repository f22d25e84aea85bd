"""What every family's model is: its sizes, what its cache keeps, and how state passes through it.

A family's file (llama.py, opt.py, mpt.py, ...) defines `Config`, `Attention`, `Block` and `Model`,
and says how a Hugging Face checkpoint maps to them. Parts are named alike everywhere: `embed`,
`layers[i].attn.{q,k,v,o}_proj`, `head`, so that no step asks which family it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Causal, Mask, Seen, causal_mask, latent_attention, latent_decode, one_token
from .cache import Buffer, Latent, StaticCache
from .config import Config


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
    layers: Sequence[Any]  # block(x, pos, attn_metadata, cache) -> x; attention is block.attn
    head: nn.Linear

    def start(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens (B, T) at positions (B or 1, T) as vectors (B, T, width)."""
        raise NotImplementedError

    def attention_metadata(self, position: Tensor, pos: Tensor, mask: Mask) -> Any:
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
        """The first layer's arguments: x (B, T, width), slots (T,) and the attention metadata."""
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
        attn_metadata = self.attention_metadata(position, pos, mask)
        return self.start(tokens, position[:, pos]), pos, attn_metadata

    def hidden(
        self,
        tokens: Tensor,
        pos: Tensor | None = None,
        cache: StaticCache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, width). Arguments as in `forward`."""
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
