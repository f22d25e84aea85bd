"""The compressed key/value cache: fixed buffers, written in place, safe for CUDA graphs."""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor


class Latent(NamedTuple):
    """What a layer keeps of its keys, or of its values, per token: `heads` vectors of `width`."""

    heads: int
    width: int


class LayerCache(NamedTuple):
    """The buffers of one layer. It does not know which: compiled layers of equal shapes are one."""

    keys: Tensor
    values: Tensor

    def update(self, pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, heads, T, width) to slots pos (T,); return the buffers."""
        self.keys.index_copy_(2, pos, k)
        self.values.index_copy_(2, pos, v)
        return self.keys, self.values


class StaticCache:
    """Buffers (B, heads, S, width) for the keys and values of every layer, allocated once.

    A slot is written once per prompt and read only by tokens at or after it, so a cache is used
    for the next prompt as it is: what an earlier prompt left behind is never seen.
    """

    def __init__(
        self,
        latents: Sequence[tuple[Latent, Latent]],
        batch: int,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        def buffer(latent: Latent) -> Tensor:
            # zeros, not empty: a slot not seen still enters as 0 * v, and 0 * nan is nan
            x = torch.zeros(batch, latent.heads, slots, latent.width, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(x)  # else in-place writes rule out CUDA graphs
            return x

        self.batch, self.slots = batch, slots
        self.keys = [buffer(k) for k, _ in latents]
        self.values = [buffer(v) for _, v in latents]

    def layer(self, index: int) -> LayerCache:
        """The buffers of one layer."""
        return LayerCache(self.keys[index], self.values[index])

    def first(self, slots: int) -> "StaticCache":
        """The first slots as a cache: a view, so what is written there is written here.

        A prompt's next part is best given the slots up to its own: it reads all that it is given.
        """
        view = copy(self)
        view.slots = slots
        view.keys = [x[:, :, :slots] for x in self.keys]
        view.values = [x[:, :, :slots] for x in self.values]
        return view

    def check(self, tokens: Tensor, pos: Tensor) -> None:
        """Raise ValueError unless tokens (B, T) at slots pos (T,) fit; compiled code skips it."""
        if torch.compiler.is_compiling():
            return  # a look at pos would break the graph: generation counts slots itself
        if tokens.size(0) != self.batch:
            raise ValueError(f"the cache was made for batch {self.batch}, given {tokens.size(0)}")
        if int(pos.max()) >= self.slots or int(pos.min()) < 0:
            raise ValueError(
                f"slots {int(pos.min())} to {int(pos.max())} do not fit a cache of {self.slots}: "
                "make a larger cache or pass fewer tokens"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        return sum(x.nbytes for x in self.keys + self.values)
