"""Speed of the fused ops on a GPU: `python -m eigenzoo.kernels.bench`.

Attention of one layer for one new token, compared with full rank, SDPA and flex_attention. Each
line ends with the bandwidth reached, as a share of the bandwidth at which a sum reads memory. Calls
are replayed from a CUDA graph and take turns on caches that together exceed the L2 cache several
times.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from ..zoo.models.bits import parse_segments
from ..zoo.models.cache import Buffer
from ..zoo.models.packing import Latent, pack
from . import ops
from .install import register

ROTATION = 1 << 30  # bytes of all caches together: 20 times the L2 cache of an H100
BITS = (16, 8, 4, 2)
MIXED = "16x8+48x4+32x2", "64x4+32x2"  # segments of keys and of values, of rank 96
RANKS = ((64, 64), (64, 96), (80, 80), (96, 96), (112, 112))


def seconds(calls: list[Callable[[], object]], rounds: int = 20) -> float:
    """Median seconds per call, where all of `calls` are replayed one after another."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times) / len(calls)


def read_bandwidth(size: int = 1 << 32) -> float:
    """Bytes per second at which a sum reads `size` bytes."""
    x = torch.randn(size // 4, device="cuda")
    return size / seconds([x.sum])


def caches(batch: int, slots: int, k: Latent, v: Latent) -> tuple[list[tuple[Buffer, Buffer]], int]:
    """Random pairs of keys and values, and the bytes of one pair.

    At least two pairs; ROTATION bytes in total.
    """
    size = batch * slots * sum(x.nbytes(torch.bfloat16) for x in (k, v))

    def one(latent: Latent) -> Buffer:
        shape = batch, latent.heads, slots, latent.width
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        return pack(x, latent) if latent.segments else x

    return [(one(k), one(v)) for _ in range(max(2, ROTATION // size))], size


def main() -> None:
    """Print one line per implementation and shape."""
    parser = argparse.ArgumentParser(prog="python -m eigenzoo.kernels.bench", description=__doc__)
    for name, value in (("batch", 8), ("slots", 8192), ("heads", 32), ("kv-heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that torch can use, and there is none")
    register("cuda")
    b, h, g, s = given.batch, given.heads, given.kv_heads, given.slots
    span = torch.tensor([[0, s]], device="cuda")
    bandwidth, flex = read_bandwidth(), torch.compile(flex_attention)
    print(f"{torch.cuda.get_device_name()}, a sum reads {bandwidth / 1e9:.0f} GB/s")
    full = 0.0

    def report(name: str, kept: str, k: Latent, v: Latent, call: Callable[..., object]) -> None:
        nonlocal full
        q = torch.randn(b, h, 1, k.width, dtype=torch.bfloat16, device="cuda")
        pairs, size = caches(b, s, k, v)
        time = seconds([partial(call, q, *pair) for pair in pairs])
        full = full or time
        share = size / time / bandwidth
        print(
            f"{name:14} {k.width:3}/{v.width:3} {kept:7} {1e6 * time:8.1f} us {full / time:5.2f}x "
            f"{share:5.0%}"
        )

    with torch.inference_mode():
        whole = Latent(g, 128)
        sdpa = partial(F.scaled_dot_product_attention, enable_gqa=h > g)
        report("SDPA", "16 bits", whole, whole, sdpa)
        report("flex_attention", "16 bits", whole, whole, partial(flex, enable_gqa=h > g))
        fused = partial(ops.latent_decode, span=span, scale=128**-0.5)
        for bits in BITS:
            for rk, rv in ((128, 128), *RANKS):
                k, v = (Latent(g, rank).rounded(bits) for rank in (rk, rv))
                report("latent_decode", f"{bits:2} bits", k, v, fused)
        k, v = (Latent(g, 96, parse_segments(text)) for text in MIXED)
        report("latent_decode", "mixed", k, v, fused)


if __name__ == "__main__":
    main()
