import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import ggufs
import pytest
import tiny
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from eigenzoo.hub_export.stream import partial_folder, stream_checkpoint
from eigenzoo.zoo.cli import app
from eigenzoo.zoo.compression import stream
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load, open_layers
from eigenzoo.zoo.inference.tensor_files import stored_bytes

WORDS = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ,.", k=1500)  # all lines differ


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(WORDS))
    return file


def run(*words: object):
    return CliRunner().invoke(app, [str(w) for w in words])


def options(text: Path, *more: str) -> list[object]:
    small = ["--samples", "5", "--seq-len", "48", "--rank-multiple", "2"]
    return ["--calibration", text, *small, *more]


def compressed(model: Path, out: Path, text: Path, *more: str):
    result = run("compress", model, out, *options(text, *more))
    assert result.exit_code == 0, result.output
    assert not partial_folder(out).exists()
    return load(str(out))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {}, []),
        (
            "llama",
            {"attention_bias": True},
            ["--keys", "rebuild", "--refit", "output"],
        ),
        (
            "llama",
            {"tie_word_embeddings": True},
            ["--keys", "pairs", "--refit", "none", "--kv-bits", "16"],
        ),
        ("llama", {}, ["--method", "fisher-plain"]),
        ("llama", {}, ["--method", "attention", "--keys", "full"]),
        ("llama", {}, ["--method", "kq-svd", "--rank-pairs", "1"]),
        ("qwen2", {}, ["--method", "pca"]),
        ("qwen3", {}, ["--method", "attention"]),
        ("gemma3_text", {}, ["--kv-bits", "16"]),
        ("mixtral", {}, []),
        ("opt", {}, ["--latent", "joint-kv"]),
        ("opt", {"word_embed_proj_dim": 32}, ["--method", "attention", "--refit", "output"]),
        ("mpt", {}, ["--heads-per-latent", "2,1"]),
        ("mpt", {}, ["--method", "kv-heads", "--keep", "0.5"]),
        ("llama", {}, ["--kv-bits", "auto", "--keep", "0.3"]),
        ("opt", {}, ["--kv-bits", "4", "--keep", "0.2", "--latent", "joint-kv"]),
        ("mpt", {}, ["--kv-bits", "8,4", "--keep", "0.3", "--refit", "none"]),
    ],
)
def test_a_model_that_was_streamed_is_the_one_that_was_compressed_in_memory(
    tmp_path, text, family, changes, words
):
    tiny.save(tmp_path / "model", family, **changes)
    whole = compressed(tmp_path / "model", tmp_path / "a", text, "--no-stream", *words)
    parts = compressed(tmp_path / "model", tmp_path / "b", text, "--stream", *words)
    assert parts.model.config == whole.model.config
    x = tiny.tokens(2, 40)
    got, want = parts.model(x), whole.model(x)
    few = whole.model.config.least_bits < 16
    # streaming runs shorter passes, so gradients and hidden states differ in their last bits
    if few:  # columns of nearly the same importance turn with these, and are rounded elsewhere
        lost = (want - load(str(tmp_path / "model")).model(x)).square().mean().sqrt()
        assert (got - want).square().mean().sqrt() < lost / 2
    else:
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    a, b = (c.config["compression"] for c in (whole, parts))
    near = 1e-2 if few else 1e-4
    assert b["evaluation"]["compressed"] == pytest.approx(a["evaluation"]["compressed"], rel=near)
    assert b["evaluation"]["dense"] == pytest.approx(a["evaluation"]["dense"], rel=1e-6)
    assert b["calibration"] == a["calibration"]
    of_whole, of_parts = (x["evaluation"]["domains"]["texts"] for x in (a, b))
    assert [x["text"] for x in of_parts] == ["Python's own help", "Python's own source"]
    for old, new in zip(of_whole, of_parts, strict=True):
        assert new["dense_perplexity"] == pytest.approx(old["dense_perplexity"], rel=1e-6)
        assert new["perplexity"] == pytest.approx(old["perplexity"], rel=near)
    for old, new in zip(a["layers"], b["layers"], strict=True):
        assert new == pytest.approx(old, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"head_dim": 8}, []),
        ("qwen2", {"tie_word_embeddings": True}, ["--method", "pca", "--dtype", "bfloat16"]),
        ("mixtral", {}, ["--method", "attention"]),
    ],
)
def test_a_gguf_file_is_streamed_to_the_bytes_that_its_weights_give(
    tmp_path, text, family, changes, words
):
    theirs = tiny.save(tmp_path / "model", family, **changes)
    file = ggufs.write(tmp_path / "tiny.gguf", theirs, parts=2)
    whole = compressed(tmp_path / "model", tmp_path / "a", text, "--stream", *words)
    parts = compressed(file, tmp_path / "b", text, "--stream", *words)
    assert parts.name == "b"
    assert parts.config["compression"]["layers"] == whole.config["compression"]["layers"]
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    weights = [name for name in a if "safetensors" in name]
    assert len(weights) == 5
    assert [a[name] for name in weights] == [b[name] for name in weights]
    x = tiny.WORDS
    assert parts.tokenizer(x)["input_ids"] == whole.tokenizer(x)["input_ids"]


