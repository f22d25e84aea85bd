"""How long the first compiled step of decoding takes, in a first process and in a second one.

    python benchmarks/compile.py [--layers 24] [--pairs 1] [--pairs 8]

A small Llama of random weights, with so many distinct pairs of ranks among its layers. `nested`
compiles layers of equal shapes once, as `Generator` does; `whole` compiles all layers as one graph.
Each runs in two processes, one after the other, that share an empty cache directory: the first is
cold, the second warm. One compile thread. Prints one line of JSON per process: seconds to the first
decoded token, how many of them in the compiler, and milliseconds of a later step.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory

import torch

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.steps import compile_seconds, decode_step
from eigenzoo.zoo.measure.shapes import random_model
from eigenzoo.zoo.models.llama import LlamaConfig
from eigenzoo.zoo.models.model import Model

STEPS = 64
WAYS = "nested", "whole"


def model(layers: int, pairs: int) -> Model:
    """A Llama whose layers cycle through `pairs` pairs of ranks, from (32, 96) on."""
    return install(
        random_model(
            LlamaConfig(
                vocab_size=256,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=32,
                k_heads_per_latent=4,
                v_heads_per_latent=4,
                k_ranks=tuple(32 + 8 * (i % pairs) for i in range(layers)),
                v_ranks=tuple(96 - 8 * (i % pairs) for i in range(layers)),
                anchor=16,
            ),
            torch.float32,
            "cpu",
        )
    )


def measure(layers: int, pairs: int, way: str) -> dict[str, float]:
    """Times of the first step of this process, and of the others."""
    generator = Generator(model(layers, pairs), 1, STEPS + 1, compile_prefill=False)
    if way == "whole":
        generator.decode = torch.compile(decode_step, fullgraph=True)
    times = []
    for slot in range(STEPS + 1):
        start = time.perf_counter()
        generator.advance(torch.tensor([[7]]), slot)
        times.append(time.perf_counter() - start)
    return {
        "first_seconds": round(times[0], 2),
        "compile_seconds": round(compile_seconds(), 2),
        "step_milliseconds": round(1e3 * median(times[1:]), 2),
    }


def main() -> None:
    """Measure each way in processes of its own, or, with --way, one way in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, action="append")
    parser.add_argument("--way", choices=WAYS, help="measure here and now")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.layers, args.pairs[0], args.way)))
        return
    for pairs in args.pairs or [1, 8]:
        for way in WAYS:
            words = ["--layers", args.layers, "--pairs", pairs, "--way", way]
            with TemporaryDirectory() as folder:
                for start in ("cold", "warm"):
                    done = subprocess.run(
                        [sys.executable, __file__, *map(str, words)],
                        env=os.environ
                        | {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
                        stdout=subprocess.PIPE,
                        check=True,
                    )
                    row = {"pairs": pairs, "way": way, "start": start} | json.loads(done.stdout)
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
