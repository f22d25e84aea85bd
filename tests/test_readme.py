"""The README's Python runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the MODEL, OUT and text.txt that the README speaks of."""
    here = tmp_path_factory.mktemp("readme")
    tiny.save(here / "MODEL", num_hidden_layers=1, max_position_embeddings=2048)
    (here / "text.txt").write_text(tiny.WORDS * 1000)
    settings = Settings(keep=0.6)
    compress_checkpoint(load(str(here / "MODEL")), here / "OUT", settings, samples=4, seq_len=32)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(place, number):
    env = os.environ | {"HF_HOME": str(place / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[number]], capture_output=True, text=True, cwd=place, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
