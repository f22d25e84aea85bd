"""Linear layers of few rows on this CPU: at what share of the bandwidth they read their weights.

    python benchmarks/linear.py [--threads 1] [--rows 1 --rows 8] [--dtype bfloat16] [--autotune]

The matrix product of PyTorch's library, the loop that torch.compile makes of `linear_decode`, the
fused op, and the op on int8 weights, which take half or a quarter of the bytes. With --autotune,
which takes minutes, also the best of torch.compile's own templates on packed weights. In turns,
over more weights than any cache holds; medians. Prints one line of JSON per case.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigenzoo.kernels import cpu, ops
from eigenzoo.zoo.measure.bench import read_bandwidth
from eigenzoo.zoo.models.linear import linear_decode

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))  # (out, in)
AUTOTUNE = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
Product = Callable[[Tensor], object]


class Frozen(nn.Module):
    """Products with constant weights, which `freezing` packs."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w, False) for w in weights])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x, w) for w in self.weights]


def all_of(product: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor], x: Tensor) -> None:
    for w in weights:
        product(x, w)


def contestants(weights: list[Tensor], autotune: bool) -> dict[str, tuple[int, Product]]:
    """By name: bytes of a weight, and all the products of x."""
    scale = torch.ones(weights[0].size(0))
    light = [w.to(torch.int8) for w in weights]
    loop = torch.compile(lambda x, w: linear_decode(x, w, None, None), fullgraph=True)
    size = weights[0].itemsize
    products: dict[str, tuple[int, Product]] = {
        "library": (size, partial(all_of, F.linear, weights)),
        "loop": (size, partial(all_of, loop, weights)),
        "fused": (size, partial(all_of, lambda x, w: ops.linear_decode(x, w, None, None), weights)),
        "int8": (1, partial(all_of, lambda x, w: ops.linear_decode(x, w, scale, None), light)),
    }
    if autotune:
        frozen = torch.compile(Frozen(weights).eval(), fullgraph=True, options=AUTOTUNE)
        products["autotuned"] = (size, frozen)
    return products


@torch.inference_mode()
def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, action="append", help="sequences; repeat for more")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--mib", type=int, default=256, help="weights of a shape together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--autotune", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cpu.load()
    bandwidth = read_bandwidth(torch.device("cpu"))
    for name in args.dtype or ["bfloat16"]:
        dtype = getattr(torch, name)
        for shape in SHAPES:
            numbers = math.prod(shape)
            count = max(1, (args.mib << 20) // (numbers * dtype.itemsize))
            weights = [torch.randn(shape).to(dtype) for _ in range(count)]
            for rows in args.rows or [1, 2, 4, 8, 16]:
                torch._dynamo.reset()
                x = torch.randn(rows, 1, shape[1]).to(dtype)
                cases = contestants(weights, args.autotune)
                times: dict[str, list[float]] = {case: [] for case in cases}
                for _ in range(args.rounds + 2):
                    for case, (_size, run) in cases.items():
                        start = time.perf_counter()
                        run(x)
                        times[case].append(time.perf_counter() - start)
                for case, (size, _run) in cases.items():
                    seconds = median(times[case][2:]) / count
                    row = {
                        "case": case,
                        "dtype": name,
                        "out": shape[0],
                        "in": shape[1],
                        "rows": rows,
                        "threads": args.threads,
                        "milliseconds": seconds * 1e3,
                        "of_bandwidth": numbers * size / seconds / bandwidth,
                    }
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
