"""Eigen Attention's choice of ranks: layer by layer, by the error of the layer's output.

Saxena et al., arXiv 2408.05646. All layers have one error budget; a layer lowers its threshold, one
for keys and values, while the error of its output stays within the budget. The paper measures
outputs on all calibration text, `compress` on its first 4096 tokens, since the inputs of every
layer are kept; and ranks are rounded up to a multiple.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.model import Model
from .allocate import Ranks, check_keep, kept_share, threshold_rank
from .basis import LayerBasis
from .fold import compressed_config, fold_attention

STEP = 0.02  # by which the threshold falls


class Setting(NamedTuple):
    """The ranks of a layer at a threshold, and the relative error of its output."""

    threshold: float
    k_rank: int
    v_rank: int
    error: float


class ErrorBudget:
    """Output errors of every layer at falling thresholds, measured when they are first needed.

    Errors measured for one budget, or one share to keep, serve the next.
    """

    def __init__(
        self, model: Model, bases: Sequence[LayerBasis], tokens: Tensor, multiple: int = 8
    ):
        """tokens: (N, T), what the errors are measured on; every layer's inputs are kept."""
        self.model, self.bases, self.multiple = model, list(bases), multiple
        self.settings: list[list[Setting]] = [[] for _ in bases]
        self.inputs = []
        with torch.inference_mode():
            x, self.pos, self.attn_metadata = model.begin(tokens)
            for block in model.layers:
                self.inputs.append(x)
                x = block(x, self.pos, self.attn_metadata, None)
            self.inputs.append(x)

    def setting(self, layer: int, step: int) -> Setting:
        """The layer after so many steps down from the threshold 1, which is full rank."""
        known, basis = self.settings[layer], self.bases[layer]
        while len(known) <= step:
            threshold = 1 - STEP * len(known)
            if not known:
                d = self.model.config.head_dim
                known.append(Setting(1.0, d, d, 0.0))
                continue
            k, v = (threshold_rank(b.spectrum, threshold, self.multiple) for b in basis if b)
            same = (k, v) == (known[-1].k_rank, known[-1].v_rank)
            error = known[-1].error if same else self._error(layer, k, v)
            known.append(Setting(threshold, k, v, error))
        return known[step]

    def _error(self, layer: int, k_rank: int, v_rank: int) -> float:
        """‖y - y'‖ / ‖y‖ of the decoder layer with such ranks, on the dense model's inputs."""
        block, basis = self.model.layers[layer], self.bases[layer]
        one = replace(self.model.config, num_hidden_layers=1, k_ranks=(), v_ranks=())
        config = compressed_config(one, [basis], Ranks((k_rank,), (v_rank,)))
        dense = block.attn
        with torch.device("meta"):
            low = type(dense)(config, 0)
        low.load_state_dict(fold_attention(config, dense, low, basis), assign=True)
        try:
            block.attn = low
            with torch.inference_mode():
                got = block(self.inputs[layer], self.pos, self.attn_metadata, None)
        finally:
            block.attn = dense
        want = self.inputs[layer + 1]
        return float((got - want).norm() / want.norm())

    def choose(self, budget: float) -> list[Setting]:
        """The last setting of every layer, stepping down, before its error exceeds the budget."""
        chosen = []
        layers = range(len(self.bases))
        for layer in tqdm(layers, "searching ranks", unit="layer", disable=None, leave=False):
            step = 0
            while (step + 1) * STEP < 1 and self.setting(layer, step + 1).error <= budget:
                step += 1
            chosen.append(self.setting(layer, step))
        return chosen

    def share(self, settings: Sequence[Setting]) -> float:
        """Share of the dense KV numbers that these settings keep."""
        heads = self.model.config.num_key_value_heads
        return kept_share(self.model.config, ranks_of(settings), (heads, heads))

    def meet(self, keep: float) -> float:
        """The smallest error budget, within 1 %, that keeps at most `keep` of the KV bytes."""
        check_keep(keep)
        low, high = 0.0, 0.01
        while self.share(self.choose(high)) > keep:
            if high > 1e3:
                raise ValueError(f"no error budget keeps {keep} or less: expected a larger keep")
            low, high = high, 2 * high
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            if self.share(self.choose(middle)) > keep:
                low = middle
            else:
                high = middle
        return high


def ranks_of(settings: Sequence[Setting]) -> Ranks:
    """The ranks of all layers."""
    return Ranks(tuple(s.k_rank for s in settings), tuple(s.v_rank for s in settings))
