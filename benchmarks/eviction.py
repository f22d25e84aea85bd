"""What is lost if a cache, compressed or not, keeps only some tokens of a prompt.

    python benchmarks/eviction.py MODEL --text FILE [--text FILE] [--keep 0.4 --keep 0.25 ...]
        [--calibration mixed] [--samples 16] [--seq-len 1024] [--anchor-block 16]
        [--share 0.5 ...] [--policy snapkv ...] [--length 2048] [--facts 2] [--prompts 2]

MODEL is measured as it is, and compressed to each share of the KV bytes, without a refit. Every
prompt is read, then all tokens are kept, or each policy keeps each share of them:

- snapkv: those that the last 16 tokens attend to most (`eigenzoo generate --keep-tokens`);
- recent: the first and the last ones of the prompt, each of which had read the whole prompt;
- sinks: a window that moves on, and the first ones (`--sliding-window`, `--sinks`; StreamingLLM,
  arXiv 2309.17453). Here a token of the prompt too attends only to what is kept.

Two measures, on every text: at five depths a fact is planted in a text of `--length` tokens, which
ends with a question about it (`eigenzoo evaluate --retrieval`), `--facts` of them at each depth;
and `--prompts` pieces of the text, of `--length` tokens, end with `--tail` tokens whose perplexity
is measured. Prints a line of JSON for each model, policy and share: the facts that greedy decoding
gives, mean log-likelihood of their tokens, perplexity of the ends, its increase in % over that
with all tokens of the same model and the standard error of that, and the bytes of the kept tokens
as a share of an uncompressed cache of all tokens.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenzoo.zoo.compression.compress import compress, gather
from eigenzoo.zoo.compression.moments import Needs, Statistics
from eigenzoo.zoo.compression.settings import Settings, needs
from eigenzoo.zoo.inference.checkpoint import Checkpoint, load
from eigenzoo.zoo.inference.data import calibration_text, encode
from eigenzoo.zoo.inference.evict import WINDOW, EvictingGenerator
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.source_texts import check_source
from eigenzoo.zoo.inference.texts import read_text
from eigenzoo.zoo.measure.probe import DEPTHS, Planted, plant, recall
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.models.model import Model

SINKS = 4


def recent(seen: Tensor) -> Tensor:
    """Weights (layers, T) by which the first and the last tokens stay."""
    weight = torch.arange(seen.size(1)).float().repeat(len(seen), 1)
    weight[:, :SINKS] = torch.inf
    return weight


Cell = tuple[str, float]  # a policy, and the share of tokens that it keeps
Losses = dict[Cell, list[tuple[float, bool, float]]]
ALL: Cell = "all", 1.0
# what a policy makes of the weights (layers, T) by which tokens stay; None: it reads by itself
POLICIES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "snapkv": lambda seen: seen,
    "recent": recent,
    "sinks": None,
}


def questions(tokenizer, texts: Sequence[Tensor], args: argparse.Namespace) -> Iterator[Planted]:
    """Texts with facts and questions, the same for every model."""
    for number, tokens in enumerate(texts):
        for depth in DEPTHS:
            random = Random(number)
            for _ in range(args.facts):
                yield plant(tokenizer, tokens.tolist(), args.length, depth, random)


def pieces(texts: Sequence[Tensor], args: argparse.Namespace) -> Iterator[Planted]:
    """Pieces of the texts, their ends as what is asked for."""
    for number, tokens in enumerate(texts):
        random = Random(number)
        for _ in range(args.prompts):
            start = random.randrange(len(tokens) - args.length)
            piece = tokens[start : start + args.length].tolist()
            yield Planted(piece[: -args.tail], piece[-args.tail :])


def losses(model: Model, each: Sequence[Planted], cells: Sequence[Cell]) -> Losses:
    """Of every prompt: the mean loss of what follows, whether greedy decoding gives that, and the
    share of tokens that were kept."""
    found: Losses = {cell: [] for cell in cells}
    for asked in each:
        count, new = len(asked.prompt), len(asked.answer)
        answer = torch.tensor([asked.answer])
        reader = EvictingGenerator(model, count + new, new, count, compile=False)
        read = reader.read(torch.tensor([asked.prompt]))
        for policy, share in cells:
            keep = max(round(share * count), WINDOW + reader.block)
            weigh = POLICIES.get(policy, POLICIES["snapkv"])
            if weigh is None:
                loss, right = within(model, asked, keep)
                found[policy, share].append((loss, right, keep / count))
                continue
            generator = EvictingGenerator(model, count + new, new, keep, compile=False)
            generator.take(read._replace(seen=weigh(read.seen)))
            logits = torch.cat((read.logits, generator.verify(answer[:, :-1], count))).float()
            loss = F.cross_entropy(logits, answer[0]).item()
            right = bool((logits.argmax(-1) == answer[0]).all())
            found[policy, share].append((loss, right, 1 - generator.dropped / count))
    return found


def within(model: Model, asked: Planted, keep: int) -> tuple[float, bool]:
    """Mean loss of an answer, and whether it is greedy, if a token attends to `keep` at most."""
    model.keep(keep - SINKS, SINKS)
    try:
        slots = len(asked.prompt) + len(asked.answer)
        right, score = recall(Generator(model, 1, slots, compile=False), asked)
    finally:
        model.keep(0)
    return -score, right


def row(model: Model, cell: Cell, facts: Losses, ends: Losses) -> dict[str, Any]:
    """What is printed of one policy and share."""
    (loss, whole) = (
        torch.tensor([x for x, *_ in ends[c]], dtype=torch.float64) for c in (cell, ALL)
    )
    kept = sum(x for *_, x in ends[cell]) / len(loss)
    more = loss - whole
    return {
        "policy": cell[0],
        "share": cell[1],
        "facts_found": sum(right for _, right, _ in facts[cell]),
        "facts": len(facts[cell]),
        "loglikelihood": round(-sum(x for x, *_ in facts[cell]) / len(facts[cell]), 3),
        "perplexity": round(loss.mean().exp().item(), 3),
        "increase_percent": round(100 * more.mean().expm1().item(), 2),
        "error_percent": round(100 * more.std().item() / len(more) ** 0.5, 2),
        "prompts": len(loss),
        "kv_share": round(kv_bytes(model.config)["kv_share"] * kept, 4),
    }


def models(args: argparse.Namespace, original: Checkpoint) -> Iterator[tuple[float, Model]]:
    """The model as it is (1.0), and at each share of the KV bytes."""
    model, tokenizer = original.model, original.tokenizer
    yield 1.0, model
    if not args.keep:
        return
    rows = calibration_text(args.calibration, model, tokenizer, args.samples, args.seq_len, 0)
    seen: dict[Needs, list[Statistics]] = {}
    for keep in args.keep:
        settings = Settings(keep=keep, anchor_block=args.anchor_block, refit=())
        fitted = settings.fit(model.config)
        need = needs(fitted, model.config)
        seen[need] = seen.get(need) or gather(model, rows.tokens, fitted)
        yield keep, compress(model, rows.tokens, settings, seen[need]).model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--keep", type=float, action="append", default=[], help="repeat for more")
    parser.add_argument("--calibration", default="mixed")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--anchor-block", type=int, help="else the default of each share")
    parser.add_argument("--share", type=float, action="append", help="by default 1/2, 1/4 and 1/8")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="by default all")
    parser.add_argument("--length", type=int, default=2048, help="tokens of prompt and end")
    parser.add_argument("--facts", type=int, default=2, help="for each depth and text")
    parser.add_argument("--prompts", type=int, default=2, help="for each text")
    parser.add_argument("--tail", type=int, default=64)
    args = parser.parse_args()

    check_source(args.calibration, args.samples)
    original = load(args.model, torch.float32)
    tokenizer, known = original.tokenizer, original.model.config.vocab_size
    texts = [encode(tokenizer, read_text(x), known, special=False) for x in args.text]
    asked, continued = [*questions(tokenizer, texts, args)], [*pieces(texts, args)]
    shares = args.share or [0.5, 0.25, 0.125]
    cells = [ALL, *((policy, x) for x in shares for policy in args.policy or POLICIES)]
    for keep, model in models(args, original):
        facts, ends = losses(model, asked, cells), losses(model, continued, cells)
        for cell in cells:
            print(json.dumps({"keep": keep} | row(model, cell, facts, ends)), flush=True)


if __name__ == "__main__":
    main()
