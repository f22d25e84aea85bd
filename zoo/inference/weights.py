"""Weights of checkpoints: check them, and build a model, whole or layer by layer."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.config import Config
from ..models.families import model_of, new_model
from ..models.model import Model
from ..models.mpt import OLD_NAMES
from .tensor_files import Lazy

EMBED = "embed.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Tensors = Iterator[tuple[str, Tensor]]


def build(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    native: bool = False,
) -> Model:
    """A model with these weights, each cast to dtype and moved to device as it is read.

    dtype: None keeps that of the weights; of mixed ones, that of most numbers. native: names are
    those of compressed checkpoints, else those of Hugging Face's. Raises ValueError if a weight is
    missing, unknown, given twice, of the wrong shape, not floating-point, or not finite.
    """
    parts = _native_parts if native else config.weights
    weights = _weights(_expected(config), parts, tensors, dtype, device)
    for key, x in weights.items():
        if x.dtype == torch.int64 and not (x.min() >= 0 and x.max() < config.head_dim // 2):
            raise ValueError(
                f"weight {key} is damaged: expected numbers from 0 to {config.head_dim // 2 - 1}"
            )
    numbers: Counter[torch.dtype] = Counter()
    for x in weights.values():
        numbers[x.dtype] += x.numel()
    main = _main_dtype(numbers)
    return model_of(config, {key: _cast(key, x, main, device) for key, x in weights.items()})


def fill(
    config: Config,
    own: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    cut: Callable[[str, Tensor], Tensor] = lambda name, x: x,
) -> None:
    """Copy the weights of a compressed checkpoint into a model as they are read, one by one.

    own: the model's weights, by the names in the checkpoint. They may be those of some layers only,
    and each the part of a weight that `cut(name, weight)` returns. Raises ValueError as `build`,
    but compares nothing with a tied head.
    """
    expected, given = _expected(config), set[str]()
    for key, tensor in tensors:
        for name, x in _native_parts(key, tensor):
            if name == "head.weight" and name not in expected:
                continue
            _check_part(key, x, expected.get(name))
            given.add(name)
            if name in own:
                own[name].copy_(_cast(key, cut(name, x), own[name].dtype, own[name].device))
    _check_missing(expected, given)


def _expected(config: Config) -> dict[str, Tensor]:
    """The weights that a checkpoint must have, by native name, on meta."""
    with torch.device("meta"):
        expected = new_model(config).state_dict()
    if config.tie_word_embeddings:
        del expected["head.weight"]
    return expected


def _weights(
    expected: dict[str, Tensor],
    parts: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The weights `expected`, made from `tensors` by `parts`. Errors as in `build`."""
    weights: dict[str, Tensor] = {}
    tied = None
    for key, tensor in tensors:
        for name, part in parts(key, tensor):
            if name == "head.weight" and name not in expected:
                tied = part
                continue
            if name in weights:
                raise ValueError(f"weight {key} is given twice: export the checkpoint again")
            _check_part(key, part, _wanted(expected, name))
            weights[name] = _cast(key, part, dtype, device)
    _check_missing(expected, weights.keys())
    for name in expected:
        if name not in weights:
            weights[name] = torch.stack([weights.pop(row) for row in _rows(expected, name)])
    if twice := weights.keys() - expected.keys():
        raise ValueError(f"weight {min(twice)} is given twice: export the checkpoint again")
    if tied is not None and not torch.equal(_cast("head", tied, dtype, device), weights[EMBED]):
        raise ValueError(
            "the embedding and the head have different weights, and tie_word_embeddings in "
            "config.json is true: expected false, or equal weights"
        )
    return weights


