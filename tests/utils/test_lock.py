"""Only one process writes an output at a time."""

import os
import signal
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from eigenzoo.zoo.utils.lock import locked


def hold(path: Path, pipe) -> None:
    with locked(path):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `out`."""
    pipe, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=hold, args=(tmp_path / "out", theirs))
    process.start()
    theirs.close()
    assert pipe.recv() == "held"
    yield process
    pipe.close()
    process.kill()
    process.join()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path, holder):
    said = rf"out is being written by process {holder.pid} on {os.uname().nodename} since 20"
    for _ in range(2):
        with pytest.raises(ValueError, match=said), locked(tmp_path / "out"):
            pass


def test_a_lock_is_free_once_its_process_is_dead(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert os.listdir(tmp_path) == [".out.lock"]
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_of_many_processes_one_at_a_time_holds_the_lock(tmp_path):
    work = [get_context("fork").Process(target=count, args=(tmp_path,)) for _ in range(3)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert (tmp_path / "number").read_text() == "30"
    assert os.listdir(tmp_path) == ["number"]


def count(folder: Path) -> None:
    done = 0
    while done < 10:
        with suppress(ValueError), locked(folder / "number"):
            file = folder / "number"
            number = int(file.read_text()) if file.exists() else 0
            file.write_text(str(number + 1))
            done += 1


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="out cannot be written"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_system_without_locks_is_named_in_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    said = "out is not locked: Function not implemented"
    with pytest.warns(UserWarning, match=said), locked(tmp_path / "out"):
        pass
