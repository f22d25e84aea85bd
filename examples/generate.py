"""Generate with a checkpoint, dense or compressed: compiled, with fused attention, as a stream.

    python examples/generate.py OUT "Once upon a time" "The capital of France is"

Several prompts make a batch, padded on the left: each is answered as it would be alone.
"""

import argparse

import torch
from transformers import TextStreamer

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load, stop_tokens
from eigenzoo.zoo.inference.generate import Generator, fastest_dtype


def main() -> None:
    """Load, compile, print token after token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder, GGUF file or Hub id")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    checkpoint = load(args.source, fastest_dtype(torch.device("cpu")))
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    install(model)  # attention over the cache by the fused ops, instead of their definitions
    ids = [tokenizer(prompt)["input_ids"] for prompt in args.prompts]
    slots = max(map(len, ids)) + args.max_new_tokens  # the cache is allocated once, and no larger
    generator = Generator(model, len(ids), slots, compile_prefill=False)  # compiled at first use

    stop, rows = stop_tokens(checkpoint), [[] for _ in ids]
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # waits for whole characters
    for tokens in generator.stream(ids, args.max_new_tokens, stop=stop):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        if len(ids) == 1:  # several would run into one another
            streamer.put(tokens)
    if len(ids) == 1:
        streamer.end()
        return
    for prompt, row in zip(args.prompts, rows, strict=True):
        print(f"{prompt}{tokenizer.decode(row, skip_special_tokens=True)}\n")


if __name__ == "__main__":
    main()
