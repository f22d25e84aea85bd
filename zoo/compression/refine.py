"""Recover quality after compression: a few hundred training steps towards the original model.

The loss is KL(original || compressed). Only the weights that compression made are trained:
encoders, decoders, and the projections that they are folded into.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..inference.data import hold_out
from ..models.families import model_of
from ..models.model import Model
from ..utils.provenance import fingerprint, model_fingerprint, work
from ..utils.records import RefineStep
from ..utils.resume import check_same, read_state, write_state
from .distill import Distiller
from .schedule import RefineSettings

KEYS = ("q_proj", "k_proj", "k_down", "k_up", "k_mean", "k_shift")
VALUES = ("v_proj", "v_down", "v_up", "o_proj", "v_shift")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the state of a parameter in AdamW


class Refined(NamedTuple):
    """The best model by held-out text, and the measurements on the way.

    history: for step 0 and every measurement `step`, `held_out` (KL in nats per token on held-out
    text) and `kl` (mean of the training steps since the last measurement). stopped: the reason.
    """

    model: Model
    history: list[RefineStep]
    stopped: str

    @property
    def best(self) -> RefineStep:
        """The measurement of `model`."""
        return min(self.history, key=lambda x: x["held_out"])


def refine(
    dense: Model,
    low: Model,
    tokens: Tensor,
    settings: RefineSettings | None = None,
    held_out: Tensor | None = None,
    state: Path | None = None,
) -> Refined:
    """Train a copy of `low` towards `dense`, the model that it was folded from.

    tokens: (N, T) to learn from. held_out: (M, T') to measure on; by default an eighth of tokens.
    The weights that are best on it, of all steps including 0, are returned in the dtype of `low`.
    state: a file for progress; if it exists, the run continues from it, and the caller removes it.
    Weights that are not trained are shared with `low`; both models stay unchanged. Raises
    ValueError for models that do not belong together, and for the state of another run.
    """
    settings = settings or RefineSettings()
    settings.check()
    if held_out is None:
        tokens, held_out = hold_out(tokens)
    run = _Run(dense, low, tokens, held_out, settings)
    if state is not None and state.exists():
        run.resume(state)
    else:
        run.measure()
    bar = tqdm(desc="refining", total=settings.steps, initial=run.step, disable=None, leave=False)
    while not (stopped := run.stopped):
        run.learn()
        bar.update()
        bar.set_postfix(kl=run.recent, held_out=run.history[-1]["held_out"])
        if run.step % settings.every == 0:
            run.measure()
            if state is not None:
                run.save(state)
    bar.close()
    if run.history[-1]["step"] < run.step:
        run.measure()
    return Refined(model_of(low.config, low.state_dict() | run.best), run.history, stopped)


def learned(low: Model) -> list[str]:
    """Names of the weights to train. Raises ValueError if there are none.

    They are those of keys, and of values, in layers that compress them.
    """
    names = []
    for i, block in enumerate(low.layers):
        low_k, low_v = low.config.compressed(i)
        parts = KEYS * low_k + VALUES * low_v
        for name, _ in block.attn.named_parameters():  # the norms of MPT's qk_ln stay
            if name.removesuffix(".weight").removesuffix(".bias") in parts:
                names.append(f"layers.{i}.attn.{name}")
    if not names:
        raise ValueError("no layer of this model is compressed: there is nothing to refine")
    return names


def check_pair(dense: Model, low: Model) -> None:
    """Raise ValueError unless `low` was folded from `dense`: weights outside attention agree."""
    if not dense.config.uncompressed:
        raise ValueError("the original is compressed itself: expected the model it was made from")
    ours = low.state_dict()
    for name, x in dense.state_dict().items():
        y = ours.get(name)
        if ".attn." not in name and (y is None or x.dtype != y.dtype or not torch.equal(x, y)):
            raise ValueError(
                f"weight {name} of the original is not that of the compressed model: expected the "
                "model that it was made from, in the same dtype"
            )


class _Run:
    """A refinement in progress: its weights, its text, and its state."""

    def __init__(
        self, dense: Model, low: Model, tokens: Tensor, held_out: Tensor, settings: RefineSettings
    ):
        check_pair(dense, low)
        self.settings, self.low, self.tokens, self.held_out = settings, low, tokens, held_out
        self.distiller = Distiller(settings.arithmetic(low.device), settings.recompute)
        weights = low.state_dict()
        self.best = {name: weights.pop(name).clone() for name in learned(low)}
        shared = self.distiller.cast(dense.state_dict())
        own = {name: x for name, x in weights.items() if ".attn." in name}
        self.frozen = {n: shared[n] for n in weights.keys() - own.keys()} | self.distiller.cast(own)
        self.student = self._with(self.best)
        self.learned = {n: p for n, p in self.student.named_parameters() if n in self.best}
        for p in self.learned.values():
            p.requires_grad_()
        # encoders, decoders and means differ in size by a factor of a hundred, and steps with them
        rms = {p: p.detach().square().mean().sqrt().item() or 1.0 for p in self.learned.values()}
        decay = settings.weight_decay
        self.optimizer = torch.optim.AdamW(
            {"params": p, "size": size, "weight_decay": decay / size} for p, size in rms.items()
        )
        self.order = settings.order(len(tokens))
        teacher = model_of(dense.config, shared)
        self.target, self.held_out_target = (
            self.distiller.targets(teacher, rows) for rows in (tokens, held_out)
        )
        self.step, self.began, self.diverged = 0, time.perf_counter(), False
        self.losses: list[float] = []  # since the last measurement
        self.history: list[RefineStep] = []
        self.about = work(
            low.device,
            **settings._asdict(),
            model=model_fingerprint(low),
            original=model_fingerprint(dense),
            sequences=len(tokens),
            seq_len=tokens.size(1),
            texts=fingerprint(tokens, held_out),
        )

    def _with(self, weights: Mapping[str, Tensor]) -> Model:
        """The compressed model with fp32 copies of the weights to train."""
        copies = {name: x.to(torch.float32, copy=True) for name, x in weights.items()}
        return model_of(self.low.config, self.frozen | copies)

    @property
    def seconds(self) -> float:
        """Duration of the run, without interruptions."""
        return time.perf_counter() - self.began

    @property
    def recent(self) -> float | None:
        """Mean KL of the steps since the last measurement."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def stopped(self) -> str:
        """The reason why the run is over; empty before that."""
        s, best = self.settings, min(self.history, key=lambda x: x["held_out"])
        if self.diverged:
            return "the KL was no longer finite"
        if self.step >= s.steps:
            return "all steps done"
        if s.minutes is not None and self.seconds >= 60 * s.minutes:
            return "time is up"
        if len(self.history) - self.history.index(best) > s.patience:
            return "no new best"
        return ""

    def learn(self) -> None:
        """Take one training step."""
        s, rows = self.settings, self.order[self.step]
        progress = (self.step + 0.5) / s.steps
        if s.minutes is not None:
            progress = min(1, max(progress, self.seconds / (60 * s.minutes)))
        rate = s.rate(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["size"]
        target = torch.cat([self.target(row) for row in rows.tolist()])
        hidden = self.distiller.hidden(self.student, self.tokens[rows])
        loss = self.distiller.divergence(hidden, target, self.student.head).item()
        if not math.isfinite(loss):
            self.diverged = True
            return
        nn.utils.clip_grad_norm_(self.learned.values(), s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.step += 1

    @torch.no_grad()
    def measure(self) -> None:
        """Measure on held-out text, with weights in the dtype in which they are written."""
        weights = {name: p.to(self.low.dtype, copy=True) for name, p in self.learned.items()}
        model, total = self._with(weights), 0.0
        for i, row in enumerate(self.held_out):
            hidden = self.distiller.hidden(model, row[None])
            total += self.distiller.divergence(hidden, self.held_out_target(i), model.head).item()
        mean = total / len(self.held_out)
        if not math.isfinite(mean):
            if not self.history:
                raise ValueError(f"the KL before the first step is {mean}: a model is unsound")
            self.diverged = True
            return
        if all(mean < x["held_out"] for x in self.history):
            self.best = weights
        self.history.append({"step": self.step, "kl": self.recent, "held_out": mean})
        self.losses.clear()

    def save(self, path: Path) -> None:
        """Write the state to continue from."""
        tensors = {f"best.{name}": x for name, x in self.best.items()}
        for name, p in self.learned.items():
            state = self.optimizer.state[p] | {"learned": p.detach()}
            tensors |= {f"{key}.{name}": x for key, x in state.items()}
        facts = {name: getattr(self, name) for name in ("about", "step", "seconds", "history")}
        write_state(path, tensors, facts)

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote. Raises ValueError if that was another run."""
        tensors, facts = read_state(path)
        check_same(path, self.about, facts.get("about", {}))
        self.step, self.history = facts["step"], facts["history"]
        self.began -= facts["seconds"]
        states = {}
        for i, (name, p) in enumerate(self.learned.items()):
            p.data.copy_(tensors[f"learned.{name}"])
            self.best[name] = tensors[f"best.{name}"].to(p.device)
            states[i] = {key: tensors[f"{key}.{name}"] for key in MOMENTS}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
