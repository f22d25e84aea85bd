"""The settings of a sweep: every combination of some values."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ..compression.settings import Settings
from ..models.config import Config


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """All settings with one value of every axis; an axis is a field of `Settings`.

    Raises ValueError for a value that is invalid whatever the other axes say.
    """
    cells = [Settings(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    block = Settings().anchor_block  # has no effect on keys that are not anchored
    cells = [s if s.keys == "anchored" else s._replace(anchor_block=block) for s in cells]
    reasons = {s: why_invalid(s) for s in cells}
    for name, values in axes.items():
        for value in values:
            of_value = [reason for s, reason in reasons.items() if getattr(s, name) == value]
            if of_value and all(of_value):
                raise ValueError(of_value[0])
    # rows say what None stood for
    return [s if reason else s._replace(kv_bits=s.bits) for s, reason in reasons.items()]


def distinct(cells: Sequence[Settings], config: Config) -> list[Settings]:
    """The settings without those that come to the same on a model of this config."""
    first: dict[Settings, Settings] = {}
    for asked in cells:
        fitted = asked if why_invalid(asked, config) else asked.fit(config)
        first.setdefault(fitted, asked)
    return list(first.values())


def why_invalid(settings: Settings, config: Config | None = None) -> str:
    """Why these settings fit no model, or not a model of this config; empty if they fit."""
    try:
        settings.check()
        if config:
            settings.fit(config)
    except ValueError as error:
        return str(error)
    return ""
