"""How long the first compiled step of decoding takes, in a first process and in a second one.

    python benchmarks/compile.py [--layers 24] [--pairs 1] [--pairs 8]
    python benchmarks/compile.py --source OUT

A checkpoint, or a small Llama of random weights, with so many distinct pairs of ranks among its
layers. `nested` compiles layers of equal shapes once, as `Generator` does; `whole` compiles all
layers as one graph.
Each runs in two processes, one after the other, that share an empty cache directory: the first is
cold, the second warm. One compile thread, unless --threads says otherwise. Prints one line of JSON
per process: seconds from its start to the first token, which a prompt of 16 tokens gives; of the
first step of decoding, and how many of them in the compiler; milliseconds of a later step; and
seconds of the processor that all took, compilers included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory

import torch

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.steps import compile_seconds, decode_step
from eigenzoo.zoo.measure.shapes import random_model
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


def measure(model: Model, way: str, began: float) -> dict[str, float]:
    """Times of the first tokens and steps of this process. began: when it did, by the clock."""
    generator = Generator(model, 1, PROMPT + STEPS + 1, compile_prefill=False)
    if way == "whole":
        generator.decode = torch.compile(decode_step, fullgraph=True)
    generator.advance(torch.full((1, PROMPT), 7), 0)
    first_token, times = time.time() - began, []
    for slot in range(PROMPT, PROMPT + STEPS + 1):
        start = time.perf_counter()
        generator.advance(torch.tensor([[7]]), slot)
        times.append(time.perf_counter() - start)
    return {
        "token_seconds": round(first_token, 2),
        "first_seconds": round(times[0], 2),
        "compile_seconds": round(compile_seconds(), 2),
        "step_milliseconds": round(1e3 * median(times[1:]), 2),
    }


def main() -> None:
    """Measure each way in processes of its own, or, with --way, one way in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, action="append")
    parser.add_argument("--source", help="a checkpoint, only as `nested`")
    parser.add_argument("--threads", default="1", help="of the compiler")
    parser.add_argument("--way", choices=WAYS, help="measure here and now")
    parser.add_argument("--began", type=float, help="with --way: when the process did")
    args = parser.parse_args()
    if args.way:
        measured = install(load(args.source).model) if args.source else None
        print(
            json.dumps(measure(measured or model(args.layers, args.pairs[0]), args.way, args.began))
        )
        return
    for pairs in [0] if args.source else args.pairs or [1, 8]:
        for way in WAYS[:1] if args.source else WAYS:
            words = ["--layers", args.layers, "--pairs", pairs, "--way", way]
            words += ["--source", args.source] if args.source else []
            about = {"source": args.source} if args.source else {"pairs": pairs}
            with TemporaryDirectory() as folder:
                for start in ("cold", "warm"):
                    took = processor_seconds()
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
                    row["processor_seconds"] = round(processor_seconds() - took, 1)
                    print(json.dumps(row), flush=True)


def processor_seconds() -> float:
    """What the processes that this one started and waited for have taken, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
