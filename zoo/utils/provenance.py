"""Where a number comes from: versions, content, device."""

import platform
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    return {name: version(name) for name in ("eigenzoo", "torch", "transformers")}


def fingerprint(*parts: Tensor | str) -> str:
    """A short hash of content: of texts, and of all bytes of tensors with dtype and shape."""
    whole = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            numbers = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            data, kind = numbers.data, f"{part.dtype} {tuple(part.shape)}"
        else:
            data, kind = memoryview(part.encode()), "text"
        whole.update(f"{kind} {data.nbytes} ".encode())  # marks the end of a part
        whole.update(data)
    return whole.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with its vector instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; on other systems the architecture is all we have
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name, isa = match[1] if match else platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {isa}, threads: {torch.get_num_threads()}"
