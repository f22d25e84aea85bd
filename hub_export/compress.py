"""From a checkpoint to a compressed checkpoint on disk, with what was measured on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..zoo.compression.compress import compress
from ..zoo.compression.methods import METHODS
from ..zoo.compression.record import about, evaluation, measured_on, texts
from ..zoo.compression.settings import Settings
from ..zoo.inference.checkpoint import Checkpoint, load, locate, open_layers
from ..zoo.inference.domains import check_apart
from ..zoo.inference.source_texts import check_source
from ..zoo.inference.sources import files as text_files
from ..zoo.inference.tensor_files import stored_bytes
from ..zoo.utils import memory
from ..zoo.utils.interrupt import interruptible
from ..zoo.utils.output import check_disk, check_folder, claimed, new_folder, writing
from ..zoo.utils.records import CompressionRecord
from .export import bytes_of, check_shard_size, export, rehearse, write_about
from .plain import check_plain, export_plain, write_about_plain
from .stream import check_partial, check_resume, discard_partial, partial_folder, stream_checkpoint


class Source(NamedTuple):
    """A checkpoint to read, and how: the arguments of `checkpoint.load`."""

    name: str
    dtype: torch.dtype | None
    device: torch.device
    revision: str | None = None
    trust_remote_code: bool = False


def compress_source(
    source: Source,
    out: Path,
    settings: Settings,
    calibration: str = "mixed",
    samples: int = 32,
    seq_len: int | None = None,
    text: Path | None = None,
    seed: int = 0,
    force: bool = False,
    shard_size: str = "5GB",
    plain: bool = False,
    stream: bool | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> CompressionRecord:
    """Read `source`, compress it into the folder `out`, and return the record in its config.json.

    stream: `stream_checkpoint` instead of `compress_checkpoint`, which say what the other
    arguments are; None: if the weights take more than half of the free memory, or on resume.
    say: is told what was chosen, and after an interruption how to go on. Raises ValueError, before
    the long work, for settings that are unsound or do not fit the model, and for a folder that may
    not be written.
    """
    settings.check()
    check_shard_size(shard_size)
    if resume and stream is False:
        raise ValueError("only work that was streamed can go on: leave --no-stream out")
    if resume and not check_resume(out, force):
        say(f"there is nothing to resume in {partial_folder(out)}: beginning anew")
    check_folder(out, force, (source.name, text, *text_files(calibration)))
    check_partial(out, resume, force)
    data = METHODS[settings.method].data
    check_source(calibration, samples if data else None)  # fails before the long work
    check_apart(measured_on(text), [calibration] if data else [])
    if stream is None:
        stream = resume or (not plain and _exceeds_memory(source, say))
    if stream and plain:
        raise ValueError("an ordinary checkpoint is made in memory: leave --stream or --plain out")
    original, files = open_layers(*source) if stream else (load(*source), None)
    settings = settings.fit(original.model.config)
    if settings.keys_note is not None:
        say(settings.keys_note)
    if not stream and force:
        with claimed(out, force) as place:
            discard_partial(place)
    how = settings, calibration, samples, seq_len, text, seed, force
    try:
        with interruptible():
            if files is not None:
                return stream_checkpoint(original, files, out, *how, resume)
            return compress_checkpoint(original, out, *how, shard_size, plain)
    except KeyboardInterrupt:
        left = partial_folder(out)
        say(
            f"stopped; the same command with --resume goes on from {left}"
            if left.exists()
            else "stopped, and nothing was written; what is compressed with --stream can go on"
        )
        raise


def _exceeds_memory(source: Source, say: Callable[[str], None]) -> bool:
    """Whether the weights take more than half of the free memory."""
    size = stored_bytes(locate(source.name, source.revision), source.dtype)
    if size <= memory.available(source.device) // 2:
        return False
    say(f"the weights take {size / 1e9:.1f} GB: reading them layer by layer (--stream)")
    return True


def compress_checkpoint(
    original: Checkpoint,
    out: Path,
    settings: Settings,
    calibration: str = "mixed",
    samples: int = 32,
    seq_len: int | None = None,
    text: Path | None = None,
    seed: int = 0,
    force: bool = False,
    shard_size: str = "5GB",
    plain: bool = False,
) -> CompressionRecord:
    """Compress `original` into the folder `out`; return the record in its config.json.

    calibration, samples, seq_len: see `data.calibration_text`; by default sequences have 1024
    tokens, or as many as the model can read. text: a file to measure perplexity on, before and
    after; by default texts of several domains, see `record.windows`. A method without
    data reads only the text for perplexity. plain: write an ordinary grouped-query
    checkpoint, see `plain.py`; raises ValueError where there is none.
    """
    check_shard_size(shard_size)
    model = original.model
    settings = settings.fit(model.config)  # before text is sampled or read
    if plain:
        check_plain(model.config, settings)
    check_disk(out, bytes_of(model))
    with new_folder(out, force) as folder:
        with writing(out):
            rehearse(folder, original, settings, write_about_plain if plain else write_about)
        tokens, test, told = texts(original, settings, calibration, samples, seq_len, text, seed)
        result = compress(model, tokens, settings)
        models = {"dense": model, "compressed": result.model}
        record: CompressionRecord = {
            **about(
                original, result.settings, result.model.config, calibration, tokens, told, seed
            ),
            "evaluation": evaluation(models, test),
            "layers": result.layers,
        }
        write = export_plain if plain else export
        with writing(out):
            write(folder, result.model, original, record, shard_size)
    return record
