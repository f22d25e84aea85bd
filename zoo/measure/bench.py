"""Decode speed and memory of several models side by side, and what memory bandwidth allows."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..utils.interrupt import interruptible
from ..utils.memory import peak, reset_peak
from ..utils.records import BenchCell, BenchExtra, BenchResult
from .timed_models import Cell, Contestant


class Figures(NamedTuple):
    """What a contestant's process reports once it is ready."""

    weight_bytes: int
    kv_bytes: int
    start_seconds: float  # of loading, and of the first round, which compiles
    dtype: str | None = None
    extra: BenchExtra | None = None


def bench(contestants: Sequence[Contestant], cell: Cell, rounds: int = 3) -> list[BenchResult]:
    """Decode at the end of the context, each contestant in its own process, in turns; medians.

    The others are compared with the first contestant. A row each: tokens per second; the floor
    (bytes of weights and cache at the measured bandwidth); `kv_read_share`, the share s of the
    cache in all bytes read; `speedup` over the first; `bound`, the largest speedup that a cache of
    a share r of the first's bytes can give, 1 / (1 - s (1 - r)) with the first's s; and the peak
    of memory while decoding. A contestant that fails has a row with the reason, `failed`.
    """
    bandwidth = read_bandwidth(cell.device)
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(c, cell)) for c in contestants]
        for worker in tqdm(workers, desc=_title(cell), disable=None, leave=False):
            worker.start()  # one after the other: compilers take all cores
        for _ in range(rounds):
            for worker in workers:
                worker.round()
    rows = [worker.row(bandwidth) for worker in workers]
    first = rows[0]
    for row in rows:
        if "failed" in row or "failed" in first:
            continue
        share = first["kv_read_share"]
        row["speedup"] = row["tokens_per_second"] / first["tokens_per_second"]
        row["bound"] = 1 / (1 - share * (1 - row["kv_bytes_read"] / first["kv_bytes_read"]))
    return rows


class _Worker:
    """A process that holds a contestant and takes a round of steps when told to."""

    def __init__(self, contestant: Contestant, cell: Cell):
        self.contestant, self.cell = contestant, cell
        self.times: list[float] = []
        self.memory, self.figures = 0, Figures(0, 0, 0.0)
        self.failed: str | None = None
        context = multiprocessing.get_context("spawn")  # a clean one: fork would share memory
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, contestant, cell), daemon=True
        )
        self.theirs = theirs

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # ends the loop of the process
        if self.process.pid is not None:
            self.process.join(5)
            self.process.kill()
            self.process.join()

    def start(self) -> None:
        """Begin the process, and wait until it is ready."""
        self.process.start()
        self.theirs.close()  # else the end of the process would not be noticed here
        self.figures = self._ask() or self.figures

    def round(self) -> None:
        """Have a round of steps taken, unless the process is gone."""
        if self.failed is None:
            with suppress(ConnectionError):  # a dead process is noticed by `_ask`
                self.pipe.send("go on")
            if answer := self._ask():
                times, self.memory = answer
                self.times += times

    def _ask(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):  # killed, mostly for its memory
            self.process.join()
            answer = f"stopped with exit code {self.process.exitcode}"
        if isinstance(answer, str):
            self.failed = answer
            return None
        return answer

    def row(self, bandwidth: float) -> BenchResult:
        """What was measured, with the floor that the bandwidth sets."""
        cell = self.cell
        row: BenchCell = {
            "model": self.contestant.name,
            "context": cell.context,
            "batch": cell.batch,
            "slots": cell.slots,
            "dtype": self.figures.dtype or str(cell.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "device": cell.device.type,
        }
        if self.failed is not None:
            return {**row, "failed": self.failed}
        seconds, figures = median(self.times), self.figures
        read = figures.weight_bytes + figures.kv_bytes
        return {
            **row,
            "tokens_per_second": cell.batch / seconds,
            "seconds_per_step": seconds,
            "floor_seconds": read / bandwidth,
            "weight_bytes_read": figures.weight_bytes,
            "kv_bytes_read": figures.kv_bytes,
            "kv_read_share": figures.kv_bytes / read,
            "bandwidth": bandwidth,
            "peak_memory": self.memory,
            "start_seconds": figures.start_seconds,
            **(figures.extra or {}),
        }


def _serve(pipe: Connection, contestant: Contestant, cell: Cell) -> None:
    """The loop of a contestant's process; the end of the pipe ends it."""
    try:
        with interruptible():
            start = time.perf_counter()
            run = contestant.start(cell)
            run.round()
            seconds = time.perf_counter() - start
            pipe.send(Figures(run.weight_bytes, run.kv_bytes, seconds, run.dtype, run.extra))
            reset_peak(cell.device)
            for _ in _orders(pipe):
                pipe.send((run.round(), run.peak() if run.peak else peak(cell.device)))
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, sent to all processes or to the other
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        if not isinstance(error, ValueError):  # which the row tells in full
            raise


def _orders(pipe: Connection) -> Iterator[Any]:
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        return


def _title(cell: Cell) -> str:
    return f"context {cell.context}, batch {cell.batch}: compiling"


def read_bandwidth(device: torch.device, size: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes per second at which a sum reads memory."""
    x = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        x.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return size / median(times[1:])
