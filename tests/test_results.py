"""The rows generate the tables in docs/results, and each row says what it measures."""

import json
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
REQUIRED = ("table", "model", "device", "date", "command")
NO_CALIBRATION = {"lorc", "clover", "rotated", "kivi", "quanto", "hqq"}  # methods, and rivals
QUALITY = {"perplexity", "increase", "increase_percent", "loglikelihood", "correct"}

tables_spec = spec_from_file_location("tables", DOCS / "tables.py")
tables = module_from_spec(tables_spec)
tables_spec.loader.exec_module(tables)

FILES = sorted(RESULTS.glob("*.jsonl"))
PAGES = sorted(RESULTS.glob("*.md"))


def check(folder):
    """Exit status and output of `python docs/tables.py --check`."""
    command = [sys.executable, DOCS / "tables.py", "--check", folder]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def test_pages_are_generated_from_the_rows():
    assert check(RESULTS) == (0, "")


@pytest.mark.parametrize("name", ["quality.md", "quality.jsonl"])
def test_a_page_or_a_row_edited_alone_is_detected_and_repaired(name, tmp_path):
    copy = shutil.copytree(RESULTS, tmp_path / "results")
    edited = (copy / name).read_text().replace("109.34", "109.43")
    (copy / name).write_text(edited)
    code, output = check(copy)
    assert code == 1
    lines = [x for x in output.splitlines() if "109.43" in x or "109.34" in x]
    assert [line[0] for line in lines] == ["-", "+"]
    assert ("109.34" in lines[1]) == (name == "quality.md")  # the rows decide
    subprocess.run([sys.executable, DOCS / "tables.py", copy], check=True)
    assert check(copy) == (0, "")
    assert ((copy / "quality.md").read_text() == (RESULTS / "quality.md").read_text()) == (
        name == "quality.md"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rows_say_what_they_are(file):
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row, place = json.loads(line), f"{file.name}:{number}"
        for name in REQUIRED:
            assert isinstance(row[name], str), place
            assert row[name].strip(), place
        assert date(2026, 1, 1) < date.fromisoformat(row["date"]), place
        assert isinstance(row["versions"], dict), place
        assert isinstance(row["settings"], dict | None), place
        if QUALITY & row.keys():
            assert row["evaluation"]["text"], place
            calibrated = (row["settings"] or {}).get("method", "lorc") not in NO_CALIBRATION
            assert bool(row["calibration"]) == calibrated, place


def test_a_table_stands_between_markers_once_and_all_rows_are_shown():
    rows, specs = tables.read_rows(RESULTS), tables.read_specs(RESULTS)
    assert rows
    names, of_readme = (
        [match[1] for page in pages for match in tables.BLOCK.findall(page.read_text())]
        for pages in (PAGES, [DOCS.parent / "README.md"])
    )
    assert sorted([*names, *{*of_readme} - {*names}]) == sorted(specs)
    shown = {id(row) for name, spec in specs.items() for row in tables.build(name, spec, rows)[1]}
    assert [row["table"] for row in rows if id(row) not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_is_written_by_hand(page):
    text = page.read_text()
    assert (
        text.count("<!-- table:") == text.count("<!-- end -->") == len(tables.BLOCK.findall(text))
    )
    by_hand = tables.BLOCK.sub("", text).splitlines()
    assert [line for line in by_hand if line.lstrip().startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_figures(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).is_file(), target


def test_all_pages_are_in_the_contents():
    contents = (RESULTS / "index.md").read_text()
    assert [page.name for page in PAGES if f"({page.name})" not in contents] == ["index.md"]


@pytest.fixture
def rows():
    """Two models at two sizes, one of them worse, and the uncompressed one."""
    lines = [
        {"settings": None, "size": 1, "name": "dense", "loss": "0.00"},
        {"settings": {"keep": "0.50"}, "size": 1, "name": "a", "loss": "-0.0"},
        {"settings": {"keep": "0.50"}, "size": 1, "name": "b", "loss": "0.0"},
        {"settings": {"keep": "0.50"}, "size": 2, "name": "a", "loss": "7.10"},
    ]
    about = {"table": "t", "model": "m", "device": "d", "versions": {"torch": "2"}}
    about |= {"date": "2026-11-26", "command": "run"}
    texts = [json.dumps(about | x) for x in lines]
    texts = [re.sub(r'"(-?\d+\.\d+)"', r"\1", text) for text in texts]  # numbers, with their digits
    return [tables.flat(json.loads(text, parse_float=tables.Decimal)) for text in texts]


def test_numbers_keep_their_digits_and_the_best_compressed_model_is_bold(rows):
    spec = tables.Spec({"size": "{size}"}, "{name}", "{loss:+} %", best=["least loss of a line"])
    text, shown = tables.build("t", spec, rows)
    assert text.splitlines()[1:5] == [
        "| size | dense | a | b |",
        "| --- | --- | --- | --- |",
        "| 1 | +0.00 % | **-0.0 %** | +0.0 % |",
        "| 2 | - | +7.10 % | - |",  # the only compressed model
    ]
    assert shown == rows
    assert "(m; d; torch 2; 2026-11-26.)" in text
    assert text.endswith("```bash\nrun\n```\n\n")


def test_brackets_are_left_out_with_their_field(rows):
    spec = tables.Spec(
        {"": "{name}, {size}"}, columns={"keep": ["", "{loss}[ at {settings.keep}]"]}
    )
    lines = tables.build("t", spec, rows)[0].splitlines()
    assert lines[3:5] == ["| dense, 1 | 0.00 |", "| a, 1 | -0.0 at 0.50 |"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"lines": {"": "{size}"}, "cell": "{loss}"}, "two rows for"),
        ({"lines": {"": "{depth}"}, "cell": "{loss}"}, "a row of t has no depth"),
        ({"lines": {"": "{name}"}, "where": {"size": 3}}, "no row is selected"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(rows, spec, reason):
    with pytest.raises(ValueError, match=reason):
        tables.build("t", tables.Spec(**spec), rows)


def test_long_commands_go_on_before_an_option():
    words = " ".join(f"--option-{i} value" for i in range(12))
    text = tables.commands([{"command": f"eigenzoo sweep {words}"}])
    assert max(map(len, text.splitlines())) <= 100
    assert re.sub(r" \\\n   ", "", text) == f"```bash\neigenzoo sweep {words}\n```"
