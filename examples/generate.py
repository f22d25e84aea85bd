"""Generate with a dense or compressed checkpoint: compiled, with fused ops, streaming tokens.

    python examples/generate.py OUT "Once upon a time" "The capital of France is"

Several prompts form a batch, padded on the left; each gets the same answer as alone.
"""

import argparse

import torch
from transformers import TextStreamer

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load, stop_tokens
from eigenzoo.zoo.inference.generate import Generator, fastest_dtype


def main() -> None:
    """Load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder, GGUF file or Hub id")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    checkpoint = load(args.source, fastest_dtype(torch.device("cpu")))
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    install(model)  # decode with fused ops instead of their definitions in PyTorch
    ids = [tokenizer(prompt)["input_ids"] for prompt in args.prompts]
    slots = max(map(len, ids)) + args.max_new_tokens  # the cache is allocated once, with this size
    generator = Generator(
        model, len(ids), slots, compile_prefill=False
    )  # decoding compiles at the first step

    stop, rows = stop_tokens(checkpoint), [[] for _ in ids]
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # waits for whole characters
    for tokens in generator.stream(ids, args.max_new_tokens, stop=stop):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        if len(ids) == 1:  # the answers of several would be mixed
            streamer.put(tokens)
    if len(ids) == 1:
        streamer.end()
        return
    for prompt, row in zip(args.prompts, rows, strict=True):
        print(f"{prompt}{tokenizer.decode(row, skip_special_tokens=True)}\n")


if __name__ == "__main__":
    main()
