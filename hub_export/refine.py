"""From a compressed checkpoint to a refined one on disk."""

from pathlib import Path
from typing import cast

from ..zoo.compression.record import calibrated_on, digests, evaluation, measured_on, windows
from ..zoo.compression.refine import RefineSettings, check_pair, learned, refine
from ..zoo.inference.checkpoint import Checkpoint, recorded
from ..zoo.inference.data import calibration_text, hold_out
from ..zoo.inference.domains import check_apart
from ..zoo.models.model import Model
from ..zoo.utils.output import check_disk, new_folder, writing
from ..zoo.utils.records import CompressionRecord, RefineRecord
from .export import bytes_of, check_shard_size, export, write_about


def original_of(low: Checkpoint) -> str:
    """The Hub id of the model that `low` was made from, by its own record.

    Raises ValueError if it was a local model, of which the record keeps the name only.
    """
    name = recorded(low.config, low.name)["base_model"]
    if "/" not in name:
        raise ValueError(f"{low.name} was made from the local model {name}: give it as --original")
    return name


def state_file(out: Path) -> Path:
    """The file that holds the progress of a refinement to `out` until it is done."""
    return out.with_name(f"{out.name}.state.safetensors")


def check_room(low: Model, out: Path) -> None:
    """Raise ValueError if the disk of `out` cannot hold the weights and the progress."""
    weights = low.state_dict()
    trained = sum(weights[name].numel() for name in learned(low))
    state = 16 * trained  # the best weights; the last ones and both moments in fp32
    check_disk(out, bytes_of(low) + 2 * state)  # an older state stays while one is written


def refine_checkpoint(
    low: Checkpoint,
    dense: Model,
    out: Path,
    settings: RefineSettings,
    calibration: str = "mixed",
    samples: int = 128,
    seq_len: int | None = None,
    text: Path | None = None,
    force: bool = False,
    shard_size: str = "5GB",
) -> CompressionRecord:
    """Refine `low` towards `dense`, write the folder `out`; return the record in its config.json.

    calibration, samples, seq_len: the text to learn from, see `data.calibration_text`, where
    `dense` is the model; by default sequences have 512 tokens, or as many as the model can
    read. An eighth of them is held out to choose the best weights by. text: a file to measure
    perplexity on, see `record.windows`. After an interruption the same call continues.
    """
    check_pair(dense, low.model)  # before text is sampled or read
    before = recorded(low.config, low.name)
    check_shard_size(shard_size)
    check_room(low.model, out)
    with new_folder(out, force) as folder:
        with writing(out):
            write_about(folder, low.model, low, before)  # fails before the work
        refined, record = _refine(low, dense, settings, calibration, samples, seq_len, text, out)
        with writing(out):
            export(folder, refined, low, record, shard_size)
    state_file(out).unlink(missing_ok=True)
    return record


def _refine(
    low: Checkpoint,
    dense: Model,
    settings: RefineSettings,
    calibration: str,
    samples: int,
    seq_len: int | None,
    text: Path | None,
    out: Path,
) -> tuple[Model, CompressionRecord]:
    """The refined model, and the record of it."""
    seq_len = seq_len or min(512, dense.config.max_position_embeddings)
    check_apart(measured_on(text), [calibration])
    test = windows(low.tokenizer, dense, text)  # fails before the long work
    rows = calibration_text(calibration, dense, low.tokenizer, samples, seq_len, settings.seed)
    tokens, held_out = hold_out(rows.tokens)
    refined = refine(dense, low.model, tokens, settings, held_out, state_file(out))
    models = {"dense": dense, "before": low.model, "compressed": refined.model}
    measured = evaluation(models, test)
    before = measured.pop("before")
    run = {
        **settings._asdict(),
        "calibration": calibrated_on(rows.told(len(tokens)), tokens),
        "kl_before": refined.history[0]["held_out"],
        "kl_after": refined.best["held_out"],
        "perplexity_before": before,
        "perplexity_after": measured["compressed"],
        "best_step": refined.best["step"],
        "stopped": refined.stopped,
        "history": refined.history,
    }
    record = recorded(low.config, low.name).copy()
    record["evaluation"] = measured
    known = record.get("calibration_digests", [])
    record["calibration_digests"] = [*known, *digests(low.tokenizer, [calibration])]
    record["refined"] = [*record.get("refined", []), cast(RefineRecord, run)]
    return refined.model, record
