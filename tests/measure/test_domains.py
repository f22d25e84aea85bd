"""Perplexity on several texts, from the command to tables, records, cards and reports."""

import json
import re

import pytest
import tiny

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression import record as records
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.texts import Text
from eigenzoo.zoo.measure import plots
from eigenzoo.zoo.measure.domains import of_evaluations, table_cells
from eigenzoo.zoo.measure.report import read_groups

QUICK = ["--samples", "4", "--seq-len", "32", "--rank-multiple", "2", "--dtype", "float32"]
SMALL = ["--window", "64", "--windows", "2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in {
        "a": tiny.WORDS,
        "b": tiny.WORDS[::-1],
        "c": "what to calibrate on ",
    }.items():
        (folder / f"{name}.txt").write_text(words * 20)
    return folder


@pytest.fixture
def python(monkeypatch):
    """Small texts in place of what Python brings along."""
    words = [Text("help", [tiny.WORDS * 40]), Text("source", [tiny.WORDS[::-1] * 10])]
    monkeypatch.setattr("eigenzoo.zoo.inference.domains.python_domains", lambda: words)
    monkeypatch.setattr(records, "python_domains", lambda: words)


@pytest.fixture(scope="module")
def low(dense, texts, tmp_path_factory):
    """The folder of a compressed model, calibrated on c.txt."""
    out = tmp_path_factory.mktemp("low") / "low"
    words = {"calibration": str(texts / "c.txt"), "text": texts / "a.txt", "samples": 4}
    compress_checkpoint(dense, out, Settings(keep=0.4, rank_multiple=2), seq_len=32, **words)
    return out


def evaluated(run, folder, *words):
    code, text, error = run("evaluate", folder, *SMALL, *words, "--json")
    assert code == 0, error
    return json.loads(text)


@pytest.fixture
def files(texts):
    return ["--domain", texts / "a.txt", "--domain", f"back={texts / 'b.txt'}"]


def test_every_domain_has_the_perplexity_of_its_text_alone(run, low, dense_folder, texts, files):
    row = evaluated(run, low, *files, "--original", dense_folder)
    assert [x["text"] for x in row["domains"]["texts"]] == ["a.txt", "back"]
    assert (row["original"], row["window"]) == ("dense", 64)
    for x, name in zip(row["domains"]["texts"], "ab", strict=True):
        alone = [
            evaluated(run, folder, "--text", texts / f"{name}.txt")["perplexity"]
            for folder in (dense_folder, low)
        ]
        assert [x["dense_perplexity"], x["perplexity"]] == pytest.approx(alone)
        assert x["tokens"] == 2 * 63
    more = [x["increase"] for x in row["domains"]["texts"]]
    assert row["domains"]["increase"] == pytest.approx({"mean": sum(more) / 2, "worst": max(more)})
    assert "perplexity" not in row


def test_the_table_has_a_row_for_every_text_and_mean_and_worst(run, low, dense_folder, files):
    words = ["evaluate", low, *files, *SMALL]
    row = evaluated(run, low, *files, "--original", dense_folder)["domains"]
    _, shown, _ = run(*words, "--original", dense_folder)
    for name in ("original", "compressed", "increase"):
        assert name in shown
    for x in row["texts"]:
        line = next(line for line in shown.splitlines() if x["text"] in line)
        assert re.findall(r"[\d.+-]+", line.replace(x["text"], "")) == [
            str(x["tokens"]),
            f"{x['dense_perplexity']:.4f}",
            f"{x['perplexity']:.4f}",
            f"{100 * x['increase']:+.2f}",
        ]
    for name in ("mean", "worst"):
        line = next(line for line in shown.splitlines() if name in line)
        assert f"{100 * row['increase'][name]:+.2f} %" in line
    _, shown, _ = run(*words)
    assert "increase" not in shown
    line = next(line for line in shown.splitlines() if "worst" in line)
    assert f"{row['perplexity']['worst']:.4f}" in line


@pytest.mark.usefixtures("python")
def test_without_files_domains_are_those_of_python(run, low, texts):
    row = evaluated(run, low, "--domains")
    assert [x["text"] for x in row["domains"]["texts"]] == ["help", "source"]
    row = evaluated(run, low, "--domains", "--domain", texts / "a.txt")
    assert [x["text"] for x in row["domains"]["texts"]] == ["help", "source", "a.txt"]


