"""Adapters that let the native model keep its latents in transformers' caches."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...zoo.models.cache import Buffer, Pack, as_bytes, of_bytes
from ...zoo.models.config import Config
from ...zoo.models.packing import Latent, pack


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

    Those require as many heads of values as of keys, and one dtype for both. If the numbers of
    latents differ, or if one of them is packed, a token's keys, and its values, are one head: that
    of a row, as `StaticCache` has it. This works in every cache that does no arithmetic on its
    contents.
    """

    def __init__(self, cache: Cache, index: int, latents: tuple[Latent, Latent]):
        self.cache, self.index, self.latents = cache, index, latents

    def update(self, pos: Tensor, k: Tensor, v: Tensor, pack: Pack = pack) -> tuple[Buffer, Buffer]:
        """Append k and v (B, heads, T, width); return all slots of the layer. pos is not used."""
        packed = any(latent.segments for latent in self.latents)
        if not packed and k.size(1) == v.size(1):
            return self.cache.update(k, v, self.index)
        # a process that shares the model with others has a part of the heads
        of_k, of_v = (
            x._replace(heads=y.size(1)) for x, y in zip(self.latents, (k, v), strict=True)
        )
        rows = _row(k, of_k, packed, pack), _row(v, of_v, packed, pack)
        keys, values = self.cache.update(*rows, self.index)
        return _buffer(keys[:, 0], of_k, k.dtype), _buffer(values[:, 0], of_v, k.dtype)


def _row(x: Tensor, latent: Latent, packed: bool, pack: Pack) -> Tensor:
    """Vectors (B, heads, T, width) as one head: (B, 1, T, n), in uint8 if `packed`."""
    if packed:
        return as_bytes(x, latent, pack)[:, None]
    return x.transpose(1, 2).flatten(2)[:, None]


def _buffer(row: Tensor, latent: Latent, dtype: torch.dtype) -> Buffer:
    """The inverse of `_row`, without unpacking: what eigenzoo's own cache would hold."""
    if row.dtype == torch.uint8:
        return of_bytes(row, latent, dtype)
    return row.unflatten(-1, (latent.heads, -1)).transpose(1, 2)


def check_not_quantized(cache: Cache) -> None:
    """Raise ValueError for transformers' quantized cache, which would round a second time."""
    if any("Quantized" in type(layer).__name__ for layer in cache.layers):
        raise ValueError(
            "given a quantized cache, but by its config this model quantizes its cache already: "
            "pass another cache"
        )
