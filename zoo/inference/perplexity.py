"""Perplexity as in the papers: of windows that do not overlap."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..models.cache import StaticCache
from ..models.model import Model


class Perplexity(NamedTuple):
    """Perplexity, and the number of tokens that were predicted."""

    perplexity: float
    tokens: int


def perplexity(
    model: Model, tokens: Tensor, window: int = 2048, windows: int = 0, bits: int | None = None
) -> Perplexity:
    """Perplexity of a text: exp of the mean negative log-likelihood of its tokens in nats.

    - tokens: (N,) token ids, on the model's device. As in the papers, they are cut into windows
      that do not overlap, and in each window all tokens but the first are predicted. A last piece
      shorter than a window is left out. Windows of Gemma 3 all begin with the text's first token,
      its BOS, without which it predicts badly.
    - window: tokens in a window, at least 2.
    - windows: at most so many; 0 stands for all.
    - bits: of a number in the cache, 16, 8 or 4; None: as the config says. At 16 no cache is used,
      because it would not change the result, unless `Model.keep` evicts tokens.

    Raises ValueError if the text is shorter than one window, or for unsupported bits.
    """
    return mean_perplexity(token_losses(model, tokens, window, windows, bits))


def mean_perplexity(losses: Tensor) -> Perplexity:
    """Perplexity of negative log-likelihoods in nats, of any shape."""
    return Perplexity(losses.double().mean().exp().item(), losses.numel())


def token_losses(
    model: Model, tokens: Tensor, window: int = 2048, windows: int = 0, bits: int | None = None
) -> Tensor:
    """Negative log-likelihoods in nats, (windows, window - 1) on the CPU.

    Arguments and errors as in `perplexity`.
    """
    return window_losses(model, cut(tokens, window, windows, begun=model.config.begun), bits)


def cut(
    tokens: Tensor, window: int, windows: int = 0, name: str = "the text", begun: bool = False
) -> Tensor:
    """Windows (M, window) of tokens (N,) that do not overlap; a last piece that is shorter is left.

    windows: at most so many; 0 stands for all. name: of the text, for the error. begun: each begins
    with the first token of the text, as `Config.begun` models need it. Raises ValueError if the
    text is shorter than one window.
    """
    if window < 2:
        raise ValueError(f"window is {window}: expected at least 2 tokens")
    if windows < 0:
        raise ValueError(f"windows is {windows}: expected at least 1, or 0 for all of the text")
    first, rest = tokens[: int(begun)], tokens[int(begun) :]
    count = len(rest) // (window - len(first))
    if count == 0:
        raise ValueError(
            f"{name} has {len(tokens)} tokens: expected at least one window of {window}; "
            "give a longer text or a smaller --window"
        )
    count = min(count, windows or count)
    rows = rest[: count * (window - len(first))].view(count, -1)
    return torch.cat((first.expand(count, -1), rows), 1)


@torch.inference_mode()
def window_losses(model: Model, rows: Tensor, bits: int | None = None) -> Tensor:
    """Negative log-likelihoods in nats, (M, W - 1) on the CPU, of windows (M, W) of token ids.

    bits: as in `perplexity`.
    """
    losses = []
    cache = rounding_cache(model, 1, rows.size(1) - 1, bits)
    for row in tqdm(rows, desc="evaluating", unit="window", disable=None, leave=False):
        losses.append(row_losses(model, model.hidden(row[None, :-1], cache=cache)[0], row[1:]))
    return torch.stack(losses).cpu()


def rounding_cache(model: Model, batch: int, slots: int, bits: int | None) -> StaticCache | None:
    """As `model.new_cache`; None if it would neither round nor evict, so one prefill needs none."""
    packed = (model.config.least_bits if bits is None else bits) < 16
    needed = packed or model.kept.window
    return model.new_cache(batch, slots, bits=bits) if needed else None


def row_losses(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats of targets (T,). hidden: the head's input, (T, width)."""
    pieces = zip(hidden.split(512), targets.split(512), strict=True)  # all logits are gigabytes
    return torch.cat(
        [F.cross_entropy(model.head(x).float(), y, reduction="none") for x, y in pieces]
    )
