"""The contestants of a bench: checkpoints, or random weights in one shape, and variants of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ..compression.settings import Settings
from ..inference.checkpoint import inspect, locate, native_config, read_config
from ..models.bits import check_bits
from ..models.config import Config
from ..models.model import Model
from ..utils.provenance import fingerprint
from .llama_cpp import CACHES, LlamaCpp, find_program
from .shapes import segmented, shaped, uniform
from .timed_models import Contestant, Native, Transformers

WEIGHTS = (".safetensors", ".bin", ".gguf")  # how the names of their files end
SIZES_OF_A_MODEL = (
    *("family", "num_hidden_layers", "hidden_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
Prepare = Callable[[Model], Model]


class Contestants(NamedTuple):
    """Models of this package, the first of which the others are compared with, and variants.

    source: what transformers would load or build for the first. settings: those of compressed
    shapes, with choices filled in.
    """

    title: str
    natives: Sequence[Native]
    configs: Mapping[str, Config]  # of the natives by name, without variants
    source: str | PreTrainedConfig
    revision: str | None = None
    settings: Sequence[Settings] = ()
    others: Sequence[Contestant] = ()

    @property
    def all(self) -> list[Contestant]:
        """In the order of the rows."""
        return [*self.natives, *self.others]

    @property
    def dtype(self) -> torch.dtype:
        """That of the first checkpoint, float32 for random weights."""
        if not isinstance(self.source, str):
            return torch.float32
        return getattr(torch, inspect(self.source, self.revision)["dtype"])

    def content(self) -> str:
        """A fingerprint of the models: of their configs, and of all bytes of their weights."""
        sources = dict.fromkeys(m.source for m in self.natives if isinstance(m.source, str))
        places = [locate(source, self.revision) for source in sources]
        places += {model.path: None for model in self.others if isinstance(model, LlamaCpp)}
        files = [path for place in places for path in _weight_files(place)]
        return fingerprint(*map(repr, self.configs.values()), *files)

    def check_length(self, slots: int) -> None:
        """Raise ValueError if a model cannot read so many tokens."""
        for config in self.configs.values():
            config.check_length(slots)

    def with_bits(self, kv_bits: Sequence[int]) -> "Contestants":
        """Every model once more for each number of bits in its cache. Raises ValueError as due."""
        widths = {
            latent.width
            for config in self.configs.values()
            for layer in range(config.num_hidden_layers)
            for latent in config.latents(layer)
        }
        for bits in kv_bits:
            for width in widths:
                check_bits(bits, width)
        rounded = [
            replace(model, name=f"{model.name}, {bits} bits", kv_bits=bits)
            for bits in kv_bits
            for model in self.natives
        ]
        return self._replace(natives=[*self.natives, *rounded])

    def with_transformers(self, static: bool = False) -> "Contestants":
        """The first model in transformers as well: with a dynamic cache, and a static one.

        static: only that.
        """
        others = [
            Transformers(f"transformers {cache}", self.source, cache == "static", self.revision)
            for cache in ("dynamic", "static")[static:]
        ]
        return self._replace(others=[*self.others, *others])

    def with_llama_cpp(
        self, given: str, batches: Sequence[int], device: torch.device
    ) -> "Contestants":
        """The first model in llama.cpp as well, once for each type of its cache in `CACHES`.

        given: its GGUF file; auto: what the first model was read from. Raises ValueError without
        llama.cpp, without a GGUF file, if the file holds another model, and for batches or a device
        that are not measured there.
        """
        if device.type != "cpu" or {*batches} != {1}:
            raise ValueError(
                f"--llama-cpp with --device {device} and batches {[*batches]}: expected cpu and "
                "one sequence, which is all that is measured in llama.cpp"
            )
        source = self.source if given == "auto" else given
        path = locate(source, self.revision) if isinstance(source, str) else Path(self.title)
        if path.suffix != ".gguf":
            raise ValueError(
                f"--llama-cpp: {path} is no GGUF file: make one with convert_hf_to_gguf.py, which "
                "comes with llama.cpp, and give --llama-cpp FILE.gguf"
            )
        _check_same_sizes(path, next(iter(self.configs.values())))
        program = find_program()
        others = [LlamaCpp(path, cache, program) for cache in CACHES]
        return self._replace(others=[*self.others, *others])


def _check_same_sizes(path: Path, config: Config) -> None:
    """Raise ValueError if a GGUF file holds a model of other sizes than those in `config`."""
    held = native_config(read_config(path))
    for size in SIZES_OF_A_MODEL:
        one, other = getattr(config, size), getattr(held, size)
        if one != other:
            raise ValueError(
                f"--llama-cpp: {path} holds another model: its {size} is {other}, and that of the "
                f"first model is {one}"
            )


def _weight_files(place: Path) -> list[Path]:
    """The files of weights in a folder, or a file itself."""
    paths = [place] if place.is_file() else sorted(place.iterdir())
    return [path for path in paths if path.suffix in WEIGHTS]


def from_checkpoints(
    sources: Sequence[str],
    prepare: Prepare,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Contestants:
    """Checkpoints, the first of which is the uncompressed one.

    prepare: see `Native`. Raises ValueError for what is no checkpoint.
    """
    names = [Path(source).name for source in sources]
    if len(set(names)) < len(names):
        names = [*sources]
    named = [*zip(names, sources, strict=True)]  # one given twice shows how much speeds vary
    configs = {n: native_config(read_config(locate(s, revision))) for n, s in named}
    natives = [Native(n, s, prepare, revision, trust_remote_code) for n, s in named]
    return Contestants(names[0], natives, configs, sources[0], revision)


def from_shape(
    shape: str,
    layers: int | None,
    context: int,
    keeps: Sequence[float],
    settings: Settings,
    prepare: Prepare,
    segments: Sequence[str] = (),
) -> Contestants:
    """Random weights in a published shape: dense, and compressed to every share in `keeps`.

    layers: so many only. context: tokens that the models must be able to read. settings: those of
    the compressed models but for `keep`. segments: of one more compressed model each, see
    `segmented`. Raises ValueError for an unknown shape and for settings that do not fit it.
    """
    source = shaped(shape, layers, context)
    dense = native_config(source.to_dict())
    fitted = []
    for keep in keeps:
        asked = settings._replace(keep=keep, kv_bits=(16,))
        asked.check()
        fitted.append(asked.fit(dense))
    configs = {"dense": dense} | {f"keep {s.keep:g}": uniform(dense, s) for s in fitted}
    for text in segments:
        configs[text] = segmented(dense, settings.fit(dense), text)
    natives = [Native(name, config, prepare) for name, config in configs.items()]
    title = shape + (f", {layers} layers" if layers else "")
    return Contestants(title, natives, configs, source, settings=fitted)
