"""What a number came from: versions, content, device."""

import platform
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("eigenzoo", "torch", "transformers")}


def fingerprint(*parts: Tensor | str) -> str:
    """A short name for content: a hash of all bytes of tensors, with dtype and shape, and texts."""
    whole = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            numbers = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            data, kind = numbers.data, f"{part.dtype} {tuple(part.shape)}"
        else:
            data, kind = memoryview(part.encode()), "text"
        whole.update(f"{kind} {data.nbytes} ".encode())  # tells where a part ends
        whole.update(data)
    return whole.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """What computes: the GPU, or the processor, its vector instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the architecture has to do
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name, isa = named[1] if named else platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {isa}, threads: {torch.get_num_threads()}"