def _wanted(expected: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The weight of this name, or the row if it ends in [3]; None if there is no such."""
    whole, bracket, number = name.partition("[")
    x = expected.get(whole)
    if not bracket or x is None:
        return x
    index = int(number.removesuffix("]"))
    return x[index] if index < len(x) else None


def _rows(expected: Mapping[str, Tensor], name: str) -> list[str]:
    """The names of all rows of a weight."""
    return [f"{name}[{i}]" for i in range(len(expected[name]))]


def _check_part(key: str, part: Tensor, expected: Tensor | None) -> None:
    _check_kind(key, part, expected)
    if not part.isfinite().all():
        raise ValueError(f"weight {key} is not finite: use a checkpoint without NaN and infinity")


def _check_kind(key: str, part: Tensor, expected: Tensor | None) -> None:
    if expected is None or part.shape != expected.shape:
        want = "no such weight" if expected is None else tuple(expected.shape)
        raise ValueError(f"weight {key} has shape {tuple(part.shape)}: config.json expects {want}")
    whole = expected.dtype == torch.int64
    if part.layout != torch.strided or part.dtype not in ((torch.int64,) if whole else FLOATS):
        want = "int64" if whole else "float16, bfloat16, float32 or float64"
        raise ValueError(
            f"weight {key} is {_short(part.dtype)}: expected {want}; quantized weights need their "
            "quantization_config in config.json"
        )


def _check_missing(expected: Mapping[str, Tensor], given: Set[str]) -> None:
    """Raise ValueError unless every weight was given, whole or by all its rows."""
    missing = set[str]()
    for name in expected.keys() - given:
        missing |= {*_rows(expected, name)} - given if f"{name}[0]" in given else {name}
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} weights, first {min(missing)}")


def _cast(key: str, part: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    cast = part.to(device, dtype if part.is_floating_point() else None)
    if cast.dtype == torch.float16 != part.dtype and not cast.isfinite().all():
        raise ValueError(f"weight {key} exceeds float16: use bfloat16 or float32")
    return cast


def _main_dtype(numbers: Mapping[torch.dtype, int]) -> torch.dtype:
    """The dtype of most numbers, which a model of mixed dtypes gets. numbers: by dtype."""
    return max(FLOATS, key=lambda dtype: numbers.get(dtype, 0))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class LayerFiles:
    """A dense checkpoint whose weights are read layer by layer."""

    def __init__(
        self,
        paths: list[Path],
        stored: Iterable[tuple[str, Lazy]],
        config: Config,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        plain: Callable[[Tensors], Tensors] = iter,
    ):
        """Read only names and shapes.

        paths: the files. stored: their tensors, by the names in a Hugging Face checkpoint. plain:
        makes tensors as they are stored floating-point. The rest as in `build`.
        """
        self.paths, self.config, self.device, self.plain = paths, config, device, plain
        # by layer, "" for what is outside layers
        self.stored: dict[str, list[tuple[str, Lazy]]] = {}
        self.expected: dict[str, dict[str, Tensor]] = {}
        expected, given = _expected(config), set[str]()
        for name, x in expected.items():
            self.expected.setdefault(_layer_of(name), {})[name] = x
        numbers: Counter[torch.dtype] = Counter()
        for key, tensor in stored:
            given |= {*self._place(key, tensor)}
            numbers[tensor.meta.dtype] += tensor.meta.numel()
        self.dtype = dtype or _main_dtype(numbers)
        if self.plain is iter:
            _check_missing(expected, given)

    def _place(self, key: str, tensor: Lazy) -> list[str]:
        """Note the layers of a tensor; returns the names of its parts."""
        parts = dict(self.config.weights(key, tensor.meta))
        for name, part in parts.items():
            layer = _layer_of(name)
            if layer not in self.expected:
                raise ValueError(f"weight {key}: config.json expects no such weight")
            tied = name == "head.weight" and name not in self.expected[layer]
            if self.plain is iter and not tied:
                _check_kind(key, part, _wanted(self.expected[layer], name))
        for layer in {_layer_of(name) for name in parts}:
            self.stored.setdefault(layer, []).append((key, tensor))
        return [*parts]

    def model(self) -> Model:
        """The model with the weights outside layers; its layers are on meta."""
        return model_of(self.config, self._read(""), whole=False)

    @contextmanager
    def layer(self, model: Model, index: int) -> Iterator[Any]:
        """Layer `index` of the model with its weights, which are freed when the context ends."""
        block, start = model.layers[index], f"layers.{index}."
        weights = {k.removeprefix(start): x for k, x in self._read(str(index)).items()}
        block.load_state_dict(weights, assign=True)
        block.requires_grad_(False)
        try:
            yield block
        finally:
            block.to("meta")

    def _read(self, layer: str) -> dict[str, Tensor]:
        tensors = ((key, tensor.read()) for key, tensor in self.stored.get(layer, []))
        parts, expected = self.config.weights, self.expected[layer]
        return _weights(expected, parts, self.plain(tensors), self.dtype, self.device)


def _layer_of(name: str) -> str:
    return name.split(".")[1] if name.startswith("layers.") else ""


def _native_parts(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    name = key.removeprefix("model.")
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    yield name, tensor
