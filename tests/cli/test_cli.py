import json
import math
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import fresh
import pytest
import tiny
import torch

from eigenzoo.kernels import install
from eigenzoo.zoo.cli.values import parse_shared
from eigenzoo.zoo.compression.choices import LATENTS, REFITS
from eigenzoo.zoo.compression.keys import KEYS
from eigenzoo.zoo.compression.methods import METHODS

ENTRY = "from eigenzoo.zoo.cli import main; main()"
QUICK = ["--samples", "8", "--seq-len", "64"]


@pytest.fixture(scope="module")
def low(dense_folder, tmp_path_factory):
    """A compressed checkpoint that the command line wrote."""
    out = tmp_path_factory.mktemp("cli") / "low"
    words = ["compress", dense_folder, out, "--keep", "0.5", "--heads-per-latent", "all,2", *QUICK]
    done = fresh.python("-c", ENTRY, *words)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "command",
    [
        "",
        "compress",
        "refine",
        "evaluate",
        "generate",
        "inspect",
        "plan",
        "bench",
        "demo",
        "serve",
        "sweep",
        "report",
    ],
)
def test_every_command_has_help(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out


def test_help_lists_the_choices_and_what_they_mean(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = run("compress", "--help")[1]
    for table in (KEYS, LATENTS, REFITS):
        assert all(f"{name}: {meaning}" in text for name, meaning in table.items())
    assert all(f"{name}: {method.source}" in text for name, method in METHODS.items())
    assert "One of auto, float32, bfloat16 or float16." in text
    assert "[default: (any)]" in text  # instead of None


def test_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"eigenzoo {version('eigenzoo')}\n", "")


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.merged])
def test_compress_prints_one_json_object(run, dense_folder, tmp_path, method):
    out = tmp_path / "low"
    words = ["--method", method, "--keep", "0.6", "--json", *QUICK]
    code, text, _ = run("compress", dense_folder, out, *words)
    printed = json.loads(text)
    assert code == 0
    assert printed["share"] <= 0.6
    assert printed["evaluation"]["compressed"] > 1
    assert (out / "config.json").exists()


def test_compress_refits_the_parts_that_are_asked_for(run, dense_folder, tmp_path):
    for asked, want in {"output": ["output"], "none": [], "auto": ["output"]}.items():
        out = tmp_path / asked
        code, text, _ = run("compress", dense_folder, out, "--refit", asked, "--json", *QUICK)
        assert (code, json.loads(text)["refit"]) == (0, want)
        said = "Refitted to them after the solve: output." in (out / "README.md").read_text()
        assert said == bool(want)


def test_bits_go_from_compress_to_inspect_and_generate(run, dense_folder, tmp_path):
    out = tmp_path / "low"
    asked = ["--kv-bits", 8, "--keep", 0.5, "--heads-per-latent", "all"]
    code, text, _ = run("compress", dense_folder, out, *asked, "--json", *QUICK)
    assert (code, json.loads(text)["kv_bits"]) == (0, [8])
    assert 0.4 < json.loads(text)["share"] <= 0.5  # of bytes, so ranks are higher than at 16 bits
    shown = json.loads(run("inspect", out, "--json")[1])
    for side in "kv":
        assert shown[f"{side}_segments"] == [f"{rank}x8" for rank in shown[f"{side}_ranks"]]
    words = ["generate", out, "-p", "the cat", "--no-compile", "--max-new-tokens", 3, "--json"]
    eight, four = (json.loads(run(*words, *more)[1]) for more in ([], ["--kv-bits", 4]))
    for row in (eight, four):
        assert row["cache_bytes"] == row["cache_slots"] * row["kv_bytes_per_token"]
    assert eight["kv_bytes_per_token"] == shown["kv_bytes_per_token"] > four["kv_bytes_per_token"]


