"""Windows, of layers and of the whole cache, in commands: options, bytes, cards."""

import json

import pytest
import tiny

from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.models.config import cache_bytes

LONG = "the cat sat on the mat. " * 9


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny.WORDS * 3)
    return path


def test_generate_keeps_the_last_tokens_and_the_first(run, dense_folder):
    words = ["generate", dense_folder, "-p", LONG, "--no-compile", "--no-chat", "--json"]
    words += ["--max-new-tokens", 20, "--dtype", "float32"]
    few, some, all_ = (
        json.loads(run(*words, *more)[1])
        for more in (["--sliding-window", 16, "--sinks", 4], ["--sliding-window", 900], [])
    )
    assert few["cache_bytes"] == (16 + 32) * 2 * few["kv_bytes_per_token"]  # pages of 32 bits
    assert all_["cache_bytes"] == all_["cache_slots"] * 2 * all_["kv_bytes_per_token"]
    assert few["cache_slots"] == all_["cache_slots"] > 48
    assert some["outputs"] == all_["outputs"]
    assert some["cache_bytes"] == all_["cache_bytes"]


def test_evaluate_measures_what_a_cache_keeps_and_cards_refuse_it(
    run, dense_folder, text, tmp_path
):
    words = ["evaluate", dense_folder, "--text", text, "--window", 64, "--windows", 1, "--json"]
    asked = (["--sliding-window", 8, "--sinks", 2], ["--sliding-window", 64], [])
    few, some, all_ = (json.loads(run(*words, *more)[1]) for more in asked)
    assert few["perplexity"] != all_["perplexity"] == some["perplexity"]
    assert (few["sliding_window"], some["sliding_window"]) == ([8, 2], [64, 0])
    assert "sliding_window" not in all_
    assert "the last 8 tokens and the first 2" in run(*words[:-1], *asked[0])[1]
    low, sheet = tmp_path / "low", tmp_path / "few.json"
    assert run("compress", dense_folder, low, "--samples", 4, "--seq-len", 32)[0] == 0
    sheet.write_text(json.dumps(few))
    code, _, said = run("card", low, sheet)
    assert (code, "was measured with --sliding-window" in said) == (2, True)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sinks", 4], "given 4 sinks without a window"),
        (["--sliding-window", -1], "Invalid value for '--sliding-window'"),
    ],
)
def test_windows_that_make_no_sense_are_refused_before_a_model_is_read(run, command, words, said):
    prompt = ["-p", "a"] if command == "generate" else []
    code, text, error = run(command, "nowhere", *prompt, *words)
    assert (code, text, said in error) == (2, "", True)


def test_a_batch_of_several_lengths_with_sinks_is_refused(run, dense_folder):
    words = ["-p", "the cat sat", "-p", "a", "--no-compile", "--no-chat"]
    more = ["--sliding-window", 4, "--sinks", 2]
    code, _, error = run("generate", dense_folder, *words, *more)
    assert (code, "generate for one prompt after the other" in error) == (2, True)


def test_inspect_plan_and_cards_count_the_slots_of_rings(run, tmp_path):
    source, low = tmp_path / "dense", tmp_path / "low"
    tiny.save(source, "mistral", sliding_window=16, max_position_embeddings=2048)
    assert json.loads(run("inspect", source, "--json")[1])["windows"] == [16, 16, 16]
    asked = ["--memory", "1GB", "--context", 30, "--context", 3000, "--dtype", "bfloat16"]
    (made,) = json.loads(run("plan", source, *asked, "--json")[1])
    cache, left = made["caches"][0], 10**9 - made["weight_bytes"]
    token = cache["kv_bytes_per_token"]
    assert cache["sequences"] == {"30": left // (30 * token), "3000": left // (32 * token)}
    assert "Layers with windows keep little more" in run("plan", source, *asked)[1]
    assert run("compress", source, low, "--samples", 4, "--seq-len", 32)[0] == 0
    model = load(str(low)).model
    kept = cache_bytes(model.config, 2048)
    assert kept == model.bfloat16().new_cache(1, 2048).nbytes < 2048 * 3 * 2 * 4 * 8 * 2
    row = "| the same in eigenzoo, of layers' windows only | "
    assert f"{row}0.0 MiB | {kept / 2**20:.1f} MiB |" in (low / "README.md").read_text()
