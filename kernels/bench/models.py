"""Decoding of whole models under CUDA graphs, by `eigenzoo bench` in a process of its own.

A process can be stopped when time is up, and shares no memory and no error with this one.
"""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from .attention import mixed
from .setup import Budget, Row, Setup, Sizes, reason

COMMAND = "from eigenzoo.zoo.cli import main; main()"
NEEDED = {"compile": "recompile_limit", "compiler.nested_compile_region": "max_reuse_entries"}
LEAST = 60.0  # seconds, in which three models may be compiled if all goes well
CACHES = 2.25  # of contestants that take turns: dense, a quarter, and transformers'


def lacking() -> str | None:
    """Why this torch cannot compile the models of this package; None if it can."""
    for name, argument in NEEDED.items():
        *place, last = name.split(".")
        function = getattr(torch.compiler if place else torch, last, None)
        if function is None or argument not in inspect.signature(function).parameters:
            return (
                f"torch {torch.__version__} has no argument {argument} of torch.{name}: whole "
                "models need torch 2.12 or later"
            )
    return None


def measure(setup: Setup, sizes: Sizes, budget: Budget) -> Iterator[Row]:
    """The rows of `eigenzoo bench`, in cells that the time and the memory allow."""
    if why := lacking():
        budget.skip("whole models", why)
        return
    for context, batch in sizes.contexts:
        what = f"whole models at context {context}, batch {batch}"
        needed = int(CACHES * sizes.token_bytes * context * batch)
        if needed > setup.memory:
            budget.skip_large(what, needed, setup.memory)
        elif budget.allows(what, LEAST):
            budget.say(what)
            try:
                yield from json.loads(
                    setup.decode(words(setup, sizes, context, batch), budget.left)
                )
            except TimeoutError:
                budget.skip(what, "it was not done when time was up")
            except Exception as error:
                yield {"context": context, "batch": batch, "failed": reason(error)}


def words(setup: Setup, sizes: Sizes, context: int, batch: int) -> list[str]:
    """The command of a cell: dense, a quarter of the bytes, and transformers' static cache."""
    return [
        *("bench", "--shape", sizes.model, "--heads-per-latent", str(sizes.shared)),
        *("--segments", "/".join(mixed(sizes.shared * sizes.model_head_dim)), "--transformers"),
        *("--context", str(context), "--batch", str(batch), "--steps", "64", "--rounds", "3"),
        *("--dtype", "bfloat16", "--device", setup.device.type, "--graphs", "--json"),
    ]


def decode(words: Sequence[str], seconds: float) -> str:
    """What `eigenzoo` prints. Raises TimeoutError, and RuntimeError with its last line."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own processes end with it
    ) as process:
        try:
            printed, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"stopped after {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError((said.strip().splitlines() or ["no message"])[-1])
    return printed