def test_what_does_not_fit_is_refused_before_the_model_is_read(run, texts, tmp_path):
    files = ["--domain", texts / "a.txt"]
    for words, said in {
        ("--domains", "--text", texts / "a.txt"): "leave --text",
        (*files, "--by-position"): "--by-position",
        (*files, "--retrieval"): "--retrieval",
        ("--original", "dense"): "--original goes with --domains",
        ("--domain", tmp_path / "none.txt"): "does not exist: expected a text file",
    }.items():
        code, _, error = run("evaluate", tmp_path / "no model", *words)
        assert (code, said in error) == (2, True), error


def test_short_texts_and_other_models_are_refused_before_anything_is_measured(
    run, low, files, tmp_path, monkeypatch
):
    monkeypatch.setattr("eigenzoo.zoo.measure.domains.window_losses", None)  # would raise another
    (tmp_path / "short.txt").write_text("the cat")
    words = ["evaluate", low, *files, "--window", "64"]
    code, _, error = run(*words, "--domain", tmp_path / "short.txt")
    assert (code, "short.txt has" in error, "one window of 64" in error) == (2, True, True)
    tiny.save(tmp_path / "other", num_hidden_layers=2)
    code, _, error = run(*words, "--original", tmp_path / "other")
    assert (code, "expected the model that was compressed" in error) == (2, True)
    code, _, error = run(*words, "--original", low)
    assert (code, "is compressed itself" in error) == (2, True)


