"""Prompts of whole models on this CPU: a compressed one beside the uncompressed one.

    python benchmarks/whole_prompts.py DENSE LOW [--tokens 2048] [--tokens 8192] [--compile]

Both models, with the fused ops, process random tokens in turns; medians. Prints one line of JSON a
length: seconds of both, and the speed of LOW over DENSE.
"""

import argparse
import json
import time
from statistics import median

import torch

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.generate import Generator


def main() -> None:
    """Measure every length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", metavar="DENSE")
    parser.add_argument("low", metavar="LOW")
    parser.add_argument("--tokens", type=int, action="append", help="of a prompt; else 2048")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile, before the first round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    models = [install(load(source, dtype).model) for source in (args.dense, args.low)]
    for count in args.tokens or [2048]:
        tokens = torch.randint(models[0].config.vocab_size, (1, count))
        # a slot more than the prompt has, as an answer needs
        generators = [Generator(model, 1, count + 1, compile=args.compile) for model in models]
        times: list[list[float]] = [[], []]
        for turn in range(args.rounds + 1):
            for generator, seconds in zip(generators, times, strict=True):
                start = time.perf_counter()
                generator.advance(tokens, 0)
                if turn:  # the first warms up
                    seconds.append(time.perf_counter() - start)
        dense, low = map(median, times)
        row = {"tokens": count, "dtype": args.dtype, "compiled": args.compile}
        row |= {"dense_seconds": dense, "low_seconds": low, "speedup": dense / low}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
