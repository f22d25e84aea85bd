"""Decoding speed with drafts and without, in turns in one run.

    python benchmarks/speculative.py MODEL [--draft MODEL] [--lookup 3] [--lookup 7] [--threads 1]

MODEL is asked to repeat a text, and to write one. Each way of drafting answers in every round;
decoding is compiled unless --no-compile is given, with the fused ops, in the dtype of `eigenzoo
generate`. Prints a line of JSON
for each prompt and way: median tokens per second over the rounds, their ratio to decoding without
drafts, the share of drafted tokens that was accepted, and whether the tokens were the same (in
bfloat16 they may differ where two are almost equally likely).
"""

import argparse
import json
from statistics import median

import torch

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode_prompt
from eigenzoo.zoo.inference.generate import Generator, answer, fastest_dtype
from eigenzoo.zoo.inference.speculative import Draft, DraftModel, Lookup

TEXT = """def total(prices, taxes):
    result = 0
    for price in prices:
        result = result + price
    for tax in taxes:
        result = result + tax
    return result

def mean(prices, taxes):
    count = len(prices)
    if count == 0:
        return 0
    return total(prices, taxes) / count
"""
PROMPTS = {
    "repeat": f"Repeat this code without any change:\n\n```python\n{TEXT}```",
    "write": "Write a short story about a lighthouse keeper and her brother.",
}


def main() -> None:
    """Load, compile, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model, which drafts 3 tokens")
    parser.add_argument("--lookup", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    dtype = fastest_dtype(torch.device("cpu"))
    model, tokenizer, *_ = load(args.model, dtype)
    known = model.config.vocab_size
    prompts = {name: encode_prompt(tokenizer, x, None, known) for name, x in PROMPTS.items()}
    slots = max(map(len, prompts.values())) + args.tokens
    ways: dict[str, Draft | None] = {"none": None}
    ways |= {f"lookup {n}": Lookup(n) for n in args.lookup or [3, 7]}
    if args.draft:
        small = install(load(args.draft, dtype).model)
        ways["draft model"] = DraftModel(Generator(small, 1, slots, args.compile, False), 3)
    generator = Generator(install(model), 1, slots, args.compile, False)
    for draft in ways.values():  # compile
        list(generator.stream([[1] * 8], 2 + (draft.tokens if draft else 1), draft=draft))
    for name, prompt in prompts.items():
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        texts = {}
        for _ in range(args.rounds):
            for way, draft in ways.items():
                done = answer(generator, [prompt], args.tokens, draft=draft)
                speeds[way].append(done.tokens_per_second or 0)
                texts[way] = done.tokens[0]
        for way, draft in ways.items():
            row = {
                "prompt": name,
                "prompt_tokens": len(prompt),
                "drafts": way,
                "tokens_per_second": round(median(speeds[way]), 1),
                "speedup": round(median(speeds[way]) / median(speeds["none"]), 2),
                "accepted": draft and round(draft.accepted / max(1, draft.proposed), 2),
                "same": texts[way] == texts["none"],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
