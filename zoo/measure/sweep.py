"""A grid of settings, compressed and measured in memory, one row of a file each."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import cache, partial
from itertools import product
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from tqdm import tqdm

from ..compression.basis import Basis, LayerBasis
from ..compression.compress import compress, error_search
from ..compression.methods import METHODS
from ..compression.moments import Needs, Statistics
from ..compression.search import ErrorBudget
from ..compression.settings import Settings, needs
from ..inference.checkpoint import Checkpoint
from ..inference.data import encode, python_docs, read_text
from ..inference.generate import Generator
from ..inference.perplexity import perplexity
from ..models.config import Config, kv_bytes
from ..models.model import Model
from ..utils.interrupt import interruptible
from ..utils.jsonl import Row, append, resume
from ..utils.provenance import device_name, fingerprint, versions
from .calibrator import Calibration, Calibrator, kind, narrow, union
from .evaluate import decode_speed

POINTS = 16  # of an error curve, beside the powers of two
DECODE_STEPS = 16  # of a round, at the end of the cache


class Evaluation(NamedTuple):
    """What to measure perplexity on: a file, or None for Python's own help; see `perplexity`."""

    text: Path | None = None
    window: int = 2048
    windows: int = 0

    def words(self) -> str:
        """The text. Raises ValueError if it cannot be read."""
        return python_docs() if self.text is None else read_text(self.text)

    def describe(self) -> dict[str, Any]:
        """The same, a file by its last name, with a digest of the text."""
        name = "Python's own help" if self.text is None else self.text.name
        return self._asdict() | {"text": name, "digest": fingerprint(self.words())}


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """All settings with one value of every axis; an axis is a field of `Settings`.

    Raises ValueError for a value that is unsound whatever the other axes say.
    """
    cells = [Settings(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    block = Settings().anchor_block  # says nothing of keys that are not anchored
    cells = [s if s.keys == "anchored" else s._replace(anchor_block=block) for s in cells]
    unsound = {s: _unsound(s) for s in cells}
    for name, values in axes.items():
        for value in values:
            reasons = [reason for s, reason in unsound.items() if getattr(s, name) == value]
            if reasons and all(reasons):
                raise ValueError(reasons[0])
    return list(unsound)


def _unsound(settings: Settings, config: Config | None = None) -> str:
    """Why these settings fit no model, or not the one of such a config, if so."""
    try:
        settings.check()
        if config:
            settings.fit(config)
    except ValueError as error:
        return str(error)
    return ""


class Job(NamedTuple):
    """A row to be: settings and calibration, None for the dense model, and what is found out."""

    settings: Settings | None
    source: Calibrator | None
    find: Callable[[], Row]


class Sweep:
    """A dense model, what it is measured on, and the file that its rows go to."""

    def __init__(
        self,
        original: Checkpoint,
        path: Path,
        evaluation: Evaluation,
        calibrations: Sequence[Calibration],
        command: str = "",
        save_statistics: bool = True,
        force: bool = False,
        decode: int | None = None,
        ready: Callable[[Model], Model] = lambda model: model,
    ):
        """Take over the rows that are in the file already.

        command: how the rows are made, for their readers. save_statistics: in a folder beside the
        file, so that another run need not calibrate. force: start the file anew. decode: slots of
        a cache at whose end decoding is timed; rows that lack it are not taken over, without it
        all are. ready: gives a model, before it is timed, the ops it decodes with. Raises
        ValueError where the file's rows are of another model, dtype or evaluation, or decode at
        other slots.
        """
        self.original, self.model, self.path = original, original.model, path
        self.evaluation, self.decode, self.ready = evaluation, decode, ready
        if self.model.config.kv_width != self.model.config.dense_kv_width:
            raise ValueError("the model is compressed already: take the model it was made from")
        longest = self.model.config.max_position_embeddings
        if decode is not None and not DECODE_STEPS <= decode <= longest:
            raise ValueError(
                f"decoding at {decode} slots: expected {DECODE_STEPS} to {longest}, which is what "
                "the model can read"
            )
        self.tokens = encode(original.tokenizer, evaluation.words()).to(self.model.device)
        self.run = {
            "model": original.name,
            "weights": fingerprint(repr(self.model.config), *self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "evaluation": evaluation.describe(),
        }
        self.about = {
            "command": command,
            "device": device_name(self.model.device),
            "date": date.today().isoformat(),
        }
        same = {name: self.run[name] for name in ("model", "weights", "dtype")}
        folder = path.with_suffix(".statistics")
        kept = folder if save_statistics else None
        self.sources = [
            Calibrator(self.model, original.tokenizer, c, kept, same) for c in calibrations
        ]
        if force:
            rmtree(folder, ignore_errors=True)
        rows = resume(path, self.run, force)
        self.done = {_identity(row): row for row in rows if self._whole(row)}

    def _whole(self, row: Row) -> bool:
        """Whether the row has the decoding asked for. Raises ValueError if it has another."""
        if self.decode is None or row["settings"] is None or "refused" in row:
            return True
        slots = row["decode"]["slots"] if "decode" in row else self.decode
        if slots != self.decode:
            raise ValueError(
                f"{self.path} holds rows that decode at {slots} slots, this run at {self.decode}: "
                "choose another file, or pass --force to start it anew"
            )
        return "decode" in row

    def distinct(self, settings: Sequence[Settings]) -> list[Settings]:
        """The settings without those that come to the same on this model."""
        first: dict[Settings, Settings] = {}
        for asked in settings:
            fitted = asked if _unsound(asked, self.model.config) else asked.fit(self.model.config)
            first.setdefault(fitted, asked)
        return list(first.values())

    def rows(self, settings: Sequence[Settings]) -> Iterator[Row]:
        """The rows of the dense model and of all settings on every calibration, as they are made.

        What is in the file is not made again. Settings that do not fit the model have the reason
        under `refused`. Those that need one kind of statistics follow one another, and one pass
        of calibration serves them; what `eigen` searched for one share to keep serves the next,
        and its seconds are in the row that needed it first.
        """
        total = 1 + len(settings) * len(self.sources)
        with tqdm(total=total, unit="cell", position=0, disable=None, leave=False) as bar:
            for job in self._jobs(settings):
                bar.set_description(
                    f"{job.settings.method} {job.settings.keep}" if job.settings else "dense"
                )
                yield self._row(job)
                bar.update()

    def _jobs(self, settings: Sequence[Settings]) -> Iterator[Job]:
        yield Job(None, None, partial(self._measure, self.model))
        for source in self.sources:
            groups: dict[Needs, list[Settings]] = {}
            for asked in settings:
                if reason := _unsound(asked, self.model.config):
                    yield Job(asked, source, partial(dict, refused=reason))
                else:
                    groups.setdefault(kind(self._needs(asked)), []).append(asked)
            for group in groups.values():
                have = union([self._needs(asked) for asked in group])
                statistics = cache(partial(source.statistics, have))
                searches: dict[Settings, ErrorBudget] = {}
                for asked in group:
                    find = partial(self._compress, asked, source, statistics, have, searches)
                    yield Job(asked, source, find)

    def _needs(self, settings: Settings) -> Needs:
        config = self.model.config
        return needs(settings.fit(config, self.model.device.type), config)

    def _row(self, job: Job) -> Row:
        """The row of a job: out of the file, or found out and added to it."""
        of = {
            "settings": job.settings and job.settings._asdict(),
            "calibration": job.source and job.source.about,
        }
        name = _identity(of)
        if name not in self.done:
            row = {"versions": versions(), **self.run, **of, **self.about, **job.find()}
            self.done[name] = append(self.path, row)
        return self.done[name]

    def _compress(
        self,
        settings: Settings,
        source: Calibrator,
        statistics: Callable[[], list[Statistics]],
        have: Needs,
        searches: dict[Settings, ErrorBudget],
    ) -> Row:
        gathered = narrow(statistics(), have, self._needs(settings))
        start = time.perf_counter()
        alike = settings._replace(keep=1.0)  # cells that differ in keep alone search together
        try:
            with interruptible():  # an interrupted cell is not a refused one
                if METHODS[settings.method].searched and alike not in searches:
                    searches[alike] = error_search(self.model, source.tokens, settings, gathered)
                search = searches.get(alike)
                result = compress(self.model, source.tokens, settings, gathered, search)
        except ValueError as error:
            return {"refused": str(error)}
        seconds = source.seconds | {"compress": time.perf_counter() - start}
        row = self._measure(result.model)
        if self.decode is not None:
            start = time.perf_counter()
            row["decode"] = self._decode(result.model, self.decode)
            row["seconds"]["decode"] = time.perf_counter() - start
        dense = self.done[_identity({"settings": None, "calibration": None})]
        return row | {
            "seconds": seconds | row["seconds"],
            "dense_perplexity": dense["perplexity"],
            "sequences": len(source.tokens),
            "fitted": result.settings._asdict(),
            "layers": result.layers,
            "curves": curves(result.bases),
        }

    def _measure(self, model: Model) -> Row:
        start = time.perf_counter()
        found = perplexity(model, self.tokens, self.evaluation.window, self.evaluation.windows)
        return {
            **found._asdict(),
            **kv_bytes(model.config, model.dtype),
            "k_ranks": model.config.k_ranks,
            "v_ranks": model.config.v_ranks,
            "full_ranks": model.config.full_ranks,
            "seconds": {"evaluate": time.perf_counter() - start},
        }

    def _decode(self, model: Model, slots: int) -> dict[str, Any]:
        """Seconds of a decoding step, and the speed over the dense model's in the same run.

        Neither is compiled, so that this takes seconds: compiled speeds, as of `bench`, differ.
        """
        models = (self.ready(m) for m in (self.model, model))
        generators = [Generator(m, 1, slots, compile=False) for m in models]
        dense, low = decode_speed(generators, DECODE_STEPS)
        return {"slots": slots, "seconds_per_step": 1 / low, "speedup": low / dense}


def curves(bases: Sequence[LayerBasis]) -> dict[str, Any]:
    """Shares of its error that a layer has left at some ranks, for `k` and `v`: layers x ranks."""
    sides = {"k": [b.k for b in bases], "v": [b.v for b in bases if b.v is not None]}
    return {name: _curve(side) for name, side in sides.items() if side}


def _curve(bases: Sequence[Basis]) -> dict[str, Any]:
    full = bases[0].spectrum.size(1)
    even = {round(i * full / POINTS) for i in range(POINTS + 1)}
    ranks = sorted(even | {2**i for i in range(full.bit_length())})
    left = [b.errors()[ranks] / b.errors()[0] for b in bases]
    return {"ranks": ranks, "left": [[float(f"{x:.4g}") for x in e.tolist()] for e in left]}


def _identity(row: Mapping[str, Any]) -> str:
    """What makes it a row of its own in a file."""
    settings = row["settings"]
    if settings is not None:  # a row may be older than a setting
        settings = Settings._field_defaults | settings
    return json.dumps([settings, row["calibration"]], sort_keys=True)
