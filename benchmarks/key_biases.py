"""What a large bias of keys does to their bits and ranks.

    python benchmarks/key_biases.py MODEL [--domain FILE] [--bits 8 --bits 4 --bits 3]

MODEL is uncompressed, and its keys have a bias before the rotation, as Qwen2's have. Prints a line
for each layer: the root mean squares of the bias and of what varies from token to token, and what
part of the bias's energy a constant does not take away, once keys are rotated within blocks of 16
or 64 positions, or by their positions in a window. Then a line for each number of bits: what
perplexity gains if keys are rounded as they are, with one scale a token and head, and if the bias
is taken off before and added after. Values stay exact. Texts are those of `mixtures.py`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from mixtures import domains
from rival_caches import Rival, rival_losses, symmetric
from torch import Tensor

from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.perplexity import cut
from eigenzoo.zoo.models.model import Model
from eigenzoo.zoo.models.rope import rotate


def biases(model: Model) -> Tensor:
    """The biases (layers, G, 1, D) of the keys. Raises ValueError if there are none."""
    found = [block.attn.k_proj.bias for block in model.layers]
    if any(bias is None for bias in found):
        raise ValueError("the keys of this model have no bias: expected one as of Qwen2")
    return torch.stack(found).detach().unflatten(1, (-1, 1, model.config.head_dim)).float()


def angles(model: Model, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (count, D / 2) of the positions from 0 on."""
    angle = torch.arange(count)[:, None] * model.inv_freq
    return angle.cos(), angle.sin()


def left(model: Model, bias: Tensor, count: int) -> float:
    """What part of a bias's energy varies with the position among so many, once it is rotated."""
    turned = rotate(bias.expand(-1, count, -1), *angles(model, count))  # (G, count, D)
    varies = turned - turned.mean(1, keepdim=True)
    return (varies.square().mean(1).sum() / bias.square().sum()).item()


@torch.inference_mode()
def varying(model: Model, rows: Tensor, bias: Tensor) -> list[float]:
    """Root mean square, in each layer, of what the projection adds to the bias."""
    sums = [0.0] * len(model.layers)

    def watch(layer: int):
        def seen(_module, _inputs, keys: Tensor) -> None:
            sums[layer] = (keys - bias[layer].flatten()).square().mean().sqrt().item()

        return seen

    hooks = [x.attn.k_proj.register_forward_hook(watch(i)) for i, x in enumerate(model.layers)]
    try:
        model.hidden(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def rounding(model: Model, bits: int, off: Tensor | None) -> Rival:
    """A cache that rounds keys alone. off: biases (layers, G, 1, D) that are taken off before."""

    def keys(layer: int, x: Tensor) -> Tensor:
        if off is None:
            return symmetric(x, bits)
        count = x.size(2)
        bias = rotate(off[layer].expand(-1, count, -1), *angles(model, count))
        return symmetric(x - bias, bits) + bias

    return Rival(keys, lambda layer, x: x, bits + 16 / model.config.head_dim)


def losses(model: Model, texts: Mapping[str, Tensor], rival: Rival) -> dict[str, float]:
    """Mean loss of every text in nats."""
    return {name: rival_losses(model, rows, rival).mean().item() for name, rows in texts.items()}


def main() -> None:
    """Measure and print, a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--domain", type=Path, action="append", default=[], help="repeat for more")
    parser.add_argument("--bits", type=int, action="append", help="repeat for more; else 8, 4, 3")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--window", type=int, default=2048)
    args = parser.parse_args()
    words = domains(args.domain)
    model, tokenizer = load(args.model, torch.float32)[:2]
    bias = biases(model)
    known = model.config.vocab_size
    texts = {
        name: cut(encode(tokenizer, text, known), args.window, args.windows, name)
        for name, text in words.items()
    }
    rest = varying(model, next(iter(texts.values()))[:1], bias)
    for layer, of in enumerate(bias):
        row = {"layer": layer, "bias": of.square().mean().sqrt().item(), "rest": rest[layer]}
        parts = {str(n): left(model, of, n) for n in (16, 64, args.window)}
        print(json.dumps(row | {"largest": of.abs().max().item(), "left": parts}), flush=True)
    exact = losses(model, texts, Rival(*2 * (lambda layer, x: x,), 16))
    for bits in args.bits or (8, 4, 3):
        row = {"bits": bits}
        for name, off in (("as_they_are", None), ("bias_off", bias)):
            found = losses(model, texts, rounding(model, bits, off))
            row[name] = {x: 100 * (torch.tensor(found[x] - exact[x]).expm1().item()) for x in found}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
