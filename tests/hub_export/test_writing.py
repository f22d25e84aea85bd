"""What can fail at writing fails before the long work, or leaves nothing half-written."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.utils.output import put

SMALL = ["--samples", "5", "--seq-len", "32", "--rank-multiple", "2"]
WORDS = "".join(chr(97 + i * i % 26) for i in range(1500))
# as Vicuna has it: transformers loads it, but does not save it
SAMPLING = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}


@pytest.fixture
def home(tmp_path):
    """A folder with a model and a text."""
    tiny.save(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(WORDS)
    return tmp_path


def command(home: Path, *more: object) -> list[object]:
    text = ["--calibration", home / "text.txt"]
    return ["compress", home / "model", home / "out", *text, *SMALL, *more]


def refused(run, *words: object) -> str:
    code, _, error = run(*words)
    last = error.splitlines()[-1]
    assert (code, last[:7], "Traceback" in error) == (2, "error: ", False), error
    return last


@pytest.fixture
def no_work(monkeypatch):
    """Fail where the long work begins."""

    def begin(*_, **__):
        raise AssertionError("the long work has begun")

    for name in ("compress.texts", "stream.texts", "refine.calibration_text"):
        monkeypatch.setattr(f"eigenzoo.hub_export.{name}", begin)


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_sampling_settings_beside_greedy_decoding_are_kept(run, home, how):
    (home / "model" / "generation_config.json").write_text(json.dumps(SAMPLING))
    code, _, error = run(*command(home, how))
    assert code == 0, error
    kept = json.loads((home / "out" / "generation_config.json").read_text())
    assert kept == kept | SAMPLING
    assert "do_sample" not in kept
    model = AutoModelForCausalLM.from_pretrained(home / "out", trust_remote_code=True)
    x = tiny.tokens(1, 5)
    greedy = model.generate(x, max_new_tokens=5, do_sample=False)
    assert model.generate(x, max_new_tokens=5).tolist() == greedy.tolist()


def test_a_plain_checkpoint_keeps_sampling_settings_too(tmp_path):
    tiny.save(tmp_path / "model", "mpt")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(SAMPLING))
    settings, out = Settings("kv-heads", 0.5, kv_bits=(16,)), tmp_path / "out"
    compress_checkpoint(
        load(str(tmp_path / "model")), out, settings, samples=4, seq_len=32, plain=True
    )
    kept = json.loads((out / "generation_config.json").read_text())
    assert kept == kept | SAMPLING


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
@pytest.mark.parametrize("name", ["tokenizer", "config.json", "README.md", "generation_config"])
def test_a_file_that_cannot_be_written_is_named_before_the_work(
    run, home, how, name, monkeypatch, no_work
):
    def fail(*_, **__):
        raise TypeError("two\nlines")

    places = {
        "tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
        "config.json": "eigenzoo.hub_export.export.EigenConfig",
        "README.md": "eigenzoo.hub_export.card.card",
        "generation_config": "transformers.GenerationConfig.to_json_file",
    }
    monkeypatch.setattr(places[name], fail)
    before = sorted(os.listdir(home))
    error = refused(run, *command(home, how))
    assert name in error
    assert "of the new checkpoint cannot be written: two lines" in error
    assert sorted(os.listdir(home)) == before


@pytest.mark.parametrize("size", ["5", "5QB", "-5GB", "0GB", "nanGB", "infGB", "GB", "", "1e999TB"])
def test_a_shard_size_that_is_none_is_refused_before_the_model_is_loaded(run, home, size):
    (home / "model" / "model.safetensors").unlink()
    said = "shard size is .* expected one such as 5GB"
    before = sorted(os.listdir(home))
    for words in (command(home), ["refine", home / "model", home / "out"]):
        with pytest.raises(ValueError, match=said):
            raise ValueError(refused(run, *words, f"--shard-size={size}"))
    assert sorted(os.listdir(home)) == before


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_a_disk_without_room_for_the_weights_is_named_before_the_work(
    run, home, how, monkeypatch, no_work
):
    usage = shutil.disk_usage(home)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    before = sorted(os.listdir(home))
    error = refused(run, *command(home, how))
    assert "out takes about 0.00029 GB, and 1e-06 GB are free there" in error
    assert sorted(os.listdir(home)) == before


@pytest.mark.parametrize("spoil", ["shape", "missing", "not finite"])
def test_weights_that_are_refused_late_leave_no_unfinished_work(run, home, spoil):
    file = home / "model" / "model.safetensors"
    weights, name = load_file(file), "model.layers.0.mlp.down_proj.weight"
    x = weights.pop(name)
    changed = {"shape": {name: x.T.contiguous()}, "not finite": {name: x / 0}, "missing": {}}
    save_file(weights | changed[spoil], file, {"format": "pt"})
    for _ in range(2):
        assert "down_proj" in refused(run, *command(home, "--stream"))
        assert sorted(os.listdir(home)) == ["model", "text.txt"]


class KilledError(Exception):
    """Ends the work as a signal would."""


def test_work_that_dies_after_its_folder_took_its_place_is_not_gone_on_from(run, home, monkeypatch):
    def dies(*args):
        put(*args)
        raise KilledError

    monkeypatch.setattr("eigenzoo.hub_export.stream.put", dies)
    with pytest.raises(KilledError):
        run(*command(home, "--stream"))
    want = {p.name: p.read_bytes() for p in (home / "out").iterdir()}
    assert (home / "out.partial").exists()
    monkeypatch.setattr("eigenzoo.hub_export.stream.put", put)
    assert "out is finished, so there is nothing to resume" in refused(
        run, *command(home, "--resume")
    )
    code, _, error = run(*command(home, "--resume", "--force"))
    assert code == 0, error
    assert {p.name: p.read_bytes() for p in (home / "out").iterdir()} == want
    assert sorted(os.listdir(home)) == ["model", "out", "text.txt"]


@pytest.mark.parametrize("how", ["--stream", "--resume", "--no-stream"])
def test_force_deletes_no_folder_that_only_has_the_name_of_unfinished_work(run, home, how):
    (home / "out.partial").mkdir()
    (home / "out.partial" / "thesis.txt").touch()
    error = refused(run, *command(home, how, "--force"))
    assert "out.partial is no unfinished work of eigenzoo" in error
    assert (home / "out.partial" / "thesis.txt").exists()


@pytest.fixture
def full_disk():
    """A disk that takes small files only."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_fills_up_leaves_nothing_of_work_in_memory(run, home, full_disk):
    before = sorted(os.listdir(home))
    error = refused(run, *command(home, "--no-stream"))
    assert "out cannot be written: " in error
    assert "File too large" in error
    assert sorted(os.listdir(home)) == before


def test_a_disk_that_fills_up_leaves_what_was_streamed(run, home, full_disk):
    (home / "other.txt").write_text(tiny.WORDS)  # short, so that its states fit the disk
    before, short = sorted(os.listdir(home)), ["--text", home / "other.txt"]
    error = refused(run, *command(home, "--stream", *short))
    assert "out.partial cannot be written: " in error
    assert "and --resume goes on from it" in error
    assert sorted(os.listdir(home)) == sorted([*before, "out.partial"])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
    code, _, error = run(*command(home, "--resume", *short))
    assert code == 0, error
    assert load(str(home / "out")).model
    assert sorted(os.listdir(home)) == sorted([*before, "out"])
