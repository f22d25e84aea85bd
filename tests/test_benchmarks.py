"""The files in benchmarks/ run as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CALIBRATION = Path(__file__).parents[1] / "benchmarks/calibration.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_calibration_costs_is_printed(dense_folder):
    words = [sys.executable, CALIBRATION, dense_folder, "--samples", "4", "--seq-len", "32"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    # 3 layers, keys and values, 3 sums of one latent of 4 heads of 16: squares, and a little more
    assert 3 * 2 * 3 * 8 * 64**2 / 2**20 < found["sums_mib"] < 3 * 2 * 3 * 8 * 64 * 66 / 2**20
    assert found["ratio"] == found["seconds"] / found["passes_seconds"] > 0
    assert found["peak_mib"] >= 0
