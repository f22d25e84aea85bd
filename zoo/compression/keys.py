"""The ways to hold the keys of models with a rotation, and the rule that chooses one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..models.config import Config

KEYS = {
    "rebuild": "latents of keys before the rotation; every read lifts and rotates all keys",
    "anchored": "latents of keys rotated within their block; a query for each block reads them",
    "pairs": "rotated keys, compressed across heads at each frequency",
    "rotated": "latents of rotated keys: anchored in a single block",
    "full": "uncompressed keys, in any model; only values are compressed",
    "auto": "anchored or rebuild, by the model and the method",
}
TURNED = ("anchored", "pairs", "rotated")  # cached at angles that may not change later
BLOCK_TEXT = "64; 16 below keep 0.25, and for caches of 16 bits"


class Choice(NamedTuple):
    """How keys are held: a name in `KEYS`, and why."""

    keys: str
    reason: str


def default_block(keep: float, rounded: bool) -> int:
    """Positions in a block of anchored keys: see `BLOCK_TEXT`.

    A decoding step makes a query for each block. Longer blocks make it faster, but the keys of a
    longer block fill more dimensions, which costs the more the smaller the cache is.
    """
    return 64 if rounded and keep >= 0.25 else 16


def choose_keys(config: Config, rebuilds: bool = False) -> Choice:
    """What `auto` means for a model.

    rebuilds: whether the method only knows rebuilt keys. Without a rotation nothing is rebuilt.
    """
    if not config.rotary:
        return Choice("rebuild", "nothing rotates these keys: queries read their latents")
    if rebuilds:
        return Choice("rebuild", "the method is defined with keys that are rebuilt")
    if config.steady_length is not None:
        return Choice("rebuild", "the angles of this RoPE change with the length of the text")
    reason = "one query a block costs less than lifting every key, and loses little more"
    return Choice("anchored", reason)
