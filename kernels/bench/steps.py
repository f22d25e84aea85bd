"""The steps of the bench, in order, within a budget of time."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import attention, checks, models, report
from .setup import Budget, Row, Setup, Sizes, graph_seconds

CHECKED, TIMED = 0.2, 0.5  # shares of the time after which checks, and ops, end
ROTATION = 1 << 30  # bytes: 20 times the L2 cache of an H100
SUMMED = 1 << 32  # bytes


def of_gpu(share: float) -> Setup:
    """The GPU that torch uses, with its read bandwidth. share: of its free memory, for caches.

    Raises ValueError if there is none, or if Triton is missing.
    """
    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a GPU that torch can use, and there is none")
    from .. import ops
    from ..install import register

    register("cuda")
    free, _ = torch.cuda.mem_get_info()
    size = min(SUMMED, free // 4)
    x = torch.ones(size // 4, device="cuda")
    bandwidth = 4 * x.numel() / graph_seconds([x.sum])
    del x
    return Setup(
        device=torch.device("cuda"),
        name=torch.cuda.get_device_name(),
        memory=int(share * free),
        rotation=min(ROTATION, int(share * free) // 4),
        bandwidth=bandwidth,
        seconds=graph_seconds,
        ops={name: getattr(ops, name) for name in checks.OPS},
        decode=models.decode,
    )


def run(setup: Setup, sizes: Sizes, budget: Budget, out: Path, about: Row) -> Row:
    """Take all steps; the report, which is also written to `out` after every step.

    about: what else the report says, of versions and the command.
    """
    written: Row = {"device": setup.name, "bandwidth": setup.bandwidth, **about}
    written |= {"seconds": {}, "skipped": budget.skipped}

    def step(name: str, rows: Iterable[Row], show: Callable[[list[Row]], str]) -> None:
        start = budget.spent
        written[name] = [*rows]
        written["seconds"][name] = round(budget.spent - start, 1)
        report.save(written, out)
        print(show(written[name]), flush=True)

    budget.say(f"{setup.name}: a sum reads {setup.bandwidth / 1e9:.0f} GB/s")
    step("checks", checks.checks(setup, budget.until(CHECKED)), report.checked)
    step("ops", attention.measure(setup, sizes, budget.until(TIMED)), report.timed)
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()  # models run in other processes
    step("models", models.measure(setup, sizes, budget), report.decoded)
    try:
        report.plot(written, out)
    except ValueError as error:
        budget.skip("the plot", str(error))
    report.save(written, out)
    for line in budget.skipped:
        print(f"skipped {line}")
    return written


def about(command: str) -> Row:
    """What else a report says."""
    import triton

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
