"""The machine code that Triton compiles the kernels to, in a process without the interpreter."""

import json
import os
import re
from pathlib import Path

import fresh
import pytest
from repeats import repeats

from eigenzoo.kernels.aot import MOST_SHARED

EACH = (  # kernel and way to hold a cache once, for targets beside one that compiles all cases
    "rotary 96x4+64x2/",
    "latent 512",
    "padded anchored 320/80",
    "merge 128",
    "paged 16 latent 80/80 x4",
)
CASES = (
    "rotary 80/80",
    "latent 80/80 x4",
    "latent 512",
    "anchored 320/80 x4 16",
    "padded anchored 320/80",
    "merge 128",
    "latent 96x8/",
    "latent 80x4/",
    "latent 96x3/",
    "latent 96x2/",
    "latent 16x16+48x8+128x4+128x2/",
    "anchored 320x4/",
    "anchored 48x8+96x4+64x2/",
    "padded anchored 320x4",
    "rotary 96x4+64x2/",
    "paged 16 latent 80/80 x4",
    "paged 16 latent 16x16+48x8+128x4+128x2/",
    "paged 16 anchored 320/",
    "paged 16 rotary 80/",
)
# these differ from others in a number only
REST = "latent 64/96", "rotary 160x4/", "paged 128 latent 80/80 x4", "paged 128 anchored 320/"
OTHERS = "sm_80", "sm_100", "gfx942"
WITHOUT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cases"),
    [
        ("sm_90", CASES),
        *((target, EACH) for target in OTHERS),
        pytest.param("sm_90", REST, marks=repeats),
        *(
            pytest.param(target, sorted({*CASES, *REST} - {*EACH}), marks=repeats)
            for target in OTHERS
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{len(x)} cases",
)
def test_kernels_compile_to_what_a_gpu_runs_well(target, cases):
    code = "from eigenzoo.kernels.aot import main; main()"
    done = fresh.python("-c", code, "--json", "--targets", target, "--only", *cases, env=WITHOUT)
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(read) == len(cases)
    for r in read:
        bits = [int(n) for n in re.findall(r"\d+x(\d+)", r["case"])]
        rotary, mixed = "rotary" in r["case"], "+" in r["case"]
        assert r["spills"] == 0
        assert r["shared"] <= MOST_SHARED[target]
        if target == "gfx942":
            assert bits or r["loop"]["global_load_dwordx4"] > 0
            continue
        assert r["blocks"] >= (2 if rotary or mixed else 3)
        loads = {k for k in r["loop"] if k.startswith(("LDG.", "LDGSTS."))}
        most = 2 if target == "sm_100" else 1  # the latest GPU reads twice as fast
        if bits:  # at least 4 bytes a thread, but for scales: 4 loads of a byte for each segment
            assert rotary or "LDG.U16" not in loads  # its tiles are small
            assert r["loop"]["LDG.U8"] <= 4 * len(bits)
            # unpacking is the limit: this only tells when it gets slower
            limit = 7 if "anchored" in r["case"] else 5.6
            assert rotary or mixed or r["ratio"] < most * limit / min(bits)
            continue
        if "padded" in r["case"]:  # a position and a bias of 4 bytes for each slot
            loads -= {"LDG.32", "LDGSTS.32"}
        if "paged" in r["case"]:  # entries of the table
            loads -= {"LDG.32"}
        assert loads == {"LDG.128", "LDGSTS.128"} & loads != set()  # caches, 16 bytes a thread
        # rotary decoding lifts keys, which on the latest GPU takes longer than reading them
        assert r["ratio"] < (0.7 if rotary else 0.35) * most


@pytest.mark.slow
def test_launchers_pass_what_triton_compiles():
    script = Path(__file__).with_name("launched.py")
    done = fresh.python(str(script), env=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["latent", "anchored", "rotary"] * 2
