"""What README and docs name exists: files, commands and their options, public Python names."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from eigenzoo import zoo
from eigenzoo.zoo.cli import app
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FORMS = sorted((ROOT / ".github").rglob("*.yml"))
COMMANDS = get_command(app).commands
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CALL = re.compile(r"\beigenzoo ([a-z][\w-]*)([^\n`\"|;#&]*)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")
FOLDERS = "zoo|kernels|hub_export|tests|benchmarks|examples|docs|figures"
FILE = re.compile(rf"(?:{FOLDERS})/[\w./-]*\w/?")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def shell(text: str) -> str:
    """A block of shell, a line a command, with its variables filled in."""
    text = text.replace("\\\n", " ")
    variables: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
        if assigned := re.match(r'(\w+)="([^"]*)"$', line.strip()):
            variables[assigned[1]] = assigned[2]
            continue
        lines.append(line)
    return "\n".join(lines)


def calls(page: Path) -> list[tuple[str, str]]:
    """Every command that follows `eigenzoo` in code on a page, and the rest of its line."""
    blocks = [shell(code) for _, kind, code in FENCE.findall(page.read_text()) if kind == "bash"]
    spans = SPAN.findall(prose(page))
    named = [call for text in (*blocks, *spans) for call in CALL.findall(text)]
    for span in spans:  # `compress --keep`
        name, _, rest = span.partition(" ")
        if name in COMMANDS and rest:
            named.append((name, rest))
    return named


def options(command: Any) -> set[str]:
    """All spellings of the options of a command."""
    words = {word for p in command.params for word in (*p.opts, *p.secondary_opts)}
    return words | {"--help", "-h"}


def unknown(name: str, rest: str) -> list[str]:
    """The command or options of a call that do not exist."""
    if name not in COMMANDS:
        return [name]
    own = rest.partition(" -- ")[0]  # what follows is of another program
    return [f"{name} {word}" for word in OPTION.findall(own) if word not in options(COMMANDS[name])]


@every_page
def test_links_and_images_lead_to_files(page):
    targets = [link.partition("#")[0] for link in LINK.findall(prose(page)) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@every_page
def test_commands_have_the_options_that_are_shown(page):
    assert not [word for call in calls(page) for word in unknown(*call)]


def test_options_alone_belong_to_some_command_or_script():
    known = {"--version", "--debug", "--no-deps"}  # of eigenzoo itself and of pip
    known |= {"--block-size", "--quantization", "--kv-cache-dtype", "--enforce-eager"}  # of vLLM
    known |= {"--tensor-parallel-size", "--pipeline-parallel-size"}
    for command in COMMANDS.values():
        known |= options(command)
    bench = ROOT / "kernels/bench/__main__.py"
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"), bench]:
        known |= {*re.findall(r'"(--[a-z-]+)"', script.read_text())}
    for page in PAGES:
        words = [span.split()[0] for span in SPAN.findall(prose(page)) if span.startswith("--")]
        assert {*words} <= known, page


@every_page
def test_files_that_are_named_exist(page):
    """Files in backticks, such as `zoo/cli/` or `tests/test_docs.py: name`."""
    named = [FILE.match(span) for span in SPAN.findall(prose(page))]
    assert not [match[0] for match in named if match and not (ROOT / match[0]).exists()]


def test_scripts_that_are_run_exist():
    for page in PAGES:
        for _, _, code in FENCE.findall(page.read_text()):
            for script in re.findall(r"(?:benchmarks|examples)/\w+\.py", code):
                assert (ROOT / script).exists(), page


def test_unknown_commands_and_options_are_detected(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '```bash\nS="eigenzoo sweep MODEL OUT \\\n    --nope 1"\n$S --keep 0.5 --gone\n'
        "eigenzoo vanish x | cat --not-ours\n```\nand `compress --lost`.\n"
    )
    missing = [word for call in calls(page) for word in unknown(*call)]
    assert missing == ["sweep --nope", "sweep --gone", "vanish", "compress --lost"]


def test_the_reference_has_every_public_name_and_command():
    names = re.findall(
        r"^::: eigenzoo\.zoo\.(\w+)$", (DOCS / "reference/python.md").read_text(), re.M
    )
    assert sorted(names) == sorted(zoo.PUBLIC)
    readme = "\n".join(code for _, _, code in FENCE.findall((ROOT / "README.md").read_text()))
    assert {*COMMANDS} == {name for name, _ in CALL.findall(readme)}


def test_the_table_of_methods_has_no_method_that_is_gone():
    rows = re.findall(
        r"^\| `([a-z][\w-]*)`(?: \(default\))? \|", (ROOT / "README.md").read_text(), re.M
    )
    assert rows
    assert {*rows} <= {*METHODS}


def test_the_table_of_models_has_every_family():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|", (DOCS / "models.md").read_text(), re.M)
    assert sorted(rows) == sorted(FAMILIES)


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.name)
def test_forms_and_workflows_are_yaml(path):
    assert yaml.safe_load(path.read_text())
