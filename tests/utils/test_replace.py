"""A replaced file is always the whole old one or the whole new one."""

import os

import pytest

from eigenzoo.zoo.utils.replace import replacing


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "config.json"
    for text in ("old", "new"):
        with replacing(path) as part:
            assert part.parent == tmp_path  # a rename within one file system
            part.write_text(text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")

    def stopped():
        with replacing(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_name_and_both_before_it_returns(tmp_path, monkeypatch):
    path, events = tmp_path / "config.json", []
    sync, rename = os.fsync, os.replace

    def synced(descriptor):
        events.append(("synced", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def renamed(*paths):
        events.append("renamed")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replacing(path) as part:
        part.write_text("new")
    inodes = path.stat().st_ino, tmp_path.stat().st_ino
    assert events == [("synced", inodes[0]), "renamed", ("synced", inodes[1])]
