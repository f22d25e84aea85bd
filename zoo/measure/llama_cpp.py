"""llama.cpp as a contestant of a bench: its program llama-bench, or the package llama-cpp-python.

Both decode one sequence on the CPU with flash attention, with as many threads as torch has.
"""

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from ..inference.gguf_file import GGUF, open_gguf
from .timed_models import Cell, Run

CACHES = "f16", "q8_0"  # types of ggml
PROGRAM = "llama-bench"
OPTIONS = "--n-depth", "--flash-attn", "--device", "jsonl"  # that early versions lack


def find_program() -> str | None:
    """The path of llama-bench; None where only the package llama-cpp-python is installed.

    Raises ValueError without either, or if llama-bench is too old.
    """
    program = shutil.which(PROGRAM)
    if program is None and find_spec("llama_cpp") is None:
        raise ValueError(
            f"llama.cpp is not installed: expected its program {PROGRAM} on the PATH, or the "
            "package llama-cpp-python (pip install llama-cpp-python)"
        )
    if program is not None:
        done = subprocess.run([program, "--help"], capture_output=True, text=True)
        missing = [option for option in OPTIONS if option not in done.stdout]
        if missing:
            raise ValueError(f"{program} is too old: it lacks {', '.join(missing)}; upgrade it")
    return program


@dataclass(frozen=True)
class LlamaCpp:
    """The model in a GGUF file, decoded by llama.cpp with a cache of one of ggml's types.

    program: the path of llama-bench; None takes the package llama-cpp-python.
    """

    path: Path
    cache: str
    program: str | None

    @cached_property
    def file(self) -> GGUF:
        """What the file holds."""
        return open_gguf(self.path)

    @property
    def kind(self) -> str:
        """The type of most weights, in bytes, as ggml calls it."""
        from gguf import GGMLQuantizationType

        sizes: Counter[int] = Counter()
        for tensor in self.file.tensors.values():
            sizes[tensor.kind] += tensor.nbytes
        return GGMLQuantizationType(max(sizes, key=sizes.__getitem__)).name

    @property
    def name(self) -> str:
        """As the rows have it."""
        return f"llama.cpp {self.kind}, {self.cache} cache"

    def start(self, cell: Cell) -> Run:
        """See `Contestant`. A round decodes at the end of a cache that a prompt has filled."""
        begin = _program if self.program else _package
        started = begin(self, cell)
        tensors = self.file.tensors
        weights = sum(x.nbytes for x in tensors.values())
        if "output.weight" in tensors:  # else the embedding is the head, which is read
            weights -= tensors["token_embd.weight"].nbytes
        return Run(
            started.round,
            weights,
            cell.context * self._token_bytes(),
            self.kind,
            {
                "prompt_tokens_per_second": started.prompt,
                "cache_type": self.cache,
                "tool": started.tool,
            },
            started.peak,
        )

    def _token_bytes(self) -> int:
        """Bytes of one token in the cache: the rows of its keys and values in all layers."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.cache.upper()]]
        rows = (x.shape[0] for name, x in self.file.tensors.items() if name.endswith(KEPT))
        return sum(rows) // numbers * size


KEPT = "attn_k.weight", "attn_v.weight"


class _Started(NamedTuple):
    """A llama.cpp that is ready. prompt: tokens per second; peak: as in `Run`."""

    prompt: float
    round: Callable[[], list[float]]
    tool: str
    peak: Callable[[], int] | None = None


def _program(model: LlamaCpp, cell: Cell) -> _Started:
    """llama-bench: a process of its own for the prompt, and one for each round."""
    filled, peaks = cell.context - cell.steps, [0]

    def measure(prompt: int, new: int, depth: int) -> dict[str, Any]:
        words = [model.program, "-m", model.path, "-p", prompt, "-n", new, "-d", depth, "-r", 1]
        words += ["-ctk", model.cache, "-ctv", model.cache, "-fa", 1, "-dev", "none"]
        words += ["-t", torch.get_num_threads(), "-o", "jsonl"]
        out, peaks[0] = _watched([str(word) for word in words])
        return json.loads(out)

    prompt = measure(filled, 0, 0)
    return _Started(
        prompt["avg_ts"],
        lambda: [1e-9 * measure(0, cell.steps, filled)["avg_ns"] / cell.steps],
        f"{PROGRAM} {prompt['build_commit']} ({prompt['build_number']})",
        lambda: peaks[0],
    )


def _watched(words: list[str]) -> tuple[str, int]:
    """What a program prints, and its peak bytes. Raises ValueError with what it says if it fails.

    The peak is sampled: what the system keeps of a process counts that which started it.
    """
    held = 0
    with psutil.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with suppress(psutil.Error):
                held = max(held, process.memory_info().rss)
            time.sleep(0.02)
        out, said = process.communicate()
    if process.returncode:
        lines = said.strip().splitlines() or ["it says nothing"]
        raise ValueError(f"{words[0]} failed with exit code {process.returncode}: {lines[-1]}")
    return out, held


def _package(model: LlamaCpp, cell: Cell) -> _Started:
    """The package llama-cpp-python, in this process."""
    import llama_cpp

    threads, kind = torch.get_num_threads(), getattr(llama_cpp, f"GGML_TYPE_{model.cache.upper()}")
    llama = llama_cpp.Llama(
        str(model.path),
        n_ctx=cell.slots,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    filled = cell.context - cell.steps

    def step(token: int) -> int:
        llama.eval([token])
        return llama.sample(temp=0.0)

    step(0)  # reads the weights for the first time
    llama.n_tokens, start = 0, time.perf_counter()
    llama.eval([0] * filled)
    prompt = filled / (time.perf_counter() - start)

    def round() -> list[float]:
        llama.n_tokens, token, times = filled, 0, []  # the next step overwrites what follows
        for _ in range(cell.steps):
            start = time.perf_counter()
            token = step(token)
            times.append(time.perf_counter() - start)
        return times

    return _Started(prompt, round, f"llama-cpp-python {version('llama_cpp_python')}")
