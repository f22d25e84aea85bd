"""A folder is written whole or not at all, whatever cuts the work off."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from eigenzoo.zoo.utils import output
from eigenzoo.zoo.utils.jsonl import SWEEP

CONFIG = '{"model_type": "llama"}'


def checkpoint(folder: Path, *more: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    for name in more:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def write(out: Path, force: bool = False) -> None:
    with output.new_folder(out, force) as folder:
        for name in ("config.json", "a", "b"):
            (folder / name).write_text(CONFIG)


NEW, OLD = ["a", "b", "config.json"], ["config.json", "old"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path, exists, request):
    every = 1 if request.config.getoption("--runslow") else 5
    for death in range(2, 200, every):
        home = tmp_path / f"{death}"
        home.mkdir()
        if exists:
            checkpoint(home / "out", "old")
        survived = dies(lambda home=home: write(home / "out", force=True), death)
        with suppress(ValueError), output.claimed(home / "out"):  # what the next command does
            pass
        left = names(home / "out") if (home / "out").exists() else None
        assert left in ([OLD, NEW] if exists else [None, NEW])
        assert os.listdir(home) == ["out"] * (left is not None)
        if survived:
            break
    assert left == NEW
    assert death > 10


def dies(work, after: int) -> bool:
    """Whether the work ends in a process that is killed at its change of the disk `after`."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1] == 0
    left = [after]

    def kill(event, _):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error, exists):
    out = tmp_path / "out"
    if exists:
        checkpoint(out, "precious")

    def crash():
        with output.new_folder(out, force=True) as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        crash()
    old = ["out", "out/config.json", "out/precious"]
    assert names(tmp_path) == (old if exists else [])


def test_a_finished_folder_that_cannot_take_its_place_is_kept(tmp_path, monkeypatch):
    checkpoint(tmp_path / "out")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(output, "put", refuse)
    for count in (1, 2):
        with pytest.raises(ValueError, match="Operation not permitted; what was to be "):
            write(tmp_path / "out", force=True)
        kept = sorted(tmp_path.glob("out.new-*"))
        assert [names(folder) for folder in kept] == [NEW] * count
    assert names(tmp_path / "out") == ["config.json"]


def test_a_folder_that_others_made_meanwhile_is_not_replaced(tmp_path):
    def work():
        with output.new_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text(CONFIG)
            checkpoint(tmp_path / "out", "precious")

    with pytest.raises(ValueError, match=r"out exists: .* what was to be .* is whole in"):
        work()
    assert names(tmp_path / "out") == ["config.json", "precious"]
    assert [names(folder) for folder in tmp_path.glob("out.new-*")] == [["config.json"]]


def test_an_empty_folder_is_written_without_force(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path / "out") == NEW


def test_a_folder_behind_a_link_is_written_where_it_is(tmp_path):
    (tmp_path / "disk").mkdir()
    checkpoint(tmp_path / "disk" / "out", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["out", *(f"out/{name}" for name in NEW)]


@pytest.mark.parametrize(
    "more",
    [
        ["runs/thesis.txt"],
        [".git/HEAD"],
        [".git"],
    ],
)
def test_force_replaces_no_checkpoint_that_holds_other_things(tmp_path, more):
    before = names(checkpoint(tmp_path / "out", *more))
    with pytest.raises(ValueError, match="holds more than a checkpoint or a report"):
        write(tmp_path / "out", force=True)
    assert names(tmp_path / "out") == before


@pytest.mark.parametrize("content", [None, "[1]", "null", "{}", "{", "\0"])
def test_force_replaces_no_folder_of_other_people(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    if content is not None:
        (tmp_path / "out" / "config.json").write_text(content)
    with pytest.raises(ValueError, match="holds more than a checkpoint or a report"):
        write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "notes.txt").exists()


def test_force_replaces_a_checkpoint_with_figures_and_a_report(tmp_path):
    checkpoint(tmp_path / "low", "figures/speed.png", "__pycache__/x.pyc")
    (tmp_path / "report").mkdir()
    for name in ("report.md", "quality.png"):
        (tmp_path / "report" / name).touch()
    for out in ("low", "report"):
        write(tmp_path / out, force=True)
        assert names(tmp_path / out) == NEW


def impossible(home: Path) -> dict[str, tuple[Path, str]]:
    """Outputs that cannot be written, and what is said of them."""
    (home / "file").touch()
    (home / "dangling").symlink_to(home / "nowhere")
    (home / "loop").symlink_to(home / "loop")
    (home / "filelink").symlink_to(home / "file")
    os.mkfifo(home / "pipe")
    return {
        "a file": (home / "file", "is a file: expected the name of a folder"),
        "a link to a file": (home / "filelink", "is a file"),
        "a pipe": (home / "pipe", "is a file"),
        "a device": (Path("/dev/null"), "is a file"),
        "no parent": (home / "no" / "out", "no does not exist: make it"),
        "file as parent": (home / "file" / "out", "file is no folder"),
        "dangling link": (home / "dangling", "is a link to .*nowhere, which does not exist"),
        "loop": (home / "loop", "is a link to .*loop, which does not exist"),
        "in a loop": (home / "loop" / "out", "Too many levels of symbolic links"),
        "too long": (home / ("n" * 256), "takes 256 bytes: expected at most 223"),
        "nearly too long": (home / ("ü" * 120), "takes 240 bytes"),
        "path too long": (home / "/".join(["n" * 200] * 30), "File name too long"),
        "unwritable": (Path("/proc/out"), "cannot be written: "),
        "root": (Path("/"), "is the root of all files"),
        "disk": (Path("/proc"), "is in use, as a disk"),
        "here": (Path("."), "is in use, as a disk or working folder"),
        "above": (Path(".."), "is in use, as a disk or working folder"),
    }


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch, force):
    (tmp_path / "home" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "here")
    cases = impossible(tmp_path / "home")
    before = names(tmp_path)
    for out, said in cases.values():
        with pytest.raises(ValueError, match=said) as refused:
            write(out, force)
        assert "\n" not in str(refused.value)
    assert names(tmp_path) == before