def test_work_on_another_gguf_file_is_not_resumed(tmp_path, text, monkeypatch):
    file = ggufs.write(tmp_path / "tiny.gguf", tiny.hf("llama"))

    def dies(*_):
        raise KilledError

    monkeypatch.setattr(stream.Stream, "_measure", dies)
    words = "compress", file, tmp_path / "out", *options(text, "--stream", "--method", "pca")
    assert isinstance(run(*words).exception, KilledError)
    ggufs.write(file, tiny.hf("llama", seed=1))
    result = run(*words, "--resume")
    assert result.exit_code == 2
    assert "weights" in result.output


def test_transformers_loads_what_was_streamed(tmp_path, text):
    from transformers import AutoModelForCausalLM

    tiny.save(tmp_path / "model")
    words = "--stream", "--kv-bits", "16"
    native = compressed(tmp_path / "model", tmp_path / "out", text, *words).model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    x = tiny.tokens(2, 20)
    torch.testing.assert_close(theirs(x).logits, native(x))


class KilledError(Exception):
    """Ends the work as a signal would."""


@pytest.mark.parametrize("method", ["fisher", "attention"])
def test_work_that_dies_at_any_write_resumes_to_the_same_bytes(
    request, tmp_path, text, monkeypatch, method
):
    tiny.save(tmp_path / "model", num_hidden_layers=2)
    words = "--stream", "--method", method
    compressed(tmp_path / "model", tmp_path / "want", text, *words)
    out, deaths = tmp_path / "out", 0
    for death in range(1, 100, 1 if request.config.getoption("--runslow") else 6):
        left = [death]

        def dies(tensors, path, *rest, left=left):
            left[0] -= 1
            if left[0] == 0:
                Path(path).write_bytes(b"half of a file")
                raise KilledError
            save_file(tensors, path, *rest)

        monkeypatch.setattr("eigenzoo.zoo.utils.resume.save_file", dies)
        first = run("compress", tmp_path / "model", out, *options(text, *words))
        if first.exit_code == 0:
            break
        assert isinstance(first.exception, KilledError)
        assert not out.exists()
        monkeypatch.undo()
        again = run("compress", tmp_path / "model", out, *options(text, *words, "--resume"))
        assert again.exit_code == 0, again.output
        assert content(out) == content(tmp_path / "want")
        shutil.rmtree(out)
        deaths += 1
    assert deaths > 2


