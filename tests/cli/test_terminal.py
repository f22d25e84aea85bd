"""What files say reaches neither the terminal nor a model card as commands or markup."""

import io
import json
import re

import pytest
import tiny
from huggingface_hub import ModelCard

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.cli.values import say, show
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.measure.sweep_table import sections
from eigenzoo.zoo.utils.jsonl import SWEEP, read_rows

HOSTILE = (
    "$\\frac$x\x1b[31m\n\n---\n| a | b |\n[red]c[/red] :smile: \u202e</h1><script>`![d](http://e)"
)
SHOWN = r"$\frac$x\x1b[31m\n\n---\n| a | b |\n[red]c[/red] :smile: \u202e</h1><script>"


@pytest.fixture(scope="module")
def hostile(dense, tmp_path_factory):
    """A checkpoint whose record is from a stranger."""
    folder = tmp_path_factory.mktemp("hostile") / "low"
    compress_checkpoint(
        dense, folder, Settings(keep=0.6, rank_multiple=2, kv_bits=(16,)), samples=4, seq_len=32
    )
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    record = raw["compression"]
    record |= {"base_model": f"org/{HOSTILE}", "base_license": HOSTILE, "keys_reason": HOSTILE}
    record["calibration"]["source"] = record["evaluation"]["text"] = HOSTILE
    record["versions"] = {"eigenzoo": HOSTILE, HOSTILE: HOSTILE}
    path.write_text(json.dumps(raw))
    return folder


def harmless(text: str) -> bool:
    return text.isprintable() or all(c.isprintable() or c == "\n" for c in text)


def test_inspect_shows_escapes_and_markup_as_they_are(run, hostile, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, text, error = run("inspect", hostile)
    assert code == 0, error
    assert harmless(text)
    assert text.count(SHOWN) == 3


def test_a_card_holds_no_markup_of_others(run, hostile, tmp_path):
    row = {"model": HOSTILE, "kv_share": 0.5, "command": f"```\n{HOSTILE}", "processor": HOSTILE}
    row |= {"kv_bytes_per_token": 1, "kv_bytes_per_token_dense": 3 * 2 * 64 * 2, "versions": {}}
    row |= {"perplexity": 3.0, "tokens": 4, "text": HOSTILE, "tasks": {HOSTILE: {"acc,none": 0.5}}}
    (tmp_path / "row.json").write_text(json.dumps(row))
    code, text, error = run("card", hostile, tmp_path / "row.json")
    assert code == 0, error
    assert harmless(text)
    body = text.split("\n---\n", 1)[1]
    assert "\n---\n" not in body
    outside = re.sub(r"^(````?)\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"(?<!\\)`[^`\n]*`", "", outside)
    assert not re.search(r"(?<!\\)(<|\]\(|`)", outside)
    data = ModelCard.load(hostile / "README.md").data
    assert data.library_name == "transformers"
    assert data.license.startswith(SHOWN)
    tables = [line for line in outside.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {4, 5}


def test_a_report_holds_no_markup_of_others(run, dense_folder, tmp_path, monkeypatch):
    plots = pytest.importorskip("matplotlib.figure", reason="the extra `plot` is not installed")
    drawn = []  # a figure takes seconds; laying out its words is what may fail
    monkeypatch.setattr(
        plots.Figure, "savefig", lambda self, path: drawn.append(self) or path.touch()
    )
    file = tmp_path / "rows.jsonl"
    (tmp_path / "text.txt").write_text(tiny.WORDS)
    words = [
        "--keep",
        "0.6",
        "--samples",
        4,
        "--seq-len",
        32,
        "--window",
        64,
        "--no-save-statistics",
    ]
    words += ["--method", "pca", "--text", tmp_path / "text.txt"]
    assert run("sweep", dense_folder, file, *words)[0] == 0
    file.write_text(file.read_text().replace('"dense"', json.dumps(HOSTILE)))
    assert sections(read_rows(file, SWEEP))[0].dense["model"] == HOSTILE
    code, text, error = run("report", file, "--out", tmp_path / "out")
    assert code == 0, error
    assert harmless(text)
    assert SHOWN in text
    drawn[0].draw_without_rendering()
    report = (tmp_path / "out" / "report.md").read_text()
    assert harmless(report)
    assert "<script>" not in report.replace(r"\<script>", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_model_writes_cannot_command_a_terminal(monkeypatch, capsys):
    said = "a\n\tb\x1b]0;c\x07"
    show(said, end="")
    assert capsys.readouterr().out == said  # a file gets what was said
    monkeypatch.setattr("sys.stdout", Terminal())
    show(said, end="")
    import sys

    assert sys.stdout.getvalue() == "a\n\tb\\x1b]0;c\\x07"
    say("d\x1b[1m")
    assert capsys.readouterr().err == "d\\x1b[1m\n"
