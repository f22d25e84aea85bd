"""What a number came from: versions, weights, device."""

import platform
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from ..models.model import Model


def digest(data: bytes) -> str:
    """A short name for the content."""
    return sha256(data).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("eigenzoo", "torch", "transformers")}


def fingerprint(model: Model) -> str:
    """A digest of the first numbers of every weight: it tells models of one name apart."""
    heads = [w.flatten()[:64].float().cpu().numpy().tobytes() for w in model.parameters()]
    return digest(b"".join([repr(model.config).encode(), *heads]))


def device_name(device: torch.device) -> str:
    """What computes: the GPU, or the processor, its vector instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the architecture has to do
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name, isa = named[1] if named else platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {isa}, threads: {torch.get_num_threads()}"