@contextmanager
def nobody() -> Iterator[None]:
    """The rights of other users, for root, who may do all."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_may_not_be_written_or_entered_is_named(mode):
    with TemporaryDirectory() as home:
        os.chmod(home, mode)
        for work in (write, output.check_folder):
            with nobody(), pytest.raises(ValueError, match="out cannot be written: Permission"):
                work(Path(home) / "out")
        os.chmod(home, 0o700)


def test_the_longest_name_that_is_allowed_is_written(tmp_path):
    write(tmp_path / ("n" * 223))


def overlapping(home: Path) -> list[tuple[Path, Path]]:
    """Outputs and inputs of which one would be lost."""
    model = checkpoint(home / "model", "model.gguf", "text.txt")
    (home / "link").symlink_to(model)
    (home / "textlink").symlink_to(model / "text.txt")
    checkpoint(home / "out.partial")
    checkpoint(home / ".out.old")
    return [
        (model, model),
        (home / "." / "model" / "..", model),
        (home / "link", model),
        (model, home / "link"),
        (model / "out", model),
        (home, model),
        (model, model / "model.gguf"),
        (model, home / "textlink"),
        (home / "out", home / "out.partial"),
        (home / "out", home / ".out.old"),
    ]


def test_an_output_that_would_replace_what_is_read_is_refused(tmp_path):
    cases = overlapping(tmp_path)
    before = names(tmp_path)
    for out, given in cases:
        with pytest.raises(ValueError, match="would be written over"):
            output.check_folder(out, True, [None, "org/name", "n" * 5000, str(given)])
    assert names(tmp_path) == before


def test_an_output_beside_what_is_read_is_free(tmp_path):
    model = checkpoint(tmp_path / "model", "x.gguf")
    output.check_folder(tmp_path / "model2", False, [model, model / "x.gguf"])
    output.check_folder(model / "out", False, [model / "x.gguf"])
    assert names(tmp_path) == ["model", "model/config.json", "model/x.gguf"]


def test_a_disk_that_is_too_small_is_named_with_both_sizes(tmp_path):
    output.check_disk(tmp_path / "out", 1)
    with pytest.raises(ValueError, match=r"out takes about 1e\+09 GB, and .* GB are free there"):
        output.check_disk(tmp_path / "out", 10**18)


ROW = '{"versions": {}, '  # a sweep's row that was cut short


def test_a_file_that_cannot_take_rows_is_refused_first(tmp_path):
    for out, said in impossible(tmp_path).values():
        if out.name not in ("file", "filelink"):
            said = said if "a file" not in said and "in use" not in said else "is no file"
            with pytest.raises(ValueError, match=said), output.claimed_rows(out, SWEEP):
                pass


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_anything_else_is_not_taken_for_rows(tmp_path, force):
    file = tmp_path / "thesis.txt"
    file.write_text("my thesis")
    with pytest.raises(ValueError, match="sweep wrote"), output.claimed_rows(file, SWEEP, force):
        pass
    assert file.read_text() == "my thesis"
    for content in ("", ROW):
        file.write_text(content)
        with output.claimed_rows(file, SWEEP, force):
            pass
    assert os.listdir(tmp_path) == ["thesis.txt"]
