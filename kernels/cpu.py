"""The decoding ops for CPUs: C++ in the folder cpp/, compiled on first use, then kept in a cache.

They need a C++ compiler, as torch.compile does. Without one, the definitions in plain PyTorch
(zoo/models/attention.py, zoo/models/linear.py) do the same work.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import ninja
import torch

from . import library_cache

PIECES = Path(__file__).with_name("cpp")
SOURCE = PIECES / "ops.cpp"  # includes all other pieces, and says why it is the only one compiled
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
VECTORS = {  # options under which ATen's vectors use what the processor has
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [*WIDE, "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512"],
}


def flags() -> list[str]:
    """Options of the compiler for this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    known = VECTORS.get(capability, [])
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        known = [*known, "-mavx512bf16"]
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        known = [*known, "-mavx512vnni"]
    if capability == "AVX512" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        known = [*known, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]  # this process may use them now
    return ["-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability if known else 'DEFAULT'}", *known]


def kind() -> str:
    """Begin of the names of compiled ops: one per sources, torch version, processor and options.

    The compiler is not part of it: a library that was built works without any.
    """
    about = (torch.__version__, platform.machine(), *flags())
    sources = hashlib.sha256(" ".join(about).encode())
    for piece in sorted((*PIECES.glob("*.h"), *PIECES.glob("*.cpp"))):
        sources.update(piece.name.encode() + piece.read_bytes())
    return f"cpu-{sources.hexdigest()[:16]}"


def load() -> None:
    """Register the implementations of `torch.ops.eigenzoo` for CPUs.

    The first call on a machine compiles them, which takes half a minute. Raises ValueError, in one
    line, if they are not in the cache and cannot be built, or if the cache is not to be trusted.
    """
    if (reason := _load()) is not None:
        raise ValueError(reason)


@functools.cache  # also of a failure: models try again whenever they are moved
def _load() -> str | None:
    """None, or why it failed."""
    try:
        place = library_cache.folder()
        kept = library_cache.find(place, kind())
        if kept is None or not _loaded(kept):
            _build(place)
    except ValueError as error:
        return f"{error}, or use the reference ops"
    return None


def _loaded(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))
    except OSError:  # built on a system with other libraries
        return False
    return True


def _build(place: Path) -> None:
    """Compile the ops, load them and keep them."""
    from torch.utils import cpp_extension  # here, because the import is slow

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise ValueError(
            f"the ops for CPUs are compiled on first use, and there is no {compiler}: install g++ "
            "or clang, or name another compiler in CXX"
        )
    paths = (os.environ.get("PATH", os.defpath), ninja.BIN_DIR)  # not every environment is active
    os.environ["PATH"] = os.pathsep.join(paths)
    library_cache.remove_interrupted(place, "build-")
    try:
        # built in a folder beside it, then renamed: other processes never see half a file
        with tempfile.TemporaryDirectory(prefix="build-", dir=place) as inside:
            cpp_extension.load(  # this also loads the library
                "eigenzoo_cpu",
                [str(SOURCE)],
                extra_cflags=flags(),
                build_directory=inside,
                is_python_module=False,
            )
            library_cache.keep(Path(inside) / "eigenzoo_cpu.so", place, kind())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"{compiler} cannot build {SOURCE} in {place} ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "No space left" in line]
    return (telling or lines or [type(error).__name__])[0][:300]
