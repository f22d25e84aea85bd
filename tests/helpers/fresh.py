"""Python processes that start at once: forked from one that has imported torch and transformers.

They save the seconds that imports take in a process of `subprocess`. They have imported nothing of
eigenzoo. All share what huggingface_hub reads from the environment at import: it is offline, and
its home is a temporary folder.
"""

import os
import runpy
import sys
from functools import cache
from multiprocessing import forkserver, get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from unittest.mock import patch

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._inductor.compile_fx", "transformers.generation.utils", "transformers.pipelines"]
)


@cache
def start() -> TemporaryDirectory:
    """Start the process that forks; return the folder that is its Hugging Face home."""
    home = TemporaryDirectory(prefix="fresh-")
    with patch.dict(os.environ, HF_HOME=home.name, HF_HUB_OFFLINE="1", TRITON_INTERPRET="0"):
        forkserver.ensure_running()
    return home


def python(
    *words,
    stdin: str = "",
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    limit: float | None = None,
) -> CompletedProcess[str]:
    """The result of `python WORDS`, with words `-c CODE ...` or `FILE ...`.

    limit: seconds after which the process is killed.
    """
    start()
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for path in streams:
            path.write_text(stdin if path.name == "stdin" else "")
        args = list(map(str, words)), streams, cwd or Path.cwd(), env or dict(os.environ)
        process = CONTEXT.Process(target=_main, args=args)
        process.start()
        process.join(limit)
        process.kill()  # which is nothing to one that ended
        process.join()
        return CompletedProcess(args[0], process.exitcode, *(x.read_text() for x in streams[1:]))


def _main(words: list[str], streams: list[Path], cwd: Path, env: dict[str, str]) -> None:
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin = open(0)  # noqa: SIM115, multiprocessing has closed it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
