"""One pass of calibration for many settings, kept on disk between runs."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..compression.calibrate import calibrate
from ..compression.moments import Moments, Needs, Statistics
from ..inference.data import calibration_tokens, read_text
from ..models.model import Model
from ..utils.provenance import fingerprint

SUMS = ("count", "origin", "sum", "gram")


def kind(needs: Needs) -> Needs:
    """Needs of one kind are served by one pass.

    They differ in heads per latent, queries, and which sums are taken of gradients. With gradients
    also the heads per latent must agree, since weights are those of whole blocks,
    and the last token of a sequence, which predicts nothing, is not read: statistics taken with
    and without them are kept apart, so that each equals what `gather` gives.
    """
    heads = needs.heads_per_latent if needs.gradients else (1, 1)
    return needs._replace(heads_per_latent=heads, queries=False, unweighted=False, weighted=False)


def union(needs: Sequence[Needs]) -> Needs:
    """What serves all of these, which are of one kind: the blocks of all are diagonal in it."""
    k, v = (math.lcm(*(n.heads_per_latent[side] for n in needs)) for side in (0, 1))
    asked = {f: any(getattr(n, f) for n in needs) for f in ("queries", "unweighted", "weighted")}
    return needs[0]._replace(heads_per_latent=(k, v), **asked)


def narrow(statistics: Sequence[Statistics], have: Needs, want: Needs) -> list[Statistics]:
    """The statistics of fewer heads per latent, out of those of more."""
    k, v = (a // b for a, b in zip(have.heads_per_latent, want.heads_per_latent, strict=True))
    return [s.split(k, v) for s in statistics]


class Calibration(NamedTuple):
    """What to calibrate on: see `data.calibration_tokens`."""

    source: str = "self"
    samples: int = 32
    seq_len: int = 1024
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """The same, a file by its last name and a digest. Raises ValueError if it is not there."""
        if self.source == "self" or self.source.startswith("hub:"):
            return self._asdict() | {"digest": None}
        name, text = Path(self.source).name, read_text(self.source)
        return self._asdict() | {"source": name, "digest": fingerprint(text)}


class Calibrator:
    """Tokens and statistics of one calibration, made when they are first needed.

    folder: where they are kept, if anywhere. run: what else they depend on, as JSON knows it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Calibration,
        folder: Path | None = None,
        run: Mapping[str, Any] | None = None,
    ):
        """Reads the file that the calibration names, if any; nothing long is done."""
        self.model, self.tokenizer, self.calibration = model, tokenizer, calibration
        self.folder, self.about = folder, calibration.describe()
        self.key = {**(run or {}), **self.about}
        self.seconds: dict[str, float] = {}  # of making the tokens, and the last statistics

    @cached_property
    def tokens(self) -> Tensor:
        """(sequences, length)."""

        def make() -> dict[str, Tensor]:
            return {
                "tokens": calibration_tokens(
                    source=self.calibration.source,
                    model=self.model,
                    tokenizer=self.tokenizer,
                    samples=self.calibration.samples,
                    length=self.calibration.seq_len,
                    seed=self.calibration.seed,
                )
            }

        found = kept(self.folder, self.key, make)
        self.seconds["text"] = float(found["seconds"])
        return found["tokens"].to(self.model.device)

    def statistics(self, needs: Needs) -> list[Statistics]:
        """What `calibrate` gives for such needs."""
        tokens, key = self.tokens, self.key | needs._asdict()
        found = kept(self.folder, key, lambda: pack(calibrate(self.model, tokens, *needs)))
        self.seconds["calibrate"] = float(found["seconds"])
        return unpack(found, len(self.model.layers), self.model.device)


def kept(
    folder: Path | None, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` gives, and the `seconds` that it took; from `folder`, if it is there by `key`."""
    path = folder and folder / f"{fingerprint(json.dumps(key))}.safetensors"
    if path and path.exists():
        return load_file(path)
    start = time.perf_counter()
    made = make()
    made["seconds"] = torch.tensor(time.perf_counter() - start)
    if path:
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".part")
        try:
            save_file(made, beside)
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
    return made


def pack(statistics: Sequence[Statistics]) -> dict[str, Tensor]:
    """The sums as tensors with names, ready for a file."""
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(statistics):
        for field, m in layer._asdict().items():
            if m is not None:
                tensors |= {f"{i}.{field}.{name}": getattr(m, name) for name in SUMS}
    return tensors


def unpack(tensors: Mapping[str, Tensor], layers: int, device: torch.device) -> list[Statistics]:
    """The statistics of so many layers that `pack` was given."""

    def moments(name: str) -> Any:
        if f"{name}.count" not in tensors:
            return None
        m = Moments(0, 0, device)
        m.count, m.origin, m.sum, m.gram = (tensors[f"{name}.{x}"].to(device) for x in SUMS)
        return m

    return [Statistics(*(moments(f"{i}.{f}") for f in Statistics._fields)) for i in range(layers)]
