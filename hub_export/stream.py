"""From a checkpoint to a compressed checkpoint on disk; neither needs to fit into memory."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..zoo.compression.record import about, calibrated_on, measured, texts, windows
from ..zoo.compression.settings import Settings
from ..zoo.compression.stream import Stream, check_stream
from ..zoo.inference.checkpoint import Checkpoint
from ..zoo.inference.weights import LayerFiles
from ..zoo.utils.provenance import fingerprint, tokenizer_fingerprint, work
from ..zoo.utils.records import CompressionRecord
from ..zoo.utils.resume import KeptFiles
from .export import check_free, put, weights_of, write_about

INDEX = "model.safetensors.index.json"
NEW = "new"  # the folder in that of unfinished work that becomes the checkpoint


def partial_folder(out: Path) -> Path:
    """The folder of unfinished work towards `out`."""
    return out.with_name(f"{out.name}.partial")


def check_partial(out: Path, resume: bool, force: bool) -> None:
    """Raise ValueError if there is unfinished work that may be neither resumed nor deleted."""
    left = partial_folder(out)
    if left.exists() and not (resume or force):
        raise ValueError(
            f"{left} holds unfinished work: pass --resume to go on, or --force to begin anew"
        )


def stream_checkpoint(
    original: Checkpoint,
    files: LayerFiles,
    out: Path,
    settings: Settings,
    calibration: str,
    samples: int = 32,
    seq_len: int | None = None,
    text: Path | None = None,
    seed: int = 0,
    force: bool = False,
    resume: bool = False,
) -> CompressionRecord:
    """As `compress_checkpoint`, with one layer in memory at a time, and a weight file for each.

    original, files: see `checkpoint.open_layers`. Progress is kept in `partial_folder(out)`;
    resume: continue from there, with the same arguments, to the same bytes. Raises ValueError also
    if `calibration` is `self`, since a model on disk cannot sample text.
    """
    model, left = original.model, partial_folder(out)
    settings = settings.fit(model.config, model.device.type)
    check_stream(settings)
    check_free(out, force)
    check_partial(out, resume, force)
    if calibration == "self":
        raise ValueError(
            "a model that is read layer by layer cannot write its own calibration text: give "
            "--calibration FILE or hub:DATASET"
        )
    tokens, held_out = texts(original, settings, calibration, samples, seq_len, text, seed)
    longest = model.config.max_position_embeddings
    words, rows = windows(original.tokenizer, text, held_out, calibration, longest)
    if left.exists() and not resume:
        shutil.rmtree(left)
    kept, fresh = KeptFiles(left), left / NEW
    fresh.mkdir(parents=True, exist_ok=True)
    count = model.config.num_hidden_layers + 1

    def write(layer: int, weights: dict[str, Tensor]) -> None:
        _save(kept, layer, count, {f"model.layers.{layer}.{k}": x for k, x in weights.items()})

    stream = Stream(files, model, tokens, rows, settings, kept, write)
    stream.run(
        work(
            model.device,
            **settings._asdict(),
            **calibrated_on(calibration, tokens),
            seed=seed,
            text=words,
            window=rows.size(1),
            dtype=str(model.dtype).removeprefix("torch."),
            weights=fingerprint(*files.paths),
            config=fingerprint(json.dumps(original.config)),
            tokenizer=tokenizer_fingerprint(original.tokenizer),
            texts=fingerprint(tokens, rows),
        )
    )
    low = stream.low
    outside = {k: x for k, x in weights_of(low).items() if not k.startswith("model.layers.")}
    _save(kept, count - 1, count, outside)
    _index(fresh)
    record: CompressionRecord = {
        **about(original, settings, low.config, calibration, tokens, seed),
        "evaluation": measured(words, rows, stream.perplexities),
        "layers": stream.layers,
    }
    write_about(fresh, low, original, record)
    put(fresh, out, left / "old")
    shutil.rmtree(left)
    return record


def _save(kept: KeptFiles, number: int, count: int, weights: dict[str, Tensor]) -> None:
    kept.write(f"{NEW}/model-{number + 1:05}-of-{count:05}", weights, {"format": "pt"})


def _index(folder: Path) -> None:
    """Write the index: the file of every weight."""
    names: dict[str, str] = {}
    paths = sorted(folder.glob("model-*.safetensors"))
    for path in paths:
        with safe_open(path, "pt") as file:
            names |= dict.fromkeys(file.keys(), path.name)
    size = sum(path.stat().st_size for path in paths)
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
