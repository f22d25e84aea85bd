"""What is lost if a cache, compressed or not, keeps only some tokens of a prompt.

    python benchmarks/eviction.py MODEL [OUT] ... --text FILE [--text FILE] [--length 2048]
        [--share 0.5 ...] [--policy snapkv ...] [--facts 2] [--prompts 2] [--tail 64]

Every prompt is read once. Then all tokens are kept, or each policy keeps each share of them:

- snapkv: those that the last 32 tokens attend to most (`eigenzoo generate --keep-tokens`);
- recent: the first 4 and the last ones (StreamingLLM, arXiv 2309.17453), in whole blocks too.

Two measures, on every text: at five depths a fact is planted in a text of `--length` tokens, which
ends with a question about it (`eigenzoo evaluate --retrieval`), `--facts` of them at each depth;
and `--prompts` pieces of the text, of `--length` tokens, end with `--tail` tokens whose perplexity
is measured. Prints a line of JSON for each model, policy and share: facts that greedy decoding
gives, mean log-likelihood of their tokens, perplexity of the ends, its increase in % over that
with all tokens of the same model and the standard error of that, and the bytes of the kept tokens
as a share of an uncompressed cache of all tokens.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.evict import WINDOW, EvictingGenerator
from eigenzoo.zoo.inference.texts import read_text
from eigenzoo.zoo.measure.probe import DEPTHS, Planted, plant
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.models.model import Model

SINKS = 4


def recent(seen: Tensor) -> Tensor:
    """Weights (layers, T) by which the first and the last tokens stay."""
    weight = torch.arange(seen.size(1)).float().expand_as(seen).clone()
    weight[:, :SINKS] = torch.inf
    return weight


ALL = "all", 1.0
# what a policy makes of the weights (layers, T) by which tokens stay
POLICIES: dict[str, Callable[[Tensor], Tensor]] = {"snapkv": lambda seen: seen, "recent": recent}


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


def losses(
    model: Model, each: Sequence[Planted], cells: Sequence[tuple[str, float]]
) -> dict[tuple[str, float], list[tuple[float, bool, float]]]:
    """By policy and share, of every prompt: mean loss of what follows, whether it is what greedy
    decoding gives, and the share of tokens that were kept."""
    found: dict[tuple[str, float], list[tuple[float, bool, float]]] = {cell: [] for cell in cells}
    for asked in each:
        count, new = len(asked.prompt), len(asked.answer)
        answer = torch.tensor([asked.answer])
        reader = EvictingGenerator(model, count + new, new, count, compile=False)
        read = reader.read(torch.tensor([asked.prompt]))
        for policy, share in cells:
            keep = max(round(share * count), WINDOW + reader.block)
            generator = EvictingGenerator(model, count + new, new, keep, compile=False)
            weigh = POLICIES.get(policy, POLICIES["snapkv"])
            generator.take(read._replace(seen=weigh(read.seen)))
            logits = torch.cat((read.logits, generator.verify(answer[:, :-1], count))).float()
            loss = F.cross_entropy(logits, answer[0]).item()
            right = bool((logits.argmax(-1) == answer[0]).all())
            found[policy, share].append((loss, right, 1 - generator.dropped / count))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", metavar="MODEL", nargs="+")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--length", type=int, default=2048, help="tokens of prompt and end")
    parser.add_argument("--share", type=float, action="append", help="by default 1/2, 1/4 and 1/8")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="by default all")
    parser.add_argument("--facts", type=int, default=2, help="for each depth and text")
    parser.add_argument("--prompts", type=int, default=2, help="for each text")
    parser.add_argument("--tail", type=int, default=64)
    args = parser.parse_args()

    shares = args.share or [0.5, 0.25, 0.125]
    cells = [ALL, *((policy, x) for x in shares for policy in args.policy or POLICIES)]
    for source in args.sources:
        model, tokenizer = load(source, torch.float32)[:2]
        known = model.config.vocab_size
        texts = [encode(tokenizer, read_text(x), known, special=False) for x in args.text]
        facts = losses(model, [*questions(tokenizer, texts, args)], cells)
        ends = losses(model, [*pieces(texts, args)], cells)
        whole = torch.tensor([x for x, *_ in ends[ALL]], dtype=torch.float64)
        for policy, share in cells:
            asked, loss = facts[policy, share], torch.tensor([x for x, *_ in ends[policy, share]])
            more = loss.double() - whole
            kept = sum(x for *_, x in ends[policy, share]) / len(loss)
            row = {
                "source": source,
                "policy": policy,
                "share": share,
                "facts_found": sum(right for _, right, _ in asked),
                "facts": len(asked),
                "loglikelihood": round(-sum(x for x, *_ in asked) / len(asked), 3),
                "perplexity": round(loss.double().mean().exp().item(), 3),
                "increase_percent": round(100 * more.mean().expm1().item(), 2),
                "error_percent": round(100 * more.std().item() / len(more) ** 0.5, 2),
                "prompts": len(loss),
                "kv_share": round(kv_bytes(model.config)["kv_share"] * kept, 4),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