def test_unknown_bits_are_refused_before_the_long_work(run, dense_folder, tmp_path):
    words = ["compress", dense_folder, tmp_path / "low", "--kv-bits", 5]
    generate = ["generate", dense_folder, "-p", "a", "--kv-bits", 5]
    code, _, said = run(*words)
    assert (code, "bits is 5: expected one of 16, 8, 4" in said) == (2, True)
    for asked in (generate, ["evaluate", dense_folder, "--kv-bits", 5]):
        code, _, said = run(*asked)
        assert (code, "'5' is unknown: expected one of 16, 8, 4" in said) == (2, True)
    for more, named in (
        (["--kv-bits", "few"], "kv bits is 'few': expected auto, 16, 8, 4, 3 or 2"),
        (["--kv-bits", "auto", "--method", "eigen"], "those have a rule of their own"),
    ):
        code, _, said = run("compress", dense_folder, tmp_path / "low", *more)
        assert (code, named in said) == (2, True)
    code, _, said = run("evaluate", dense_folder, "--kv-bits", 0)
    assert (code, "'0' is unknown" in said) == (2, True)


def test_heads_per_latent_may_have_spaces():
    assert parse_shared("all, 1", 4) == parse_shared("all,1", 4) == (4, 1)


def test_compress_calibrates_on_a_file_and_measures_on_another(run, dense_folder, tmp_path):
    (tmp_path / "a.txt").write_text(tiny.WORDS * 30)
    (tmp_path / "b.txt").write_text(tiny.WORDS[::-1] * 10)
    words = ["--calibration", tmp_path / "a.txt", "--text", tmp_path / "b.txt", *QUICK]
    code, text, _ = run("compress", dense_folder, tmp_path / "low", "--json", *words)
    printed = json.loads(text)
    assert code == 0
    assert printed["calibration"]["source"] == "a.txt"
    assert printed["calibration"]["sequences"] == 8
    assert printed["evaluation"]["text"] == "b.txt"


def test_a_method_without_calibration_reads_only_the_evaluation_text(run, dense_folder, tmp_path):
    (tmp_path / "short.txt").write_text("the cat")
    (tmp_path / "b.txt").write_text(tiny.WORDS[::-1] * 10)
    words = ["--method", "lorc", "--calibration", tmp_path / "short.txt", *QUICK]
    low = tmp_path / "low"
    code, text, _ = run(
        "compress", dense_folder, low, "--json", *words, "--text", tmp_path / "b.txt"
    )
    printed = json.loads(text)
    assert code == 0
    assert printed["calibration"] is None
    assert "from the weights alone" in (low / "README.md").read_text()


def test_by_default_a_model_is_calibrated_on_a_mixture_that_its_card_tells(
    run, dense_folder, tmp_path
):
    words = ["--samples", "10", "--seq-len", "32", "--json"]
    code, text, error = run("compress", dense_folder, tmp_path / "low", *words)
    assert code == 0, error
    told = "mixed: self 3, chat 3, help 2, source 2 sequences"
    assert json.loads(text)["calibration"]["source"] == told
    assert json.loads(text)["evaluation"]["text"] == "Python's own help and Python's own source"
    assert f"Calibrated on 320 tokens ({told})" in (tmp_path / "low" / "README.md").read_text()


@pytest.mark.parametrize("command", ["compress", "refine", "sweep"])
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("self:0", "self:0 has the share 0: expected a positive number"),
        ("self,mixd", "mixd does not exist: expected a text file"),
        ("self,chat,help", "given 2 samples for 3 sources"),
    ],
)
def test_calibration_text_that_cannot_be_had_is_refused_before_a_model_is_loaded(
    run, tmp_path, command, source, says
):
    words = ["--calibration", source, "--samples", "2"]
    code, text, error = run(command, tmp_path / "no-model", tmp_path / "out", *words)
    assert (code, text) == (2, "")
    assert says in error


def test_compress_writes_a_plain_checkpoint_and_says_who_reads_it(run, tmp_path):
    tiny.save(tmp_path / "mpt", "mpt")
    words = [tmp_path / "mpt", tmp_path / "low", "--plain", *QUICK]
    code, text, _ = run("compress", *words, "--method", "kv-heads", "--keep", "0.5")
    assert code == 0
    assert "transformers' own MPT does not support kv_n_heads" in " ".join(text.split())
    inspected = json.loads(run("inspect", tmp_path / "low", "--json")[1])
    assert (inspected["num_key_value_heads"], inspected["kv_share"]) == (4, 1)
    assert inspected["compression"]["method"] == "kv-heads"
    code, _, error = run("compress", *words, "--force")
    assert code == 2
    assert "no plain checkpoint: fisher keeps latents" in error


