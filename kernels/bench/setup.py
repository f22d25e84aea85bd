"""What all steps of the bench share: the device, its clock, and the time that is left."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]
Op = Callable[..., Tensor]
Row = dict[str, Any]  # of the report, which is written as JSON


class Setup(NamedTuple):
    """A device and how to use it.

    memory: bytes that the caches of one case may take. rotation: bytes of all caches that calls
    take turns on: many times the L2 cache. seconds: time per call, where all calls run one after
    another. ops: the fused ops by name. decode: runs `eigenzoo` with some words for at most some
    seconds and returns what it prints; raises RuntimeError, or TimeoutError.
    """

    device: torch.device
    name: str
    memory: int
    rotation: int
    bandwidth: float  # bytes per second at which a sum reads memory
    seconds: Callable[[Sequence[Call]], float]
    ops: Mapping[str, Op]
    decode: Callable[[Sequence[str], float], str]


class Sizes(NamedTuple):
    """What is measured.

    heads, kv_heads, head_dim: of the ops' model. shared: kv heads of one latent. cells: slots and
    sequences. model: a shape that `eigenzoo bench` knows; token_bytes: of its uncompressed cache;
    contexts: tokens and sequences of whole models.
    """

    heads: int = 32  # as Llama-3.1-8B
    kv_heads: int = 8
    head_dim: int = 128
    shared: int = 4
    # what is measured first matters most: time may run out
    cells: tuple[tuple[int, int], ...] = (
        *((32768, 1), (32768, 16), (8192, 16), (131072, 1), (8192, 1)),
        *((8192, 64), (131072, 16), (32768, 64), (131072, 64)),
    )
    model: str = "llama-3.2-1b"
    model_head_dim: int = 64
    token_bytes: int = 16 * 2 * 8 * 64 * 2
    contexts: tuple[tuple[int, int], ...] = ((8192, 16), (32768, 16), (131072, 1), (8192, 1))


class Budget:
    """Seconds for all steps. A step ends at its deadline; what it leaves is for the next ones."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock, self.start = seconds, clock, clock()
        self.end = self.start + seconds
        self.skipped: list[str] = []

    def until(self, share: float) -> "Budget":
        """The same budget, which ends when a share of all seconds is spent."""
        part = Budget(self.seconds, self.clock)
        part.start, part.end = self.start, self.start + share * self.seconds
        part.skipped = self.skipped
        return part

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    @property
    def left(self) -> float:
        """Seconds until the end, 0 or more."""
        return max(0.0, self.end - self.clock())

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for a case that takes so long; if not, it counts as skipped."""
        if self.left > seconds:
            return True
        self.skip(what, f"{self.left:.0f} s are left")
        return False

    def skip(self, what: str, why: str) -> None:
        """Note that something is not measured, and say so."""
        self.skipped.append(f"{what}: {why}")
        self.say(f"skipped {what}: {why}")

    def skip_large(self, what: str, needed: int, memory: int) -> None:
        """Note that caches of so many bytes do not fit."""
        self.skip(what, f"{needed / 2**30:.1f} GiB of caches, more than {memory / 2**30:.1f}")

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"[{self.spent:4.0f} s] {text}", file=sys.stderr, flush=True)


def graph_seconds(calls: Sequence[Call], rounds: int = 10) -> float:
    """Median seconds per call on a GPU, where a CUDA graph replays all of them."""
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times[1:]) / len(calls)


def reason(error: BaseException) -> str:
    """One line about an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
