"""Long work as steps, of which every one is kept on disk: a step that was killed is taken again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..utils.replace import replacing
from ..utils.resume import check_same

PROGRESS = "progress.json"
BAR = (
    "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} layer passes "
    "[{elapsed}<{remaining}, {rate_fmt}]"
)


class Step(NamedTuple):
    """A step of the work: `take` leaves files, and returns the names of those no longer needed."""

    name: str
    cost: float  # in forward passes through a layer
    take: Callable[[], Sequence[str]]


def take_steps(
    folder: Path,
    steps: Sequence[Step],
    facts: Mapping[str, Any],
    begin: Callable[[], None],
    delete: Callable[[str], None],
) -> None:
    """Take the steps that are not done yet, and note each in `folder`.

    facts: what the work depends on, as JSON holds it. begin: is called before the first step of
    new work. delete: removes a file that is no longer needed. Raises ValueError if the folder was
    left by work on other facts.
    """
    state, done = folder / PROGRESS, 0
    if state.exists():
        try:
            left = json.loads(state.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{state} is damaged ({error}): delete {folder} to start again"
            ) from error
        check_same(folder, facts, left["facts"])
        done = left["done"]
    else:
        begin()
    costs = [step.cost for step in steps]
    with tqdm(
        total=sum(costs),
        initial=sum(costs[:done]),
        bar_format=BAR,
        unit="pass",
        disable=None,
        leave=False,
    ) as bar:
        for number, step in enumerate(steps[done:], done + 1):
            bar.set_description(step.name)
            stale = step.take()
            with replacing(state) as part:
                part.write_text(json.dumps({"facts": dict(facts), "done": number}))
            for name in stale:
                delete(name)
            bar.update(step.cost)
