"""The README is short, its Python runs as it is printed, and so does the Python of the guides."""

import ast
import re
from pathlib import Path

import fresh
import pytest
import tiny

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo import Settings, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SNIPPETS = BLOCK.findall(README)
GUIDES = {s for page in (ROOT / "docs").rglob("*.md") for s in BLOCK.findall(page.read_text())}
ALL = [*SNIPPETS, *sorted(GUIDES - {*SNIPPETS})]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the MODEL, OUT and text.txt that the README speaks of."""
    here = tmp_path_factory.mktemp("readme")
    tiny.save(here / "MODEL", num_hidden_layers=1, max_position_embeddings=2048)
    (here / "text.txt").write_text(tiny.WORDS * 1000)
    settings = Settings(keep=0.6, kv_bits=(16,))
    compress_checkpoint(load(str(here / "MODEL")), here / "OUT", settings, samples=4, seq_len=32)
    return here


# the same graphs without C++, whose compilation takes most of a minute; other tests compile it
QUICK = """
def _quick():
    import functools, torch
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
_quick()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ALL)))
def test_snippets_run(place, number):
    done = fresh.python("-c", QUICK + ALL[number], cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_it_stays_short():
    assert len(README.splitlines()) <= 250
    assert [len(code.split("\n\n", 1)[-1].splitlines()) <= 10 for code in SNIPPETS] == [True, True]


def test_its_python_needs_the_public_names_only():
    imported = {
        node.module
        for code in SNIPPETS
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom)
    }
    assert imported == {"eigenzoo.zoo", "transformers"}
    assert "import eigenzoo.zoo." not in "".join(SNIPPETS)
