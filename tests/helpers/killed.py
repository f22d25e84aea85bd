"""Commands that are killed at a chosen point: before their Nth change of files in a folder."""

from pathlib import Path
from subprocess import CompletedProcess

import fresh

CODE = """
import os, signal, sys
folder, left = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

def die(event, args):
    global left
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes or event in CHANGES) and str(args[0]).startswith(folder):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
from eigenzoo.zoo.cli import main
main()
"""


def killed(folder: Path, point: int, *words: object) -> CompletedProcess[str]:
    """The result of the command `eigenzoo WORDS`, whose exit code is -9 if it was killed."""
    return fresh.python("-c", CODE, folder, point, *words)
