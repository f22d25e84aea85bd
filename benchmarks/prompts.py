"""Attention of a prompt on this CPU, with the mask as a matrix and without a matrix.

    python benchmarks/prompts.py [--threads 1] [--slots 8192] [--dtype float32] [--dtype bfloat16]

`latent_attention` with its mask as a matrix of tokens and slots, and with the same mask as a
`CausalMask`, in turns; medians. Prints one line of JSON per case: milliseconds of both, not
counting the matrix, which is made once for all layers, and its MiB.
"""

import argparse
import json
import time
from statistics import median

import torch
from torch import Tensor

from eigenzoo.zoo.models.attention import latent_attention
from eigenzoo.zoo.models.mask import CausalMask, Mask, alibi_slopes, causal_matrix

WIDTHS = ((80, 80), (64, 96))


def matrix(seen: CausalMask, new: int, slots: int, heads: int, dtype: torch.dtype) -> Tensor:
    """The mask that `CausalMask` describes, as SDPA takes it: with ALiBi one matrix per head."""
    mask = causal_matrix(torch.arange(slots - new, slots), slots, seen.valid)
    if seen.slopes is None or seen.position is None:
        return mask
    ahead = seen.position[:, None] - seen.position[:, -new:, None]
    bias = (seen.slopes[:, None, None] * ahead[:, None]).to(dtype)
    return bias.masked_fill_(~mask, -torch.inf)


def main() -> None:
    """Measure every case in every dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--part", type=int, default=2048, help="tokens of a prompt's later part")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    slots, heads = args.slots, args.heads
    position, slopes = torch.arange(slots)[None], alibi_slopes(heads)
    cases = {
        "plain": CausalMask(),
        "padded": CausalMask(position >= 8),
        "ALiBi": CausalMask(None, position, slopes),
    }
    for name in args.dtype or ["float32"]:
        dtype = getattr(torch, name)
        for rk, rv in WIDTHS:
            for case, seen in cases.items():
                for new in (slots, args.part):
                    shapes = (new, rk), (slots, rk), (slots, rv)
                    inputs = tuple(torch.randn(1, heads, *shape).to(dtype) for shape in shapes)
                    whole = matrix(seen, new, slots, heads, dtype)
                    masks: dict[str, Mask] = {"matrix": whole, "causal": seen}
                    times: dict[str, list[float]] = {k: [] for k in masks}
                    for _ in range(args.rounds):
                        for kind, mask in masks.items():
                            start = time.perf_counter()
                            latent_attention(*inputs, mask, 0.125)
                            times[kind].append(1e3 * (time.perf_counter() - start))
                    row = {"case": case, "tokens": new, "slots": slots, "ranks": [rk, rv]}
                    row |= {"dtype": name, "heads": heads, "threads": args.threads}
                    row["matrix_mib"] = whole.nbytes >> 20
                    row |= {f"{k}_milliseconds": round(median(t), 1) for k, t in times.items()}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
