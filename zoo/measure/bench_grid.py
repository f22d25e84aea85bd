"""A bench at every batch size and context, with its rows in a file from which it resumes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ..utils.jsonl import BENCH, append, remove, resume
from ..utils.records import BenchOrigin, BenchRow
from ..utils.resume import check_same
from .bench import bench
from .timed_models import Cell, Contestant


class BenchGrid(NamedTuple):
    """Contexts and batches to decode at. buffer: slots of static caches, in contexts."""

    contexts: Sequence[int] = (2048,)
    batches: Sequence[int] = (1,)
    buffer: int = 1
    steps: int = 16
    rounds: int = 3

    def check(self) -> None:
        """Raise ValueError for numbers at which nothing can be timed."""
        contexts, batches, buffer, steps, rounds = self
        if min(contexts) < steps + 2 or min(*contexts, *batches, buffer, steps, rounds) < 1:
            raise ValueError(
                f"contexts {[*contexts]}, batches {[*batches]}, buffer {buffer}, {rounds} rounds "
                f"of {steps} steps: expected at least 1 of each, and contexts at least two tokens "
                "longer"
            )

    @property
    def slots(self) -> int:
        """Of the largest static cache."""
        return self.buffer * max(self.contexts)

    def cells(
        self, dtype: torch.dtype, device: torch.device, compile: bool, graphs: bool = False
    ) -> list[Cell]:
        """Every combination, the batches one after the other."""
        return [
            Cell(length, batch, self.buffer * length, self.steps, dtype, device, compile, graphs)
            for batch in self.batches
            for length in self.contexts
        ]


def rows_left(file: Path | None, origin: BenchOrigin, names: Sequence[str]) -> list[BenchRow]:
    """The rows of whole cells that the same command left in the file, which is ready for more.

    origin: how the rows are made. names: of the contestants; rows of a cell that some of them lack
    are removed. Raises ValueError if the file holds anything but rows of a bench, and if the
    command measured other models, or with other versions or on another processor.
    """
    if file is None:
        return []
    rows = [row for row in resume(file, BENCH) if row["command"] == origin["command"]]
    for row in rows:
        check_same(file, _facts(origin), _facts(row), "choose another --out")
    cells: dict[tuple[int, int], list[BenchRow]] = {}
    for row in rows:
        cells.setdefault((row["context"], row["batch"]), []).append(row)
    cut = [cell for cell, found in cells.items() if [x["model"] for x in found] != [*names]]
    if cut:
        mine = origin["command"]
        remove(
            file,
            BENCH,
            lambda row: row["command"] == mine and (row["context"], row["batch"]) in cut,
        )
    return [row for cell, found in cells.items() if cell not in cut for row in found]


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    names = "contestants", "processor", "code"
    return {name: row.get(name) for name in names} | (row.get("versions") or {})


def bench_cells(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    rounds: int,
    origin: BenchOrigin,
    left: Sequence[BenchRow] = (),
    file: Path | None = None,
) -> Iterator[BenchRow]:
    """The rows of all cells as they are made, appended to the file.

    origin: how the rows are made. left: what `rows_left` returned; cells that have rows there are
    not measured again.
    """
    done = {(row["context"], row["batch"]) for row in left}
    for cell in dict.fromkeys(cells):  # a context given twice is measured once
        if (cell.context, cell.batch) not in done:
            for result in bench(contestants, cell, rounds):
                row = cast(BenchRow, {**result, **origin})
                yield append(file, row) if file else row
