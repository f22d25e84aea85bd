"""The decoding ops for CPUs: C++ in the folder cpp/, compiled on first use, then kept in a cache.

They need a C++ compiler, as torch.compile does. Without one, the definitions in plain PyTorch
(zoo/models/attention.py, zoo/models/linear.py) do the same work.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import ninja
import torch

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
    return ["-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability if known else 'DEFAULT'}", *known]


def library() -> Path:
    """Path of the compiled ops, built or not: one file per sources, torch version and options.

    The compiler is not part of the name: a library that was built works without any.
    """
    kind = hashlib.sha256(" ".join((torch.__version__, *flags())).encode())
    for piece in sorted((*PIECES.glob("*.h"), *PIECES.glob("*.cpp"))):
        kind.update(piece.name.encode() + piece.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eigenzoo"
    return cache / f"cpu-{kind.hexdigest()[:16]}.so"


@functools.cache
def load() -> None:
    """Register the implementations of `torch.ops.eigenzoo` for CPUs.

    The first call on a machine compiles them, which takes half a minute. Raises ValueError if there
    is no compiler, or it fails.
    """
    kept = library()
    if kept.exists():
        torch.ops.load_library(str(kept))
    else:
        _build(kept)


def _build(kept: Path) -> None:
    from torch.utils import cpp_extension  # here, because the import is slow

    compiler, instead = cpp_extension.get_cxx_compiler(), "or use the reference ops"
    if shutil.which(compiler) is None:
        raise ValueError(
            f"the attention ops for CPUs are compiled on first use, and there is no {compiler}: "
            f"install g++ or clang, name another compiler in CXX, {instead}"
        )
    os.environ["PATH"] += os.pathsep + ninja.BIN_DIR  # for environments that are not activated
    kept.parent.mkdir(parents=True, exist_ok=True)
    # built in a folder beside it, then renamed: other processes never see half a file
    with tempfile.TemporaryDirectory(dir=kept.parent) as place:
        try:
            cpp_extension.load(  # this also loads the library
                "eigenzoo_cpu",
                [str(SOURCE)],
                extra_cflags=flags(),
                build_directory=place,
                is_python_module=False,
            )
        except RuntimeError as error:
            raise ValueError(f"{compiler} cannot build {SOURCE}, {instead}: {error}") from error
        os.replace(Path(place) / "eigenzoo_cpu.so", kept)
