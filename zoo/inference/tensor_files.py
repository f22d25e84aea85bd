"""Files of tensors: safetensors, or PyTorch's .bin files, whole or in shards."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.regular import readable
from .files import read_json
from .gguf_file import open_gguf

EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")  # names of quantized dtypes


class Lazy(NamedTuple):
    """A tensor that is read when asked for."""

    meta: Tensor
    """On meta: its shape and dtype."""
    read: Callable[[], Tensor]


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
    for path in shards(folder, whole):
        yield from read(path)


def shards(folder: Path, whole: str) -> list[Path]:
    """The file `whole`, or the shards that its index lists, which must lie in the folder.

    A file may be a link out of the folder, as all files in the Hub's cache are.
    """
    index = folder / f"{whole}.index.json"
    names = _listed(index) if index.exists() else [whole]
    for name in names:
        if not (folder / name).exists():
            also = " (a GGUF file is given by its own path)" if list(folder.glob("*.gguf")) else ""
            raise ValueError(
                f"{folder} lacks {name}: expected weights as safetensors or .bin{also}"
            )
    return [readable(folder / name) for name in names]


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ValueError if its weights are in other files."""
    if not list(folder.glob("*.safetensors*")):
        raise ValueError(
            f"{folder} has no safetensors, which reading layer by layer needs: convert the "
            "checkpoint, or omit --stream"
        )
    return shards(folder, "model.safetensors")


def lazy_safetensors(paths: list[Path]) -> Iterator[tuple[str, Lazy]]:
    """The tensors of safetensors files by name. Raises ValueError if one is damaged."""
    for path in paths:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118, not a mapping
                yield key, Lazy(_on_meta(file, key), partial(_read_one, path, key))


def _on_meta(file: Any, key: str) -> Tensor:
    """A tensor of an open safetensors file without its numbers."""
    stored = file.get_slice(key)
    shape = stored.get_shape()
    dtype = (stored[:0] if shape else file.get_tensor(key)).dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def _read_one(path: Path, key: str) -> Tensor:
    with opened(path) as file:
        return file.get_tensor(key)


def _listed(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map: expected the name of a file for each weight")
    for key, name in files.items():
        if not isinstance(name, str) or PurePath(name).name != name or name == "..":
            raise ValueError(f"{index} has {name!r} for {key}: expected a file in the same folder")
    return sorted(set(files.values()))


def _open_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118, not a mapping
            yield key, file.get_tensor(key)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(readable(path), "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): download or export it again") from error


def _open_pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a pickled file. For other content, raises ValueError and runs none."""
    try:
        tensors = torch.load(readable(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no end"
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({reason}): download it again, or, if "
            "you trust it, convert it to safetensors"
        ) from error
    pairs = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in pairs):
        raise ValueError(f"{path} holds a {type(tensors).__name__}: expected tensors by name")
    while tensors:
        yield tensors.popitem()


def stored_bytes(path: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights in a dtype; 0 if they are neither in safetensors nor in GGUF.

    dtype: None counts them as stored; those of 8 bits are quantized, and count as 16 bits. Those in
    GGUF count as 32 bits.
    """
    if path.suffix == ".gguf":
        count = sum(prod(tensor.shape) for tensor in open_gguf(path).tensors.values())
        return count * (dtype or torch.float32).itemsize
    paths = list(path.glob("*.safetensors"))
    numbers: Counter[str] = Counter()
    for path in paths:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118, not a mapping
                tensor = file.get_slice(key)
                numbers[tensor.get_dtype()] += prod(tensor.get_shape())
    if dtype is not None:
        return numbers.total() * dtype.itemsize
    return sum(path.stat().st_size for path in paths) + sum(numbers[name] for name in EIGHT_BITS)
