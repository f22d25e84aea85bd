"""Adapters that let the native model keep its latents in transformers' caches."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ...zoo.models.cache import SCALE, Buffer, Latent, Packed, pack
from ...zoo.models.config import Config


class LatentCache:
    """A cache for the native model that keeps its latents in one of transformers' caches."""

    def __init__(self, cache: Cache, slots: int, config: Config):
        self.cache, self.slots, self.config = cache, slots, config

    def check(self, tokens: Tensor, pos: Tensor) -> None:
        """Do nothing: transformers' caches check their bounds themselves."""

    def layer(self, index: int) -> "LatentLayer":
        """The cache of one layer."""
        return LatentLayer(self.cache, index, self.config.latents(index))


class LatentLayer:
    """A layer's cache for the native model, kept in one of transformers' caches.

    Those require as many heads of values as of keys. If the numbers of latents differ, all latents
    of a token are concatenated into one head. Below 16 bits, a latent is stored as a row of bytes
    (its scale, its codes, and padding to an even number of bytes). That works in every cache that
    does no arithmetic on its contents.
    """

    def __init__(self, cache: Cache, index: int, latents: tuple[Latent, Latent]):
        self.cache, self.index, self.latents = cache, index, latents

    def update(self, pos: Tensor, k: Tensor, v: Tensor) -> tuple[Buffer, Buffer]:
        """Append k and v (B, heads, T, width); return all slots of the layer. pos is not used."""
        bits = [latent.bits for latent in self.latents]
        packed, dtype = min(bits) < 16, k.dtype
        if packed:
            k, v = (_to_bytes(x, n) for x, n in zip((k, v), bits, strict=True))
        heads, equal = (k.size(1), v.size(1)), k.size(1) == v.size(1)
        if not equal:
            k, v = (x.transpose(1, 2).flatten(2)[:, None] for x in (k, v))
        cached = self.cache.update(k, v, self.index)
        if not equal:
            sides = zip(cached, heads, strict=True)
            cached = tuple(x[:, 0].unflatten(-1, (n, -1)).transpose(1, 2) for x, n in sides)
        if not packed:
            return cached
        k, v = (
            _from_bytes(x, latent.width, n, dtype)
            for x, latent, n in zip(cached, self.latents, bits, strict=True)
        )
        return k, v


def _to_bytes(x: Tensor, bits: int) -> Tensor:
    """Vectors (B, heads, T, width) as rows of bytes, (B, heads, T, bytes) in uint8."""
    if not x.size(-1):
        return x
    if bits == 16:
        return x.contiguous().view(torch.uint8)
    codes, scale = pack(x, bits)
    row = torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), dim=-1)
    return F.pad(row, (0, row.size(-1) % 2))  # so that scales, of 2 bytes, are aligned


def _from_bytes(row: Tensor, width: int, bits: int, dtype: torch.dtype) -> Buffer:
    """The inverse of `_to_bytes`, without unpacking: what eigenzoo's own cache would hold."""
    if not width:
        return row
    if bits == 16:
        return row.view(dtype)
    codes = row[..., 2 : 2 + width * bits // 8]
    return Packed(codes.view(torch.int8) if bits == 8 else codes, row[..., :2].view(SCALE))


def check_not_quantized(cache: Cache) -> None:
    """Raise ValueError for transformers' quantized cache, which would round a second time."""
    if any("Quantized" in type(layer).__name__ for layer in cache.layers):
        raise ValueError(
            "given a quantized cache, but by its config this model quantizes its cache already: "
            "pass another cache"
        )
