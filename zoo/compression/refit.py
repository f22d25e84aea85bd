"""After the solve: projections fitted anew to what compressed layers give them.

The dense and the compressed model read the same tokens side by side, layer by layer. Every fit is
a ridge regression towards the weights that are there: without evidence nothing changes.
"""

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.config import Config
from ..models.model import Model
from .allocate import Ranks
from .basis import LayerBasis
from .fold import fold, fold_attention
from .solve import damp, usual

REFITS = {
    "inputs": "query, key and value projections read compressed hidden states",
    "heads": "every query head reads its values by a decoder of its own",
    "output": "the output projection and its bias, all heads together",
}
RIDGE = 0.1  # in units of the mean diagonal of what is regressed on
INPUTS = ("q_proj", "k_proj", "v_proj")
ROWS = 1024  # of a weight in fp64 at a time


@torch.no_grad()
def refit(
    model: Model,
    tokens: Tensor,
    bases: Sequence[LayerBasis],
    ranks: Ranks,
    anchor: int,
    parts: Sequence[str],
) -> Model:
    """As `fold`, and then what `parts` names of `REFITS` is fitted to tokens (N, T).

    One layer after the other, each behind compressed ones and towards the dense model. `inputs`:
    queries, keys and values are what the dense model's are, before the basis is folded into their
    projections. `heads`, `output`: attention gives what it gives in the dense model. One pass of
    each model, and one more of attention. Memory is the hidden states of all
    tokens, up to six times.
    """
    low = fold(model, bases, ranks, anchor)
    rows = [model.begin(row[None]) for row in tokens]
    want = have = [x for x, _, _ in rows]
    dense_at, low_at = rows[0][1:], low.begin(tokens[:1])[1:]
    layers = list(zip(model.layers, low.layers, bases, strict=True))
    for block, low_block, basis in tqdm(layers, desc="refitting", disable=None, leave=False):
        want = refit_layer(block, low_block, low.config, basis, parts, want, have, dense_at, low_at)
        have = [low_block(x, *low_at, None) for x in have]
    return low


def refit_layer(
    block: Any,
    low_block: Any,
    config: Config,
    basis: LayerBasis,
    parts: Sequence[str],
    want: Sequence[Tensor],
    have: Sequence[Tensor],
    dense_at: tuple,
    low_at: tuple,
) -> list[Tensor]:
    """Fit one layer, `low_block` of the folded config, to `block`: what the latter gives of `want`.

    want, have: what the layer reads in the dense model and behind compressed layers, (1, T, width)
    a sequence; dense_at, low_at: slots and attention metadata, as `Model.begin` gives them.
    """
    device = block.attn.o_proj.weight.device
    names = ["q_proj"] * ("inputs" in parts) + ["o_proj"]
    dense = [_read(block, names, x, dense_at, whole=True) for x in want]
    if "inputs" in parts:
        attn = deepcopy(block.attn)
        n = attn.q_proj.in_features
        sums = _Sums(n, n, device)
        for x, target in zip(have, dense, strict=True):
            sums.add(_read(block, ["q_proj"], x, dense_at)["q_proj"], target["q_proj"])
        for name in INPUTS:
            sums.correct(getattr(attn, name), getattr(block.attn, name))
        folded = fold_attention(config, attn, low_block.attn, basis)
        low_block.attn.load_state_dict(folded, assign=True)
    blocks = {"heads": block.attn.heads, "output": 1}
    if not blocks.keys().isdisjoint(parts):
        low_out, out = low_block.attn.o_proj, block.attn.o_proj
        sums = _Sums(low_out.in_features, out.in_features, device)
        for x, target in zip(have, dense, strict=True):
            sums.add(_read(low_block, ["o_proj"], x, low_at)["o_proj"], target["o_proj"])
        for part, count in blocks.items():
            if part in parts:
                sums.correct(low_out, out, count)
    return [seen["y"] for seen in dense]


class _Enough(Exception):  # noqa: N818
    """What was asked for is seen, and nothing behind it is run."""


def _read(
    block: Any, names: Sequence[str], x: Tensor, at: tuple, whole: bool = False
) -> dict[str, Tensor]:
    """What projections of attention read, (T, ...) by name, where the block reads x (1, T, width).

    names: in the order in which they run. whole: run what is behind the last of them too, and
    tell what the block gives, as `y`.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple) -> None:
        seen[name] = args[0][0]
        if name == names[-1] and not whole:
            raise _Enough

    hooks = [
        getattr(block.attn, name).register_forward_pre_hook(partial(keep, name)) for name in names
    ]
    try:
        with suppress(_Enough):
            seen["y"] = block(x, *at, None)
    finally:  # an interruption must leave no hook on the dense model
        for hook in hooks:
            hook.remove()
    return seen


class _Sums:
    """Sums over what linear layers read behind compressed layers, x, and in the dense model, t.

    What they give of both is linear in these, and never made.
    """

    def __init__(self, n: int, m: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.count, self.x, self.t = 0, zeros(n), zeros(m)
        self.xx, self.xt = zeros(n, n), zeros(n, m)

    def add(self, x: Tensor, t: Tensor) -> None:
        """x: (T, n), t: (T, m)."""
        x, t = x.double(), t.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.t += t.sum(0)
        self.xx.addmm_(x.mT, x)
        self.xt.addmm_(x.mT, t)

    def correct(self, linear: nn.Linear, towards: nn.Linear, blocks: int = 1) -> None:
        """Make `linear` give of x what `towards` gives of t, by a ridge regression.

        Inputs are cut into blocks, each of which answers for a share of its own.
        """
        x, t = (v.unflatten(0, (blocks, -1))[:, None] / self.count for v in (self.x, self.t))
        xx, xt = (_diagonal_blocks(m, blocks) for m in (self.xx, self.xt))
        about = -self.count * x.mT * (linear.bias is not None)  # without one, about no mean
        gram = xx.baddbmm(about, x)
        ridge = RIDGE * usual(gram)[:, None, None]
        root = torch.linalg.cholesky(damp(gram, RIDGE))
        del gram
        weights, means = [], []
        both = (y.weight.split(ROWS) for y in (towards, linear))
        for wanted, old in zip(*both, strict=True):
            w, v = (
                y.double().unflatten(1, (blocks, -1)).permute(1, 2, 0) for y in (wanted, old)
            )  # (blocks, m or n, rows)
            mean = t @ w
            v = torch.cholesky_solve(xt @ w + about @ mean + ridge * v, root)
            weights.append(v.permute(2, 0, 1).flatten(1).to(old.dtype))
            means.append((mean - x @ v).sum((0, 1)))
        _put(linear, "weight", torch.cat(weights))
        if linear.bias is not None:
            mean = torch.cat(means)
            _put(linear, "bias", mean if towards.bias is None else mean + towards.bias)


def _diagonal_blocks(matrix: Tensor, blocks: int) -> Tensor:
    """(b n, b m) -> (b, n, m)."""
    parts = matrix.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1))  # (b, n, b, m)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _put(linear: nn.Linear, name: str, new: Tensor) -> None:
    """A parameter of its own: the old one may be shared with the dense model."""
    setattr(linear, name, nn.Parameter(new.to(linear.weight.dtype), requires_grad=False))
