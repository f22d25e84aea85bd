"""From a checkpoint to a compressed checkpoint on disk; neither needs to fit into memory."""

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..zoo.compression.record import about, measured, texts, windows
from ..zoo.compression.settings import Settings
from ..zoo.compression.steps import PROGRESS
from ..zoo.compression.stream import Stream, check_stream
from ..zoo.inference.checkpoint import Checkpoint
from ..zoo.inference.weights import LayerFiles
from ..zoo.utils.output import check_disk, claimed, discard, put, scratch, writing
from ..zoo.utils.provenance import fingerprint
from ..zoo.utils.records import CompressionRecord
from .export import bytes_of, rehearse, weights_of, write_about

INDEX = "model.safetensors.index.json"


def partial_folder(out: Path) -> Path:
    """The folder of unfinished work towards `out`."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.partial")


def check_partial(out: Path, resume: bool, force: bool) -> None:
    """Raise ValueError if there is unfinished work that may be neither resumed nor deleted."""
    left = partial_folder(out)
    if not os.path.lexists(left) or _is_over(left):
        return
    if left.is_symlink() or not (left / "new").is_dir():
        raise ValueError(f"{left} is no unfinished work of eigenzoo: move it out of the way")
    if not (resume or force):
        raise ValueError(
            f"{left} holds unfinished work: pass --resume to go on, or --force to begin anew"
        )


def discard_partial(place: Path) -> None:
    """Delete unfinished work towards the folder `place`, which is claimed, if there is any."""
    if partial_folder(place).exists():
        discard(partial_folder(place), place)


def _is_over(work: Path) -> bool:
    """Whether the work was not begun, or what it made is in its place already."""
    begun = (work / "new").exists()
    return work.is_dir() and not begun and ((work / PROGRESS).exists() or not any(work.iterdir()))


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
    settings = settings.fit(original.model.config, original.model.device.type)
    check_stream(settings)
    if calibration == "self":
        raise ValueError(
            "a model that is read layer by layer cannot write its own calibration text: give "
            "--calibration FILE or hub:DATASET"
        )
    with claimed(out, force) as place:
        work = partial_folder(place)
        check_partial(place, resume, force)
        if not resume or _is_over(work):
            discard_partial(place)
        written = sum(x.stat().st_size for x in work.rglob("*.safetensors"))
        check_disk(out, bytes_of(original.model) - written)
        with writing(out), scratch(place) as folder:
            rehearse(folder, original, settings)
        tokens, held_out = texts(original, settings, calibration, samples, seq_len, text, seed)
        longest = original.model.config.max_position_embeddings
        words, rows = windows(original.tokenizer, text, held_out, calibration, longest)
        fresh = work / "new"
        try:
            with writing(work, "; what is done is kept there, and --resume goes on from it"):
                fresh.mkdir(parents=True, exist_ok=True)
                stream = _stream(original, files, settings, tokens, rows, work)
                record: CompressionRecord = {
                    **about(original, settings, stream.low.config, calibration, tokens, seed),
                    "evaluation": measured(words, rows, stream.perplexities),
                    "layers": stream.layers,
                }
                write_about(fresh, stream.low, original, record)
                put(fresh, place)
        except BaseException:
            if not (work / PROGRESS).exists():
                discard_partial(place)
            raise
        discard_partial(place)
    return record


def _stream(
    original: Checkpoint,
    files: LayerFiles,
    settings: Settings,
    tokens: Tensor,
    rows: Tensor,
    work: Path,
) -> Stream:
    """Compress, with all weights in `work / "new"` at the end. Arguments as of `Stream`."""
    model, fresh = original.model, work / "new"
    count = model.config.num_hidden_layers + 1

    def write(layer: int, weights: dict[str, Tensor]) -> None:
        _save(fresh, layer, count, {f"model.layers.{layer}.{k}": x for k, x in weights.items()})

    stream = Stream(files, model, tokens, rows, settings, work, write)
    stream.run(
        {
            "config": fingerprint(json.dumps(original.config)),
            "weights": [[path.name, path.stat().st_size] for path in files.paths],
            "dtype": str(model.dtype),
            "text": fingerprint(tokens, rows),
            "settings": json.loads(json.dumps(settings._asdict())),
        }
    )
    names = weights_of(stream.low)
    _save(fresh, count - 1, count, {k: x for k, x in names.items() if "model.layers." not in k})
    _index(fresh)
    return stream


def _save(folder: Path, number: int, count: int, weights: dict[str, Tensor]) -> None:
    name = f"model-{number + 1:05}-of-{count:05}.safetensors"
    save_file({k: x.contiguous() for k, x in weights.items()}, folder / name, {"format": "pt"})


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
