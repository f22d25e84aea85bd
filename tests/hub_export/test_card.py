"""Cards show what was measured, their snippets run, and inspect reports code that is not ours."""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import fresh
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from eigenzoo.hub_export import code as travelling
from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.models.bits import BITS
from eigenzoo.zoo.models.config import kv_bytes


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint that says its license."""
    folder = tmp_path_factory.mktemp("cards") / "dense"
    tiny.save(folder, max_position_embeddings=2048)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    return folder


@pytest.fixture
def low(dense, tmp_path):
    """The compressed checkpoint of `dense`."""
    out = tmp_path / "low"
    compress_checkpoint(
        load(str(dense)),
        out,
        Settings(keep=0.6, rank_multiple=2, kv_bits=(16,)),
        samples=4,
        seq_len=32,
    )
    return out


def text(folder) -> str:
    return (folder / "README.md").read_text()


def test_a_card_says_license_and_bytes(low):
    config = load(str(low)).model.config
    data = ModelCard.load(low / "README.md").data
    assert (data.license, data.library_name) == ("mit", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert "base_model" not in data.to_dict()  # a folder here is no Hub id
    before, after = 2 * config.dense_kv_width, 2 * config.kv_width
    assert f"| KV bytes per token, 16 bits | {before} | {after} |" in text(low)
    assert f"| cache of 2048 tokens | {2048 * before / 2**20:.1f} MiB |" in text(low)
    assert "cache of 8192" not in text(low)  # longer than the model can read


@pytest.mark.parametrize(
    ("bits", "keep", "what"),
    [((8,), 1.0, "bits"), (BITS, 0.3, "segments")],
    ids=["bits", "segments"],
)
def test_a_card_and_inspect_say_bits_and_bytes_with_scales(run, dense, tmp_path, bits, keep, what):
    out, settings = tmp_path / "few", Settings(keep=keep, rank_multiple=2, kv_bits=bits)
    compress_checkpoint(load(str(dense)), out, settings, samples=4, seq_len=32)
    config = load(str(out)).model.config
    size = kv_bytes(config)["kv_bytes_per_token"]
    assert size == load(str(out)).model.new_cache(1, 1).nbytes
    assert f"| KV bytes per token, 16 bits | {2 * config.dense_kv_width} | {size} |" in text(out)
    assert f"| cache of 2048 tokens | 0.8 MiB | {2048 * size / 2**20:.1f} MiB |" in text(out)
    held = [getattr(config, f"{side}_{what}")[2] for side in "kv"]
    last = (2, config.k_ranks[2], config.v_ranks[2], *held)
    assert f"| layer | key rank | value rank | key {what} | value {what} |" in text(out)
    assert "| " + " | ".join(map(str, last)) + " |" in text(out)
    assert ("16 numbers of 8 bits" in text(out)) == (what == "segments")
    code, shown, _ = run("inspect", out)
    assert (code, str(size) in shown) == (0, True)
    assert ("k_bits" in shown) == (what == "bits")  # segments stand in place of ranks
    assert all(str(x) in shown for x in held)


def test_every_table_states_the_share_beside_16_bits(run, dense, tmp_path):
    out, rows = tmp_path / "few", tmp_path / "rows.jsonl"
    asked = ["--keep", 0.3, "--kv-bits", "8", "--rank-multiple", 2, "--samples", 4, "--seq-len", 32]
    done = json.loads(run("compress", dense, out, *asked, "--dtype", "float32", "--json")[1])
    assert 0.25 < done["share"] <= 0.3
    (tmp_path / "text.txt").write_text(tiny.WORDS)
    measured = ["--window", 64, "--text", tmp_path / "text.txt"]
    words = ["evaluate", out, *measured]
    (tmp_path / "row.json").write_text(run(*words, "--json")[1])
    assert f"{done['share']:.1%} of the {2 * 3 * 2 * 32}" in run(*words)[1]
    assert run("sweep", dense, rows, *asked, *measured, "--dtype", "float32")[0] == 0
    code, card, error = run("card", out, tmp_path / "row.json")
    assert code == 0, error
    assert f"| share of the KV bytes | 1.000 | {done['share']:.3f} |" in card
    assert f"| {done['share']:.2f} of the KV bytes |" in card
    words = [
        "generate",
        out,
        "-p",
        "a",
        "--no-compile",
        "--max-new-tokens",
        2,
        "--dtype",
        "float32",
    ]
    assert f"; {done['share']:.1%} of an uncompressed cache of 16 bits" in run(*words)[2]
    shares = {
        json.loads(run("inspect", out, "--json")[1])["kv_share"],
        json.loads((tmp_path / "row.json").read_text())["kv_share"],
        json.loads(rows.read_text().splitlines()[-1])["kv_share"],
        json.loads(run(*words, "--json")[1])["kv_share"],
    }
    assert shares == {done["share"]}


def test_a_card_of_a_model_from_the_hub_names_it(low):
    raw = json.loads((low / "config.json").read_text())
    raw["compression"]["base_model"] = "org/model"
    (low / "config.json").write_text(json.dumps(raw))
    from eigenzoo.hub_export.measurements import add

    add(low, [])
    data = ModelCard.load(low / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("org/model", "finetune")
    assert data.eval_results[0].metric_type == "perplexity"


@pytest.mark.usefixtures("forked")
def test_measurements_go_into_the_card_with_their_commands(run, dense, low, tmp_path):
    (tmp_path / "text.txt").write_text(tiny.WORDS * 20)
    files = []
    for folder in (low, dense):
        words = ["--text", tmp_path / "text.txt", "--window", 64, "--windows", 2, "--json"]
        code, output, error = run("evaluate", folder, *words)
        assert code == 0, error
        files.append(tmp_path / f"{folder.name}.json")
        files[-1].write_text(output)
    words = ["--context", 20, "--steps", 2, "--rounds", 1, "--no-compile", "--out", tmp_path / "b"]
    code, _, error = run("bench", dense, low, *words)
    assert code == 0, error
    code, output, error = run("card", low, *files, tmp_path / "b" / "bench.jsonl")
    assert code == 0, error
    assert output.strip() == text(low).strip()
    evaluations = [json.loads(file.read_text()) for file in files]
    names = f"{evaluations[0]['kv_share']:.2f} of the KV bytes", "original"
    for x, name in zip(evaluations, names, strict=True):
        row = f"| {name} | {x['tokens']} tokens of text.txt | perplexity | {x['perplexity']:.4f} |"
        assert row in output
        assert x["command"] in output
    assert "eigenzoo evaluate low --text text.txt --window 64" in output  # no local folders
    assert str(tmp_path) not in output
    assert (low / "figures" / "speed.png").stat().st_size > 1000
    assert "![speed](figures/speed.png)" in output
    speeds = [json.loads(line) for line in (tmp_path / "b" / "bench.jsonl").open()]
    for x in speeds:
        assert f"| {x['model']} | 20 | 1 | 20 | {x['tokens_per_second']:.2f} |" in output
        assert x["processor"] in output
    raw = json.loads((low / "config.json").read_text())
    assert raw["compression"]["measured"]["evaluations"] == evaluations
    load(str(low))
    code, output, error = run("card", low, "--json")
    assert code == 0, error
    shown = json.loads(output)
    assert shown["card"] == text(low)
    assert shown["metadata"]["model-index"][0]["results"][0]["metrics"][0]["type"] == "perplexity"
    # a new perplexity replaces the old ones; speeds stay
    code, _, error = run("card", low, files[0])
    assert code == 0, error
    assert "| original |" not in text(low).split("## Measured")[1]
    assert "| low | 20 |" in text(low)


def test_speeds_from_before_rows_said_the_processor_go_into_the_card(run, low, tmp_path):
    cell = {"model": "low", "context": 20, "batch": 1, "slots": 20, "dtype": "float32"}
    figures = ("tokens_per_second", "seconds_per_step", "floor_seconds", "weight_bytes_read")
    figures += ("kv_bytes_read", "kv_read_share", "bandwidth", "peak_memory", "start_seconds")
    origin = {"threads": 1, "device": "cpu", "ops": "auto", "compiled": False, "command": "bench"}
    row = cell | dict.fromkeys(figures, 2.0) | origin
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + '\n{"model": "cut')
    code, output, error = run("card", low, tmp_path / "bench.jsonl")
    assert code == 0, error
    assert "Decoding in float32:" in output
    assert "| low | 20 | 1 | 20 | 2.00 |" in output


def test_a_plot_that_is_a_link_is_not_copied(run, low, tmp_path):
    (tmp_path / "secret").write_text("my token")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bench.jsonl").write_text("")
    (tmp_path / "b" / "speed.png").symlink_to(tmp_path / "secret")
    before = text(low)
    code, _, error = run("card", low, tmp_path / "b" / "bench.jsonl")
    assert (code, "speed.png is a link out of the folder" in error) == (2, True)
    (tmp_path / "b" / "speed.png").unlink()
    (low / "figures").symlink_to(tmp_path / "b")  # plots would be written there
    code, _, error = run("card", low, tmp_path / "b" / "bench.jsonl")
    assert (code, "figures is a link out of the folder" in error) == (2, True)
    assert text(low) == before
    assert not (low / "figures" / "speed.png").exists()


def test_an_evaluation_of_another_model_is_refused(run, low, tmp_path):
    row = {"model": "other", "kv_bytes_per_token": 8, "kv_bytes_per_token_dense": 16}
    row |= {"kv_share": 0.5, "processor": "x", "versions": {}, "command": "eigenzoo evaluate other"}
    (tmp_path / "x.json").write_text(json.dumps(row))
    before = text(low)
    code, _, error = run("card", low, tmp_path / "x.json")
    assert (code, "other has 16 KV bytes per token before compression, and " in error) == (2, True)
    assert text(low) == before


def test_a_perplexity_without_its_text_is_refused(run, low, tmp_path):
    size = {"kv_bytes_per_token": 8, "kv_bytes_per_token_dense": 16, "kv_share": 0.5}
    row = size | {"model": "low", "processor": "x", "versions": {}, "command": "x"}
    (tmp_path / "x.json").write_text(json.dumps(row | {"perplexity": 3.0, "tokens": 5}))
    code, _, error = run("card", low, tmp_path / "x.json")
    assert (code, "x.json has a perplexity without text or tokens" in error) == (2, True)


@pytest.mark.parametrize("command", ["card", "inspect"])
@pytest.mark.parametrize(
    "record", ["x", [1], {"base_model": 3}, {"layers": 3}, {"evaluation": {}}], ids=str
)
def test_a_damaged_record_of_a_compression_is_refused(run, low, tmp_path, command, record):
    copy = shutil.copytree(low, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    whole = config["compression"]
    config["compression"] = whole | record if isinstance(record, dict) else record
    (copy / "config.json").write_text(json.dumps(config))
    code, _, error = run(command, copy)
    assert (code, "the compression in config.json of" in error) == (2, True)


def test_a_file_without_measurements_is_refused(run, dense, low, tmp_path):
    (tmp_path / "x.json").write_text('{"perplexity": 3}')
    before = text(low)
    code, _, error = run("card", low, tmp_path / "x.json")
    assert code == 2
    assert "x.json, line 1: expected what `eigenzoo evaluate --json` printed, or a row" in error
    (tmp_path / "x.json").write_text('{"model": "low", "kv_sha')  # cut short
    code, _, error = run("card", low, tmp_path / "x.json")
    assert (code, "x.json has no whole row: expected what" in error) == (2, True)
    code, _, error = run("card", dense)
    assert code == 2
    assert "was not written by eigenzoo compress" in error
    assert text(low) == before


@pytest.mark.slow
def test_the_snippet_of_a_card_runs_where_the_card_lies(low):
    (snippet,) = re.findall(r"```python\n(.*?)```", text(low), re.DOTALL)
    code = "import sys; sys.modules['eigenzoo'] = None\n" + snippet
    done = fresh.python("-c", code, cwd=low)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_inspect_shows_whose_code_a_checkpoint_brings(run, low, dense):
    code, output, error = run("inspect", low, "--json")
    assert code == 0, error
    about = json.loads(output)
    assert about["format_version"] == 2
    assert re.fullmatch(r"as eigenzoo [\d.]+ writes it, not released", about["code"])
    with (low / "cache.py").open("a") as file:
        file.write("print('who?')\n")
    _, output, _ = run("inspect", low, "--json")
    verdict = json.loads(output)["code"]
    assert re.search(r"not that of eigenzoo .*: read cache.py; changed since .*: cache.py", verdict)
    (low / "other.py").touch()
    _, output, _ = run("inspect", low)
    assert "read cache.py, other.py" in " ".join(output.replace("│", "").split())
    code, output, _ = run("inspect", dense)
    assert code == 0
    assert "format_version" not in output


def test_code_of_a_release_is_told_from_code_of_none(run, low, monkeypatch, tmp_path):
    monkeypatch.setattr(travelling, "RELEASES", tmp_path / "releases.json")
    travelling.RELEASES.write_text("{}")
    assert travelling.verdict(low, None).endswith("writes it, not released")
    travelling.RELEASES.write_text(json.dumps({"9.8.7": travelling.hashes()}))
    assert travelling.verdict(low, None) == "that of eigenzoo 9.8.7, released"


def test_what_is_released_travels_unchanged_until_the_version_changes():
    released = json.loads(travelling.RELEASES.read_text())
    assert released.get(version("eigenzoo"), travelling.hashes()) == travelling.hashes()


def test_a_checkpoint_of_a_newer_format_is_refused(run, low):
    raw = json.loads((low / "config.json").read_text())
    assert set(raw["code"]) == {p.name for p in low.glob("*.py")}
    (low / "config.json").write_text(json.dumps(raw | {"format_version": 3}))
    code, _, error = run("inspect", low)
    assert code == 2
    assert "has format 3, but this eigenzoo reads formats up to 2: upgrade" in error


OLDEST = Path(__file__).parents[1] / "fixtures" / "format-0"


def test_the_earliest_checkpoints_are_still_read():
    checkpoint = load(str(OLDEST))
    known = load_file(OLDEST / "logits.safetensors")
    with torch.inference_mode():
        logits = checkpoint.model(known["tokens"])
    # another version or processor summed these fp32 logits of about 0.4 in another order
    torch.testing.assert_close(logits, known["logits"], atol=1e-5, rtol=1e-5)


def test_the_earliest_checkpoints_get_a_card_of_today(run, tmp_path):
    folder = shutil.copytree(OLDEST, tmp_path / "old")
    code, output, error = run("card", folder)
    assert code == 0, error
    assert "KV bytes per token" in output
    code, output, error = run("inspect", folder, "--json")
    assert code == 0, error
    assert json.loads(output)["format_version"] == 0
