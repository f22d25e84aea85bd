"""Work that is killed goes on to the same result; what was damaged or changed since is refused."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from killed import killed
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from eigenzoo.zoo.cli import app
from eigenzoo.zoo.compression.stream import Stream

WORDS = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ,.", k=1500)  # all lines differ
COMMANDS = {  # after the folder to write, with most changes of files that one makes
    "compress": (["--stream", "--resume", "--keep", "0.4"], 160),
    "refine": (["--steps", "4", "--every", "1", "--batch", "2"], 40),
    "sweep": (["--keep", "0.8", "--keep", "0.4", "--windows", "1"], 20),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model, its compressed model, and a text."""
    folder = tmp_path_factory.mktemp("given")
    tiny.save(folder / "model", num_hidden_layers=2)
    (folder / "text.txt").write_text("".join(WORDS))
    (folder / "other.txt").write_text("".join(reversed(WORDS)))
    words = ["--calibration", folder / "text.txt", "--samples", "4", "--seq-len", "32"]
    assert run("compress", folder / "model", folder / "low", "--keep", "0.3", *words).exit_code == 0
    return folder


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def command(name: str, given: Path, out: Path) -> list[object]:
    source = given / ("low" if name == "refine" else "model")
    words = ["--calibration", given / "text.txt", "--samples", "4", "--seq-len", "32"]
    words += ["--text", given / "other.txt"] if name == "sweep" else []
    words += ["--original", given / "model"] if name == "refine" else []
    return [name, source, out, *words, *COMMANDS[name][0]]


def content(out: Path) -> object:
    """All bytes of a folder; the rows of a file without what differs from run to run."""
    if out.is_dir():
        return {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    changing = {"seconds", "command", "date", "checksum"}
    return [{name: x for name, x in row.items() if name not in changing} for row in rows]


@pytest.mark.parametrize("name", COMMANDS)
def test_work_that_is_killed_anywhere_goes_on_to_the_same_bytes(given, tmp_path, name, kill_seed):
    want = given / f"{name}-want"
    if not want.exists():
        assert run(*command(name, given, want)).exit_code == 0
    out, chance = tmp_path / "out", random.Random(f"{name} {kill_seed}")
    words = command(name, given, out)
    for _ in range(1 + kill_seed % 3):
        if not out.is_dir():  # folders appear when they are whole
            done = killed(tmp_path, chance.randrange(1, COMMANDS[name][1]), *words)
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
    finished = out.is_dir()
    result = run(*words)
    assert (result.exit_code != 0) == finished, result.output + result.output
    assert content(out) == content(want)
    left = {"out", "out.statistics"} | ({"out.state.safetensors"} if finished else set())
    assert {path.name for path in tmp_path.iterdir()} <= left


# from here on: work in OUT.partial that cannot go on


@pytest.fixture(scope="module")
def unfinished(given, tmp_path_factory):
    """The folder of a copy of the model and of streamed work that ended while folding."""
    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(given / "model", folder / "model")
    shutil.copy(given / "text.txt", folder)

    def dies(stream, i):
        raise KeyboardInterrupt if i else fold(stream, i)

    fold = Stream._fold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_fold", lambda stream, i: dies(stream, i) if i else fold(stream, i))
        run(*command("compress", folder, folder / "out"))
    assert (folder / "out.partial").exists()
    return folder


@pytest.fixture
def work(unfinished, tmp_path):
    """A copy of it that may be spoiled."""
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resumed(work: Path) -> str:
    """Why the work does not go on."""
    before = {p: p.read_bytes() for p in (work / "out.partial").rglob("*") if p.is_file()}
    result = run(*command("compress", work, work / "out"))
    assert result.exit_code != 0
    assert not (work / "out").exists()
    assert before == {p: p.read_bytes() for p in (work / "out.partial").rglob("*") if p.is_file()}
    return result.output


def files(work: Path) -> list[Path]:
    left = work / "out.partial"
    return [left / "progress.json", *left.glob("basis-1.*"), *left.glob("new/*.safetensors")]


def test_damage_of_any_file_of_unfinished_work_is_noticed(work):
    for path in files(work):
        whole = path.read_bytes()
        middle = len(whole) // 2
        zeros = bytes(len(whole) - middle)
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damaged in (whole[:middle] + zeros, whole[:middle], flipped, b""):
            path.write_bytes(damaged)
            assert f"{path.name} is damaged" in resumed(work)
        path.write_bytes(whole)
    for path in files(work)[1:]:
        whole = path.read_bytes()
        path.unlink()
        assert f"{path.name} is missing" in resumed(work)
        path.write_bytes(whole)
    strangers = "model-00009-of-00009.safetensors", ".model-00001-of-00003.safetensors.part"
    for name in strangers:
        (work / "out.partial" / "new" / name).write_text("of something else")
    assert run(*command("compress", work, work / "out")).exit_code == 0
    assert not content(work / "out").keys() & {*strangers}


def other_weights(work):
    path = work / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, path, {"format": "pt"})


