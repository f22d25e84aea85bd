"""Write a compressed model as one folder that eigenzoo, transformers and the Hub all read."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from torch import Tensor

from ..zoo.inference.checkpoint import FORMAT, Checkpoint
from ..zoo.models.model import Model
from ..zoo.utils.records import CompressionRecord
from ..zoo.utils.replace import sync, sync_all
from . import card, code
from .remote.configuration_eigen import EigenConfig

AUTO_MAP = {
    "AutoConfig": "configuration_eigen.EigenConfig",
    "AutoModel": "modeling_eigen.EigenModel",
    "AutoModelForCausalLM": "modeling_eigen.EigenForCausalLM",
}
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def check_free(out: Path, force: bool) -> None:
    """Raise ValueError if `out` is taken and `force` does not allow to replace it."""
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} does not exist: make it, or choose another output folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: expected the name of a folder to write")
    if out.exists() and not force:
        raise ValueError(f"{out} exists: choose another folder, or pass --force to replace it")


def check_shard_size(size: str) -> None:
    """Raise ValueError if weights cannot be cut into files of this size."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        raise ValueError(f"shard size is {size!r}: expected one such as 5GB ({error})") from None


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if the block ends well, and is removed if not."""
    check_free(out, force)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        put(fresh, out, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put(fresh: Path, out: Path, old: Path) -> None:
    """Rename the folder `fresh` to `out`, and an existing `out` to `old` before.

    What is in `fresh` is on disk before it gets the name, and the name when this returns.
    """
    sync_all(fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    sync(out.parent)


def export(
    out: Path,
    low: Model,
    original: Checkpoint,
    compression: CompressionRecord,
    force: bool = False,
    shard_size: str = "5GB",
) -> None:
    """Write the checkpoint folder `out`: weights, config, tokenizer, remote code and card.

    original: what the model was made from; its tokenizer, token ids and generation config are
    copied. compression: provenance and measurements, for config.json and the card. Raises
    ValueError if `out` is taken. On any error no half-written folder stays.
    """
    with new_folder(out, force) as folder:
        save_torch_state_dict(weights_of(low), folder, max_shard_size=shard_size)
        write_about(folder, low, original, compression)


def weights_of(low: Model) -> dict[str, Tensor]:
    """The weights by their names in a checkpoint, without a head that is tied to the embedding."""
    weights = {f"model.{name}": x.contiguous() for name, x in low.state_dict().items()}
    if low.config.tie_word_embeddings:
        del weights["model.head.weight"]
    return weights


def write_about(
    folder: Path, low: Model, original: Checkpoint, compression: CompressionRecord
) -> None:
    """Write all but the weights, which `low` need not hold. Arguments as in `export`."""
    config = EigenConfig(
        family=low.config.family,
        **asdict(low.config),
        **{key: original.config[key] for key in KEPT if original.config.get(key) is not None},
        compression=compression,
        format_version=FORMAT,
        code=code.hashes(),
        architectures=["EigenForCausalLM"],
        dtype=str(low.dtype).removeprefix("torch."),
    )
    config.auto_map = AUTO_MAP
    generation = copy(original.generation)
    generation.use_cache = True  # MPT's config disables the cache
    config.save_pretrained(folder)
    original.tokenizer.save_pretrained(folder)
    generation.save_pretrained(folder)
    for name, text in code.files().items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text(card.card(low.config, compression, low.dtype))
