"""Where a number comes from: versions, content, device."""

import json
import platform
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

CODE = "*.py", "*.cpp", "*.h"
CHUNK = 1 << 24  # bytes of a file that are read at once


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    return {name: version(name) for name in ("eigenzoo", "torch", "transformers")}


@cache
def code() -> str:
    """A fingerprint of this package's own files, which change without a new version as well."""
    root = Path(__file__).parents[2]
    rooms = [root / name for name in ("zoo", "kernels", "hub_export")]
    paths = sorted(path for room in rooms for kind in CODE for path in room.rglob(kind))
    return fingerprint(*(f"{path.relative_to(root)}\n{path.read_text('utf-8')}" for path in paths))


def work(device: torch.device, **parts: Any) -> dict[str, Any]:
    """All that the result of long work depends on, as JSON holds it, to be compared on resume.

    parts: every setting, and fingerprints of weights and texts. Added are the kind of device, this
    package's code and the versions of packages.
    """
    return json.loads(json.dumps({**parts, "device": device.type, **versions(), "code": code()}))


def fingerprint(*parts: Tensor | str | Path) -> str:
    """A short hash of content: texts, all bytes of files, and of tensors with dtype and shape."""
    whole = sha256()
    for part in parts:
        if isinstance(part, Path):
            kind, size, pieces = "file", part.stat().st_size, _pieces(part)
        else:
            kind, data = _bytes(part)
            size, pieces = data.nbytes, iter([data])
        whole.update(f"{kind} {size} ".encode())  # marks the end of a part
        for piece in pieces:
            whole.update(piece)
    return whole.hexdigest()[:16]


def _bytes(part: Tensor | str) -> tuple[str, memoryview]:
    if isinstance(part, str):
        return "text", memoryview(part.encode())
    numbers = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{part.dtype} {tuple(part.shape)}", numbers.data


def _pieces(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, with a bar if it takes more than a second to read them."""
    with (
        path.open("rb") as file,
        tqdm(
            desc=f"checking {path.name}",
            total=path.stat().st_size,
            unit="B",
            unit_scale=True,
            delay=1,
            disable=None,
            leave=False,
        ) as bar,
    ):
        while piece := file.read(CHUNK):
            bar.update(len(piece))
            yield memoryview(piece)


def model_fingerprint(model: Any) -> str:
    """A fingerprint of a model's config and weights."""
    return fingerprint(repr(model.config), *model.state_dict().values())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A fingerprint of all by which a tokenizer of transformers makes tokens, or a prompt."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    return fingerprint(json.dumps(about), rules.to_str() if rules else type(tokenizer).__name__)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with its vector instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; on other systems the architecture is all we have
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name, isa = match[1] if match else platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {isa}, threads: {torch.get_num_threads()}"
