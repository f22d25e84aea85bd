"""Cached rows of a text, put behind another text: they are computed once and read elsewhere.

A row is what a layer caches of a token. Where keys are cached before the rotation, or rotated
within a block of positions only, a row does not tell where its block stands. It does tell what
stood before: above the first layer, rows depend on all earlier tokens. So behind another text, rows
that were moved differ from rows that are computed there, and answers may differ too.
"""

from torch import Tensor

from ..models.cache import Buffer, StaticCache
from ..models.config import Config
from ..models.packing import Packed


def shift_step(config: Config) -> int:
    """Rows may be moved by multiples of so many positions: by the block of anchored keys, or by 1.

    Raises ValueError for a model whose rows tell their positions.
    """
    if config.learned_positions:
        raise ValueError(
            f"rows of this {config.family} cannot be moved, because it adds learned positions to "
            "its tokens: expected a model with RoPE or ALiBi"
        )
    if not config.rotary:
        return 1
    layers = range(config.num_hidden_layers)
    whole = [layer for layer in layers if not config.compressed(layer)[0]]
    if whole or getattr(config, "pairs", False):
        where = f"layer {whole[0]} caches" if whole else "pairs are"
        raise ValueError(
            f"rows cannot be moved, because {where} keys that are rotated by their position: "
            "compress with --keys anchored or --keys rebuild"
        )
    return getattr(config, "anchor", 1)


def move(source: StaticCache, start: int, cache: StaticCache, at: int, count: int) -> None:
    """Copy the rows of `count` slots, from `start` on, to the slots of a cache from `at` on.

    Both are caches of one model, for equal batches. Only shifts by multiples of `shift_step` keep
    the meaning of rows. Raises ValueError if the slots are not there, or if a cache has rings.
    """
    if source.rings or cache.rings:
        raise ValueError(
            "rows cannot be moved, because layers with windows keep only the last tokens: expected "
            "caches that keep all slots"
        )
    if start < 0 or at < 0 or start + count > source.slots or at + count > cache.slots:
        raise ValueError(
            f"given {count} slots from {start} of {source.slots} to {at} of {cache.slots}: "
            "expected slots that both caches have"
        )
    buffers = zip(cache.keys + cache.values, source.keys + source.values, strict=True)
    for to, of in buffers:
        by_slot(to).narrow(-2, at, count).copy_(by_slot(of).narrow(-2, start, count))


def by_slot(buffer: Buffer) -> Tensor:
    """The tensor of a buffer, whose last dimension but one are the slots."""
    return buffer.rows if isinstance(buffer, Packed) else buffer
