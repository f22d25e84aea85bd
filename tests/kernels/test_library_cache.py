"""Compiled ops: built once, loaded only if whole and this user's, and what happens if not."""

import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import pytest
import tiny

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.kernels import cpu, install, library_cache
from eigenzoo.zoo.cli.values import fuse
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load

LOAD = "from eigenzoo.kernels import cpu, ops; cpu.load()"
COPYING = """#!/bin/sh
# a compiler that takes the time of a copy: its output is a library that was built before
for word; do [ "$last" = -o ] && out=$word; [ "$last" = -MF ] && : > "$word"; last=$word; done
[ -z "$out" ] && exec c++ "$@"
case "$*" in *-shared*) cp '{built}' "$out";; *) : > "$out";; esac
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return library_cache.folder()


@pytest.fixture
def kept(place, tmp_path):
    """A file in the cache, under its name."""
    (tmp_path / "built").write_bytes(b"\x7fELF" + bytes(range(200)))
    library_cache.keep(tmp_path / "built", place, "cpu-1")
    [path] = place.iterdir()
    return path


@pytest.fixture(scope="module")
def built():
    """The ops of this machine, from its own cache."""
    cpu.load()
    return library_cache.find(library_cache.folder(), cpu.kind())


@pytest.fixture
def compiler(tmp_path, built):
    return script(tmp_path / "copying", COPYING.format(built=built))


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def loading(*compilers: object) -> str:
    """Errors of processes that load the ops at once, one for each compiler."""
    with ThreadPoolExecutor(len(compilers)) as pool:
        env = [os.environ | {"CXX": str(compiler)} for compiler in compilers]
        return "".join(pool.map(lambda x: fresh.python("-c", LOAD, env=x).stderr, env))


def test_folder_and_library_are_this_users_alone(place, kept):
    assert place.stat().st_mode & 0o777 == kept.stat().st_mode & 0o777 == 0o700
    assert library_cache.find(place, "cpu-1") == kept
    assert library_cache.find(place, "cpu-2") is None


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGE = {
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(204)),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xc6"),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: path.symlink_to(path.rename(path.parent.parent / "elsewhere")),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nothing")),
}


@pytest.mark.parametrize("way", DAMAGE)
def test_a_damaged_library_is_removed(place, kept, way):
    DAMAGE[way](kept)
    assert library_cache.find(place, "cpu-1") is None
    assert not list(place.iterdir())


def test_a_folder_in_the_place_of_a_library_is_no_library(place, kept):
    kept.unlink()
    kept.mkdir()
    assert library_cache.find(place, "cpu-1") is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_what_others_can_write_is_not_loaded(place, kept, mode):
    kept.chmod(mode)
    with pytest.raises(ValueError, match=r"other users can write to .*-.*so \(chmod go-w"):
        library_cache.find(place, "cpu-1")
    for folder in (place, place.parent):
        folder.chmod(mode)
        with pytest.raises(ValueError, match=f"other users can write to {folder} "):
            library_cache.folder()
        folder.chmod(0o755)
    place.parent.chmod(0o1777)  # as /tmp: nobody else can rename what is in it
    assert library_cache.folder() == place


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_not_loaded(place, kept):
    os.chown(kept, 1234, -1)
    with pytest.raises(ValueError, match="so belongs to another user"):
        library_cache.find(place, "cpu-1")
    os.chown(place, 1234, -1)
    with pytest.raises(ValueError, match="eigenzoo belongs to another user"):
        library_cache.folder()


def test_a_link_to_a_cache_is_checked_where_it_leads(place, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(place.parent)
    place.parent.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    with pytest.raises(ValueError, match=f"other users can write to {place.parent} "):
        library_cache.folder()


def test_without_a_home_or_a_place_to_write_the_error_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/none", tmp_path / ("x" * 300)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        with pytest.raises(ValueError, match=r"cannot be created .*: mend it, or set XDG_CACHE"):
            library_cache.folder()


def test_a_relative_cache_is_ignored_as_its_specification_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert library_cache.folder() == tmp_path / ".cache/eigenzoo"


def test_a_cache_that_is_mounted_noexec_is_refused_before_anything_is_built(place, monkeypatch):
    real = os.statvfs(place)
    flags = os.statvfs_result((*real[:8], real.f_flag | os.ST_NOEXEC, real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda path: flags)
    with pytest.raises(ValueError, match="may be executed"):
        library_cache.folder()


def test_folders_of_builds_that_were_killed_are_removed_later(place):
    old, new = place / "build-1", place / "build-2"
    for folder in (old, new):
        (folder / "inside").mkdir(parents=True)
    hours = time.time() - 2 * library_cache.STALE
    os.utime(old, (hours, hours))
    library_cache.remove_interrupted(place, "build-")
    assert list(place.iterdir()) == [new]


@pytest.mark.slow
def test_two_processes_build_at_once_and_a_third_needs_no_compiler(place, compiler):
    assert not loading(compiler, compiler)
    [library] = place.iterdir()
    written = library.stat().st_mtime_ns
    assert not loading("no-compiler")
    assert library.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_library_of_another_system_is_built_again(place, compiler, tmp_path):
    (tmp_path / "bad").write_bytes(b"\x7fELF of another system")
    library_cache.keep(tmp_path / "bad", place, cpu.kind())  # whole, as its name says
    assert not loading(compiler)
    assert not loading("no-compiler")


def test_a_change_in_any_source_file_causes_a_new_build(tmp_path, monkeypatch):
    pieces = tmp_path / "cpp"
    shutil.copytree(cpu.PIECES, pieces)
    monkeypatch.setattr(cpu, "PIECES", pieces)
    seen = {cpu.kind()}
    for piece in pieces.iterdir():
        piece.write_text(piece.read_text() + "\n")
        seen.add(cpu.kind())
    assert len(seen) == 1 + len(list(pieces.iterdir())) > 2


COMPILERS = {  # what it does, what the error says
    "none": (None, r"there is no .*none: install g\+\+ or clang"),
    "failing": ("exit 1", "cannot build .*ops.cpp in .*eigenzoo "),
    "a full disk": ("echo 'x.o: No space left on device' >&2; exit 1", "No space left on device"),
    "of another system": (": > eigenzoo_cpu.so; : > ops.o", "cannot build .*load this library"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", COMPILERS)
def test_where_ops_cannot_be_built_one_line_says_why_and_nothing_is_left(place, tmp_path, way):
    does, says = COMPILERS[way]
    compiler = tmp_path / way.replace(" ", "-")
    if does:
        script(compiler, f'#!/bin/sh\ncase "$*" in *ops*) {does};; *) exec c++ "$@";; esac\n')
    code = (
        "from eigenzoo.kernels import cpu\n"
        "for _ in range(2):\n"
        "    try: cpu.load()\n"
        "    except ValueError as error: print(error)\n"
    )
    done = fresh.python("-c", code, env=os.environ | {"CXX": str(compiler)})
    first, second = done.stdout.splitlines()  # the second without another build
    assert first == second
    assert re.search(says, first)
    assert first.endswith(", or use the reference ops")
    assert not list(place.iterdir())


DECODE = """
import sys
from transformers import AutoModelForCausalLM as Auto
import torch
model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).to(torch.bfloat16)
print(model.generate(torch.arange(2, 12)[None], max_new_tokens=4, min_new_tokens=4).shape)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("low")
    tiny.save(place / "dense", num_hidden_layers=1)
    dense = load(str(place / "dense"))
    compress_checkpoint(
        dense,
        place / "low",
        Settings(keep=0.6, rank_multiple=2, kv_bits=(16,)),
        samples=4,
        seq_len=32,
    )
    return place / "low"


