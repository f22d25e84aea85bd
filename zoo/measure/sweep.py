"""Compress a model to many settings, in memory, and measure each: one row of a file each."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import cache, partial
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple, cast

from tqdm import tqdm

from ..compression.compress import compress, error_search
from ..compression.methods import METHODS
from ..compression.moments import Needs, Statistics
from ..compression.record import settings_record
from ..compression.search import ErrorBudget
from ..compression.settings import Settings, needs
from ..inference.checkpoint import Checkpoint
from ..inference.domains import all_rows, check_apart, domain, domains_record
from ..inference.generate import Generator
from ..inference.perplexity import mean_perplexity, window_losses
from ..models.config import kv_bytes
from ..models.model import Model
from ..utils.interrupt import interruptible
from ..utils.provenance import (
    code,
    device_name,
    model_fingerprint,
    tokenizer_fingerprint,
    versions,
    work,
)
from ..utils.records import (
    CompressedResult,
    DecodeRecord,
    DenseResult,
    Refusal,
    Seconds,
    SweepRow,
    SweepRun,
)
from .calibrator import Calibration, Calibrator, kind, narrow, union
from .curves import curves
from .evaluate import Evaluation, decode_speed
from .grid import why_invalid
from .sweep_file import SweepFile

DECODE_STEPS = 16  # of a round, at the end of the cache
Result = DenseResult | CompressedResult | Refusal


class Job(NamedTuple):
    """A row to make: its settings and calibration, None for the dense model; `run` measures it."""

    settings: Settings | None
    source: Calibrator | None
    run: Callable[[], Result]


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
        ops: str = "plain",
    ):
        """Read the rows that are in the file already.

        command: how the rows are made, for their readers. save_statistics: in a folder beside the
        file, so that another run need not calibrate. force: start the file again. decode: slots of
        a cache at whose end decoding is timed; rows without that timing are made again, and if it
        is None no row is. ready: installs in a model, before it is timed, the ops it decodes with,
        of this name.
        Raises ValueError where the file's rows are of another model, dtype or evaluation, or
        decode at other slots, and where a text is measured on that is calibrated on.
        """
        self.original, self.model = original, original.model
        self.decode, self.ready, self.ops = decode, ready, ops
        if not self.model.config.uncompressed:
            raise ValueError("the model is compressed already: take the model it was made from")
        longest = self.model.config.max_position_embeddings
        if decode is not None and not DECODE_STEPS <= decode <= longest:
            raise ValueError(
                f"decoding at {decode} slots: expected {DECODE_STEPS} to {longest}, which is what "
                "the model can read"
            )
        texts = evaluation.read()
        check_apart(texts, [c.source for c in calibrations])
        size = evaluation.window, evaluation.windows
        self.domains = [domain(x, original.tokenizer, self.model, *size) for x in texts]
        device = self.model.device
        run: SweepRun = {
            "model": original.name,
            "weights": model_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "evaluation": evaluation.describe(original.tokenizer),
        }
        tokenizer = tokenizer_fingerprint(original.tokenizer)
        self.origin = {
            "versions": versions(),
            **run,
            "tokenizer": tokenizer,
            "code": code(),
            "place": device.type,
        }
        self.made = {
            "command": command,
            "device": device_name(device),
            "date": date.today().isoformat(),
        }
        facts = work(device, **run, tokenizer=tokenizer)
        on_text = {name: facts[name] for name in facts.keys() - {"evaluation"}}
        folder = path.with_suffix(".statistics")
        kept = folder if save_statistics else None
        self.sources = [
            Calibrator(self.model, original.tokenizer, c, kept, on_text) for c in calibrations
        ]
        if force:
            rmtree(folder, ignore_errors=True)
        timing = None if decode is None else {"slots": decode, "ops": ops}
        self.file = SweepFile(path, facts, timing, force)

    def rows(self, settings: Sequence[Settings]) -> Iterator[SweepRow]:
        """The rows of the dense model and of all settings on every calibration, as they are made.

        Rows that are in the file are not made again. Settings that do not fit the model have the
        reason under `refused`. Settings that need the same kind of statistics follow one another,
        so that one pass of calibration serves them. What `eigen` searched for one share to keep
        serves the next; its seconds are in the row that needed it first.
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
                if reason := why_invalid(asked, self.model.config):
                    yield Job(asked, source, partial(Refusal, refused=reason))
                else:
                    groups.setdefault(kind(self._needs(asked)), []).append(asked)
            for group in groups.values():
                have = union([self._needs(asked) for asked in group])
                statistics = cache(partial(source.statistics, have))
                searches: dict[Settings, ErrorBudget] = {}
                for asked in group:
                    run = partial(self._compress, asked, source, statistics, have, searches)
                    yield Job(asked, source, run)

    def _needs(self, settings: Settings) -> Needs:
        config = self.model.config
        return needs(settings.fit(config), config)

    def _row(self, job: Job) -> SweepRow:
        """The row of a job: out of the file, or made and added to it."""
        settings = None if job.settings is None else settings_record(job.settings)
        calibration = None if job.source is None else job.source.about
        if row := self.file.row(settings, calibration):
            return row
        cell = {"settings": settings, "calibration": calibration}
        made = {**self.origin, **cell, **self.made, **job.run()}
        return self.file.add(cast(SweepRow, made))

    def _compress(
        self,
        settings: Settings,
        source: Calibrator,
        statistics: Callable[[], list[Statistics]],
        have: Needs,
        searches: dict[Settings, ErrorBudget],
    ) -> CompressedResult | Refusal:
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
        seconds: Seconds = {**source.seconds, "compress": time.perf_counter() - start}
        dense = cast(DenseResult, self.file.row(None, None))
        measured = self._measure(result.model, dense)
        row: CompressedResult = {
            **measured,
            "seconds": {**seconds, **measured["seconds"]},
            "dense_perplexity": dense["perplexity"],
            "sequences": len(source.tokens),
            "fitted": settings_record(result.settings),
            "layers": result.layers,
            "curves": curves(result.bases),
        }
        if self.decode is not None:
            start = time.perf_counter()
            row["decode"] = self._decode(result.model, self.decode)
            row["seconds"]["decode"] = time.perf_counter() - start
        return row

    def _measure(self, model: Model, dense: DenseResult | None = None) -> DenseResult:
        """Measure a model. dense: what was measured of the uncompressed one, if it is another."""
        start = time.perf_counter()
        losses = window_losses(model, all_rows(self.domains))
        quality = mean_perplexity(losses)
        measured: DenseResult = {
            "perplexity": quality.perplexity,
            "tokens": quality.tokens,
            **kv_bytes(model.config),
            "k_ranks": model.config.k_ranks,
            "v_ranks": model.config.v_ranks,
            "full_ranks": model.config.full_ranks,
            "seconds": {"evaluate": time.perf_counter() - start},
        }
        if len(self.domains) > 1:
            known = [x["perplexity"] for x in dense["domains"]["texts"]] if dense else None
            measured["domains"] = domains_record(self.domains, losses, known)
        return measured

    def _decode(self, model: Model, slots: int) -> DecodeRecord:
        """Seconds of a decoding step, and the speed over the dense model's in the same run.

        Neither is compiled, so that this takes seconds: compiled speeds, as of `bench`, differ.
        """
        models = (self.ready(m) for m in (self.model, model))
        generators = [Generator(m, 1, slots, compile=False) for m in models]
        dense, low = decode_speed(generators, DECODE_STEPS)
        return {
            "slots": slots,
            "ops": self.ops,
            "seconds_per_step": 1 / low,
            "speedup": low / dense,
        }
