"""From a checkpoint to a compressed checkpoint on disk; neither needs to fit into memory."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..zoo.compression.record import about, calibrated_on, measured, texts
from ..zoo.compression.settings import Settings
from ..zoo.compression.steps import PROGRESS
from ..zoo.compression.stream import Stream, check_stream
from ..zoo.inference.checkpoint import Checkpoint
from ..zoo.inference.weights import LayerFiles
from ..zoo.utils.interrupt import interruptible
from ..zoo.utils.output import check_disk, claimed, discard, put, scratch, writing
from ..zoo.utils.provenance import fingerprint, tokenizer_fingerprint, work
from ..zoo.utils.records import CompressionRecord
from ..zoo.utils.resume import KeptFiles
from .export import bytes_of, rehearse, weights_of, write_about

INDEX = "model.safetensors.index.json"
NEW = "new"  # the folder in that of unfinished work that becomes the checkpoint


def partial_folder(out: Path) -> Path:
    """The folder of unfinished work towards `out`."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.partial")


def check_partial(out: Path, resume: bool, force: bool) -> None:
    """Raise ValueError if there is unfinished work that may be neither resumed nor deleted."""
    left = partial_folder(out)
    if not os.path.lexists(left) or _is_over(left):
        return
    if left.is_symlink() or not (left / NEW).is_dir():
        raise ValueError(f"{left} is no unfinished work of eigenzoo: move it out of the way")
    if not (resume or force):
        raise ValueError(
            f"{left} holds unfinished work: pass --resume to go on, or --force to begin anew"
        )


def check_resume(out: Path, force: bool) -> bool:
    """Whether there is work to go on with. Raises ValueError if `out` is finished already."""
    left = partial_folder(out)
    if left.is_dir() and not _is_over(left):
        return True
    if out.is_dir() and any(out.iterdir()) and not force:
        with claimed(out, force=True) as place:
            discard_partial(place)  # what a kill at the very end has left
        raise ValueError(
            f"{out} is finished, so there is nothing to resume: pass --force to make it again"
        )
    return False


def discard_partial(place: Path) -> None:
    """Delete unfinished work towards the folder `place`, which is claimed, if there is any."""
    if partial_folder(place).exists():
        discard(partial_folder(place), place)


def _is_over(left: Path) -> bool:
    """Whether the work was not begun, or what it made is in its place already."""
    begun = (left / NEW).exists()
    return left.is_dir() and not begun and ((left / PROGRESS).exists() or not any(left.iterdir()))


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
    if `calibration` names `self` or `chat`, since a model on disk cannot sample text.
    """
    settings = settings.fit(original.model.config)
    check_stream(settings)
    with claimed(out, force) as place:
        left = partial_folder(place)
        check_partial(place, resume, force)
        if not resume or _is_over(left):
            discard_partial(place)
        written = sum(x.stat().st_size for x in left.rglob("*.safetensors"))
        check_disk(out, bytes_of(original.model) - written)
        with writing(out), scratch(place) as folder:
            rehearse(folder, original, settings)
        tokens, test, told = texts(original, settings, calibration, samples, seq_len, text, seed)
        facts = {**calibrated_on(told, tokens), "text": test.name, "seed": seed}
        fresh = left / NEW
        try:
            # interruptible: else code in C may turn Ctrl-C into what looks like a refusal
            with (
                interruptible(),
                writing(left, "; what is done is kept there, and --resume goes on from it"),
            ):
                fresh.mkdir(parents=True, exist_ok=True)
                kept = KeptFiles(left)
                stream = _stream(original, files, settings, tokens, test.rows, kept, facts)
                record: CompressionRecord = {
                    **about(original, settings, stream.low.config, calibration, tokens, told, seed),
                    "evaluation": measured(test, stream.losses),
                    "layers": stream.layers,
                }
                write_about(fresh, stream.low, original, record)
                put(fresh, place, force)
        except BaseException as error:
            # nothing goes on from what is refused, unlike what the disk or a signal cut off
            refused = isinstance(error, ValueError) and error.__cause__ is None and not resume
            if refused or not (left / PROGRESS).exists():
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
    kept: KeptFiles,
    told: Mapping[str, Any],
) -> Stream:
    """Compress, with all weights in the folder `NEW` of `kept` at the end.

    told: what the record says of the texts. Other arguments as of `Stream`.
    """
    model = original.model
    count = model.config.num_hidden_layers + 1

    def write(layer: int, weights: dict[str, Tensor]) -> None:
        _save(kept, layer, count, {f"model.layers.{layer}.{k}": x for k, x in weights.items()})

    read = _stamps(files)
    facts = work(
        model.device,
        **settings._asdict(),
        **told,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=fingerprint(*files.paths),
        config=fingerprint(json.dumps(original.config)),
        tokenizer=tokenizer_fingerprint(original.tokenizer),
        texts=fingerprint(tokens, rows),
    )
    stream = Stream(files, model, tokens, rows, settings, kept, write)
    stream.run(facts)
    if _stamps(files) != read:
        raise ValueError(
            f"{files.paths[0].parent} was changed while it was read, so {kept.folder} mixes two "
            "models: delete that to start again"
        )
    names = weights_of(stream.low)
    _save(kept, count - 1, count, {k: x for k, x in names.items() if "model.layers." not in k})
    _index(kept)
    return stream


def _stamps(files: LayerFiles) -> list[tuple[int, int, int]]:
    """By which a file that was written again is recognized without reading it."""
    stats = [path.stat() for path in files.paths]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def _save(kept: KeptFiles, number: int, count: int, weights: dict[str, Tensor]) -> None:
    kept.write(f"{NEW}/model-{number + 1:05}-of-{count:05}", weights, {"format": "pt"})


def _index(kept: KeptFiles) -> None:
    """Write the index: the file of every weight. Whatever else lies there is removed."""
    folder, names = kept.folder / NEW, dict[str, str]()
    paths = [kept.path(name) for name in sorted(kept.sums) if name.startswith(f"{NEW}/")]
    for path in {*folder.iterdir()} - {*paths}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in paths:
        with safe_open(path, "pt") as file:
            names |= dict.fromkeys(file.keys(), path.name)
    size = sum(path.stat().st_size for path in paths)
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
