"""Which room may import which. A new import is a design decision: change the table and say why."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from eigenzoo import zoo
from eigenzoo.hub_export import code

ROOT = Path(__file__).parents[1]
ROOMS = {  # what a room may import beside itself; imports in both directions are not allowed
    "zoo": set(),
    "zoo.utils": set(),
    "zoo.models": set(),
    "zoo.inference": {"zoo.models", "zoo.utils"},
    "zoo.compression": {"zoo.inference", "zoo.models", "zoo.utils"},
    "zoo.measure": {"zoo.compression", "zoo.inference", "zoo.models", "zoo.utils"},
    "kernels": {"zoo.models"},
    "hub_export": {"zoo.compression", "zoo.inference", "zoo.models", "zoo.utils"},
}
ROOMS["serving"] = {"hub_export", "kernels", "zoo.inference", "zoo.models"}  # vLLM's plugin
ROOMS["zoo.cli"] = {*ROOMS}  # commands import everything, and nobody imports them
TRAVELS = sorted(p for p in (ROOT / "zoo/models").glob("*.py") if p.name != "__init__.py")
REMOTE = sorted((ROOT / "hub_export/remote").glob("*.py"))
MODELING = ROOT / "hub_export/remote/modeling_eigen.py"  # uses the fused ops if they are there
LAZY = ROOT / "zoo/__init__.py"  # its imports are for type checkers
FILES = sorted(
    p for room in ("zoo", "kernels", "hub_export", "serving") for p in (ROOT / room).rglob("*.py")
)


def room(name: str) -> str:
    """The room of a module or of a name in it."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "zoo" else parts[0]


def imports(path: Path) -> set[str]:
    """Names a file imports: `zoo.cache` inside the package, the top-level name outside."""
    package, names = list(path.relative_to(ROOT).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            reached = package[: len(package) + 1 - node.level]
            place = [*reached, *([node.module] if node.module else [])]
            folder = ROOT.joinpath(*".".join(place).split("."))
            for alias in node.names:  # what is imported may be a module, or a name in one
                module = not node.module or (folder / alias.name).is_dir()
                names.add(".".join([*place, alias.name] if module else place))
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_the_table_allows(path):
    home = room(".".join(path.relative_to(ROOT).parts[:-1]))
    rooms = {room(name) for name in imports(path) if room(name) in ROOMS}
    if path != MODELING:
        assert "eigenzoo" not in imports(path), "inside the package, imports are relative"
    if path != LAZY:
        assert rooms <= {home} | ROOMS[home]


def test_no_two_rooms_import_each_other():
    for name, below in ROOMS.items():
        assert not [other for other in below if name in ROOMS[other] and other != name]


def test_what_travels_with_checkpoints_is_the_room_of_models():
    assert set(code.files()) == {p.name for p in (*TRAVELS, *REMOTE)}


@pytest.mark.parametrize("path", TRAVELS, ids=lambda p: p.name)
def test_models_need_torch_and_one_another_only(path):
    near = {f"zoo.models.{travel.stem}" for travel in TRAVELS}
    assert imports(path) <= near | {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", REMOTE, ids=lambda p: p.name)
def test_remote_files_need_torch_and_transformers_only(path):
    near = {f"zoo.models.{travel.stem}" for travel in TRAVELS}
    near |= {f"hub_export.remote.{other.stem}" for other in REMOTE}
    outside = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    assert imports(path) <= near | outside | ({"eigenzoo"} if path == MODELING else set())


def test_kernels_is_no_package_by_itself():
    # a kernels/__init__.py on sys.path would hide Hugging Face's package of that name
    assert not (ROOT / "kernels/__init__.py").exists()


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


HEAVY = ("torch", "transformers", "numpy")


@pytest.mark.parametrize(
    "statement",
    [
        "import eigenzoo.zoo",
        "from eigenzoo.zoo.cli import app",
        "from eigenzoo.zoo.cli import app; app(['--help'], standalone_mode=False)",
        "from eigenzoo.zoo.cli import app; app(['compress', '--help'], standalone_mode=False)",
    ],
)
def test_importing_loads_nothing_heavy(statement):
    code = f"import sys; {statement}; print([x for x in {HEAVY} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_are_those_of_the_library():
    for name, place in zoo.PUBLIC.items():
        assert getattr(zoo, name) is getattr(import_module(place, zoo.__name__), name)
        assert getattr(zoo, name).__doc__
        assert name in dir(zoo)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        zoo.nothing  # noqa: B018
