"""The schedule of a refinement: steps, learning rates, and the order of its text."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .choices import PRECISIONS, check_choice


class RefineSettings(NamedTuple):
    """How to refine.

    steps: at most this many, of `batch` sequences each. lr: the peak of the learning rate, as a
    share of the root mean square of each weight, after a linear rise over the share `warmup` of the
    run; then it falls as a cosine. clip: the largest norm of the gradient. every: steps between
    measurements on held-out text. patience: stop after this many measurements without a new best.
    minutes: stop after this time; the learning rate reaches its end by then. precision: of the
    arithmetic, a name in `PRECISIONS`; weights learn in float32. recompute: a layer's activations
    are computed again in the backward pass, which saves memory.
    """

    steps: int = 200
    batch: int = 2
    lr: float = 5e-5
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
        """Raise ValueError for settings that no run can have."""
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
        check_choice("precision", self.precision, PRECISIONS)

    def arithmetic(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products on this device."""
        fast = self.precision == "auto" and device.type == "cuda"
        return torch.bfloat16 if fast or self.precision == "bfloat16" else torch.float32

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run, from 0 to 1."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        falling = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * (1 + math.cos(math.pi * falling)) / 2

    def order(self, rows: int) -> Tensor:
        """The rows that each step learns from, (steps, batch): all, shuffled, epoch by epoch."""
        random, n = torch.Generator().manual_seed(self.seed), self.steps * self.batch
        epochs = [torch.randperm(rows, generator=random) for _ in range(0, n, rows)]
        return torch.cat(epochs)[:n].view(self.steps, self.batch)
