"""After the solve: output projections fitted anew to what compressed layers give them.

The dense and the compressed model read the same tokens side by side, layer by layer. Every fit is
a ridge regression towards the weights that are there: without evidence nothing changes.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.cache import Rounding
from ..models.model import Model
from .allocate import Ranks
from .basis import LayerBasis
from .fold import fold
from .solve import damp, usual

RIDGE = 0.1  # in units of the mean diagonal of what is regressed on
ROWS = 1024  # of a weight in fp64 at a time


@torch.no_grad()
def refit(
    model: Model, tokens: Tensor, bases: Sequence[LayerBasis], ranks: Ranks, anchor: int
) -> Model:
    """As `fold`, and then the output projection and its bias are fitted to tokens (N, T).

    One layer after the other, each behind compressed ones, with latents rounded as in a cache: the
    output of attention approaches that of the dense model. Each model runs once, attention once
    more. Memory: the hidden states of all tokens, up to four times.
    """
    low = fold(model, bases, ranks, anchor)
    rows = [model.begin(row[None]) for row in tokens]
    want = have = [x for x, _, _ in rows]
    dense_at, low_at = rows[0][1:], low.begin(tokens[:1])[1:]
    layers = list(zip(model.layers, low.layers, strict=True))
    for block, low_block in tqdm(layers, desc="refitting", disable=None, leave=False):
        want = refit_layer(block, low_block, want, have, dense_at, low_at)
        have = [low_block(x, *low_at, rounding(low_block)) for x in have]
    return low


def rounding(block: Any) -> Rounding:
    """Stands for the cache of a layer."""
    return Rounding(block.attn.k, block.attn.v)


def refit_layer(
    block: Any,
    low_block: Any,
    want: Sequence[Tensor],
    have: Sequence[Tensor],
    dense_at: tuple,
    low_at: tuple,
) -> list[Tensor]:
    """Fit one layer, `low_block`, to `block`; return the outputs of the latter for `want`.

    want, have: what the layer reads in the dense model and behind compressed layers, (1, T, width)
    a sequence; dense_at, low_at: slots and attention metadata, as `Model.begin` gives them.
    """
    low_out, out = low_block.attn.o_proj, block.attn.o_proj
    sums, outputs = _Sums(low_out.in_features, out.in_features, out.weight.device), []
    for x, dense_x in zip(have, want, strict=True):
        target, y = _read(block, dense_x, dense_at)
        sums.add(_read(low_block, x, low_at, rounding(low_block), whole=False)[0], target)
        outputs.append(y)
    sums.correct(low_out, out)
    return outputs


class _Enough(Exception):  # noqa: N818
    """The output projection is reached, and nothing behind it is run."""


def _read(
    block: Any, x: Tensor, at: tuple, cache: Rounding | None = None, whole: bool = True
) -> tuple[Tensor, Any]:
    """What the output projection reads, (T, ...), and what the block gives of x (1, T, width).

    whole: otherwise nothing behind attention is run, and the second is None.
    """
    inputs, y = [], None

    def keep(module: nn.Module, args: tuple) -> None:
        inputs.append(args[0][0])
        if not whole:
            raise _Enough

    hook = block.attn.o_proj.register_forward_pre_hook(keep)
    try:
        with suppress(_Enough):
            y = block(x, *at, cache)
    finally:  # an interruption must leave no hook on the dense model
        hook.remove()
    return inputs[0], y


class _Sums:
    """Sums over what linear layers read behind compressed layers, x, and in the dense model, t.

    Their outputs are linear in these, and are never computed.
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

    def correct(self, linear: nn.Linear, towards: nn.Linear) -> None:
        """Fit `linear` of x to `towards` of t, by a ridge regression towards its own weight."""
        x, t = self.x / self.count, self.t / self.count
        about = -self.count * x * (linear.bias is not None)  # without one, about no mean
        gram = self.xx.addr(about, x)
        ridge = RIDGE * usual(gram[None])
        root = torch.linalg.cholesky(damp(gram[None], RIDGE)[0])
        del gram
        weights, means = [], []
        both = (y.weight.split(ROWS) for y in (towards, linear))
        for wanted, old in zip(*both, strict=True):
            w, v = wanted.double().mT, old.double().mT  # (m or n, rows)
            mean = t @ w
            v = torch.cholesky_solve((self.xt @ w).addr(about, mean) + ridge * v, root)
            weights.append(v.mT.to(old.dtype))
            means.append(mean - x @ v)
        _put(linear, "weight", torch.cat(weights))
        if linear.bias is not None:
            mean = torch.cat(means)
            _put(linear, "bias", mean if towards.bias is None else mean + towards.bias)


def _put(linear: nn.Linear, name: str, new: Tensor) -> None:
    """A parameter of its own: the old one may be shared with the dense model."""
    setattr(linear, name, nn.Parameter(new.to(linear.weight.dtype), requires_grad=False))
