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
BLOCK = 16  # positions in a block of anchored keys, unless told


class Choice(NamedTuple):
    """How keys are held: a name in `KEYS`, the positions in an anchored block, and why."""

    keys: str
    block: int
    reason: str


def choose_keys(config: Config, rebuilds: bool = False) -> Choice:
    """What `auto` means for a model.

    rebuilds: whether the method only knows rebuilt keys. Without a rotation nothing is rebuilt.
    """
    if not config.rotary:
        return Choice("rebuild", BLOCK, "nothing rotates these keys: queries read their latents")
    if rebuilds:
        return Choice("rebuild", BLOCK, "the method is defined with keys that are rebuilt")
    if not config.fixed_angles:
        return Choice("rebuild", BLOCK, "the angles of longrope change with the length of the text")
    reason = "one query a block costs less than lifting every key, and loses little more"
    return Choice("anchored", BLOCK, reason)
