"""Decode speed of the models in a sweep's file, measured in turns in one run.

    python benchmarks/rows.py MODEL ROWS.jsonl [--context 2048] [--context 8192]

MODEL is what the sweep compressed. Weights are random, in the shapes that follow from the ranks of
the rows: they decode as fast as the compressed models. Attention uses the fused ops; nothing is
compiled. Prints a line of JSON for every model and context.
"""

import argparse
import json
from pathlib import Path

from eigenzoo.kernels.install import install
from eigenzoo.zoo.compression.allocate import Ranks
from eigenzoo.zoo.compression.fold import low_config
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.measure.evaluate import decode_speed
from eigenzoo.zoo.measure.shapes import random_model
from eigenzoo.zoo.measure.sweep_table import label
from eigenzoo.zoo.models.config import Config
from eigenzoo.zoo.utils.jsonl import SWEEP, read_rows
from eigenzoo.zoo.utils.records import CompressedRow, DenseRow


def shape(config: Config, row: DenseRow | CompressedRow) -> Config:
    """The config of a row's model. config: that of the dense model."""
    if row["settings"] is None:
        return config
    settings = Settings(**row["fitted"])
    ranks = Ranks(tuple(row["k_ranks"]), tuple(row["v_ranks"]))
    joint = settings.latent == "joint-kv"
    return low_config(
        config, ranks, tuple(settings.heads_per_latent), joint, **settings.rotary(config)
    )


def main() -> None:
    """Build, install, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()

    model = load(args.model).model
    rows = [row for row in read_rows(args.rows, SWEEP) if "refused" not in row]
    models = [
        install(random_model(shape(model.config, row), model.dtype, model.device)) for row in rows
    ]
    for context in args.context or [2048]:
        generators = [Generator(m, args.batch, context, compile=False) for m in models]
        speeds = decode_speed(generators)
        for row, generator, speed in zip(rows, generators, speeds, strict=True):
            speed_row = {
                "model": "dense" if row["settings"] is None else label(row),
                "context": context,
                "batch": args.batch,
                "tokens_per_second": speed,
                "speedup": speed / speeds[0],  # a sweep's first row is of the dense model
                "cache_bytes": generator.cache.nbytes,
            }
            print(json.dumps(speed_row), flush=True)


if __name__ == "__main__":
    main()
