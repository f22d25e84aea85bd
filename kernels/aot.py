"""Compile the kernels for GPUs that need not be present, and read the machine code.

`python -m eigenzoo.kernels.aot` prints a table: registers, spills, shared memory and the hot loop
of every kernel and target. This detects regressions and bounds what a GPU can reach; it does not
measure speed.
"""

import argparse
import json
import math
import re
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..zoo.models.bits import parse_segments
from ..zoo.models.packing import Latent
from . import anchored_decode, latent_decode, layouts, rotary_decode, split
from .disassembly import count, disassemble, loops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Limits(NamedTuple):
    """Of one multiprocessor: bytes of shared memory, and bytes read from memory per clock."""

    shared: int
    bytes_per_clock: float


# data sheets: bandwidth / multiprocessors / boost clock of A100, H100 and B200
LIMITS = {
    "sm_80": Limits(164 << 10, 2.04e12 / 108 / 1.41e9),
    "sm_90": Limits(228 << 10, 3.35e12 / 132 / 1.76e9),
    "sm_100": Limits(228 << 10, 8.0e12 / 148 / 1.85e9),
}
HEADS = 8  # latents of a token, which share a row if they are packed
WIDTH = 51  # of the names of cases in the table
LOADS = ("LDG.", "LDGSTS.", "global_load", "buffer_load")
REGISTERS, WARPS, MOST_BLOCKS = 65536, 64, 32  # per multiprocessor, on all three
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


