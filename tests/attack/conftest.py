"""Where the attack takes place: a copy of good files for each row, in a folder of its own."""

import shutil
import tempfile

import attack
import pytest


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """The good files, written once."""
    place = tmp_path_factory.mktemp("attack") / "place"
    place.mkdir()
    attack.make_place(place)
    return place


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A copy of the good files, which is the working folder and holds the temporary files.

    The Hub has an empty repository of any name, else nothing could be pushed.
    """
    place = shutil.copytree(good, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *_, **__: [])
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    yield place
    shutil.rmtree(place)