BROKEN = {
    "truncated": (_truncate, "there is no no-compiler"),
    "others can write": (lambda path: path.chmod(0o777), "other users can write"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", BROKEN)
def test_a_model_loads_and_decodes_without_the_ops_and_says_so_once(
    folder, place, built, tmp_path, way
):
    harm, says = BROKEN[way]
    shutil.copy(built, tmp_path / "copy")
    library_cache.keep(tmp_path / "copy", place, cpu.kind())
    harm(next(place.iterdir()))
    done = fresh.python("-c", DECODE, folder, env=os.environ | {"CXX": "no-compiler"})
    assert done.stdout == "torch.Size([1, 14])\n", done.stderr
    said = [line for line in done.stderr.splitlines() if "reference ops" in line]
    assert len(said) == 1
    assert says in said[0]


def test_commands_miss_only_ops_that_were_asked_for_by_name(place, monkeypatch, capsys):
    install.register.cache_clear()
    place.parent.chmod(0o777)
    cpu._load.cache_clear()
    model = tiny.native(num_hidden_layers=1)
    with pytest.raises(ValueError, match="other users can write"):
        fuse(model, "fused", True)
    assert fuse(model, "auto", True) is model
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("decoding with the reference ops: other users can write")
    cpu._load.cache_clear()
