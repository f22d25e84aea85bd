"""From a checkpoint to a compressed checkpoint on disk, with what was measured on the way."""

from pathlib import Path

from ..zoo.compression.compress import compress
from ..zoo.compression.record import about, evaluation, texts
from ..zoo.compression.settings import Settings
from ..zoo.inference.checkpoint import Checkpoint
from ..zoo.utils.records import CompressionRecord
from .export import export
from .plain import check_plain, export_plain


def compress_checkpoint(
    original: Checkpoint,
    out: Path,
    settings: Settings,
    calibration: str = "self",
    samples: int = 32,
    seq_len: int | None = None,
    text: Path | None = None,
    seed: int = 0,
    force: bool = False,
    shard_size: str = "5GB",
    plain: bool = False,
) -> CompressionRecord:
    """Compress `original` into the folder `out`; return what its config.json says about it.

    calibration, samples, seq_len: see `data.calibration_tokens`; sequences are 1024 tokens long,
    or as long as the model can read, if not told. text: a file to measure
    perplexity on, before and after; by default an eighth of the calibration sequences is held out
    for that. For a method without data only what is measured on is read or sampled.
    plain: write an ordinary grouped-query checkpoint, see `plain.py`; raises ValueError where
    there is none.
    """
    model, tokenizer = original.model, original.tokenizer
    settings = settings.fit(model.config, model.device.type)  # before text is sampled or read
    if plain:
        check_plain(model.config, settings.method)
        if settings.rounded:
            raise ValueError("an ordinary checkpoint has no bits of its own: leave kv bits out")
    tokens, held_out = texts(original, settings, calibration, samples, seq_len, text, seed)
    result = compress(model, tokens, settings)
    models = {"dense": model, "compressed": result.model}
    record: CompressionRecord = {
        **about(original, result.settings, result.model.config, calibration, tokens, seed),
        "evaluation": evaluation(models, tokenizer, text, held_out, calibration),
        "layers": result.layers,
    }
    write = export_plain if plain else export
    write(out, result.model, original, record, force, shard_size)
    return record
