"""Long work as steps, of which every one is kept on disk: a step that was killed is taken again."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from ..utils.regular import regular
from ..utils.replace import replacing
from ..utils.resume import KeptFiles, check_same, sealed, unsealed

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
    kept: KeptFiles,
    steps: Sequence[Step],
    facts: Mapping[str, Any],
    begin: Callable[[], None],
) -> None:
    """Take the steps that are not done yet, and note each in the folder of their files.

    facts: what the work depends on, see `provenance.work`. begin: is called before the first step
    of new work. Raises ValueError if the folder was left by work on other facts, or is damaged.
    """
    done = _done(kept, facts)
    if not done:
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
            kept.forget(stale)
            progress = {"facts": dict(facts), "done": number, "files": kept.sums}
            with replacing(kept.folder / PROGRESS) as part:
                part.write_text(json.dumps(sealed(progress)))
            kept.delete(stale)
            bar.update(step.cost)


def _done(kept: KeptFiles, facts: Mapping[str, Any]) -> int:
    """How many steps are done by the files, which are those of `facts`, and whole."""
    state = kept.folder / PROGRESS
    try:
        left = unsealed(json.loads(regular(state).read_bytes()))
    except FileNotFoundError:
        return 0
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{state} is damaged ({error}): delete {kept.folder} to start again"
        ) from error
    check_same(kept.folder, facts, left.get("facts", {}))
    kept.sums = left["files"]
    kept.check()
    return left["done"]