def other_config(work):
    path = work / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def other_tokenizer(work):
    tiny.tokenizer(begin=True).save_pretrained(work / "model")


def other_text(work):
    (work / "text.txt").write_text("".join(reversed(WORDS)))


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_weights, "weights"), (other_config, "config"), (other_tokenizer, "tokenizer"),
     (other_text, "texts")],
)  # fmt: skip
def test_work_goes_on_only_from_what_it_began_with(work, change, named):
    change(work)
    reason = resumed(work)
    assert "was left by other work (" in reason
    assert f"{named} '" in reason
    assert "repeat its command to finish that, or delete it to start again" in reason


def test_weights_that_are_replaced_while_they_are_read_are_noticed(work, monkeypatch):
    measure = Stream._measure

    def measured(stream):
        other_weights(work)
        return measure(stream)

    monkeypatch.setattr(Stream, "_measure", measured)
    result = run(*command("compress", work, work / "out"))
    assert "model was changed while it was read" in result.output
    assert not (work / "out").exists()
    monkeypatch.undo()
    assert "other work (weights" in resumed(work)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--keep", "0.5"], "keep 0.4, given 0.5"),
        (["--method", "pca"], "method 'fisher', given 'pca'"),
        (["--samples", "5"], "sequences 4, given 5"),
        (["--seq-len", "48"], "seq_len 32, given 48"),
        (["--dtype", "bfloat16"], "dtype 'float32', given 'bfloat16'"),
        (["--seed", "1"], "seed 0, given 1"),
    ],
)
def test_other_options_are_named_with_both_values(work, option, named):
    result = run(*command("compress", work, work / "out"), *option)
    assert named in result.output


def test_after_an_upgrade_the_error_says_what_then_helps(work, monkeypatch):
    monkeypatch.setattr("eigenzoo.zoo.utils.provenance.version", lambda name: "99")
    reason = resumed(work)
    assert f"torch {torch.__version__!r}, given '99'" in reason
    assert "go on with those that began it, or delete it to start again" in reason
    monkeypatch.undo()
    monkeypatch.setattr("eigenzoo.zoo.utils.provenance.code", lambda: "other")
    assert "given 'other'" in resumed(work)


def test_where_nothing_is_unfinished_resuming_begins_or_says_that_it_is_done(given, tmp_path):
    words = command("compress", given, tmp_path / "out")
    begun = run(*words)
    assert f"nothing to resume in {tmp_path / 'out.partial'}: beginning anew" in begun.output
    assert begun.exit_code == 0
    before = content(tmp_path / "out")
    (tmp_path / "out.partial").mkdir()  # the rest of what was killed at the very end
    (tmp_path / "out.partial" / "progress.json").write_text("{}")
    done = run(*words)
    assert "out is finished, so there is nothing to resume: pass --force" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == before