def test_what_was_calibrated_on_is_not_measured_on(run, low, dense_folder, texts, tmp_path):
    raw = json.loads((low / "config.json").read_text())
    assert len(raw["compression"]["calibration_digests"]) == 1
    for option in ("--domain", "--text"):
        code, _, error = run("evaluate", low, option, texts / "c.txt", *SMALL)
        assert (code, "was calibrated on c.txt: measure on another text" in error) == (2, True)
    calibrated = ["--calibration", texts / "c.txt", *QUICK]
    for words in (
        ["compress", dense_folder, tmp_path / "out", "--text", texts / "c.txt", *calibrated],
        ["sweep", dense_folder, tmp_path / "x.jsonl", "--domain", texts / "c.txt", *calibrated],
        ["refine", low, tmp_path / "out", "--text", texts / "c.txt", *calibrated[:2]],
    ):
        code, _, error = run(*words)
        assert (code, "c.txt is calibrated on, so c.txt would" in error) == (2, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("python")
def test_compress_measures_domains_and_record_card_and_inspect_show_them(
    run, dense_folder, texts, tmp_path
):
    out = tmp_path / "low"
    words = ["compress", dense_folder, out, "--calibration", texts / "c.txt", *QUICK]
    code, text, error = run(*words)
    assert code == 0, error
    record = json.loads((out / "config.json").read_text())["compression"]
    assert record["calibration"]["sequences"] == 4  # none is held out
    quality = record["evaluation"]
    rows, spread = quality["domains"]["texts"], quality["domains"]["increase"]
    assert [x["text"] for x in rows] == ["help", "source"]
    assert quality["text"] == "help and source"
    assert quality["tokens"] == sum(x["tokens"] for x in rows) == 2 * 8 * 255
    card = (out / "README.md").read_text()
    _, shown, _ = run("inspect", out)
    for x in rows:
        assert f"{x['perplexity']:.4f}" in text
        assert f"{x['perplexity']:.4f}" in shown
        numbers = f"{x['dense_perplexity']:.3f} | {x['perplexity']:.3f}"
        assert f"| perplexity ({x['tokens']} tokens of {x['text']}) | {numbers} |" in card
    assert f"| increase of perplexity, worst |  | {spread['worst']:+.2%} |" in card
    for printed in (text, shown):
        told = (
            f"perplexity {100 * spread['mean']:+.2f} % on average, {100 * spread['worst']:+.2f} %"
        )
        assert told in " ".join(printed.split())
    again = evaluated(run, out, "--domains", "--windows", "8", "--window", "256")
    want = [x["perplexity"] for x in again["domains"]["texts"]]
    assert [x["perplexity"] for x in rows] == pytest.approx(want, rel=1e-4)


def test_evaluations_on_domains_go_into_the_card(run, low, dense_folder, files, tmp_path):
    row = evaluated(run, low, *files, "--original", dense_folder)
    (tmp_path / "row.json").write_text(json.dumps(row))
    code, card, error = run("card", low, tmp_path / "row.json")
    assert code == 0, error
    for x in row["domains"]["texts"]:
        line = f"| {x['tokens']} tokens of {x['text']} | perplexity | {x['perplexity']:.4f} |"
        assert line in card
    worst = 100 * row["domains"]["increase"]["worst"]
    assert f"| worst increase of perplexity, % | {worst:.4f} |" in card


def test_a_report_draws_domains_of_evaluations_and_sweeps_side_by_side(
    run, low, dense_folder, texts, files, tmp_path
):
    rows = [
        evaluated(run, low, *files, "--original", dense_folder, *bits)
        for bits in ([], ["--kv-bits", "4"])
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(row))
    calibrated = ["--calibration", texts / "c.txt", *QUICK]
    swept = tmp_path / "rows.jsonl"
    asked = ["--keep", "0.5", "--method", "fisher", "--method", "pca"]
    code, _, error = run("sweep", dense_folder, swept, *files, *SMALL, *calibrated, *asked)
    assert code == 0, error
    given = [swept, tmp_path / "0.json", tmp_path / "1.json"]
    code, shown, error = run("report", *given, "--out", tmp_path / "report", "--json")
    assert code == 0, error
    *_, of_sweep, of_rows = json.loads(shown)
    assert of_rows["texts"] == of_sweep["texts"] == ["a.txt", "back"]
    assert [x["domains"] for x in of_rows["table"]] == [x["domains"] for x in rows]
    assert [x["label"] for x in of_sweep["table"]] == ["fisher, keep 0.5", "pca, keep 0.5"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| a.txt | back | mean | worst |" in text
    for x in of_rows["table"] + of_sweep["table"]:
        spread = x["domains"]["increase"]
        assert f"| {spread['mean']:+.2%} |".replace("%", " %") in text
        assert f"| {spread['worst']:+.2%} |".replace("%", " %") in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert [p for p in pictures if "domains" in p] == [
        "dense-domains.png",
        "a.txt-and-back-domains.png",
    ]
    assert all((tmp_path / "report" / p).stat().st_size > 1000 for p in pictures)


def test_bars_are_the_increases_in_per_cent(run, low, dense_folder, files):
    row = evaluated(run, low, *files, "--original", dense_folder)
    (table,) = of_evaluations([row])
    (bars,) = plots.domains(table).axes[0].containers
    shares = [x["increase"] for x in row["domains"]["texts"]]
    want = [100 * x for x in (*shares, row["domains"]["increase"]["mean"])]
    assert [bar.get_height() for bar in bars] == pytest.approx(want)


def test_rows_on_other_texts_are_other_tables_and_rows_on_one_text_are_refused(
    run, low, dense_folder, texts, files, tmp_path
):
    one, other = (
        evaluated(run, low, *words)
        for words in (files, ["--domain", texts / "b.txt", "--domain", f"back={texts / 'a.txt'}"])
    )
    tables = of_evaluations([one, other])
    assert [x.texts for x in tables] == [["a.txt", "back"], ["b.txt", "back"]]
    assert table_cells(tables[0])[0] == ["", "a.txt", "back", "mean", "worst"]
    (tmp_path / "x.json").write_text(json.dumps(evaluated(run, low, "--text", texts / "a.txt")))
    with pytest.raises(ValueError, match="measured on one text: evaluate it with --domains --json"):
        read_groups([tmp_path / "x.json"])


@pytest.mark.usefixtures("python")
def test_refine_measures_domains_and_remembers_what_was_calibrated_on(
    run, low, dense_folder, texts, tmp_path
):
    words = ["--original", dense_folder, "--steps", "1", "--batch", "1", "--every", "1"]
    words += ["--calibration", texts / "b.txt", "--samples", "4", "--seq-len", "32"]
    code, text, error = run("refine", low, tmp_path / "out", *words, "--json")
    assert code == 0, error
    record = json.loads(text)
    assert [x["text"] for x in record["evaluation"]["domains"]["texts"]] == ["help", "source"]
    known = load(str(low)).config["compression"]["calibration_digests"]
    assert record["calibration_digests"][:1] == known
    code, _, error = run("evaluate", tmp_path / "out", "--domain", texts / "b.txt", *SMALL)
    assert (code, "was calibrated on b.txt" in error) == (2, True)