class Case(NamedTuple):
    """One kernel for one shape."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes_read(self) -> float:
        """Bytes of memory that one iteration of the loop reads."""
        c = self.constants
        if "K" not in c:
            return float(c["WIDTH"] * c["TILE"] * 4)
        return sum(self._bytes(c[name]) for name in "KV") * float(c["TILE"])

    def _bytes(self, row: layouts.Row) -> float:
        """Bytes of a latent in a slot: of a row of bytes, its share of the heads."""
        return row.slot / HEADS if row.codes else row.width * self.dtype.itemsize


class Reading(NamedTuple):
    """What the machine code says; `loop` counts instructions of the longest loop, by opcode.

    For AMD, `loop` counts the whole kernel, and blocks and ratio are unknown: 0 and nan. The
    instructions of an inner loop, as in `rotary_decode` without HELD, count once.
    """

    registers: int
    spills: int
    shared: int
    blocks: int  # that fit on a multiprocessor at once
    loop: dict[str, int]
    ratio: float  # clocks to issue the loop / clocks to read its tile from memory


def latent(k: int | str, v: int | str, shared: int = 1) -> Case:
    """`latent_decode` for `shared` query heads of one latent. k, v: ranks or segments."""
    shape = latent_decode.constants(shared, 1, _row(k), _row(v, layouts.LEAST_VALUES), 2)
    shape |= {"bias_ptr": None, "slopes_ptr": None, "table_ptr": None}
    return Case(f"latent {k}/{v} x{shared}", latent_decode.kernel, shape)


def anchored(k: int | str, v: int | str, shared: int, block: int, padded: bool = False) -> Case:
    """`anchored_decode` for blocks of `block` positions. padded: positions and a bias are given."""
    rows = _row(k), _row(v, layouts.LEAST_VALUES)
    shape = anchored_decode.constants(shared, block, *rows, 2, aligned=not padded)
    absent = ("added_ptr",) if padded else ("bias_ptr", "position_ptr", "added_ptr")
    shape |= dict.fromkeys((*absent, "table_ptr"))
    name = f"{'padded ' * padded}anchored {k}/{v} x{shared} {block}"
    return Case(name, anchored_decode.kernel, shape)


def rotary(k: int | str, v: int | str, shared: int, lifted: int) -> Case:
    """`rotary_decode` for a latent of `lifted` kv heads of 128 numbers."""
    rows = _row(k, loop=True), _row(v, layouts.LEAST_VALUES)
    shape = rotary_decode.constants(shared, 1, *rows, 128, 2, False)
    shape |= {"bias_ptr": None, "mean_ptr": None, "table_ptr": None, "LIFTED": lifted}
    return Case(f"rotary {k}/{v} x{shared} of {lifted}", rotary_decode.kernel, shape)


def paged(case: Case, page: int) -> Case:
    """The same for a cache in pages of so many slots."""
    shape = {name: x for name, x in case.constants.items() if name != "table_ptr"}
    shape |= {name: shape[name]._replace(page=page) for name in "KV"}
    return case._replace(name=f"paged {page} {case.name}", constants=shape)


def _row(kept: int | str, least: int = layouts.LEAST_ROWS, loop: bool = False) -> layouts.Row:
    """The row of a cache as `StaticCache` makes it: of a rank, or of segments."""
    if isinstance(kept, int):
        return layouts.row(None, kept, kept, least, loop)
    segments = parse_segments(kept)
    slot = Latent(HEADS, 0, segments).nbytes(torch.bfloat16)
    layout = (HEADS, *(n for segment in segments for n in segment))
    return layouts.row(layout, 0, slot, least, loop)


def merge(splits: int, width: int) -> Case:
    """The second pass, which sums the weighted parts of all splits."""
    shape = {"SPLITS": splits, "WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    shape |= {"TILE": min(splits, 16), "num_warps": 4, "num_stages": 3}
    return Case(f"merge {splits} of {width}", split._merge, shape)


CASES = (
    *(latent(r, r) for r in (16, 32, 48, 64, 72, 80, 96, 112, 128)),
    *(latent(r, r, 4) for r in (64, 80, 96, 128)),
    latent(64, 96),
    latent(320, 80, 4),
    latent(320, 320, 4),
    latent(512, 128, 4),
    *(
        anchored(r, 80, shared, block)
        for r, shared in ((80, 1), (320, 4))
        for block in (16, 32, 64)
    ),
    anchored(160, 160, 8, 32),
    anchored(80, 80, 4, 0),
    *(anchored(r, 80, shared, 16, padded=True) for r, shared in ((80, 1), (320, 4))),
    *(rotary(r, 80, 1, 1) for r in (64, 80, 96)),
    rotary(160, 80, 4, 2),
    rotary(320, 80, 1, 4),
    *(latent(f"{r}x{n}", f"{r}x{n}") for n in (8, 4, 3, 2) for r in (80, 96)),
    latent("16x8+32x4+16x2", "32x4+32x2"),
    latent("16x16+48x8+128x4+128x2", "16x8+96x4+48x2", 4),
    *(anchored(f"320x{n}", f"80x{n}", 4, 32) for n in (8, 4, 2)),
    anchored("48x8+96x4+64x2", "16x8+96x4+48x2", 4, 32),
    anchored("320x4", "80x4", 4, 16, padded=True),
    *(rotary(f"96x{n}", f"96x{n}", 1, 1) for n in (8, 4, 2)),
    *(rotary(f"160x{n}", f"96x{n}", 4, 2) for n in (8, 4)),
    rotary("96x4+64x2", "64x4+32x2", 4, 2),
    *(
        paged(case, page)
        for page in (16, 128)
        for case in (
            latent(80, 80, 4),
            latent("16x16+48x8+128x4+128x2", "16x8+96x4+48x2", 4),
            anchored(320, 80, 4, 16),
            anchored("48x8+96x4+64x2", "16x8+96x4+48x2", 4, 32),
            anchored(320, 80, 4, 16, padded=True),
            rotary(80, 80, 1, 1),
            rotary("96x4+64x2", "64x4+32x2", 4, 2),
        )
    ),
    merge(32, 80),
    merge(128, 320),
)


def compiled(case: Case, target: GPUTarget) -> Any:
    """The kernel as Triton compiles it for aligned tensors and strides divisible by 16."""
    constants = dict(case.constants)
    if "K" in constants:
        ptx = target.backend == "cuda"
        constants |= {n: constants[n]._replace(ptx=ptx, aligned=True) for n in "KV"}
        constants |= {"K_SHARE": 1, "V_SHARE": 1, "UPCAST": False}
    if target.backend == "hip" and "HELD" in constants:
        constants["HELD"] = False
    if target.backend == "hip" and case.kernel is latent_decode.kernel:
        constants["TILE"] = split.tile_of(constants["K"].width + constants["V"].width, 2)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
    names = case.kernel.arg_names
    types = {n: "constexpr" if n in constants else _type(n, case) for n in names}
    aligned = [i for i, n in enumerate(names) if types[n] not in ("constexpr", "fp32")]
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    # the default of enable_fp_fusion changes with Triton 3.10
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


def _type(name: str, case: Case) -> str:
    own = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
    if name == "span_ptr":
        return "*i64"
    if name in ("position_ptr", "table_ptr"):
        return "*i32"
    if name in ("k_ptr", "z_ptr", "v_ptr"):
        packed = case.constants["V" if name == "v_ptr" else "K"].codes
        return "*u8" if packed else "*" + own
    if name.split("_")[0] in ("part", "weight", "bias", "slopes", "cos", "sin"):
        return "*fp32" if name.endswith("_ptr") else "i32"
    if name.endswith("_ptr"):
        return "*" + own
    return "fp32" if name == "scale" else "i32"


def read(case: Case, name: str) -> Reading:
    """Compile a case for a target of `TARGETS` and read the machine code."""
    target = TARGETS[name]
    made = compiled(case, target)
    shared, warps = made.metadata.shared, case.constants["num_warps"]
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        counts = [re.search(rf"\.{k}:\s+(\d+)", text) for k in ("vgpr_count", "vgpr_spill_count")]
        registers, spills = (int(c[1]) if c else -1 for c in counts)
        return Reading(registers, spills, shared, 0, count(text.splitlines()), math.nan)
    usage, text = disassemble(made.asm["cubin"])
    line = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert line, usage
    registers, spills = int(line[1]), int(line[2])
    loop = max(loops(text), key=len, default=[])
    limits = LIMITS[name]
    per_warp = -(-registers * 32 // 256) * 256  # registers are allocated in units of 256
    blocks = (REGISTERS // per_warp // warps, limits.shared // (shared + 1024), WARPS // warps)
    issue = len(loop) * warps / 4  # four schedulers, one instruction each per clock
    ratio = issue / (case.bytes_read / limits.bytes_per_clock)
    return Reading(registers, spills, shared, min(*blocks, MOST_BLOCKS), count(loop), ratio)


def main() -> None:
    """Print one line per target and case."""
    parser = argparse.ArgumentParser(prog="python -m eigenzoo.kernels.aot", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--only", nargs="*", default=[""], help="only cases with these prefixes")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, no table")
    given = parser.parse_args()
    if not given.json:
        print(f"target  {'case':{WIDTH}} regs spills shared blocks loop ratio loads")
    for target in given.targets.split(","):
        for case in (c for c in CASES if c.name.startswith(tuple(given.only))):
            r = read(case, target)
            if given.json:
                print(json.dumps({"target": target, "case": case.name} | r._asdict()), flush=True)
                continue
            loads = " ".join(f"{k} {n}" for k, n in r.loop.items() if k.startswith(LOADS))
            print(
                f"{target:7} {case.name:{WIDTH}} {r.registers:4} {r.spills:6} {r.shared:6} "
                f"{r.blocks:6} {sum(r.loop.values()):4} {r.ratio:5.2f} {loads}",
                flush=True,
            )


if __name__ == "__main__":
    main()
