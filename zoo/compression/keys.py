"""The ways to hold the keys that a rotation turns, and the rule that chooses one."""

from typing import NamedTuple

from ..models.config import Config

KEYS = {
    "rebuild": "lifted and rotated whenever they are read",
    "anchored": "turned within blocks of slots: one query reads each block",
    "pairs": "compressed frequency by frequency across heads, and cached rotated",
    "rotated": "one basis of keys that are rotated already: anchored in one block",
    "full": "whole, only values are compressed",
    "auto": "chosen by the model and the device",
}
TURNED = ("anchored", "pairs", "rotated")  # cached at angles that may not change later
BLOCK = 16  # slots of a block of anchored keys, unless told


class Choice(NamedTuple):
    """How keys are held: a name in `KEYS`, the slots of an anchored block, and why."""

    keys: str
    block: int
    reason: str


def choose_keys(config: Config, device: str, rebuilds: bool = False) -> Choice:
    """What `auto` means for a model on a kind of device, such as cpu or cuda.

    rebuilds: the method knows no other way. Where nothing rotates the keys, none is rebuilt.
    """
    if not config.rotary:
        return Choice("rebuild", BLOCK, "nothing rotates these keys: queries read their latents")
    if rebuilds:
        return Choice("rebuild", BLOCK, "the method is defined with keys that are rebuilt")
    if not config.fixed_angles:
        return Choice("rebuild", BLOCK, "the angles of longrope change with the length of the text")
    reason = "one query a block costs less than lifting every key, and loses little more"
    return Choice("anchored", BLOCK, reason)
