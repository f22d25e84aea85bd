"""The container of GGUF: metadata and tensors of a file, or of all parts of a split one.

The package gguf dequantizes. Its reader is not used: a damaged length sends it into an endless
loop, and it takes seconds for a large vocabulary.
"""

import math
import re
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.regular import readable

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # by value type
STRING, ARRAY = 8, 9  # the other value types
DIMENSIONS = 4  # the most that ggml knows
PIECE = 1024  # rows that are dequantized at a time


class Stored(NamedTuple):
    """Where a tensor lies: its file, its shape as in torch, ggml's type, and the first byte."""

    path: Path
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def block(self) -> tuple[int, int]:
        """Numbers and bytes of one block. Raises ValueError for an unknown type."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.kind not in {kind.value for kind in GGMLQuantizationType}:
            raise ValueError(f"ggml type {self.kind} is unknown: upgrade the package gguf")
        return GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        numbers, size = self.block
        if self.shape[-1] % numbers:
            raise ValueError(
                f"a row of {self.shape[-1]} numbers is not made of blocks of {numbers}"
            )
        return self.shape[-1] // numbers * size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.row_bytes * math.prod(self.shape[:-1])

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in dtype. Raises ValueError for a type that gguf cannot dequantize.

        Rows are dequantized and cast piece by piece, so that beside the result no tensor of its
        size is in memory.
        """
        from gguf import GGMLQuantizationType, dequantize

        rows = math.prod(self.shape[:-1]), self.row_bytes
        kind = GGMLQuantizationType(self.kind)
        stored = np.memmap(self.path, np.uint8, "r", self.start, rows)
        x = torch.empty(rows[0], self.shape[-1], dtype=dtype)
        try:
            for i in range(0, rows[0], PIECE):
                piece = np.array(dequantize(stored[i : i + PIECE], kind))
                x[i : i + PIECE] = torch.from_numpy(piece)
        except NotImplementedError as error:
            raise ValueError(f"{self.path} holds {kind.name}, which gguf cannot read") from error
        return x.view(self.shape)


class GGUF(NamedTuple):
    """Metadata and tensors by name. Of a split file, all of its parts."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def first_part(path: Path) -> Path:
    """The first part of the split file that `path` belongs to, or `path`."""
    match = PART.fullmatch(path.name)
    return path.with_name(f"{match[1]}-{1:05}-of-{match[3]}.gguf") if match else path


def model_name(path: Path) -> str:
    """The file's name without its ending and the number of its part."""
    match = PART.fullmatch(path.name)
    return match[1] if match else path.stem


def parts(path: Path) -> list[Path]:
    """All parts of the split file that `path` belongs to, or `path` alone.

    Raises ValueError naming the parts that are missing.
    """
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    stem, count = match[1], int(match[3])
    paths = [path.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise ValueError(
            f"{path} is a part of {count}, but {len(missing)} are missing, first {missing[0]}: "
            "put all parts into one folder"
        )
    return paths


def open_gguf(path: Path) -> GGUF:
    """A GGUF file with all its parts; tensors stay on disk.

    Raises ValueError if the package gguf or a part is missing, or if a file is damaged.
    """
    if find_spec("gguf") is None:
        raise ValueError(f"{path} needs the package gguf: pip install 'eigenzoo[gguf]'")
    paths = parts(path)
    opened = [_header(part) for part in paths]
    whole = GGUF(opened[0].metadata, {})
    for i, (part, own) in enumerate(zip(paths, opened, strict=True)):
        place = own.metadata.get("split.no", 0), own.metadata.get("split.count", 1) or 1
        if place != (i, len(paths)):
            raise ValueError(
                f"{part} says that it is part {place[0]} of {place[1]}, counted from 0: expected "
                f"{i} of {len(paths)}; give split files their own names"
            )
        twice = whole.tensors.keys() & own.tensors.keys()
        if twice:
            raise ValueError(f"{part} holds {min(twice)}, which an earlier part holds too")
        whole.tensors.update(own.tensors)
    count = whole.metadata.get("split.tensors.count", len(whole.tensors))
    if count != len(whole.tensors):
        raise ValueError(f"{path} announces {count} tensors: found {len(whole.tensors)}")
    return whole


def _header(path: Path) -> GGUF:
    if readable(path).stat().st_size == 0:
        raise ValueError(f"{path} is empty: download it again")
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except (struct.error, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error


class _Cursor:
    """Reads values one after the other. Raises struct.error beyond the end."""

    def __init__(self, data: mmap):
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        """The next values, of the forms of the module struct."""
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        """The next string."""
        (length,) = self.take("Q")
        return self.take(f"{length}s")[0].decode()

    def value(self, kind: int) -> Any:
        """The next value of metadata, of GGUF's type `kind`."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(self._scalar(kind))[0]
        kind, count = self.take("IQ")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        return list(self.take(f"{count}{self._scalar(kind)}"))

    def _scalar(self, kind: int) -> str:
        form = SCALARS[kind] if kind < len(SCALARS) else None
        if form is None:
            raise ValueError(f"unknown type of value, {kind}")
        return form


def _parse(path: Path, cursor: _Cursor) -> GGUF:
    magic, version, tensor_count, value_count = cursor.take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("expected GGUF of version 2 or 3, little-endian")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        _put(metadata, cursor.string(), cursor.value(*cursor.take("I")))
    infos: dict[str, Stored] = {}
    for name, shape, kind, offset in _infos(cursor, tensor_count):
        _put(infos, name, Stored(path, shape, kind, offset))
    step = metadata.get("general.alignment", 32)
    if type(step) is not int or step < 1:
        raise ValueError(f"general.alignment is {step}: expected a positive number")
    start = -(-cursor.at // step) * step
    tensors = {name: x._replace(start=start + x.start) for name, x in infos.items()}
    for name, x in tensors.items():
        if x.start + x.nbytes > len(cursor.data):
            raise ValueError(f"it ends before the end of {name}")
    return GGUF(metadata, tensors)


def _infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for _ in range(count):
        name = cursor.string()
        (dimensions,) = cursor.take("I")
        if not 1 <= dimensions <= DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = cursor.take(f"{dimensions}Q")
        if 0 in shape:
            raise ValueError(f"{name} is empty")
        yield name, shape[::-1], *cursor.take("IQ")


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    if name in values:
        raise ValueError(f"{name} stands there twice")
    values[name] = value
