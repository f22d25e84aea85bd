"""How long the first compiled step of decoding takes, in a first process and in a second one.

    python benchmarks/compile.py [--layers 24] [--pairs 1] [--pairs 8]
    python benchmarks/compile.py --layers 6 --segments
    python benchmarks/compile.py --source OUT

A checkpoint; or random weights: a small Llama with so many distinct pairs of ranks among its
layers, or layers of SmolLM2's shape that all have segments of their own. `nested` compiles layers
of equal shapes once, as `Generator` does; `whole` compiles all layers as one graph.
Each runs in two processes, one after the other, that share an empty cache directory: the first is
cold, the second warm. One compile thread, unless --threads says otherwise. Prints one line of JSON
per process: seconds from its start to the first token, which a prompt of 16 tokens gives; of the
first step of decoding, and how many of them in the compiler; seconds of the processor that this
step took in Python and in the C++ compiler; and milliseconds of a later step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median
from tempfile import TemporaryDirectory

import torch

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load, native_config
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.steps import compile_seconds, decode_step
from eigenzoo.zoo.measure.shapes import random_model, shaped
from eigenzoo.zoo.models.bits import parse_segments
from eigenzoo.zoo.models.llama import LlamaConfig
from eigenzoo.zoo.models.model import Model

STEPS, PROMPT = 64, 16
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


def segmented(layers: int) -> Model:
    """Layers of SmolLM2's shape, up to 24 of which differ in their segments."""

    def text(i: int) -> str:
        widths = 8 + 8 * (i % 3), 40 + 8 * (i % 5), 48 + 8 * (i * 7 % 4), 16 + 8 * (i // 12)
        return "+".join(f"{n}x{bits}" for n, bits in zip(widths, (8, 4, 3, 2), strict=True))

    segments = tuple(text(i) for i in range(layers))
    ranks = tuple(sum(s.width for s in parse_segments(text)) for text in segments)
    dense = native_config(shaped("smollm2-135m", layers, 0).to_dict())
    fields = {f"{side}_ranks": ranks for side in "kv"} | {f"{x}_segments": segments for x in "kv"}
    config = replace(
        dense, k_heads_per_latent=3, v_heads_per_latent=3, anchor=16, centered=True, **fields
    )
    return install(random_model(config, torch.float32, "cpu"))


def processor_seconds() -> tuple[float, float]:
    """Of this process, and of those that it started and waited for."""
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime


def measure(model: Model, way: str, began: float) -> dict[str, float]:
    """Times of the first tokens and steps of this process. began: when it did, by the clock."""
    generator = Generator(model, 1, PROMPT + STEPS + 1, compile_prefill=False)
    if way == "whole":
        generator.decode = torch.compile(decode_step, fullgraph=True)
    generator.advance(torch.full((1, PROMPT), 7), 0)
    first_token, before, times = time.time() - began, processor_seconds(), []
    for slot in range(PROMPT, PROMPT + STEPS + 1):
        start = time.perf_counter()
        generator.advance(torch.tensor([[7]]), slot)
        times.append(time.perf_counter() - start)
        if slot == PROMPT:
            took = [b - a for a, b in zip(before, processor_seconds(), strict=True)]
    return {
        "token_seconds": round(first_token, 2),
        "first_seconds": round(times[0], 2),
        "compile_seconds": round(compile_seconds(), 2),
        "python_seconds": round(took[0], 1),
        "cpp_seconds": round(took[1], 1),
        "step_milliseconds": round(1e3 * median(times[1:]), 2),
    }


def main() -> None:
    """Measure each way in processes of its own, or, with --way, one way in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, action="append")
    parser.add_argument("--source", help="a checkpoint, only as `nested`")
    parser.add_argument("--segments", action="store_true", help="only as `nested`")
    parser.add_argument("--threads", default="1", help="of the compiler")
    parser.add_argument("--way", choices=WAYS, help="measure here and now")
    parser.add_argument("--began", type=float, help="with --way: when the process did")
    args = parser.parse_args()
    if args.way:
        if args.source:
            measured = install(load(args.source).model)
        elif args.segments:
            measured = segmented(args.layers)
        else:
            measured = model(args.layers, args.pairs[0])
        print(json.dumps(measure(measured, args.way, args.began)))
        return
    other = ["--source", args.source] if args.source else ["--segments"] * args.segments
    for pairs in [0] if other else args.pairs or [1, 8]:
        for way in WAYS[:1] if other else WAYS:
            words = ["--layers", args.layers, "--pairs", pairs, "--way", way, *other]
            about = {"model": " ".join(other)} if other else {"pairs": pairs}
            with TemporaryDirectory() as folder:
                for start in ("cold", "warm"):
                    done = subprocess.run(
                        [sys.executable, __file__, *map(str, words), "--began", str(time.time())],
                        env=os.environ
                        | {
                            "TORCHINDUCTOR_CACHE_DIR": folder,
                            "TORCHINDUCTOR_COMPILE_THREADS": args.threads,
                        },
                        stdout=subprocess.PIPE,
                        check=True,
                    )
                    row = about | {"way": way, "start": start} | json.loads(done.stdout)
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
