"""The bench for a rented GPU, run on a CPU: in tiny sizes, with a clock that is told the time."""

import json
import time

import pytest
import torch

from eigenzoo.kernels.bench import __main__ as command
from eigenzoo.kernels.bench import attention, models, steps
from eigenzoo.kernels.bench.setup import Budget, Setup, Sizes
from eigenzoo.zoo.models import attention as definitions
from eigenzoo.zoo.models.cache import unpacked


def stand_in(name):
    """A definition that leaves out NaN, as ops do with slots that may not be read."""

    def op(q, k, v, span, scale, *rest):
        k, v = (unpacked(x, q.dtype).nan_to_num() for x in (k, v))
        return getattr(definitions, name)(q, k, v, span, scale, *rest)

    return op


OPS = {name: stand_in(name) for name in steps.checks.OPS}
DECODED = {"context": 96, "batch": 2, "model": "dense", "tokens_per_second": 7.0, "speedup": 1.0}
SIZES = Sizes(
    heads=4,
    kv_heads=2,
    head_dim=32,
    shared=2,
    cells=((64, 1), (128, 2)),
    contexts=((96, 2),),
)


def decode(words, seconds):
    assert "--graphs" in words
    return json.dumps([DECODED])


def seconds(calls):
    for call in calls:
        assert call().isfinite().all()
    return 1e-3


SETUP = Setup(torch.device("cpu"), "a CPU", 1 << 40, 1 << 16, 1e9, seconds, OPS, decode)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing is compiled, and every torch can compile all."""
    whole = attention.rivals(SIZES)[0]
    monkeypatch.setattr(attention, "flex", lambda sizes: whole._replace(name="flex"))
    monkeypatch.setattr(models, "lacking", lambda: None)


def run_command(monkeypatch, out, setup=SETUP, minutes="8"):
    monkeypatch.setattr(command, "of_gpu", lambda share: setup)
    monkeypatch.setattr(command, "Sizes", lambda: SIZES)
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(out), "--minutes", minutes])
    code = command.main()
    return code, json.loads((out / "bench.json").read_text())


def test_one_command_checks_and_times_everything(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")  # of an extra; without it there is no plot
    code, report = run_command(monkeypatch, tmp_path / "out")
    assert code == 0
    assert len(report["checks"]) == 36
    assert all(row["passed"] for row in report["checks"])
    names = {row["case"] for row in report["ops"]}
    assert {"SDPA", "flex", "latent_decode, 2 bits", "anchored_decode, segments"} <= names
    assert len(report["ops"]) >= 2 * len(names)
    row = next(x for x in report["ops"] if x["case"] == "SDPA" and x["batch"] == 2)
    assert row["bytes"] == 2 * 128 * 2 * 2 * 32 * 2
    assert row["share"] == row["bytes"] / 1e-3 / 1e9
    assert report["models"] == [DECODED]
    assert report["skipped"] == []
    assert (tmp_path / "out/bench.png").read_bytes()[1:4] == b"PNG"
    printed, said = capsys.readouterr()
    assert "36 of 36 checks passed" in printed
    assert "whole models at context 96, batch 2" in said


def test_a_wrong_op_and_a_broken_one_are_reported_and_timing_goes_on(monkeypatch, tmp_path):
    def wrong(*arguments):
        return 1.1 * OPS["anchored_decode"](*arguments)

    def broken(*arguments):
        raise RuntimeError("no such instruction\nand a long story")

    ops = OPS | {"anchored_decode": wrong, "rotary_decode": broken}
    code, report = run_command(monkeypatch, tmp_path, SETUP._replace(ops=ops))
    assert code == 1
    passed = [row["case"] for row in report["checks"] if row["passed"]]
    assert len(passed) == 12
    assert all(name.startswith("latent_decode") for name in passed)
    failed = [row["failed"] for row in report["ops"] if "failed" in row]
    assert "RuntimeError: no such instruction" in failed
    assert report["models"] == [DECODED]


def test_what_there_is_no_time_for_is_named(tmp_path):
    now = iter(range(10**6))
    budget = Budget(60, lambda: next(now))
    report = steps.run(SETUP, SIZES, budget, tmp_path, {})
    assert 0 < len(report["checks"]) < 36
    assert report["checks"][0]["case"] == "latent_decode 16 bits, T 1"
    assert report["models"] == []
    assert any("rotary_decode" in line and "s are left" in line for line in report["skipped"])
    assert any("whole models" in line for line in report["skipped"])
    assert json.loads((tmp_path / "bench.json").read_text()) == report


def test_caches_that_do_not_fit_are_skipped(tmp_path):
    size = 2 * 128 * 2 * 2 * 32 * 2
    report = steps.run(SETUP._replace(memory=size - 1), SIZES, Budget(600), tmp_path, {})
    assert "SDPA at 128 slots, batch 2: 0.0 GiB of caches, more than 0.0" in report["skipped"]
    assert [row["slots"] for row in report["ops"] if row["case"] == "SDPA"] == [64]
    assert [row["slots"] for row in report["ops"] if row["case"] == "latent_decode, 8 bits"] == [
        64,
        128,
    ]


def test_a_torch_without_the_arguments_is_told_in_a_line(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert "has no argument recompile_limit of torch.compile" in models.lacking()
    budget = Budget(600)
    assert not [*models.measure(SETUP, SIZES, budget)]
    assert "whole models need torch 2.12 or later" in budget.skipped[0]


def test_models_that_take_too_long_are_stopped_and_errors_are_a_row():
    def late(words, seconds):
        raise TimeoutError

    def bad(words, seconds):
        raise RuntimeError("no kernel image")

    budget = Budget(600)
    assert not [*models.measure(SETUP._replace(decode=late), SIZES, budget)]
    assert "not done when time was up" in budget.skipped[0]
    (row,) = models.measure(SETUP._replace(decode=bad), SIZES, budget)
    assert row["failed"] == "RuntimeError: no kernel image"


def test_a_process_ends_with_what_it_started(monkeypatch):
    monkeypatch.setattr(models, "COMMAND", "import sys; print(sys.argv[1:])")
    assert models.decode(["a", "b"], 60) == "['a', 'b']\n"
    monkeypatch.setattr(models, "COMMAND", "raise SystemExit('told so')")
    with pytest.raises(RuntimeError, match="told so"):
        models.decode([], 60)
    child = "import subprocess; subprocess.run(['sleep', '60'])"
    monkeypatch.setattr(models, "COMMAND", child)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        models.decode([], 2)
    assert time.monotonic() - start < 30


def test_the_command_of_a_cell_is_one_that_the_command_line_knows():
    from typer.main import get_command

    from eigenzoo.zoo.cli import app

    bench = get_command(app).get_command(None, "bench")
    name, *words = models.words(SETUP, Sizes(), 8192, 16)
    assert name == "bench"
    given = bench.make_context("bench", words).params
    assert given["segments"] == ["80x8+32x4+32x3+32x2/80x8+16x4+32x3+32x2"]
    assert given["heads_per_latent"] == 4
    assert given["context"] == [8192]


def test_without_a_gpu_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main()
    assert "needs a GPU" in capsys.readouterr().err