PEAK = """
import sys, torch
from pathlib import Path
from eigenzoo.hub_export.stream import stream_checkpoint
from eigenzoo.zoo.inference.checkpoint import open_layers
from eigenzoo.zoo.compression.compress import Settings
from eigenzoo.zoo.utils.memory import peak, reset_peak

text, other, *models = sys.argv[1:]
cpu = torch.device("cpu")
torch.set_num_threads(1)
for model in models:  # one layer: modules are imported, and caches filled
    reset_peak(cpu)
    before = peak(cpu)
    out, settings = Path(model + "-low"), Settings(keep=0.6, kv_bits=(16,))
    stream_checkpoint(*open_layers(model), out, settings, text, 5, 48, Path(other))
    print(peak(cpu) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, text):
    (other := tmp_path / "other.txt").write_text("".join(WORDS[::-1]))
    models, weights = [tmp_path / "1", tmp_path / "2", tmp_path / "5"], []
    for model in models:
        tiny.save(model, hidden_size=512, intermediate_size=2048, num_hidden_layers=int(model.name))
        weights.append((model / "model.safetensors").stat().st_size)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, text, other, *models],
        # return freed memory at once: the heap would keep holes of a layer's size
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
        check=True,
        capture_output=True,
        text=True,
    )
    _, *used = map(int, done.stdout.split())
    layer = (weights[2] - weights[1]) / 3
    assert used[1] - used[0] < layer, f"{used} of {weights}"


def test_a_layer_is_in_memory_only_while_it_is_used(tmp_path):
    theirs = tiny.save(tmp_path / "model", num_hidden_layers=2)
    (model, *_), files = open_layers(str(tmp_path / "model"))
    assert all(p.is_meta for p in model.layers.parameters())
    with files.layer(model, 1) as block:
        want = theirs.model.layers[1].self_attn.k_proj.weight
        torch.testing.assert_close(block.attn.k_proj.weight, want)
        assert all(p.is_meta for p in model.layers[0].parameters())
    assert all(p.is_meta for p in model.layers.parameters())


def test_unfinished_work_is_neither_lost_nor_taken_for_another(tmp_path, text, monkeypatch, ctrl_c):
    tiny.save(tmp_path / "model")
    out = tmp_path / "out"
    command = "compress", tmp_path / "model", out

    monkeypatch.setattr(stream.Stream, "_fold", ctrl_c)
    stopped = run(*command, *options(text, "--stream"))
    assert stopped.exit_code != 0
    assert f"--resume goes on from {out}.partial" in stopped.output
    monkeypatch.undo()
    again = run(*command, *options(text, "--stream"))
    assert "pass --resume to go on, or --force to begin anew" in again.output
    other = run(*command, *options(text, "--resume", "--keep", "0.5"))
    assert "was left by other work (keep 0.25, given 0.5): repeat its command" in str(other.output)
    progress = out.with_name("out.partial") / "progress.json"
    whole = progress.read_text()
    progress.write_text(whole[:9])
    damaged = run(*command, *options(text, "--resume"))
    assert f"{progress} is damaged" in damaged.output
    progress.write_text(whole)
    assert run(*command, *options(text, "--stream", "--force")).exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--stream", "--calibration", "self"],
            "cannot write its own calibration text: give --calibration FILE",
        ),
        (["--method", "eigen"], "eigen finds its ranks by looking at all layers together"),
        (["--method", "palu"], "palu finds its ranks by looking at all layers together"),
        (["--plain"], "an ordinary checkpoint is made in memory"),
        (["--resume", "--no-stream"], "only work that was streamed can go on"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_anything_is_written(tmp_path, text, words, says):
    tiny.save(tmp_path / "model")
    source = [] if "self" in words else ["--stream", *options(text)]
    result = run("compress", tmp_path / "model", tmp_path / "out", *source, *words)
    assert says in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


def test_a_model_on_disk_is_calibrated_on_what_mixed_has_beside_own_text(tmp_path):
    tiny.save(tmp_path / "model", chat=True)
    words = ["--samples", "4", "--seq-len", "48", "--json"]
    result = run("compress", tmp_path / "model", tmp_path / "out", "--stream", *words)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["calibration"]["source"]
    assert told == "mixed: help 2, source 2 sequences"


def test_work_on_other_sources_does_not_go_on(tmp_path, text, monkeypatch, ctrl_c):
    tiny.save(tmp_path / "model")
    out = tmp_path / "out"
    (other_text := tmp_path / "other.txt").write_text("".join(WORDS[::-1]))
    common = ["--samples", "4", "--seq-len", "48", "--text", other_text]
    given = partial(run, "compress", tmp_path / "model", out, "--stream", *common)
    monkeypatch.setattr(stream.Stream, "_fold", ctrl_c)
    assert given("--calibration", f"{text},help").exit_code != 0
    assert partial_folder(out).exists()
    monkeypatch.undo()
    for other in (f"{text},source", f"{text},help:3"):
        refused = given("--calibration", other, "--resume")
        assert "was left by other work" in refused.output
        assert "source 'text.txt 2, help 2 sequences', given" in refused.output
    assert given("--calibration", f"{text},help", "--resume").exit_code == 0


def test_a_finished_folder_is_not_replaced_unless_forced(tmp_path, text):
    tiny.save(tmp_path / "model")
    compressed(tmp_path / "model", tmp_path / "out", text, "--stream")
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match="pass --force to replace it"):
        stream_checkpoint(
            *open_layers(str(tmp_path / "model")),
            tmp_path / "out",
            Settings(keep=0.6, kv_bits=(16,)),
            str(text),
            5,
            48,
        )
    assert content(tmp_path / "out") == before


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path, text, monkeypatch):
    tiny.save(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage._replace(free=600_000))
    with pytest.raises(ValueError, match="fewer --samples, or --method attention"):
        stream_checkpoint(
            *open_layers(str(tmp_path / "model")),
            tmp_path / "out",
            Settings(keep=0.6, kv_bits=(16,)),
            str(text),
            5,
            48,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


def test_weights_that_do_not_fit_into_free_memory_are_streamed_unasked(tmp_path, text, monkeypatch):
    tiny.save(tmp_path / "model")
    monkeypatch.setattr("eigenzoo.zoo.utils.memory.available", lambda device: 1000)
    result = run("compress", tmp_path / "model", tmp_path / "out", *options(text))
    assert "reading them layer by layer" in result.output
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_the_bytes_of_weights_are_known_before_they_are_read(tmp_path):
    tiny.save(tmp_path)
    model = load(str(tmp_path)).model
    numbers = sum(x.numel() for x in model.parameters())
    assert stored_bytes(tmp_path, torch.bfloat16) == 2 * numbers < stored_bytes(tmp_path)
    assert stored_bytes(tmp_path, torch.float32) == 4 * numbers
    file = ggufs.write(tmp_path / "tiny.gguf", tiny.hf())
    assert stored_bytes(file) == 4 * numbers
    assert stored_bytes(file, torch.bfloat16) == 2 * numbers


def test_weights_that_are_not_safetensors_cannot_be_streamed(tmp_path, text):
    tiny.hf().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    result = run("compress", tmp_path / "model", tmp_path / "out", *options(text, "--stream"))
    assert "has no safetensors" in result.output
