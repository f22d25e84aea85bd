import sys

import pytest
import tiny
from exported import of_kind

from eigenzoo.zoo.cli import serve

OPTIONS = ["--port", "8000", "--model-loader-extra-config", "{}"]


@pytest.fixture
def started(monkeypatch):
    """The programs that took the place of this one."""
    programs = []
    monkeypatch.setattr(serve.os, "execv", lambda *words: programs.append(words))
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    return programs


@pytest.fixture
def low(tmp_path):
    of_kind("anchored keys", anchor=16).save_pretrained(tmp_path / "low")
    return tmp_path / "low"


def test_serve_becomes_the_server_of_vllm_with_its_options(run, started, low):
    code, text, said = run("serve", low, "--", *OPTIONS)
    assert (code, text) == (0, "")
    assert "bytes of cache" in said
    words = [sys.executable, "-m", serve.SERVER, "--model", str(low), *OPTIONS]
    assert started == [(sys.executable, words)]


def test_without_vllm_serve_says_what_to_install(run, started, low, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    code, _, said = run("serve", low)
    assert (code, started) == (2, [])
    assert "pip install 'eigenzoo[vllm]'" in said


def test_only_compressed_checkpoints_are_served(run, started, tmp_path):
    tiny.save(tmp_path / "dense", "llama")
    code, _, said = run("serve", tmp_path / "dense")
    assert (code, started) == (2, [])
    assert "is not compressed: run eigenzoo compress first" in said
