"""What a refinement does when: how long, how fast, and in which order it reads."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("auto", "float32", "bfloat16")


class RefineSettings(NamedTuple):
    """How to refine.

    steps: at most so many, of `batch` sequences each. lr: its peak, after a linear rise over the
    share `warmup` of the run; then it falls as a cosine. clip: the largest norm of the gradient.
    every: steps between measurements on held-out text. patience: stop after so many of them
    without a new best. minutes: stop after so long; the learning rate falls in time. precision:
    of the arithmetic, auto is bfloat16 on CUDA and float32 elsewhere; weights learn in float32.
    recompute: a layer's activations are computed again in the backward pass, to save memory.
    """

    steps: int = 200
    batch: int = 2
    lr: float = 2e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    every: int = 20
    patience: int = 5
    minutes: float | None = None
    precision: str = "auto"
    recompute: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for settings that make no run."""
        for name in ("steps", "batch", "every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("lr", "clip", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: expected a number above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: expected a share of the run below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight decay is {self.weight_decay}: expected 0 or more")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision {self.precision!r} is unknown: expected one of {', '.join(PRECISIONS)}"
            )

    def arithmetic(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products on this device."""
        fast = self.precision == "auto" and device.type == "cuda"
        return torch.bfloat16 if fast or self.precision == "bfloat16" else torch.float32

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        falling = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * (1 + math.cos(math.pi * falling)) / 2

    def order(self, rows: int) -> Tensor:
        """Which rows each step learns from, (steps, batch): all, shuffled, epoch by epoch."""
        random, n = torch.Generator().manual_seed(self.seed), self.steps * self.batch
        epochs = [torch.randperm(rows, generator=random) for _ in range(0, n, rows)]
        return torch.cat(epochs)[:n].view(self.steps, self.batch)
