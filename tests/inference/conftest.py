"""Fixtures of the tests of loading."""

import shutil

import pytest


@pytest.fixture
def folder(tmp_path, dense_folder):
    """A copy of the dense checkpoint, for tests that damage it."""
    return shutil.copytree(dense_folder, tmp_path / "copy")
