"""Every command that writes refuses an output that it may not take, before the work."""

import os
import signal
import sys
import time
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import pytest
import tiny
import torch

from eigenzoo.hub_export import compress
from eigenzoo.zoo import cli
from eigenzoo.zoo.utils.lock import locked

FORK = get_context("fork")
ROW = '{"versions": {}, "settings": null'  # cut short


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working folder, with a model and a text."""
    tiny.save(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(tiny.WORDS * 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(run, words: str) -> str:
    code, _, error = run(*words.split())
    assert (code, error.count("\n"), error[:7]) == (2, 1, "error: "), error
    return error


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def hold(paths: list[str], pipe) -> None:
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(locked(Path(path)))
        pipe.send("held")
        pipe.recv()


WRITERS = {
    "compress model out --force": "out",
    "compress model out --stream --resume --calibration text.txt": "out",
    "refine model out --original model": "out",
    "demo --out out": "out",
    "pull org/name out": "out",
    "sweep model out.jsonl": "out.jsonl",
    "sweep model out.jsonl --force": "out.jsonl",
    "bench model --context 32 --out out --no-compile": "out/bench.jsonl",
    "report rows.jsonl --out out": "out",
}


def test_the_second_of_two_processes_is_refused_and_changes_nothing(run, home):
    (home / "out").mkdir()
    (home / "rows.jsonl").touch()
    pipe, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=([*set(WRITERS.values())], theirs))
    process.start()
    assert pipe.recv() == "held"
    before = files(home)
    for words, path in WRITERS.items():
        said = refused(run, words)
        assert f"{path} is being written by process {process.pid} on " in said
        assert files(home) == before
    pipe.send("enough")
    process.join()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compress model model --force", "written over model, which is read"),
        ("compress model ./model/. --force", "written over model, which is read"),
        ("compress model model/out", "written over model, which is read"),
        ("compress model out --calibration out/text.txt --force", "written over out/text.txt"),
        ("compress model out --text out/text.txt --force", "written over out/text.txt"),
        ("refine model model --force", "written over model, which is read"),
        ("refine model out --original out --force", "written over out, which is read"),
        ("report out/rows.jsonl --out out --force", "written over out/rows.jsonl"),
        ("compress model thesis --force", "holds more than a checkpoint"),
        ("compress model . --force", "written over model, which is read"),
        ("compress org/name . --force", "is in use, as a disk or working folder"),
        ("pull org/name thesis --force", "holds more than a checkpoint"),
        ("sweep model text.txt --force", "deletes nothing else"),
        ("sweep model model/config.json --force", "deletes nothing else"),
        ("sweep model model", "model is no file"),
        ("sweep model no/out.jsonl", "no does not exist: make it"),
        ("sweep model out.statistics", "has the name of its statistics"),
        ("sweep model thesis.jsonl --force", "thesis.statistics holds no statistics"),
        ("bench model --out text.txt", "text.txt cannot be made"),
        ("compress model dangling", "is a link to nowhere, which does not exist"),
        ("compress model text.txt/out", "text.txt is no folder"),
    ],
)
def test_what_is_not_the_command_s_own_is_never_replaced(run, home, words, said):
    for name in ("thesis/notes.txt", "out/text.txt", "thesis.statistics/notes.txt"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(tiny.WORDS)
    (home / "out" / "config.json").write_text('{"model_type": "eigen"}')
    (home / "out" / "rows.jsonl").write_text(ROW)
    (home / "dangling").symlink_to("nowhere")
    before = files(home)
    assert said in refused(run, words)
    assert files(home) == before


def work(words: str) -> None:
    """Run a command until its long work begins, which then takes a minute."""

    def begin(*_):
        print("working", file=sys.stderr, flush=True)
        time.sleep(60)

    torch.set_num_threads(1)  # the threads of this process's parent are gone
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w")  # noqa: SIM115, it is pytest's
    sys.argv = ["eigenzoo", *words.split()]
    compress.texts = begin
    cli.main()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_nothing_that_the_next_command_does_not_clear(run, home, number):
    said = home / "said"
    said.touch()
    process = FORK.Process(target=work, args=["compress model out --no-stream"])
    process.start()
    while "working" not in said.read_text():
        assert process.is_alive(), said.read_text()
        time.sleep(0.01)
    assert f"by process {process.pid} " in refused(run, "compress model out")
    os.kill(process.pid, number)
    process.join()
    assert "Traceback" not in said.read_text()
    left = {*os.listdir(home)} - {"model", "text.txt", "said"}
    if number == signal.SIGKILL:
        assert left == {".out.lock", ".out.new"}
        words = "compress model out --calibration text.txt --samples 3"
        code, _, error = run(*words.split())
        assert code == 0, error
        assert {*os.listdir(home)} - {"model", "text.txt", "said"} == {"out"}
    else:
        assert process.exitcode == 130
        assert "nothing was written" in said.read_text()
        assert not left
