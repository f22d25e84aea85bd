"""What the fused ops' rounding of queries and weights costs in perplexity, on several texts.

    python benchmarks/rounding.py OUT [--domain FILE] [--prompt 512] [--steps 512]

A checkpoint in bfloat16 reads the beginning of each text as a prompt, then the next tokens one by
one over its packed cache, all texts in one batch. Attention is computed exactly (in float32), by
the definition in bfloat16, and by the fused op; all else is equal. Prints a line of JSON each: the
perplexity of the tokens read one by one, and its increase in % over exact attention. Texts are
those of `mixtures.py`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mixtures import domains
from torch import Tensor

from eigenzoo.kernels.install import FUSED, install
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.models.model import Model
from eigenzoo.zoo.models.packing import Packed

Op = Callable[..., Tensor]


def exact(definition: Op) -> Op:
    """The same in float32."""

    def wide(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    def op(q: Tensor, *arguments: Any) -> Tensor:
        more = (x if isinstance(x, Packed) else wide(x) for x in arguments)
        return definition(q.float(), *more).to(q.dtype)

    return op


def use(model: Model, ways: Callable[[Op, Op], Op]) -> None:
    """Let attention decode by ways(definition, fused op)."""
    install(model)
    for layer in model.layers:
        for definition, fused in FUSED.items():
            if hasattr(layer.attn, fused.__name__):
                setattr(layer.attn, fused.__name__, ways(definition, fused))


@torch.inference_mode()
def losses(model: Model, tokens: Tensor, prompt: int) -> Tensor:
    """Losses (B, steps) of tokens (B, prompt + steps + 1), read one by one after a prompt."""
    count = tokens.size(1) - 1
    cache = model.new_cache(len(tokens), count)
    model(tokens[:, :prompt], torch.arange(prompt), cache, last=1)
    found = []
    for t in range(prompt, count):
        logits = model(tokens[:, t : t + 1], torch.tensor([t]), cache)[:, 0]
        found.append(F.cross_entropy(logits.float(), tokens[:, t + 1], reduction="none"))
    return torch.stack(found, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="OUT")
    parser.add_argument("--domain", type=Path, action="append", default=[], help="repeat for more")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=512)
    args = parser.parse_args()

    texts = domains(args.domain)
    model, tokenizer = load(args.source, torch.bfloat16)[:2]
    known, length = model.config.vocab_size, args.prompt + args.steps + 1
    rows = [encode(tokenizer, text, known)[:length] for text in texts.values()]
    ways: dict[str, Callable[[Op, Op], Op]] = {
        "exact": lambda definition, _: exact(definition),
        "definition": lambda definition, _: definition,
        "fused": lambda _, fused: fused,
    }
    before: Tensor | None = None
    for name, way in ways.items():
        use(model, way)
        mean = losses(model, torch.stack(rows), args.prompt).mean(1)
        before = mean if before is None else before
        row = {"attention": name, "perplexity": dict(zip(texts, mean.exp().tolist(), strict=True))}
        rise = 100 * ((mean - before).exp() - 1)
        row["increase"] = dict(zip(texts, rise.tolist(), strict=True))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
