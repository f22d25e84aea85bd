"""Machine code of compiled kernels as text: its loops, and counts of its instructions."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions of a compiled kernel for NVIDIA GPUs, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, text = (
            subprocess.run([TOOLS / tool, flag, f.name], capture_output=True, text=True, check=True)
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    return usage.stdout, text.stdout


def loops(text: str) -> Iterator[list[str]]:
    """Instructions of every loop in disassembled text: from a label to a branch back to it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                yield instructions[labels[back[1]] :]


def count(instructions: list[str]) -> dict[str, int]:
    """The number of times each opcode occurs; loads from memory are counted by width."""
    counts: dict[str, int] = {}
    for line in instructions:
        words = re.sub(r"^@!?U?P\w+\s+", "", line.strip()).split()
        if not words:
            continue
        op = words[0]
        if op.split(".")[0] in ("LDG", "LDGSTS"):
            width = re.search(r"\.(128|64|U16|U8)\b", op)
            op = f"{op.split('.')[0]}.{width[1] if width else 32}"
        elif not op.startswith(("global_load", "buffer_load", "v_mfma")):
            op = op.split(".")[0]
        counts[op] = counts.get(op, 0) + 1
    return counts
