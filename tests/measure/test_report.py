import json
import re
import sys

import pytest
import tiny
from PIL import Image

from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.measure import plots
from eigenzoo.zoo.measure.calibrator import Calibration
from eigenzoo.zoo.measure.evaluate import Evaluation
from eigenzoo.zoo.measure.grid import grid
from eigenzoo.zoo.measure.sweep import Sweep
from eigenzoo.zoo.measure.sweep_table import increase, label, sections
from eigenzoo.zoo.utils import jsonl


def read_rows(path):
    return jsonl.read_rows(path, jsonl.SWEEP)


def swept(model, path, axes, decode=None):
    """Sweep into a file; return its path."""
    tokens = path.parent / "text.txt"
    tokens.write_text(tiny.WORDS * 20)
    measured = path.parent / "other.txt"
    measured.write_text(tiny.WORDS[::-1] * 20)
    calibrations = [Calibration(str(tokens), 4, 32)]
    command = "eigenzoo sweep MODEL OUT"
    evaluation = Evaluation(measured, 64, 2)
    work = Sweep(model, path, evaluation, calibrations, command, decode=decode)
    assert list(work.rows(grid({"kv_bits": [(16,)], **axes})))
    return path


@pytest.fixture(scope="module")
def llama(dense, tmp_path_factory):
    axes = {"method": ["fisher", "eigen"], "keep": [0.8, 0.5], "keys": ["rebuild", "anchored"]}
    return swept(dense, tmp_path_factory.mktemp("llama") / "llama.jsonl", axes)


@pytest.fixture(scope="module")
def timed(dense, tmp_path_factory):
    """Rows with decode speeds: two methods at one share, one of them at another."""
    path = tmp_path_factory.mktemp("timed") / "timed.jsonl"
    swept(dense, path, {"method": ["attention", "pca"], "keep": [0.5]}, 32)
    return swept(dense, path, {"method": ["pca"], "keep": [0.8]}, 32)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    tiny.save(folder / "tiny-opt", "opt")
    axes = {"latent": ["joint-kv"], "keep": [0.5, 0.25]}
    return swept(load(str(folder / "tiny-opt")), folder / "opt.jsonl", axes)


def test_numbers_of_the_report_are_those_of_the_rows(run, llama, opt, tmp_path):
    code, text, _ = run("report", llama, opt, "--out", tmp_path / "report", "--json")
    printed = json.loads(text)
    assert code == 0
    for section, file in zip(printed, (llama, opt), strict=True):
        dense, *rows = read_rows(file)
        assert section["perplexity"] == dense["perplexity"]
        told = {(x["keep"], x["perplexity"], x["kv_share"]) for x in section["table"]}
        done = [r for r in rows if "refused" not in r]
        assert told == {(r["settings"]["keep"], r["perplexity"], r["kv_share"]) for r in done}
        assert len(section["table"]) == len(done)
        for x in section["table"]:
            assert x["increase"] == pytest.approx(x["perplexity"] / dense["perplexity"] - 1)
    labels = {x["label"] for x in printed[0]["table"]}
    assert labels == {"fisher, keys rebuild", "fisher, keys anchored", "eigen, keys rebuild"}
    assert {x["label"] for x in printed[1]["table"]} == {"fisher"}
    reason = printed[0]["refused"]["eigen, keys anchored, keep 0.5"]
    assert "eigen rebuilds its keys" in reason
    text = (tmp_path / "report" / "report.md").read_text()
    assert reason in text
    assert "latent joint-kv" in text
    for x in (x for section in printed for x in section["table"]):
        assert (
            f"{x['perplexity']:.2f} ({100 * x['increase']:+.1f} %) at {x['kv_share']:.3f}" in text
        )


def test_markdown_has_a_table_with_the_best_in_bold_and_the_command(run, llama, tmp_path):
    code, text, _ = run("report", llama, "--out", tmp_path / "report")
    assert code == 0
    assert "fisher" in text
    text = (tmp_path / "report" / "report.md").read_text()
    lines = [x.split(" | ") for x in text.splitlines() if x.startswith("|")]
    assert lines[0] == ["| method", "keep 0.8", "keep 0.5 |"]
    assert {len(line) for line in lines} == {3}
    done = [r for r in read_rows(llama)[1:] if "perplexity" in r]
    for column, keep in enumerate((0.8, 0.5), start=1):
        best = min(r["perplexity"] for r in done if r["settings"]["keep"] == keep)
        assert [f"**{best:.2f} (" in line[column] for line in lines].count(True) == 1
    assert text.count("**") == 4
    for told in ("eigenzoo sweep MODEL OUT", done[0]["device"], done[0]["date"], "torch "):
        assert told in text


def test_every_figure_in_the_report_is_a_picture_and_not_blank(run, llama, opt, tmp_path):
    run("report", llama, opt, "--out", tmp_path / "report")
    folder = tmp_path / "report"
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text())
    assert sorted(linked) == sorted(p.name for p in folder.glob("*.png"))
    assert {"dense-quality.png", "dense-ranks-at-0.5.png", "tiny-opt-quality.png"} <= set(linked)
    assert any("errors-of-fisher" in name for name in linked)
    for name in linked:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_figures_show_the_rows_numbers(llama, opt):
    (section,) = sections(read_rows(llama))
    drawn = plots.quality(section, "title").axes[0]
    shown = {line.get_label(): line.get_xydata().tolist() for line in drawn.get_lines()}
    for name, cells in section.table.items():
        want = sorted([r["kv_share"], 100 * increase(r)] for r in cells.values())
        assert shown[name] == want
    row = section.table["fisher, keys rebuild"][0.5]
    texts = [t.get_text() for t in plots.ranks(row, "title").axes[0].texts]
    assert texts == [str(r) for r in (*row["k_ranks"], *row["v_ranks"])]
    panels = plots.errors(row, "title").axes[:2]
    for panel, side in zip(panels, "kv", strict=True):
        assert panel.get_yscale() == "log"
        curves = [line.get_ydata().tolist() for line in panel.get_lines()[::2]]
        assert curves == row["curves"][side]["left"]
        dots = [line.get_xdata()[0] for line in panel.get_lines()[1::2]]
        assert dots == row[f"{side}_ranks"]
    (joint,) = sections(read_rows(opt))
    row = joint.table["fisher"][0.5]
    assert len(plots.ranks(row, "title").axes[0].texts) == len(row["k_ranks"])


