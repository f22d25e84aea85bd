"""One function and one line add a method: no other code compares with a method's name."""

import ast
import json
from pathlib import Path

import fresh
import pytest
import tiny
import torch

from eigenzoo.zoo.compression import basis, basis_published
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.methods import METHODS, Method, RankRule, methods_that
from eigenzoo.zoo.compression.settings import Settings

ROOT = Path(__file__).parents[2]
FILES = [p for room in ("zoo", "hub_export", "kernels") for p in (ROOT / room).rglob("*.py")]

ADDED = """
import torch
from eigenzoo.zoo.compression import basis, methods

def first_numbers(model, attn, s):
    def keep(moments):
        identity = torch.eye(moments.sum.size(1), dtype=torch.float64).expand_as(moments.second)
        spectrum = moments.second.diagonal(dim1=1, dim2=2)
        order = spectrum.argsort(dim=1, descending=True)
        columns = identity.take_along_dim(order[:, None], 2)
        zero = torch.zeros_like(spectrum)
        return basis.Basis(columns, columns, spectrum.take_along_dim(order, 1), zero)
    return basis.LayerBasis(keep(s.k), keep(s.v))

basis.first_numbers = first_numbers
methods.METHODS["first-numbers"] = methods.Method("first_numbers", "the largest numbers (a test)")
"""


@pytest.fixture
def added(monkeypatch):
    """A method that keeps the largest numbers of keys and values as they are."""
    monkeypatch.setattr(basis, "first_numbers", None, raising=False)
    monkeypatch.setitem(METHODS, "first-numbers", None)
    exec(ADDED, {})


def test_a_method_is_added_by_a_function_and_a_line(added):
    dense, x = tiny.native(head_dim=16), tiny.tokens(4, 64)
    low = compress(dense, x, Settings("first-numbers", 0.5, rank_multiple=4, kv_bits=(16,))).model
    assert low.config.kv_width <= 0.5 * dense.config.kv_width
    full = compress(dense, x, Settings("first-numbers", 1.0, kv_bits=(16,))).model
    torch.testing.assert_close(full(x), dense(x), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"eigen rebuilds its keys: .* or first-numbers"):
        Settings("eigen", keep=0.6, keys="anchored", kv_bits=(16,)).check()


def test_an_added_method_runs_from_the_command_line(tmp_path):
    tiny.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.WORDS * 30)
    code = f"{ADDED}\nfrom eigenzoo.zoo.cli import main\nmain()"

    def run(*words: str) -> str:
        done = fresh.python("-c", code, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "the largest numbers (a test)" in " ".join(
        run("compress", "--help").replace("│", " ").split()
    )
    words = "--method first-numbers --keep 0.5 --rank-multiple 2 --calibration text.txt"
    sizes = "--samples 4 --seq-len 32 --json"
    for way in ("--no-stream", "--stream"):
        printed = json.loads(
            run("compress", "model", f"out{way}", way, *words.split(), *sizes.split())
        )
        assert printed["method"] == "first-numbers"
        assert printed["share"] <= 0.5
        assert "the largest numbers (a test)" in (tmp_path / f"out{way}/README.md").read_text()


def named(node: ast.AST) -> set[str]:
    """The strings in one side of a comparison."""
    return {
        x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_compares_with_the_name_of_a_method(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            assert not any(named(side) & METHODS.keys() for side in sides), ast.unparse(node)
        if isinstance(node, ast.MatchValue):
            assert not named(node) & METHODS.keys(), ast.unparse(node)


@pytest.mark.parametrize("name", METHODS)
def test_the_functions_of_a_method_are_there(name):
    method = METHODS[name]
    homes = [room for room in (basis, basis_published) if hasattr(room, method.function)]
    assert len(homes) == 1
    assert callable(getattr(*homes, method.function))
    weights = getattr(*homes, f"{method.function}_weights", None)
    assert (weights is not None) == (method.ranks is RankRule.PROPORTIONAL)


def test_what_a_method_allows_follows_from_its_rank_rule():
    allowed = {
        rule: [
            name
            for name in ("budgeted", "searched", "merged", "streamed")
            if getattr(Method("", "", rule), name)
        ]
        for rule in RankRule
    }
    assert allowed == {
        RankRule.GLOBAL: ["budgeted", "streamed"],
        RankRule.PROPORTIONAL: [],
        RankRule.SEARCHED: ["searched"],
        RankRule.MERGED: ["merged", "streamed"],
    }


def test_messages_list_methods_as_a_sentence_does():
    assert methods_that(lambda m: m.joint) == "fisher, fisher-plain or attention"
    assert methods_that(lambda m: m.searched) == "eigen"


def test_all_heads_share_a_latent_where_the_settings_say_0():
    config = tiny.native().config
    assert Settings(keep=0.6, heads_per_latent=(0, 2), kv_bits=(16,)).fit(
        config
    ).heads_per_latent == (4, 2)
    assert Settings("lorc", keep=0.6, kv_bits=(16,)).fit(config).heads_per_latent == (4, 4)
    with pytest.raises(ValueError, match="expected divisors of 4"):
        Settings(keep=0.6, heads_per_latent=(-1, 1), kv_bits=(16,)).fit(config)
