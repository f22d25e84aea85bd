import json
import stat
import sys

import ggufs
import pytest
import tiny
import torch
from contestants import same

from eigenzoo.zoo.measure import tables
from eigenzoo.zoo.measure.bench import bench
from eigenzoo.zoo.measure.contestants import from_checkpoints
from eigenzoo.zoo.measure.llama_cpp import CACHES, LlamaCpp
from eigenzoo.zoo.measure.timed_models import Cell
from eigenzoo.zoo.utils.jsonl import BENCH, append, read_rows

CPU = torch.device("cpu")
CELL = Cell(64, 1, 64, 4, torch.float32, CPU, compile=False)
HELP = "--n-depth --flash-attn --device jsonl"
STAND_IN = f"""#!{sys.executable}
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--help" in sys.argv:
    print("{HELP}")
elif given["-ctk"] == "q8_0":
    sys.exit("no such type")
else:
    with Path(__file__).with_name("calls").open("a") as file:
        print(json.dumps(given), file=file)
    print(json.dumps({{"build_commit": "abc", "build_number": 7, "avg_ns": 8e6, "avg_ts": 250.0}}))
"""


@pytest.fixture
def file(tmp_path):
    return ggufs.write(tmp_path / "model.gguf", tiny.hf("llama"))


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "llama-bench"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for llama-cpp-python, which notes what it is asked for."""

    made = []

    class Llama:
        def __init__(self, path, **options):
            self.options, self.n_tokens, self.calls = options, 0, []
            made.append(self)

        def eval(self, tokens):
            self.calls.append((self.n_tokens, len(tokens)))
            self.n_tokens += len(tokens)

        def sample(self, temp):
            return 5

    module = type(sys)("llama_cpp")
    module.Llama, module.GGML_TYPE_Q8_0 = Llama, 8
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr("eigenzoo.zoo.measure.llama_cpp.version", lambda name: "1")
    return made


def of(source):
    return from_checkpoints([str(source)], same)


@pytest.mark.usefixtures("forked")
def test_llama_bench_decodes_the_file_in_a_process_for_each_round(file, program, tmp_path, capsys):
    models = of(file).with_llama_cpp("auto", [1], CPU)
    names = ["llama.cpp F32, f16 cache", "llama.cpp F32, q8_0 cache"]
    assert [model.name for model in models.all] == ["model.gguf", *names]
    own, timed, failed = bench(models.all, CELL, rounds=2)
    calls = [json.loads(line) for line in (program.parent / "calls").read_text().splitlines()]
    sizes = [(x["-p"], x["-n"], x["-d"]) for x in calls]
    assert sizes == [("60", "0", "0"), *3 * [("0", "4", "60")]]  # the prompt, warming up, 2 rounds
    assert {x["-t"] for x in calls} == {str(torch.get_num_threads())}
    assert (timed["seconds_per_step"], timed["tokens_per_second"]) == (0.002, 500)
    assert timed["speedup"] == pytest.approx(own["seconds_per_step"] / 0.002)
    assert timed["kv_bytes_read"] == own["kv_bytes_read"] // 2  # of 16 bits beside 32
    assert timed["weight_bytes_read"] == own["weight_bytes_read"]
    facts = {"prompt_tokens_per_second": 250, "cache_type": "f16", "tool": "llama-bench abc (7)"}
    assert facts.items() <= timed.items()
    assert (own["dtype"], timed["dtype"]) == ("float32", "F32")
    assert failed["failed"].endswith("llama-bench failed with exit code 1: no such type")
    origin = {"ops": "auto", "compiled": False, "command": "bench"}
    for row in (own, timed, failed):
        append(tmp_path / "bench.jsonl", row | origin)
    assert read_rows(tmp_path / "bench.jsonl", BENCH)[1]["cache_type"] == "f16"
    tables.bench([own, timed, failed])
    assert "250.0" in capsys.readouterr().out


def test_the_package_decodes_where_there_is_no_program(file, package, monkeypatch):
    monkeypatch.setenv("PATH", "")
    model = LlamaCpp(file, "q8_0", None)
    run = model.start(CELL)
    (llama,) = package
    assert len(run.round()) == len(run.round()) == 4
    assert llama.calls == [(0, 1), (0, 60), *2 * [(60 + i, 1) for i in range(4)]]
    assert llama.options["type_k"] == llama.options["type_v"] == 8
    assert llama.options["n_ctx"] == 64
    assert run.extra["tool"] == "llama-cpp-python 1"
    assert run.peak is None  # it is this process


def test_without_llama_cpp_the_error_says_what_to_install(file, run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, error = run("bench", file, "--llama-cpp", "auto", "--no-compile")
    assert (code, "pip install llama-cpp-python" in error) == (2, True)


def test_an_old_llama_bench_is_refused(file, program):
    program.write_text(STAND_IN.replace(HELP, "--device jsonl"))
    with pytest.raises(ValueError, match="too old: it lacks --n-depth, --flash-attn"):
        of(file).with_llama_cpp("auto", [1], CPU)


def test_a_checkpoint_that_is_no_gguf_needs_a_file_of_the_same_model(
    dense_folder, file, program, tmp_path
):
    models = of(dense_folder)
    with pytest.raises(ValueError, match=r"no GGUF file: make one with convert_hf_to_gguf.py"):
        models.with_llama_cpp("auto", [1], CPU)
    other = of(ggufs.write(tmp_path / "other.gguf", tiny.hf("llama", num_hidden_layers=1)))
    with pytest.raises(ValueError, match="another model: its num_hidden_layers is"):
        other.with_llama_cpp(str(file), [1], CPU)


@pytest.mark.parametrize(("batches", "device"), [([1, 2], "cpu"), ([1], "cuda")])
def test_only_one_sequence_on_a_cpu_is_measured_in_llama_cpp(batches, device, file, program):
    with pytest.raises(ValueError, match="expected cpu and one sequence"):
        of(file).with_llama_cpp("auto", batches, torch.device(device))


def test_the_content_of_contestants_counts_the_file_of_llama_cpp(file, program, tmp_path):
    other = file.rename(tmp_path / "other.gguf")
    models = of(other)
    assert len(models.with_llama_cpp(str(other), [1], CPU).others) == len(CACHES)
    one = models.with_llama_cpp(str(other), [1], CPU).content()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(other.read_bytes()[:-1] + b"!")
    assert models.with_llama_cpp(str(copy), [1], CPU).content() != one
