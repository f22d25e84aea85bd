"""Memory: how much is free, and the peak of this process."""

import sys
from pathlib import Path

import psutil
import torch

PROCESS = Path("/proc/self")  # Linux


def available(device: torch.device) -> int:
    """Bytes of free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def reset_peak(device: torch.device) -> None:
    """Start counting the peak again, if the system can: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Peak bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROCESS.exists():  # getrusage may report the peak of the parent process
        lines = (PROCESS / "status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    import resource  # not on Windows

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
