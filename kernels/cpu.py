"""The decode ops for CPUs: cpu.cpp, built once on the machine that runs it, and kept.

Without a C++ compiler, which torch.compile wants as well, zoo/models/attention.py does their work.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import ninja
import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
VECTORS = {  # what ATen's vectors want to be told, by what the processor has
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [*WIDE, "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512"],
}


def flags() -> list[str]:
    """Options for the compiler on this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    known = VECTORS.get(capability, [])
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        known = [*known, "-mavx512bf16"]
    return ["-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability if known else 'DEFAULT'}", *known]


def library() -> Path:
    """Where the built ops are kept: a file for every source, torch and kind of processor."""
    kind = " ".join((SOURCE.read_text(), torch.__version__, *flags()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eigenzoo"
    return cache / f"cpu-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"


@functools.cache
def load() -> None:
    """Give `torch.ops.eigenzoo` its implementations for CPUs, built if need be: half a minute.

    Raises ValueError where there is no compiler.
    """
    kept = library()
    if kept.exists():
        torch.ops.load_library(str(kept))
    else:
        _build(kept)


def _build(kept: Path) -> None:
    from torch.utils import cpp_extension  # takes its time

    compiler, instead = cpp_extension.get_cxx_compiler(), "or use the reference ops"
    if shutil.which(compiler) is None:
        raise ValueError(
            f"the attention ops for CPUs are compiled on first use, and there is no {compiler}: "
            f"install g++ or clang, name another in CXX, {instead}"
        )
    os.environ["PATH"] += os.pathsep + ninja.BIN_DIR  # an environment need not be activated
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as place:  # half a file is never seen
        try:
            cpp_extension.load(  # loads what it has built
                "eigenzoo_cpu",
                [str(SOURCE)],
                extra_cflags=flags(),
                build_directory=place,
                is_python_module=False,
            )
        except RuntimeError as error:
            raise ValueError(f"{compiler} cannot build {SOURCE}, {instead}: {error}") from error
        os.replace(Path(place) / "eigenzoo_cpu.so", kept)