def test_speeds_of_decoding_are_in_the_table(run, timed, tmp_path):
    code, text, _ = run("report", timed, "--out", tmp_path / "report", "--json")
    (section,) = json.loads(text)
    assert code == 0
    rows = [r for r in read_rows(timed) if "decode" in r]
    assert [x["decode"] for x in section["table"]] == [r["decode"] for r in rows]
    text = (tmp_path / "report" / "report.md").read_text()
    for row in rows:
        assert f"at {row['kv_share']:.3f}, {row['decode']['speedup']:.2f}x" in text
    assert "at the end of 32 slots" in text
    linked = re.findall(r"decode-cost-at-[\d.]+png", text)
    assert linked == ["decode-cost-at-0.5.png"]  # 0.8 has one row: nothing to compare it with


def test_speeds_at_other_slots_are_not_compared(timed, llama):
    (section,) = sections(read_rows(llama))
    assert section.slots is None
    assert not [title for title in plots.figures([section]) if "decode cost" in title]
    rows = read_rows(timed)
    rows[-1]["decode"]["slots"] = 64
    with pytest.raises(ValueError, match="32 and 64 slots"):
        sections(rows)


def test_the_figure_of_cost_has_one_point_per_row(timed):
    rows = read_rows(timed)
    one, two = (r for r in rows if r["settings"] and r["settings"]["keep"] == 0.5)
    for worse, scale in ((1.1, "log"), (0.9, "symlog")):
        one["perplexity"], two["perplexity"] = (x * one["dense_perplexity"] for x in (1.2, worse))
        (section,) = sections(rows)
        axes = plots.cost(section, 0.5, "title").axes[0]
        points = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for row, more in ((one, 20), (two, 100 * (worse - 1))):
            ((x, y),) = points[label(row)]
            assert x == row["decode"]["speedup"]
            assert y == pytest.approx(more)
        assert axes.get_yscale() == scale
        assert [1, 0] in [line.get_xydata()[0].tolist() for line in axes.get_lines()]
        assert "32 slots" in axes.get_xlabel()


def test_curves_start_at_all_of_the_error_and_end_at_none(llama):
    for row in read_rows(llama)[1:]:
        for side, curve in row.get("curves", {}).items():
            assert (curve["ranks"][0], curve["ranks"][-1]) == (0, row["full_ranks"][side == "v"])
            for left in curve["left"]:
                assert (left[0], left[-1]) == (1, 0)
                assert left == sorted(left, reverse=True)


def test_nothing_is_replaced_unless_forced(run, llama, tmp_path):
    out = tmp_path / "report"
    assert run("report", llama, "--out", out)[0] == 0
    (out / "report.md").write_text("old")
    code, _, error = run("report", llama, "--out", out)
    assert code == 2
    assert "--force" in error
    assert (out / "report.md").read_text() == "old"
    assert run("report", llama, "--out", out, "--force")[0] == 0
    assert (out / "report.md").read_text() != "old"
    (out / "mine.txt").write_text("mine")
    assert run("report", llama, "--out", out, "--force")[0] == 2
    assert (out / "mine.txt").exists()


def test_without_matplotlib_the_error_names_the_extra_to_install(run, llama, tmp_path, monkeypatch):
    for name in ("plots", "report"):
        monkeypatch.delitem(sys.modules, f"eigenzoo.zoo.measure.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = run("report", llama, "--out", tmp_path / "report")
    assert code == 2
    assert "pip install 'eigenzoo[plot]'" in error
    assert not (tmp_path / "report").exists()


def test_figures_are_drawn_without_pyplot_and_its_state(run, llama, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    assert run("report", llama, "--out", tmp_path / "report")[0] == 0
    assert "matplotlib.pyplot" not in sys.modules


def test_a_file_that_is_not_a_sweep_is_refused(run, llama, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    lines = llama.read_text().splitlines(keepends=True)
    (tmp_path / "headless.jsonl").write_text("".join(lines[1:]))
    for name, named in {
        "empty": "no rows yet",
        "other": "other.jsonl, line 1: expected a row that eigenzoo sweep wrote, or what",
        "headless": "no row is of the uncompressed",
        "missing": "does not exist",
    }.items():
        code, _, error = run("report", tmp_path / f"{name}.jsonl", "--out", tmp_path / "report")
        assert code == 2
        assert named in error
        assert not (tmp_path / "report").exists()


def test_different_texts_of_the_same_name_are_refused(llama):
    rows = read_rows(llama)
    one = next(r for r in rows if "dense_perplexity" in r)
    other = one | {"calibration": one["calibration"] | {"digest": "another"}}
    with pytest.raises(ValueError, match=r"two texts are called text\.txt"):
        sections([*rows, other])
    assert sections([*rows, *rows]) == sections(rows)