def test_evaluate_takes_dense_and_compressed(run, dense_folder, low):
    options = ["--window", "64", "--windows", "2", "--json"]
    dense, small = (json.loads(run("evaluate", m, *options)[1]) for m in (dense_folder, low))
    assert dense["tokens"] == small["tokens"] == 126
    assert dense["kv_share"] == 1
    assert small["kv_share"] <= 0.5
    assert dense["kv_bytes_per_token"] == small["kv_bytes_per_token_dense"] == 3 * 2 * 4 * 16 * 2


def test_evaluate_shows_perplexity_by_position(run, low, tmp_path):
    (tmp_path / "a.txt").write_text(tiny.WORDS * 20)
    words = [
        "evaluate",
        low,
        "--text",
        tmp_path / "a.txt",
        "--by-position",
        "--window",
        "200",
        "--windows",
        "2",
    ]
    printed = json.loads(run(*words, "--json")[1])
    rows = printed["by_position"]
    assert [(x["start"], x["stop"]) for x in rows] == [(1, 64), (64, 128), (128, 200)]
    mean = sum(x["tokens"] * x["loss"] for x in rows) / printed["tokens"]
    assert math.exp(mean) == pytest.approx(printed["perplexity"])
    assert "64 to 127" in run(*words)[1]


def test_evaluate_asks_for_planted_facts(run, low, tmp_path):
    (tmp_path / "a.txt").write_text(tiny.WORDS * 20)
    words = [
        "evaluate",
        low,
        "--text",
        tmp_path / "a.txt",
        "--retrieval",
        "--length",
        "150",
        "--length",
        "200",
        "--facts",
        "1",
    ]
    printed = json.loads(run(*words, "--json")[1])
    assert {x["length"] for x in printed["retrieval"]} == {150, 200}
    assert {x["right"] for x in printed["retrieval"]} == {0.0}
    assert "perplexity" not in printed
    text = run(*words)[1]
    assert "depth 75%" in text
    few = json.loads(run(*words, "--json", "--keep-tokens", "100")[1])
    all_kept = json.loads(run(*words, "--json", "--keep-tokens", "200")[1])
    assert (few["keep_tokens"], all_kept["keep_tokens"]) == (100, 200)
    for whole, one, other in zip(*(x["retrieval"] for x in (printed, all_kept, few)), strict=True):
        assert one["loglikelihood"] == pytest.approx(whole["loglikelihood"], abs=1e-5)
        assert other["loglikelihood"] != whole["loglikelihood"]
    assert "0% -" in text


