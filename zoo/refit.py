"""After the solve: projections fitted anew to what compressed layers give them.

The dense and the compressed model read the same tokens side by side, layer by layer. Every fit is
a ridge regression of what a linear map still misses, so where there is no evidence nothing changes.
"""

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .allocate import Ranks
from .basis import LayerBasis
from .fold import fold, fold_attention
from .model import Config, LatentAttention, Model
from .solve import damp

REFITS = {
    "inputs": "query, key and value projections read compressed hidden states",
    "heads": "every query head reads its values by a decoder of its own",
    "output": "the output projection and its bias, all heads together",
}
RIDGE = 0.1  # in units of the mean diagonal of what is regressed on
INPUTS = ("q_proj", "k_proj", "v_proj")


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
    each model, and of attention alone one for every part. Memory is the hidden states of all
    tokens, up to seven times.
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
    a sequence; dense_at, low_at: slots and what `where` returns, as `Model.begin` gives them.
    """
    names = (*INPUTS * ("inputs" in parts), "o_proj")
    dense = [_Seen(block, names, x, dense_at, whole=True) for x in want]
    if "inputs" in parts:
        attn = _fit_inputs(block, dense, have, dense_at)
        folded = fold_attention(config, attn, low_block.attn, basis)
        low_block.attn.load_state_dict(folded, assign=True)
    for part, blocks in (("heads", block.attn.heads), ("output", 1)):
        if part in parts:
            fit = _Fit(low_block.attn.o_proj, blocks)
            for x, target in zip(have, dense, strict=True):
                seen = _Seen(low_block, ("o_proj",), x, low_at)
                missing = target.read(block, blocks) - seen.read(low_block, blocks)
                fit.add(seen.input["o_proj"], missing)
            fit.correct()
    return [seen.y for seen in dense]


def _fit_inputs(
    block: Any, dense: Sequence["_Seen"], have: Sequence[Tensor], at: tuple
) -> LatentAttention:
    """The dense attention, its projections fitted to give of `have` what `dense` has seen."""
    attn = deepcopy(block.attn)
    fits = {name: _Fit(getattr(attn, name)) for name in INPUTS}
    for x, target in zip(have, dense, strict=True):
        seen = _Seen(block, INPUTS, x, at)
        for name, fit in fits.items():
            fit.add(seen.input[name], (target.output[name] - seen.output[name])[:, None])
    for fit in fits.values():
        fit.correct()
    return attn


class _Enough(Exception):  # noqa: N818
    """Attention is done, and nothing behind it is asked for."""


class _Seen:
    """What projections of a block's attention see of x (1, T, width), and what the block gives.

    input, output: by the projection's name, (T, ...). y: only if `whole`.
    """

    y: Tensor

    def __init__(self, block: Any, names: Sequence[str], x: Tensor, at: tuple, whole: bool = False):
        self.input: dict[str, Tensor] = {}
        self.output: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
            self.input[name], self.output[name] = args[0][0], out[0]

        def stop(module: nn.Module, args: tuple, out: Tensor) -> None:
            raise _Enough

        hooks = [
            getattr(block.attn, name).register_forward_hook(partial(keep, name)) for name in names
        ]
        if not whole:
            hooks.append(block.attn.register_forward_hook(stop))
        try:
            with suppress(_Enough):
                self.y = block(x, *at, None)
        finally:  # an interruption must leave no hook on the dense model
            for hook in hooks:
                hook.remove()

    def read(self, block: Any, blocks: int) -> Tensor:
        """The output of attention as a sum over `blocks` groups of heads: (T, blocks, width)."""
        if blocks == 1:
            return self.output["o_proj"][:, None]
        o_proj, x = block.attn.o_proj, self.input["o_proj"].unflatten(1, (blocks, -1))
        y = torch.einsum("tbn,obn->tbo", x, o_proj.weight.unflatten(1, (blocks, -1)))
        return y if o_proj.bias is None else y + o_proj.bias / blocks


class _Fit:
    """What a linear layer should add to what it gives, regressed on what it is given; streamed.

    Its inputs are cut into blocks, each of which answers for a share of its own.
    """

    def __init__(self, linear: nn.Linear, blocks: int = 1):
        self.linear, self.blocks = linear, blocks
        width, out = linear.in_features // blocks, linear.out_features
        zeros = partial(torch.zeros, dtype=torch.float64, device=linear.weight.device)
        self.count, self.x, self.missing = 0, zeros(blocks, width), zeros(blocks, out)
        self.gram, self.cross = zeros(blocks, width, width), zeros(blocks, width, out)

    def add(self, x: Tensor, missing: Tensor) -> None:
        """x: (T, in), missing: (T, blocks, out)."""
        x = x.double().unflatten(-1, (self.blocks, -1)).transpose(0, 1)
        missing = missing.double().transpose(0, 1)
        self.count += x.size(1)
        self.x += x.sum(1)
        self.missing += missing.sum(1)
        self.gram.baddbmm_(x.mT, x)
        self.cross.baddbmm_(x.mT, missing)

    def correct(self) -> None:
        """Add it to the weight, and where there is a bias to that."""
        x, missing = self.x / self.count, self.missing / self.count
        if self.linear.bias is None:
            x, missing = torch.zeros_like(x), torch.zeros_like(missing)
        # in place: in fp64 each is four times as large as the projection in bf16
        gram = self.gram.div_(self.count).baddbmm_(x[:, :, None], x[:, None], alpha=-1)
        cross = self.cross.div_(self.count).baddbmm_(x[:, :, None], missing[:, None], alpha=-1)
        change = torch.linalg.solve(damp(gram, RIDGE), cross).mT  # (blocks, out, width)
        self._replace("weight", change.transpose(0, 1).flatten(1))
        if self.linear.bias is not None:
            self._replace("bias", (missing - (change @ x[..., None])[..., 0]).sum(0))

    def _replace(self, name: str, change: Tensor) -> None:
        old = getattr(self.linear, name)  # may be shared with the dense model
        new = (old.double() + change).to(old.dtype)
        setattr(self.linear, name, nn.Parameter(new, requires_grad=False))
