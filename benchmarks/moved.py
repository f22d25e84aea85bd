"""What a text loses that is read from cached rows which were computed behind another text.

    python benchmarks/moved.py OUT --text FILE [--text FILE] [--samples 8] [--documents 1]
        [--document 256] [--begin 256] [--before 128] [--tail 128]

A prompt is a beginning, documents from elsewhere in the text, each with a fact planted in it, and
then the continuation of one document, or a question about its fact. The rows of documents are

- recomputed: as they are in this prompt (the reference);
- dropped: no document at all;
- moved: computed behind other text, each behind another piece of `--before` tokens;
- alone: computed with nothing before them, so that each begins with a sink of attention;
- shared: computed behind the first block of the beginning (a shared prefix, arXiv 2502.05431);

and "+ N" means that the first N tokens of each document are recomputed in the prompt (arXiv
2410.15332). Prints a line of JSON for each: perplexity of the
continuations, its increase in % over the reference and the standard error of that, the share of
their tokens for which the most likely token is that of the reference, and how many facts greedy
decoding gives.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.moved import move, shift_step
from eigenzoo.zoo.inference.texts import read_text
from eigenzoo.zoo.measure.probe import NAMES
from eigenzoo.zoo.models.cache import StaticCache
from eigenzoo.zoo.models.model import Model

Rows = tuple[StaticCache, int]  # where a document's rows are: a cache, and their first slot


class Prompt(NamedTuple):
    """Token ids, (T,) each. before: what stood before each document when its rows were made.

    answer: how many tokens at the end of the question answer it.
    """

    begin: Tensor
    documents: list[Tensor]
    before: list[Tensor]
    tails: list[Tensor]  # the continuation, the question
    answer: int


def prompts(tokenizer, tokens: Tensor, args: argparse.Namespace) -> Iterator[Prompt]:
    """Prompts from pieces of a text that are far from one another."""

    def ids(words: str) -> Tensor:
        return encode(tokenizer, words, special=False)

    random = Random(0)
    for _ in range(args.samples):
        asked = random.randrange(args.documents)
        documents, before = [], []
        for i, name in enumerate(random.sample(NAMES, args.documents)):
            said = f"\n\nThe secret number of {name} is"
            number = random.randrange(10_000, 100_000)
            fact = ids(f"{said} {number}.\n\n")
            at = random.randrange(args.before, len(tokens) - args.document - args.tail)
            middle = random.randrange(args.document - len(fact))
            stop = at + args.document - len(fact)
            document = torch.cat((tokens[at : at + middle], fact, tokens[at + middle : stop]))
            documents.append(document)
            far = random.randrange(len(tokens) - args.before)
            before.append(tokens[far : far + args.before])
            if i == asked:
                question = ids(f"{said} {number}")
                answer = len(question) - len(ids(said))
                tails = [tokens[stop : stop + args.tail], question]
        first = random.randrange(len(tokens) - args.begin)
        yield Prompt(tokens[first : first + args.begin], documents, before, tails, answer)


def read(model: Model, tokens: Tensor, cache: StaticCache, start: int) -> Tensor:
    """Run tokens (T,) at the slots from `start` on: logits (T, vocabulary)."""
    return model(tokens[None], None, cache.first(start + len(tokens)))[0]


def made(model: Model, document: Tensor, before: Tensor) -> Rows:
    """The rows of a document behind other text, or behind none."""
    cache = model.new_cache(1, len(before) + len(document))
    read(model, torch.cat((before, document)), cache, 0)
    return cache, len(before)


def answers(
    model: Model, prompt: Prompt, begun: StaticCache, rows: Sequence[Rows], mend: int
) -> list[Tensor]:
    """Logits of each tail, (T, vocabulary), behind the beginning and documents of these rows."""
    at = len(prompt.begin)
    longest = max(map(len, prompt.tails))
    cache = model.new_cache(1, at + sum(map(len, prompt.documents)) + longest)
    move(begun, 0, cache, 0, at)
    for document, (source, start) in zip(prompt.documents[: len(rows)], rows, strict=True):
        move(source, start, cache, at, len(document))
        if mend:
            read(model, document[:mend], cache, at)
        at += len(document)
    return [read(model, tail, cache, at) for tail in prompt.tails]


def ways(model: Model, prompt: Prompt, mends: Sequence[int]) -> Iterator[tuple[str, list[Tensor]]]:
    """The logits of the tails by the way in which documents are read; the reference first."""
    documents, begin = prompt.documents, prompt.begin
    whole = made(model, torch.cat((begin, *documents)), begin[:0])[0]
    starts = len(begin) + torch.tensor([0, *map(len, documents)]).cumsum(0)
    here: list[Rows] = [(whole, int(start)) for start in starts[:-1]]
    yield "recomputed", answers(model, prompt, whole, here, 0)
    yield "dropped", answers(model, prompt, whole, [], 0)
    shared = begin[: shift_step(model.config)]
    origins = {
        "moved": prompt.before,
        "alone": [begin[:0]] * len(documents),
        "shared": [shared] * len(documents),
    }
    for name, before in origins.items():
        rows = [made(model, *pair) for pair in zip(documents, before, strict=True)]
        for mend in mends:
            yield name + f" + {mend}" * bool(mend), answers(model, prompt, whole, rows, mend)


@torch.inference_mode()
def measured(model: Model, each: Iterator[Prompt], mends: Sequence[int]) -> dict[str, dict]:
    """What is printed of each way."""
    sums: dict[str, list[tuple[float, float, bool]]] = {}
    for prompt in each:
        reference: Tensor | None = None
        for way, (continuation, question) in ways(model, prompt, mends):
            tail, asked = prompt.tails
            loss = F.cross_entropy(continuation[:-1].float(), tail[1:]).item()
            chosen = continuation.argmax(-1)
            reference = chosen if reference is None else reference
            said = question.argmax(-1)[-prompt.answer - 1 : -1]
            agree = (chosen == reference).float().mean().item()
            right = bool((said == asked[-prompt.answer :]).all())
            sums.setdefault(way, []).append((loss, agree, right))
    mean = {way: torch.tensor(found, dtype=torch.float64) for way, found in sums.items()}
    rows = {}
    for way, found in mean.items():
        loss, agree, _ = found.mean(0)
        more = found[:, 0] - mean["recomputed"][:, 0]
        rows[way] = {
            "perplexity": round(loss.exp().item(), 3),
            "increase_percent": round(100 * more.mean().expm1().item(), 2),
            "error_percent": round(100 * more.std().item() / len(more) ** 0.5, 2),
            "agreement": round(agree.item(), 4),
            "facts_found": int(found[:, 2].sum()),
        }
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="OUT")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--documents", type=int, default=1, help="in a prompt, at most 12")
    parser.add_argument("--document", type=int, default=256, help="tokens; so are the next ones")
    parser.add_argument("--begin", type=int, default=256)
    parser.add_argument("--before", type=int, default=128)
    parser.add_argument("--tail", type=int, default=128)
    parser.add_argument("--mend", type=int, action="append", help="by default 0 and a block")
    args = parser.parse_args()

    model, tokenizer = load(args.source, torch.float32)[:2]
    install(model)
    step = shift_step(model.config)
    for name in ("document", "begin", "before"):
        if getattr(args, name) % step:
            parser.error(f"--{name} {getattr(args, name)}: expected a multiple of {step}")
    for file in args.text:
        tokens = encode(tokenizer, read_text(file), model.config.vocab_size)
        found = measured(model, prompts(tokenizer, tokens, args), args.mend or (0, step))
        for way, row in found.items():
            told = {"text": file.stem, "documents": args.documents, "way": way}
            print(json.dumps(told | row | {"facts": args.samples}), flush=True)


if __name__ == "__main__":
    main()
