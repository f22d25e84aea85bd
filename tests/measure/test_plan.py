import json
from pathlib import Path

import pytest
import tiny
import torch

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.cli.values import parse_bytes
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import inspect, native_config
from eigenzoo.zoo.measure.plan import hours
from eigenzoo.zoo.measure.shapes import SHAPES, segmented, shaped
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.models.families import new_model

DOCS = Path(__file__).parents[2] / "docs"


def planned(run, *words):
    code, text, said = run("plan", *words, "--json")
    assert (code, said) == (0, "")
    return json.loads(text)


def test_numbers_of_llama_8b_are_those_made_by_hand(run):
    (made,) = planned(run, "Llama-3.1-8B", "--context", 8192, "--keep", 0.25)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert made["parameters"] == 32 * layer + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    assert made["weight_bytes"] == 16_060_522_496
    dense, quarter = made["caches"]
    assert dense["kv_bytes_per_token"] == 32 * 8 * 128 * 2 * 2 == 131072
    assert quarter["kv_bytes_per_token"] == 32768
    left = 80_000_000_000 - 16_060_522_496
    assert dense["sequences"] == {"8192": left // (131072 * 8192)} == {"8192": 59}
    assert quarter["sequences"] == {"8192": left // (32768 * 8192)} == {"8192": 238}
    assert made["compress_hours"] == pytest.approx(32 * layer * 32 * 1024 * 5.0e-11 / 3600)


def test_hours_are_near_those_that_were_measured():
    rows = map(json.loads, (DOCS / "results/large-models.jsonl").read_text().splitlines())
    for row in rows:
        text = row["calibration"]
        config = native_config(shaped(row["shape"]).to_dict())
        guess = hours(config, text["samples"] * text["seq_len"])
        assert guess == pytest.approx(row["hours_of_all_layers"], rel=0.01)


def test_float32_doubles_weights_and_the_uncompressed_cache_only(run):
    half, whole = (planned(run, "opt-125m", "--dtype", d)[0] for d in ("float16", "float32"))
    assert whole["weight_bytes"] == 2 * half["weight_bytes"]
    kept = [[x["kv_bytes_per_token"] for x in made["caches"]] for made in (half, whole)]
    assert kept[1] == [2 * kept[0][0], *kept[0][1:]]


def test_checkpoints_are_planned_from_their_config_alone(run, tmp_path):
    for family, timed in {"mistral": True, "mixtral": False, "qwen3_moe": False}.items():
        model = tiny.save(tmp_path / family, family, sliding_window=16)
        for path in (tmp_path / family).iterdir():
            if path.name != "config.json":
                path.unlink()
        (made,) = planned(run, tmp_path / family)
        assert made["parameters"] == sum(p.numel() for p in model.parameters())
        assert made["caches"][0]["kv_bytes_per_token"] == inspected(
            tmp_path / family
        )  # windows too
        assert (made["compress_hours"] is not None) == timed


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "opt-6.7b", "mpt-30b"])
@pytest.mark.parametrize("layout", [(1, 4), (2, 8)])
def test_compressing_to_a_quarter_changes_weights_by_a_few_percent(name, layout):
    part, bits = layout
    config = native_config(shaped(name).to_dict())
    settings = Settings().fit(config)
    wide = [shared * config.head_dim // part for shared in settings.heads_per_latent]
    low = segmented(config, settings, f"{wide[0]}x{bits}/{wide[1]}x{bits}")
    counts = []
    with torch.device("meta"):
        for sizes in (config, low):
            counts.append(sum(p.numel() for p in new_model(sizes).parameters()))
    assert kv_bytes(low)["kv_share"] == pytest.approx(0.25, abs=0.005)
    assert 0.92 < counts[1] / counts[0] < 1.031


def inspected(folder):
    return inspect(str(folder))["kv_bytes_per_token"]


def test_a_compressed_checkpoint_has_its_own_share(run, dense, tmp_path):
    out = tmp_path / "low"
    compress_checkpoint(dense, out, Settings(keep=0.5), samples=4, seq_len=32)
    (made,) = planned(run, out)
    (cache,) = made["caches"]
    assert cache["kv_bytes_per_token"] == inspected(out)
    assert cache["keep"] == inspect(str(out))["kv_share"]
    assert made["compress_hours"] is None
    assert "not estimated" in run("plan", out)[1]


def test_what_does_not_fit_is_said_below_the_table(run):
    asked = ("opt-1.3b", "llama-2-7b", "--memory", "3GB", "--context", 2048, "--context", 4096)
    small, large = planned(run, *asked)
    assert [small["caches"][0]["sequences"][n] for n in ("2048", "4096")] == [0, None]
    assert {*large["caches"][1]["sequences"].values()} == {None}
    text = run("plan", *asked)[1]
    assert "-: opt-1.3b has learned positions for 2048 tokens." in text
    assert "-: the weights of llama-2-7b do not fit." in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("llama-9", "llama-9 does not exist: expected a folder, a .gguf file or a Hub id, or one "),
        (
            "llama-3.1-70b",
            "memory is 80.0 GB, and in bfloat16 the weights alone take: llama-3.1-70",
        ),
        ("opt-125m --memory 80", "memory is '80': expected a size such as 80GB or 80GiB"),
        ("opt-125m --memory 0GB", "memory is '0GB': expected a size such as 80GB"),
        (
            "opt-125m --keep 1.5",
            "keep is 1.5: expected a share of the KV bytes above 0 and up to 1",
        ),
        ("opt-125m --context 0", "Invalid value for '--context'"),
        ("opt-125m --dtype int3", "'int3' is unknown: expected one of float32, bfloat16, float16"),
    ],
)
def test_bad_input_is_one_line(run, words, said):
    code, text, error = run("plan", *words.split())
    assert (code, text) == (2, "")
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_an_unknown_name_lists_all_shapes(run):
    assert ", ".join(SHAPES) in run("plan", "llama-9")[2]


def test_sizes_are_decimal_or_binary():
    sizes = {"80GB": 80 * 10**9, "1.5 gib": 3 * 2**29, "2TB": 2 * 10**12, "7KiB": 7168}
    assert {text: parse_bytes(text) for text in sizes} == sizes


def test_the_table_in_the_guide_is_what_the_command_prints(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = (DOCS / "guides/large-models.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    (words,) = (x for x in lines if x.startswith("eigenzoo plan Llama-3.1-8B"))
    code, text, _ = run(*words.split()[1:])
    assert code == 0
    assert f"```text\n{text}```" in page
