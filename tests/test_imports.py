"""Who may import whom. A new arrow is a design decision: change the table, and say why."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from eigenzoo.hub_export.code import NATIVE

ROOT = Path(__file__).parents[1]
ALLOWED = {"zoo": {"zoo"}, "kernels": {"kernels", "zoo"}, "hub_export": {"hub_export", "zoo"}}
TRAVELS = tuple(f"zoo/{Path(m.__file__).name}" for m in NATIVE)
REMOTE = sorted(p.name for p in (ROOT / "hub_export/remote").glob("*.py"))
MODELING = (
    ROOT / "hub_export/remote/modeling_eigen.py"
)  # from wherever it lies, fused ops if it can
FILES = sorted(p for room in ALLOWED for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Names a file imports: `zoo.cache` inside the package, the top-level name outside."""
    package, names = list(path.relative_to(ROOT).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            reached = package[: len(package) + 1 - node.level]
            inside = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {".".join([*reached, name]) for name in inside}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_the_table_allows(path):
    room = path.relative_to(ROOT).parts[0]
    inside = {name for name in imports(path) if name.split(".")[0] in ALLOWED}
    if path != MODELING:
        assert "eigenzoo" not in imports(path), "inside the package, imports are relative"
    if path.parent.name != "cli":  # commands may import everything, and nobody imports them
        assert not [name for name in inside if name.startswith("zoo.cli")]
        assert {name.split(".")[0] for name in inside} <= ALLOWED[room]


@pytest.mark.parametrize("name", TRAVELS)
def test_native_files_that_travel_need_torch_and_one_another_only(name):
    near = {travel.removesuffix(".py").replace("/", ".") for travel in TRAVELS}
    assert imports(ROOT / name) <= near | {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", REMOTE)
def test_remote_files_need_torch_and_transformers_only(name):
    near = {travel.removesuffix(".py").replace("/", ".") for travel in TRAVELS}
    near |= {f"hub_export.remote.{other.removesuffix('.py')}" for other in REMOTE}
    outside = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    path = ROOT / "hub_export/remote" / name
    assert imports(path) <= near | outside | ({"eigenzoo"} if path == MODELING else set())


def test_rooms_are_no_packages_by_themselves():
    # a kernels/__init__.py on sys.path would hide Hugging Face's package of that name
    assert not [room for room in ALLOWED if (ROOT / room / "__init__.py").exists()]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    named = [node for node in tree.body if isinstance(node, kinds)]
    named += [
        n for c in named if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, kinds)
    ]
    bare = [n.name for n in named if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert ast.get_docstring(tree)
    assert not bare


def test_help_answers_without_loading_torch():
    code = "import sys; from eigenzoo.zoo.cli import app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
