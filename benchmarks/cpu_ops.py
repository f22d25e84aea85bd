"""Attention of one new token on this CPU: the ops of kernels/cpp compared with PyTorch's SDPA.

    python benchmarks/cpu_ops.py [--threads 1] [--slots 8192] [--dtype float32] [--dtype bfloat16]
    python benchmarks/cpu_ops.py --pages --threads 2 --dtype bfloat16

All cases take turns in one process, each over several KV caches, so that none stays in the
processor's caches; medians. SDPA reads whole keys and values of D = 128; the ops read latents, some
of them packed. Prints a line of JSON a case: milliseconds; speedup over SDPA; the share of the read
bandwidth that a dot product of long vectors reaches in the same turns; and the time over the floor,
which is the time to read the bytes, or to lift the keys at the speed of a product of two large
matrices of the same dtype. With --pages it times SmolLM2's attention over a cache in pages instead,
and prints milliseconds and the time over that of one long page.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenzoo.kernels import ops
from eigenzoo.kernels.install import register
from eigenzoo.zoo.models.cache import Buffer
from eigenzoo.zoo.models.packing import Latent, Packed, pack

D = 128
SHAPES = {  # query heads, kv heads
    "multi-head": (32, 32),
    "grouped": (32, 8),
}
BITS = ("16", "8", "4", "falling")  # of packed caches, but for 16; see `_latent`
PAGES = {"pages of 16": 16, "pages of 16, in order": -16, "pages of 128": 128}  # else shuffled
SMALL = "16x8+80x4+32x3+64x2", "32x8+96x4+32x3+32x2"  # a layer of SmolLM2-135M, a quarter of bytes


class Case(NamedTuple):
    """A timed operation, and the least that it costs for one cache."""

    call: Callable[[], object]
    nbytes: int
    flops: int = 0  # of the matrix product that it needs


def cases(slots: int, heads: int, kv: int, dtype: torch.dtype, caches: int) -> dict[str, Case]:
    """The cases of one shape."""

    def made(latents: int, *widths: int, bits: str = "16") -> list[list[Buffer]]:
        def one(width: int) -> Buffer:
            x = torch.randn(1, latents, slots, width)
            return x.to(dtype) if bits == "16" else pack(x, _latent(latents, width, bits))

        return [[one(w) for w in widths] for _ in range(caches)]

    def size(kept: list[list[Buffer]]) -> int:
        parts = [x.rows if isinstance(x, Packed) else x for x in kept[0]]
        return sum(x.nbytes for x in parts)

    full, span = made(kv, D, D), torch.tensor([[0, slots]])
    q = torch.randn(1, heads, 1, D).to(dtype)
    eighth = torch.tensor([[0, slots // 8]])
    seen = (torch.arange(slots) < slots // 8)[None, None, None]

    def sdpa(mask: Tensor | None = None) -> None:
        for k, v in full:
            F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    def latent(q: Tensor, kept: list[list[Buffer]], span: Tensor = span) -> Callable[[], None]:
        def call() -> None:
            for k, v in kept:
                ops.latent_decode(q, k, v, span, 0.1)

        return call

    named: dict[str, Case] = {
        "sdpa": Case(sdpa, size(full)),
        "sdpa, 1/8 full": Case(lambda: sdpa(seen), size(full)),
        "latent_decode 128/128": Case(latent(q, full), size(full)),
        "latent_decode 128/128, 1/8 full": Case(latent(q, full, eighth), size(full) // 8),
    }
    for rk, rv, bits in ((64, 96, "16"), *((80, 80, bits) for bits in BITS)):
        kept = made(kv, rk, rv, bits=bits)
        call = latent(torch.randn(1, heads, 1, rk).to(dtype), kept)
        named[f"latent_decode {rk}/{rv}{_few(bits)}"] = Case(call, size(kept))
    kept = made(kv, 80, 80, bits="falling")
    call = latent(torch.randn(1, heads, 1, 80).to(dtype), [_in_one_row(*pair) for pair in kept])
    named["latent_decode 80/80, falling bits, keys and values in one row"] = Case(call, size(kept))
    for shared in (2, 4):
        rank = 80 * shared
        up = torch.randn(kv // shared, rank, shared * D)
        for bits in BITS:
            kept = made(kv // shared, rank, rank, bits=bits)
            call = latent(torch.randn(1, heads, 1, rank).to(dtype), kept)
            name = f"latent_decode {rank}, {shared} heads a latent{_few(bits)}"
            named[name] = Case(call, size(kept))
        for block, bits in ((16, "16"), (64, "16"), *((32, bits) for bits in BITS)):
            kept = made(kv // shared, rank, rank, bits=bits)
            angle = torch.rand(1, 1, -(-slots // block), D // 2)
            rest = (span, 0.1, angle.cos(), angle.sin(), up.to(dtype), None, block)

            def anchored(kept: list = kept, rest: tuple = rest) -> None:
                for z, v in kept:
                    ops.anchored_decode(q, z, v, *rest)

            name = f"anchored_decode {rank}, {shared} heads a latent, blocks of {block}{_few(bits)}"
            named[name] = Case(anchored, size(kept))
    angle = torch.rand(1, 1, slots, D // 2)
    for shared in (1, 2, 4):
        rank = 80 * shared
        kept, up = made(kv // shared, rank, rank), torch.randn(kv // shared, rank, shared * D)
        rest = (span, 0.1, angle.cos(), angle.sin(), up.to(dtype), None)

        def rotary(kept: list = kept, rest: tuple = rest) -> None:
            for z, v in kept:
                ops.rotary_decode(q, z, v, *rest)

        lift = 2 * slots * kv * rank * D
        named[f"rotary_decode {rank}, {shared} heads a latent"] = Case(rotary, size(kept), lift)
    return named


def paged_cases(slots: int, dtype: torch.dtype, caches: int) -> dict[str, Case]:
    """Attention of a layer of SmolLM2-135M: 9 heads of 64 numbers, one latent, blocks of 16."""
    kept = [Latent.of_layout(f"1:{text}") for text in SMALL]
    pairs = [[pack(torch.randn(1, 1, slots, x.width), x) for x in kept] for _ in range(caches)]
    rows = [_in_one_row(*pair) for pair in pairs]
    q, up = torch.randn(1, 9, 1, 64).to(dtype), torch.randn(1, kept[0].width, 3 * 64).to(dtype)
    angle = torch.rand(1, 1, -(-slots // 16), 32)
    rest = (torch.tensor([[0, slots]]), 0.1, angle.cos(), angle.sin(), up, None, 16, None, None)

    def case(rows: list[list[Buffer]], table: Tensor | None = None) -> Case:
        def call() -> None:
            for z, v in rows:
                ops.anchored_decode(q, z, v, *rest, table)

        return Case(call, slots * sum(x.nbytes(dtype) for x in kept))

    named = {"one long page": case(rows)}
    for name, page in PAGES.items():
        count = slots // abs(page)
        order = torch.arange(count) if page < 0 else torch.randperm(count)

        def paged(x: Buffer, order: Tensor = order) -> Buffer:
            pages = x.rows[0].unflatten(0, (len(order), -1))  # type: ignore[union-attr]
            return x._replace(rows=pages[order])  # type: ignore[union-attr]

        table = order.argsort().int()[None]
        named[name] = case([_in_one_row(*map(paged, pair)) for pair in pairs], table)
    return named


def _latent(heads: int, width: int, bits: str) -> Latent:
    """Of one number of bits; or of bits that fall, 4.4 on average."""
    segments = f"{width}x{bits}"
    if bits == "falling":
        segments = f"{width // 5}x8+{width // 5 * 3}x4+{width // 5}x2"
    return Latent.of_layout(f"{heads}:{segments}")


def _in_one_row(*pair: Buffer) -> list[Buffer]:
    """The same keys and values, as views of rows that hold both."""
    packs = [x for x in pair if isinstance(x, Packed)]
    rows = torch.cat([x.rows for x in packs], 2).split([x.rows.size(2) for x in packs], 2)
    return [x._replace(rows=part) for x, part in zip(packs, rows, strict=True)]


def _few(bits: str) -> str:
    return "" if bits == "16" else f", {bits} bits"


def medians(named: dict[str, Case], rounds: int) -> dict[str, float]:
    """Seconds a call, of cases that take turns."""
    times: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(rounds + 1):
        for name, case in named.items():
            start = time.perf_counter()
            case.call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: median(t) for name, t in times.items()}


def main() -> None:
    """Measure every shape in every dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--caches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pages", action="store_true", help="time a cache in pages; see above")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    register("cpu")
    x = torch.ones(1 << 26)
    for name in args.dtype or ["float32"]:
        if args.pages:
            times = medians(paged_cases(args.slots, getattr(torch, name), args.caches), args.rounds)
            for case, seconds in times.items():
                row = {"case": case, "dtype": name, "threads": args.threads, "slots": args.slots}
                row["milliseconds"] = round(1e3 * seconds / args.caches, 3)
                row["over_one_page"] = round(seconds / times["one long page"], 3)
                print(json.dumps(row), flush=True)
            continue
        for shape, (heads, kv) in SHAPES.items():
            named = cases(args.slots, heads, kv, getattr(torch, name), args.caches)
            named["dot"] = Case(lambda: torch.dot(x, x[:]), x.nbytes)
            square = torch.randn(1024, 1024).to(getattr(torch, name))
            named["product"] = Case(lambda s=square: s @ s, 0)  # type: ignore[misc]
            times = medians(named, args.rounds)
            bandwidth, peak = x.nbytes / times.pop("dot"), 2 * 1024**3 / times.pop("product")
            for case, seconds in times.items():
                each, (_, nbytes, flops) = seconds / args.caches, named[case]
                row = {
                    "case": case,
                    "shape": shape,
                    "dtype": name,
                    "threads": args.threads,
                    "slots": args.slots,
                    "milliseconds": round(1e3 * each, 3),
                    "speedup": round(times["sdpa"] / seconds, 2),
                    "of_bandwidth": round(nbytes / each / bandwidth, 2),
                    "over_floor": round(each / max(nbytes / bandwidth, flops / peak), 2),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
