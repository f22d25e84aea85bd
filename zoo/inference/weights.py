"""Weights of checkpoints: read and check files, and build a model, whole or layer by layer."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.config import Config
from ..models.families import model_of, new_model
from ..models.model import Model


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder by name: from safetensors, else from PyTorch's .bin files."""
    if list(folder.glob("*.safetensors*")) or not list(folder.glob("pytorch_model*.bin*")):
        yield from _read_files(folder, "model.safetensors", _open_safetensors)
    else:
        yield from _read_files(folder, "pytorch_model.bin", _open_pickled)


def _read_files(
    folder: Path, whole: str, read: Callable[[Path], Iterator[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of file `whole`, or of the shards that its index lists."""
    for path in _shards(folder, whole):
        yield from read(path)


def _shards(folder: Path, whole: str) -> list[Path]:
    index = folder / f"{whole}.index.json"
    names = [whole]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            raise ValueError(f"{folder} lacks {name}: expected weights as safetensors or .bin")
    return [folder / name for name in names]


def _open_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118, not a mapping
            yield key, file.get_tensor(key)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): download or export it again") from error


def _open_pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a pickled file. For other content, raises ValueError and runs none."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no end"
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({reason}): download it again, or, if "
            "you trust it, convert it to safetensors"
        ) from error
    while tensors:
        yield tensors.popitem()


def stored_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights in a dtype, by default as stored; 0 if they are not in safetensors."""
    paths = list(folder.glob("*.safetensors"))
    if dtype is None:
        return sum(path.stat().st_size for path in paths)
    numbers = 0
    for path in paths:
        with opened(path) as file:
            numbers += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return numbers * dtype.itemsize


def build(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    native: bool = False,
) -> Model:
    """A model with these weights, each cast to dtype and moved to device as it is read.

    native: names are those of compressed checkpoints, else those of Hugging Face's. Raises
    ValueError if a weight is missing, unknown, of the wrong shape, or not finite.
    """
    parts = _native_parts if native else config.weights
    return model_of(config, _weights(_expected(config), parts, tensors, dtype, device))


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
    weights = {}
    for key, tensor in tensors:
        if not tensor.isfinite().all():
            raise ValueError(
                f"weight {key} is not finite: use a checkpoint without NaN and infinity"
            )
        for name, part in parts(key, tensor):
            if name == "head.weight" and name not in expected:
                continue  # tied
            if name not in expected or part.shape != expected[name].shape:
                want = tuple(expected[name].shape) if name in expected else "no such weight"
                raise ValueError(
                    f"weight {key} has shape {tuple(part.shape)}: config.json expects {want}"
                )
            cast = dtype if part.is_floating_point() else None
            weights[name] = part.to(device, cast or part.dtype)
    missing = expected.keys() - weights.keys()
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} weights, first {min(missing)}")
    return weights


class LayerFiles:
    """A dense checkpoint in safetensors whose weights are read layer by layer."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ):
        """Read only names and shapes. folder: of the checkpoint; the rest as in `build`."""
        if not list(folder.glob("*.safetensors*")):
            raise ValueError(
                f"{folder} has no safetensors, which reading layer by layer needs: convert the "
                "checkpoint, or omit --stream"
            )
        self.config, self.dtype, self.device = config, dtype, device
        self.paths = _shards(folder, "model.safetensors")
        # names of tensors by layer ("" for those outside layers) and file
        self.keys: dict[str, dict[Path, list[str]]] = {}
        self.expected: dict[str, dict[str, Tensor]] = {}
        for name, x in _expected(config).items():
            self.expected.setdefault(_layer_of(name), {})[name] = x
        for path in self.paths:
            with opened(path) as file:
                for key in file.keys():  # noqa: SIM118, the file is no mapping
                    self._place(path, key, file.get_slice(key).get_shape())

    def _place(self, path: Path, key: str, shape: list[int]) -> None:
        parts = self.config.weights(key, torch.empty(shape, device="meta"))
        for layer in {_layer_of(name) for name, _ in parts}:
            if layer not in self.expected:
                raise ValueError(f"weight {key}: config.json expects no such weight")
            self.keys.setdefault(layer, {}).setdefault(path, []).append(key)

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
        def tensors() -> Iterator[tuple[str, Tensor]]:
            for path, keys in self.keys.get(layer, {}).items():
                with opened(path) as file:
                    for key in keys:
                        yield key, file.get_tensor(key)

        parts, expected = self.config.weights, self.expected[layer]
        return _weights(expected, parts, tensors(), self.dtype, self.device)


def _layer_of(name: str) -> str:
    return name.split(".")[1] if name.startswith("layers.") else ""


def _native_parts(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    # in older checkpoints, the norms of MPT's qk_ln are parts of its projections
    name = re.sub(r"\.([qk])_proj\.norm\.", r".\1_bound.norm.", key.removeprefix("model."))
    yield name, tensor
