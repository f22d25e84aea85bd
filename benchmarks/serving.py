"""A compressed checkpoint beside the uncompressed model, both served by vLLM in the same memory.

    python benchmarks/serving.py DENSE LOW [--rounds 3] [--requests 64] [--threads 2]

Both engines live in one process and take turns. First steps: `batch` texts of `--context` tokens
each decode some tokens; milliseconds a step, medians. Then load: `--requests` prompts of `--prompt`
random tokens arrive at once, and each gets `--new` tokens, with a cache that holds `--sequences` of
them uncompressed; LOW has as many bytes, so more slots. Prints a line of JSON a measurement, of
every model and round, and at the end the table: the medians of the rounds, and LOW over DENSE.

DENSE is a folder that transformers can load; vLLM runs it with its own attention.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: turns cannot overlap
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from rich.console import Console
from rich.table import Table
from vllm import LLM, SamplingParams

from eigenzoo.zoo.inference.checkpoint import inspect

Row = dict[str, float]


class Served:
    """An engine, and the times at which it gives tokens."""

    def __init__(self, source: str, pages: int, args: argparse.Namespace):
        self.llm = LLM(
            source,
            dtype=args.dtype,
            block_size=args.page,
            num_gpu_blocks_override=pages + 1,  # one is vLLM's own
            max_model_len=max(args.context + args.steps, args.prompt + args.new) + 1,
            max_num_seqs=args.requests,
            enable_prefix_caching=False,
            enforce_eager=args.eager,
            disable_log_stats=False,
            distributed_executor_backend="uni",
        )
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def times(self, count: int, length: int, new: int, seed: int) -> dict[str, list[float]]:
        """Seconds from the start to every token of `count` random prompts, by request."""
        engine, random = self.llm.llm_engine, torch.Generator().manual_seed(seed)
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        for i in range(count):
            prompt = torch.randint(self.vocabulary, (length,), generator=random).tolist()
            engine.add_request(str(i), {"prompt_token_ids": prompt}, how)
        found: dict[str, list[float]] = {str(i): [] for i in range(count)}
        start = time.perf_counter()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for x in outputs:
                more = len(x.outputs[0].token_ids) - len(found[x.request_id])
                found[x.request_id] += [now] * more
        return found

    def preemptions(self) -> int:
        """How many there were so far, in all engines of this process."""
        names = {x.name: getattr(x, "value", 0) for x in self.llm.get_metrics()}
        return int(names.get("vllm:num_preemptions", 0))

    def step(self, batch: int, args: argparse.Namespace, seed: int) -> Row:
        """A decoding step of so many texts."""
        found = self.times(batch, args.context, args.steps, seed)
        begun = max(times[0] for times in found.values())
        after = sorted({t for times in found.values() for t in times if t >= begun})
        return {"ms": 1e3 * median(b - a for a, b in pairwise(after))}

    def load(self, args: argparse.Namespace, seed: int) -> Row:
        """Many requests at once."""
        before = self.preemptions()
        found = self.times(args.requests, args.prompt, args.new, seed)
        whole = max(times[-1] for times in found.values())
        gaps = [b - a for times in found.values() for a, b in pairwise(times)]
        return {
            "requests/s": len(found) / whole,
            "tokens/s": sum(map(len, found.values())) / whole,
            **spread("first token, s", [times[0] for times in found.values()]),
            **spread("between tokens, s", gaps),
            "preemptions": self.preemptions() - before,
        }


def spread(name: str, values: list[float]) -> Row:
    """The median and the 99th percentile."""
    return {f"{name}, p50": median(values), f"{name}, p99": quantiles(values, n=100)[98]}


def measured(engines: Mapping[str, Served], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of every measurement, model and round."""
    for turn in range(-1, args.rounds):  # the first warms up
        for name, engine in engines.items():
            for batch in args.batch:
                row = engine.step(batch, args, 1000 + turn)
                if turn >= 0:
                    yield {"model": name, "round": turn, "case": f"step of {batch}", **row}
            if turn >= 0:
                yield {"model": name, "round": turn, "case": "load", **engine.load(args, turn)}


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    """The table of medians."""
    table = Table("", *names, f"{names[1]} / {names[0]}")
    about = ("model", "round", "case")
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        for field in (f for f in of_case[0] if f not in about):
            one, other = (
                median(row[field] for row in of_case if row["model"] == name) for name in names
            )
            ratio = f"{other / one:.2f}" if one else "-"
            table.add_row(f"{case}: {field}", f"{one:.4g}", f"{other:.4g}", ratio)
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", metavar="DENSE")
    parser.add_argument("low", metavar="LOW")
    for name, value in {
        "rounds": 3,
        "requests": 64,
        "prompt": 512,
        "new": 128,
        "sequences": 8,
        "context": 900,
        "steps": 32,
        "page": 128,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, action="append", help="of steps; else 1 and 8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    args.batch = args.batch or [1, 8]

    torch.set_num_threads(args.threads)
    dense = args.sequences * -(-(args.prompt + args.new) // args.page)
    pages = {args.dense: dense, args.low: int(dense / inspect(args.low)["kv_share"])}
    engines = {name: Served(name, count, args) for name, count in pages.items()}
    rows = []
    for row in measured(engines, args):
        rows.append(row)
        print(json.dumps(row), flush=True)
    show(rows, [args.dense, args.low])


if __name__ == "__main__":
    main()
