"""Memory that reading a checkpoint takes at most, beside the model's own.

    python benchmarks/reading.py MODEL [--dtype bfloat16]

Prints a line of JSON: bytes of the weights as they are held; the peak of the process while
`load` reads them, above what it holds when the libraries and the tokenizer are loaded; and the
ratio of the two.
"""

import argparse
import json

import psutil
import torch

from eigenzoo.zoo.inference.checkpoint import load, vocabulary
from eigenzoo.zoo.utils.memory import peak, reset_peak
from eigenzoo.zoo.utils.provenance import device_name, versions

CPU = torch.device("cpu")


def main() -> None:
    """Read, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype")
    args = parser.parse_args()

    vocabulary(args.model)
    before = psutil.Process().memory_info().rss
    reset_peak(CPU)
    model = load(args.model, getattr(torch, args.dtype) if args.dtype else None).model
    most = peak(CPU) - before
    held = sum(x.nbytes for x in {x.data_ptr(): x for x in model.parameters()}.values())
    row = {"dtype": str(model.dtype), "held_bytes": held, "peak_bytes": most, "ratio": most / held}
    print(json.dumps({**row, "device": device_name(CPU), **versions()}))


if __name__ == "__main__":
    main()
