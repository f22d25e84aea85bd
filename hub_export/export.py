"""A compressed model as files of one folder that eigenzoo, transformers and the Hub all read."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from ..zoo.compression.record import about
from ..zoo.compression.settings import Settings
from ..zoo.inference.checkpoint import FORMAT, Checkpoint
from ..zoo.models.model import Model
from ..zoo.utils.escape import told
from ..zoo.utils.records import CompressionRecord
from . import card, code
from .remote.configuration_eigen import EigenConfig

AUTO_MAP = {
    "AutoConfig": "configuration_eigen.EigenConfig",
    "AutoModel": "modeling_eigen.EigenModel",
    "AutoModelForCausalLM": "modeling_eigen.EigenForCausalLM",
}
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def check_shard_size(size: str) -> None:
    """Raise ValueError if weights cannot be cut into files of this size."""
    number = re.fullmatch(r"(\d{1,9}(\.\d{1,9})?) ?[KMGT]B", size.strip(), re.IGNORECASE)
    if number is None or not float(number[1]):
        raise ValueError(f"shard size is {size!r}: expected one such as 5GB, in KB, MB, GB or TB")


def weights_of(low: Model) -> dict[str, Tensor]:
    """The weights by their names in a checkpoint, without a head that is tied to the embedding."""
    weights = {f"model.{name}": x.contiguous() for name, x in low.state_dict().items()}
    if low.config.tie_word_embeddings:
        del weights["model.head.weight"]
    return weights


def bytes_of(low: Model) -> int:
    """Bytes of the weights that are written."""
    return sum(x.nbytes for x in weights_of(low).values())


def export(
    folder: Path,
    low: Model,
    original: Checkpoint,
    compression: CompressionRecord,
    shard_size: str = "5GB",
) -> None:
    """Write a whole checkpoint into an empty folder. Arguments as in `write_about`."""
    save_torch_state_dict(weights_of(low), folder, max_shard_size=shard_size)
    write_about(folder, low, original, compression)


def write_about(
    folder: Path, low: Model, original: Checkpoint, compression: CompressionRecord
) -> None:
    """Write all but the weights: config, tokenizer, remote code and card.

    low: the model, whose layers may be on meta. original: what it was made from; its tokenizer,
    token ids and generation config are copied. compression: provenance and measurements, for
    config.json and the card. Raises ValueError, naming the file that cannot be written.
    """
    with naming("config.json"):
        _config(low, original, compression).save_pretrained(folder)
    write_kept(folder, original)
    for name, text in code.files().items():
        (folder / name).write_text(text)
    with naming("README.md"):
        (folder / "README.md").write_text(card.card(low.config, compression))


def rehearse(
    folder: Path,
    original: Checkpoint,
    settings: Settings,
    write: Callable[[Path, Model, Checkpoint, CompressionRecord], None] = write_about,
) -> None:
    """Write all but the weights as if nothing were compressed, to fail before the long work."""
    model = original.model
    source = about(original, settings, model.config, "self", torch.empty(0, 1), "", 0)
    write(folder, model, original, cast(CompressionRecord, {**source, "layers": []}))


def write_kept(folder: Path, original: Checkpoint) -> None:
    """Write what stays as it was: tokenizer and generation config.

    The latter is written without transformers' check, which refuses sampling settings beside
    greedy decoding, as Vicuna has them: a model answers as its original does, which ignores them.
    """
    with naming("the tokenizer"):
        original.tokenizer.save_pretrained(folder)
    with naming("generation_config.json"):
        generation = copy(original.generation)
        generation.use_cache = True  # MPT's config disables the cache
        generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Raise ValueError, naming the file, for any error: tokenizers run code of their own."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name} of the new checkpoint cannot be written: {told(error)}"
        ) from error


def _config(low: Model, original: Checkpoint, compression: CompressionRecord) -> EigenConfig:
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
    return config
