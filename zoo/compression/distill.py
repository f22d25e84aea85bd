"""Distillation: KL divergence of predictions over the vocabulary, computed in pieces."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.cache import Rounding
from ..models.model import Model

CHUNK = 128  # tokens whose logits are held at a time
KEPT = 2**30  # bytes of teacher outputs that are kept for the next epoch


def kl_divergence(hidden: Tensor, target: Tensor, head: nn.Module) -> Tensor:
    """KL(teacher || student) in nats, summed over tokens, by the head that both share.

    hidden, target: inputs of the head, (n, width), of the student and of the teacher.
    """
    want, got = (head(x).float().log_softmax(-1) for x in (target, hidden))
    return F.kl_div(got, want, reduction="sum", log_target=True)


class Distiller(NamedTuple):
    """How teacher and student are run.

    dtype: of matrix products. recompute: the student's layers are run again in the backward pass
    and keep no activations until then.
    """

    dtype: torch.dtype = torch.float32
    recompute: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """A context in which matrix products have `dtype`, for weights of any dtype."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def cast(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that are not trained: matrices in `dtype`, cast once; norms in fp32."""
        kinds = {True: self.dtype, False: torch.float32}
        return {name: x.to(kinds[x.ndim > 1]) for name, x in weights.items()}

    def hidden(self, model: Model, tokens: Tensor) -> Tensor:
        """Inputs of the head at tokens (B, T), latents rounded as in a cache: (B T, width)."""
        recompute = self.recompute and torch.is_grad_enabled()
        with self.autocast(tokens.device):
            x, pos, attn_metadata = model.begin(tokens)
            x = x.float()  # sums over the layers need fp32
            for block in model.layers:
                inputs = x, pos, attn_metadata, Rounding(block.attn.k, block.attn.v)
                again = recompute and partial(checkpoint, block, use_reentrant=False)
                x = (again or block)(*inputs)
            return model.finish(x).flatten(0, 1)

    def targets(self, teacher: Model, rows: Tensor) -> Callable[[int], Tensor]:
        """A function from the number of a row of tokens (N, T) to inputs of the teacher's head."""
        size = rows.size(1) * teacher.config.hidden_size * teacher.dtype.itemsize

        @lru_cache(max(1, KEPT // size))
        @torch.no_grad()
        def target(row: int) -> Tensor:  # one row at a time, so that batches change no bit of it
            return self.hidden(teacher, rows[row : row + 1])

        return target

    def divergence(self, hidden: Tensor, target: Tensor, head: nn.Module) -> Tensor:
        """Mean KL per token; runs the backward pass as well if `hidden` requires gradients."""
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        total = leaf.new_zeros((), dtype=torch.float32)
        for x, t in zip(leaf.split(CHUNK), target.split(CHUNK), strict=True):
            with self.autocast(x.device):
                part = kl_divergence(x, t, head) / len(hidden)
            if part.requires_grad:
                part.backward()  # frees the logits of this piece
            total += part.detach()
        if hidden.requires_grad:
            hidden.backward(leaf.grad)
        return total
