"""benchmarks/serving.py runs as it is."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

import fresh
import tiny
from exported import of_kind
from served import write

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def test_a_compressed_model_is_measured_beside_the_uncompressed_one(tmp_path):
    tiny.save(tmp_path / "dense", "llama", head_dim=32)  # vLLM's own attention takes no smaller one
    write(of_kind("anchored keys", k_segments=("2x8+4x4",) * 3), tmp_path / "low")
    words = [SCRIPT, tmp_path / "dense", tmp_path / "low", "--eager", "--dtype", "float32"]
    words += ["--rounds", "1", "--requests", "4", "--prompt", "20", "--new", "6"]
    done = fresh.python(*words, "--context", "40", "--steps", "4", "--page", "32", "--batch", "2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == ["step of 2", "load"] * 2
    assert all(row["requests/s"] > 0 for row in rows if row["case"] == "load")
