"""Which calibration carries over: perplexity on several domains after each.

    python benchmarks/mixtures.py MODEL --calibration self --calibration mixed \\
        --calibration self:2,help,source [--keep 0.25 --keep 0.16] [--kv-bits auto] [--domain FILE]

Domains are Python's own help and the source of its modules, those parts of both that are never
calibrated on, and the files that are given. The first row is of the uncompressed model; increases
are in % over it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.zoo.cli.values import parse_bits
from eigenzoo.zoo.compression.compress import compress, gather
from eigenzoo.zoo.compression.moments import Needs, Statistics
from eigenzoo.zoo.compression.settings import Settings, needs
from eigenzoo.zoo.inference.checkpoint import Checkpoint, load
from eigenzoo.zoo.inference.data import calibration_text, encode
from eigenzoo.zoo.inference.perplexity import perplexity
from eigenzoo.zoo.inference.python_texts import python_help, python_source
from eigenzoo.zoo.inference.source_texts import check_source
from eigenzoo.zoo.inference.texts import Text, read_text
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.models.model import Model


def domains(files: list[Path]) -> dict[str, Text]:
    """Texts to measure on, by name."""
    texts = {
        "help": Text("Python's own help", [python_help(held_out=True)]),
        "source": Text("the source of Python's modules", [python_source(held_out=True)]),
    }
    return texts | {path.stem: read_text(path) for path in files}


def quality(model: Model, texts: Mapping[str, Tensor], windows: int, window: int) -> dict[str, Any]:
    """Perplexity by domain, and the share of the KV bytes."""
    measured = {x: perplexity(model, tokens, window, windows) for x, tokens in texts.items()}
    share = kv_bytes(model.config)["kv_share"]
    return {"share": share, "perplexity": {x: p.perplexity for x, p in measured.items()}}


def compared(
    original: Checkpoint,
    texts: Mapping[str, Tensor],
    settings: Sequence[Settings],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """A row of the uncompressed model, and one for every calibration and share.

    settings: they differ in `keep` and in what follows from it.
    """
    model, tokenizer = original.model, original.tokenizer
    size = args.windows, args.window
    dense = quality(model, texts, *size)
    yield {"calibration": None, **dense}
    for asked in args.calibration:
        rows = calibration_text(asked, model, tokenizer, args.samples, args.seq_len, args.seed)
        told = {"calibration": asked, "sources": rows.told(len(rows.tokens))}
        seen: dict[Needs, list[Statistics]] = {}
        for choice in settings:
            fitted = choice.fit(model.config)
            need = needs(fitted, model.config)
            seen[need] = seen.get(need) or gather(model, rows.tokens, fitted)
            row = quality(compress(model, rows.tokens, choice, seen[need]).model, texts, *size)
            over = dense["perplexity"]
            increase = {x: 100 * (p / over[x] - 1) for x, p in row["perplexity"].items()}
            mean, worst = sum(increase.values()) / len(increase), max(increase.values())
            yield {**told, **row, "increase": increase, "mean": mean, "worst": worst}


def main() -> None:
    """Measure and print, a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True, help="repeat for more")
    parser.add_argument("--domain", type=Path, action="append", default=[], help="repeat for more")
    parser.add_argument("--keep", type=float, action="append", help="repeat for more; else 0.25")
    parser.add_argument("--kv-bits", type=parse_bits, default="auto")
    parser.add_argument("--anchor-block", type=int, help="else the default of each share")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for calibration in args.calibration:
        check_source(calibration, args.samples)
    words = domains(args.domain)
    original = load(args.model, torch.float32)
    settings = [
        Settings(keep=keep, kv_bits=args.kv_bits, anchor_block=args.anchor_block)
        for keep in args.keep or [0.25]
    ]
    known = original.model.config.vocab_size
    texts = {x: encode(original.tokenizer, text, known) for x, text in words.items()}
    for row in compared(original, texts, settings, args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