def test_evaluate_decodes_with_fused_ops_only_if_asked(run, low, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(tiny.WORDS * 20)
    installed, real = [], install.install
    monkeypatch.setattr(install, "install", lambda model: installed.append(real(model)) or model)
    words = ["evaluate", low, "--text", tmp_path / "a.txt", "--retrieval", "--length", "150"]
    plain, fused = (
        json.loads(run(*words, "--facts", "1", "--ops", ops, "--json")[1])["retrieval"]
        for ops in ("auto", "fused")
    )
    assert len(installed) == 1
    for one, other in zip(plain, fused, strict=True):
        assert other["loglikelihood"] == pytest.approx(one["loglikelihood"], abs=1e-3)


def test_evaluate_asks_the_tasks_of_ruler(run, tmp_path):
    folder = tmp_path / "long"
    tiny.save(folder, chat=True, max_position_embeddings=1024, num_hidden_layers=1)
    words = ["evaluate", folder, "--ruler", "--samples", "2", "--batch-size", "2"]
    printed = json.loads(run(*words, "--json")[1])
    (row,) = printed["ruler"]
    assert (row["length"], row["samples"], row["chat"]) == (1024, 2, True)
    assert [*row["tasks"]] == ["single", "keys", "values", "variables", "words"]
    assert row["mean"]["recall"] < 0.2
    assert "perplexity" not in printed
    code, shown, _ = run(*words[:3], "--samples", "1", "--length", "900")
    assert code == 0
    assert all(name in shown for name in (*row["tasks"], "mean", "900", "1 questions"))
    code, _, said = run(*words, "--length", "900", "--length", "1025")
    assert (code, "length is 1025: expected 1024 at most" in said) == (2, True)


@pytest.mark.usefixtures("forked")
def test_bench_compares_checkpoints_and_resumes_where_it_stopped(run, dense_folder, low, tmp_path):
    words = ["bench", dense_folder, low, "--context", "64", "--batch", "1", "--buffer", "2"]
    words += ["--steps", "3", "--rounds", "1", "--no-compile", "--out", tmp_path / "out", "--json"]
    code, text, _ = run(*words)
    rows = json.loads(text)
    assert code == 0
    assert [(x["context"], x["slots"], x["model"]) for x in rows] == [
        (64, 128, Path(name).name) for name in (dense_folder, low)
    ]
    assert rows[1]["kv_bytes_read"] <= 0.5 * rows[0]["kv_bytes_read"]
    names = {"bench.jsonl", "speed.png", "memory.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    file = tmp_path / "out" / "bench.jsonl"
    file.write_text(file.read_text() + '{"model": "ha')
    assert json.loads(run(*words)[1]) == rows  # nothing was measured anew
    text = run(*words[:-1])[1]
    assert "context 64, batch 1, 128 slots" in text


def test_compress_takes_joint_latents_if_the_model_has_no_rotation(run, tmp_path):
    tiny.save(tmp_path / "opt", "opt")
    words = [tmp_path / "opt", tmp_path / "low", "--latent", "joint-kv", "--keep", "0.4", *QUICK]
    code, text, _ = run("compress", *words)
    assert code == 0
    assert "keys and values" in text
    inspected = json.loads(run("inspect", tmp_path / "low", "--json")[1])
    assert (inspected["family"], inspected["joint_kv"]) == ("opt", True)
    assert inspected["kv_share"] <= 0.4
    code, text, _ = run("evaluate", tmp_path / "low", "--windows", "1", "--json")
    assert json.loads(text)["window"] == 256  # the longest text that the model reads


def test_auto_keys_report_the_choice_and_its_reason(run, dense_folder, tmp_path):
    code, text, error = run(
        "compress", dense_folder, tmp_path / "low", "--keys", "auto", "--json", *QUICK
    )
    printed = json.loads(text)
    assert code == 0
    assert (printed["keys"], printed["anchor_block"]) == ("anchored", 64)
    assert f"keys: anchored in blocks of 64, since {printed['keys_reason']}" in error
    raw = json.loads((tmp_path / "low" / "config.json").read_text())
    assert raw["compression"]["keys_reason"] == printed["keys_reason"]
    assert printed["keys_reason"] in " ".join(run("inspect", tmp_path / "low", "--json")[1].split())


def test_generate_answers_a_batch(run, low):
    words = ["-p", "the cat", "-p", "a mat and saw", "--no-compile", "--max-new-tokens", "6"]
    words += ["--dtype", "bfloat16"]
    code, text, _ = run("generate", low, *words, "--json")
    printed = json.loads(text)
    assert code == 0
    assert len(printed["outputs"]) == 2
    assert printed["cache_bytes"] == 2 * printed["cache_slots"] * printed["kv_bytes_per_token"]
    assert printed["first_token_seconds"] > 0 == printed["compile_seconds"]
    assert printed["peak_memory"] > printed["cache_bytes"]
    code, text, error = run("generate", low, *words)
    assert text.startswith("--- 1\n")
    assert "of an uncompressed cache" in error
    assert "the first after" in error


@pytest.mark.slow
def test_generate_gives_the_same_text_with_fused_ops(run, low):
    words = ["-p", "the cat", "-p", "a mat and saw", "--no-compile", "--max-new-tokens", "9"]
    words += ["--dtype", "float32"]
    outputs = [
        json.loads(run("generate", low, *words, "--ops", ops, "--json")[1])["outputs"]
        for ops in ("reference", "fused", "auto")
    ]
    assert outputs[0] == outputs[1] == outputs[2]


def test_decoding_uses_the_fastest_dtype_of_the_processor(run, low, monkeypatch):
    words = ["-p", "the cat", "--no-compile", "--max-new-tokens", "3", "--kv-bits", "16", "--json"]
    size = {}
    for has_it in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        size[has_it] = json.loads(run("generate", low, *words)[1])["cache_bytes"]
    assert size[False] == 2 * size[True]


@pytest.mark.usefixtures("forked")
def test_bench_also_decodes_every_model_with_fewer_bits(run, dense_folder):
    words = ["bench", dense_folder, "--kv-bits", "8", "--kv-bits", "4", "--context", "64", "--json"]
    words += ["--steps", "3", "--rounds", "1", "--no-compile", "--ops", "fused"]
    rows = json.loads(run(*words, "--dtype", "float32")[1])
    name = Path(dense_folder).name
    assert [x["model"] for x in rows] == [name, f"{name}, 8 bits", f"{name}, 4 bits"]
    read = [x["kv_bytes_read"] for x in rows]
    numbers = read[0] // 4
    scales = [size - numbers * bits // 8 for size, bits in zip(read[1:], (8, 4), strict=True)]
    assert scales[0] == scales[1] > 0
    assert all("speedup" in x for x in rows)


@pytest.mark.usefixtures("forked")
def test_weights_become_int8_if_asked_for(run, dense_folder):
    words = ["-p", "the cat", "--no-compile", "--max-new-tokens", "3", "--weights", "int8"]
    assert run("generate", dense_folder, *words)[0] == 0
    words = ["--context", "64", "--steps", "3", "--rounds", "1", "--no-compile", "--json"]
    words += ["--dtype", "float32"]
    (native,) = json.loads(run("bench", dense_folder, *words)[1])
    (light,) = json.loads(run("bench", dense_folder, *words, "--weights", "int8")[1])
    assert light["weight_bytes_read"] < 0.3 * native["weight_bytes_read"]
    assert (native["weights"], light["weights"]) == ("native", "int8")


def test_generate_gives_the_same_text_with_drafts_and_tells_what_was_accepted(
    run, low, dense_folder
):
    words = ["generate", low, "-p", "the cat the cat", "--no-compile", "--max-new-tokens", "40"]
    words += ["--dtype", "float32"]
    plain = json.loads(run(*words, "--json")[1])
    assert (plain["drafted_tokens"], plain["accepted_share"]) == (0, None)
    for drafts in (["--lookup", "3"], ["--draft", dense_folder], ["--draft", low]):
        printed = json.loads(run(*words, *drafts, "--json")[1])
        assert printed["outputs"] == plain["outputs"]
        assert printed["drafted_tokens"] > 0 <= printed["accepted_share"] <= 1
        assert printed["decode_tokens_per_second"] > 0
    assert printed["accepted_share"] > 0.5  # it drafts for itself
    assert "drafted ones accepted" in run(*words, "--draft", low)[2]


def test_generate_keeps_some_tokens_of_a_prompt_in_a_smaller_cache(run, low):
    words = ["generate", low, "-p", "the cat saw 12 birds " * 20, "--no-compile", "--no-chat"]
    words += ["--max-new-tokens", "6", "--dtype", "float32"]
    plain, same, few = (
        json.loads(run(*words, *more, "--json")[1])
        for more in ([], ["--keep-tokens", "200"], ["--keep-tokens", "100"])
    )
    assert same["outputs"] == plain["outputs"]
    assert same["dropped_tokens"] == plain["dropped_tokens"] == 0
    assert few["dropped_tokens"] == 64  # a block
    assert few["cache_slots"] == 106
    assert few["cache_bytes"] * plain["cache_slots"] == plain["cache_bytes"] * 106
    assert few["new_tokens"] == [6]
    assert "64 tokens of the prompt dropped" in run(*words, "--keep-tokens", "100")[2]


def test_drafts_that_cannot_be_are_refused_before_weights_are_read(
    run, low, dense_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("eigenzoo.zoo.cli.generate.load", None)
    tiny.save(tmp_path / "fewer", vocab_size=319)
    tiny.save(tmp_path / "other")
    tokens = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = [*vocabulary][50:52]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokens))
    for words, named in (
        (["--lookup", 0], "'--lookup': Input should be greater than or equal to 1"),
        (["--lookup", 128], "fewer than the new ones"),
        (["--lookup", 3, "-p", "y"], "given 2 sequences and a draft"),
        (["--lookup", 3, "--draft", dense_folder], "expected one of them"),
        (["--draft", dense_folder, "--draft-tokens", 200], "fewer than the new ones"),
        (["--draft", tmp_path / "none"], "none does not exist"),
        (["--draft", tmp_path / "fewer"], "knows 319 tokens, and"),
        (["--draft", tmp_path / "other"], "which are not the same"),
    ):
        code, _, said = run("generate", low, "-p", "x", *words)
        assert (code, named in " ".join(said.split())) == (2, True), said


def test_generate_streams_one_answer_and_reads_standard_input(low):
    words = ["generate", str(low), "--no-compile", "--max-new-tokens", "6", "--temperature", "1"]
    runs = [
        fresh.python("-c", ENTRY, *words, "--seed", seed, stdin="the cat")
        for seed in ("1", "1", "2")
    ]
    assert all(done.returncode == 0 for done in runs)
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout


def test_inspect_shows_segments_and_the_base_model(run, low):
    code, text, _ = run("inspect", low)
    assert code == 0
    assert "fisher" in text
    inspected = json.loads(run("inspect", low, "--json")[1])
    assert all(x in text for x in (*inspected["k_segments"], *inspected["v_segments"]))
    assert inspected["k_heads_per_latent"] == 4
    assert inspected["v_heads_per_latent"] == 2
    assert inspected["compression"]["base_model"] == "dense"


def test_bad_input_prints_one_line_and_exits_with_2(run, dense_folder, low, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the cat")
    new = tmp_path / "new"
    cases = {
        ("evaluate", tmp_path / "none"): "does not exist",
        ("evaluate", dense_folder, "--text", tmp_path / "none.txt"): "none.txt does not exist",
        (
            "evaluate",
            dense_folder,
            "--text",
            tmp_path / "short.txt",
        ): "expected at least one window",
        ("evaluate", dense_folder, "--length", "64"): "goes with --retrieval or --ruler",
        ("evaluate", dense_folder, "--keep-tokens", "99"): "goes with --retrieval or --ruler",
        ("evaluate", dense_folder, "--ruler", "--keep-tokens", "99", "--batch-size", "2"): "one by",
        ("evaluate", low, "--retrieval", "--keep-tokens", "9", "--length", "200"): "too few",
        ("generate", low, "-p", "x", "-p", "y", "--keep-tokens", "99"): "one by one",
        ("evaluate", dense_folder, "--samples", "3"): "goes with --ruler",
        ("evaluate", dense_folder, "--ruler", "--length", "64"): "length is 64: expected",
        ("evaluate", dense_folder, "--ruler", "--domains"): "leave --text, --by-position",
        ("evaluate", dense_folder, "--limit", "3"): "--limit goes with --tasks",
        ("evaluate", dense_folder, "--ops", "fused"): "goes with --retrieval or --ruler or --tasks",
        ("evaluate", dense_folder, "--batch-size", "2"): "--batch-size goes with --ruler",
        ("evaluate", dense_folder, "--facts", "2", "--ruler"): "--facts goes with --retrieval",
        ("evaluate", dense_folder, "--ruler", "--window", "9"): "--window goes with perplexity",
        ("evaluate", dense_folder, "--ruler", "--text", "none"): "--text goes with perplexity",
        ("generate", dense_folder, "-p", "x", "--top-p", "0.5"): "with --temperature above 0",
        ("generate", dense_folder, "-p", "x", "--draft-tokens", "2"): "goes with --draft",
        ("evaluate", dense_folder, "--retrieval", "--length", "20"): "length is 20",
        ("evaluate", dense_folder, "--dtype", "int8"): "'--dtype': 'int8' is unknown",
        ("evaluate", dense_folder, "--windows", "-1"): "greater than or equal to 0",
        ("evaluate", dense_folder, "--device", "tpu"): "device 'tpu' cannot be used",
        ("evaluate", dense_folder, "--device", "meta"): "device 'meta' cannot be used",
        ("push", tmp_path / "empty.txt", "a/b", "--dry-run"): "empty.txt has no config.json",
        ("compress", dense_folder, new, "--keep", "0"): "keep is 0.0",
        ("compress", dense_folder, new, "--keep", "1.2"): "keep is 1.2",
        ("compress", dense_folder, new, "--keep", "0.01", *QUICK): "expected at least",
        (
            "compress",
            dense_folder,
            new,
            "--method",
            "svd",
        ): "'svd' is unknown: expected one of fisher",
        ("compress", dense_folder, new, "--error-budget", "0.1"): "goes with eigen",
        ("compress", dense_folder, new, "--error-budget", "0.1", "--keep", "0.5"): "one of them",
        ("compress", dense_folder, new, "--heads-per-latent", "3"): "expected divisors of 4",
        ("compress", dense_folder, new, "--heads-per-latent", "x"): "expected auto",
        ("compress", dense_folder, new, "--heads-per-latent", "0"): "expected auto",
        ("compress", dense_folder, new, "--heads-per-latent", "1,2,4"): "expected auto",
        ("compress", dense_folder): "Missing argument",
        ("compress", dense_folder, new, "--keeps", "0.5"): "No such option",
        ("sweep", dense_folder, new, "--budget", "local"): "expected one of global, uniform",
        ("refine", low, new, "--precision", "int8"): "expected one of auto, float32, bfloat16",
        ("compress", dense_folder, new, "--rank-multiple", "0"): "rank multiple is 0",
        (
            "compress",
            dense_folder,
            new,
            "--refit",
            "keys",
        ): "'keys' is unknown: expected one of auto, none",
        ("compress", dense_folder, new, "--rank-pairs", "0"): "rank pairs is 0",
        ("compress", dense_folder, new, "--calibration", tmp_path / "empty.txt"): "is empty",
        (
            "compress",
            dense_folder,
            new,
            "--calibration",
            tmp_path / "short.txt",
        ): "expected at least",
        ("compress", dense_folder, new, "--samples", "1"): "greater than or equal to 2",
        ("compress", dense_folder, new, "--seq-len", "-5"): "greater than or equal to 2",
        ("compress", dense_folder, new, "--shard-size", "huge"): "shard size is 'huge'",
        ("compress", dense_folder, low): "--force",
        ("compress", dense_folder, tmp_path / "no" / "folder"): "does not exist: make it",
        ("compress", low, new, *QUICK): "compressed already",
        ("compress", dense_folder, new, "--latent", "both"): "'--latent': 'both' is unknown",
        ("compress", dense_folder, new, "--latent", "joint-kv", *QUICK): "rotates",
        ("compress", dense_folder, new, "--method", "eigen", "--latent", "joint-kv"): "no joint",
        ("compress", dense_folder, new, "--keys", "turned"): "expected one of rebuild, anchored",
        (
            *("compress", dense_folder, new, "--keys", "full", "--keep", "0.5"),
            *("--kv-bits", "16"),
        ): "beside whole keys",
        ("bench", "--shape", "opt-125m", "--keys", "pairs"): "nothing rotates",
        ("bench",): "given 0 checkpoints",
        ("bench", dense_folder, "--context", "8"): "expected at least 1",
        (
            "bench",
            dense_folder,
            "--kv-bits",
            "5",
        ): "'5' is unknown: expected one of 16, 8, 4",
        ("bench", dense_folder, "--out", tmp_path / "no" / "new"): "new cannot be made: No such",
        ("bench", "--shape", "opt-1"): "shape 'opt-1' is unknown",
        ("bench", "--shape", "opt-125m", "--layers", "13"): "layers is 13",
        ("bench", dense_folder, "--keys", "auto"): "--keys goes with --shape",
        ("bench", "--shape", "opt-125m", "--heads-per-latent", "0"): "greater than or equal to 1",
        ("generate", low, "-p", "x", "--temperature", "-1"): "expected a finite temperature",
        ("generate", low, "-p", "x", "--max-new-tokens", "0", "--no-compile"): "do not fit",
        (
            "generate",
            low,
            "-p",
            "x",
            "--ops",
            "fast",
        ): "'fast' is unknown: expected one of auto",
        (
            "generate",
            low,
            "-p",
            "x",
            "--weights",
            "int4",
        ): "'int4' is unknown: expected one of native",
        (
            "bench",
            dense_folder,
            "--weights",
            "int4",
        ): "'int4' is unknown: expected one of native",
    }
    for words, named in cases.items():
        code, text, error = run(*words)
        assert code == 2, words
        assert text == "", words
        assert error.splitlines()[-1].startswith("error: "), error
        assert named in error
        assert not new.exists()


def test_ctrl_c_leaves_nothing_behind(dense_folder, tmp_path):
    words = ["compress", str(dense_folder), str(tmp_path / "out"), "--samples", "4000"]
    command = [sys.executable, "-c", ENTRY, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any("keys: " in line for line in process.stderr)  # printed when the work begins
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "what is compressed with --stream can go on" in error
    assert list(tmp_path.iterdir()) == []
