"""Calibrate once for many settings, and keep the statistics on disk between runs."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..compression.calibrate import calibrate
from ..compression.moments import Moments, Needs, Statistics
from ..inference.data import calibration_tokens
from ..inference.source_texts import known_texts
from ..inference.sources import described
from ..models.model import Model
from ..utils.provenance import fingerprint
from ..utils.records import CalibrationText, Seconds
from ..utils.resume import check_same, read_state, write_state

SUMS = ("count", "origin", "sum", "gram")


def kind(needs: Needs) -> Needs:
    """The kind of these needs: one pass of calibration serves all needs of one kind.

    Needs of one kind may differ in heads per latent, in queries, and in which sums of gradients
    are taken. With gradients the heads per latent must agree too, since the weights are those of
    whole blocks. Needs with and without gradients are of different kinds: with gradients the last
    token of a sequence, which predicts nothing, is not read, and the statistics must equal those
    of `gather`.
    """
    heads = needs.heads_per_latent if needs.gradients else (1, 1)
    return needs._replace(heads_per_latent=heads, queries=False, unweighted=False, weighted=False)


def union(needs: Sequence[Needs]) -> Needs:
    """The needs that serve all of these, which are of one kind: its blocks contain all theirs."""
    k, v = (math.lcm(*(n.heads_per_latent[side] for n in needs)) for side in (0, 1))
    asked = {f: any(getattr(n, f) for n in needs) for f in ("queries", "unweighted", "weighted")}
    return needs[0]._replace(heads_per_latent=(k, v), **asked)


def narrow(statistics: Sequence[Statistics], have: Needs, want: Needs) -> list[Statistics]:
    """Statistics of fewer heads per latent, cut out of those of more."""
    k, v = (a // b for a, b in zip(have.heads_per_latent, want.heads_per_latent, strict=True))
    return [s.split(k, v) for s in statistics]


class Calibration(NamedTuple):
    """What to calibrate on: see `data.calibration_text`."""

    source: str = "mixed"
    samples: int = 32
    seq_len: int = 1024
    seed: int = 0

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> CalibrationText:
        """The same, files by name and a digest of their text, chats as the template has them.

        Raises ValueError if a file cannot be read.
        """
        words = [text.words(tokenizer) for text in known_texts(self.source)]
        return {
            "source": described(self.source),
            "samples": self.samples,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "digest": fingerprint(*words) if words else None,
        }


class Calibrator:
    """Tokens and statistics of one calibration, made when they are first needed.

    folder: where they are kept for another run, None for nowhere. run: what else they depend on,
    ready for JSON.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Calibration,
        folder: Path | None = None,
        run: Mapping[str, Any] | None = None,
    ):
        """Read the file that the calibration names, if any. Nothing here takes long."""
        self.model, self.tokenizer, self.calibration = model, tokenizer, calibration
        self.folder, self.about = folder, calibration.describe(tokenizer)
        self.key = {**(run or {}), **self.about}
        self.seconds: Seconds = {}  # of making the tokens, and the last statistics

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

        tensors = kept(self.folder, self.key, make)
        self.seconds["text"] = float(tensors["seconds"])
        return tensors["tokens"].to(self.model.device)

    def statistics(self, needs: Needs) -> list[Statistics]:
        """What `calibrate` gives for such needs."""
        tokens, key = self.tokens, self.key | needs._asdict()
        tensors = kept(self.folder, key, lambda: pack(calibrate(self.model, tokens, *needs)))
        self.seconds["calibrate"] = float(tensors["seconds"])
        return unpack(tensors, len(self.model.layers), self.model.device)


def check_kept(rows: Path) -> None:
    """Raise ValueError unless the statistics of a sweep can be kept beside its file of rows."""
    folder = rows.with_suffix(".statistics")
    if folder == rows:
        raise ValueError(f"{rows} has the name of its statistics: choose another ending")
    others = [p for p in folder.glob("*") if p.suffix not in (".safetensors", ".part")]
    if os.path.lexists(folder) and (others or not folder.is_dir()):
        raise ValueError(f"{folder} holds no statistics of a sweep: choose another file")


def kept(
    folder: Path | None, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` returns, with the `seconds` it took; from `folder` if it was kept under `key`.

    Raises ValueError if what was kept is damaged.
    """
    path = folder and folder / f"{fingerprint(json.dumps(key))}.safetensors"
    if path and path.exists():
        tensors, facts = read_state(path)
        check_same(path, json.loads(json.dumps(key)), facts)
        return tensors
    start = time.perf_counter()
    made = make()
    made["seconds"] = torch.tensor(time.perf_counter() - start)
    if path:
        path.parent.mkdir(exist_ok=True)
        write_state(path, made, key)
    return made


def pack(statistics: Sequence[Statistics]) -> dict[str, Tensor]:
    """The sums as tensors with names, ready for a file."""
    tensors = {"anchor": torch.tensor(statistics[0].anchor)}
    for i, layer in enumerate(statistics):
        for field, m in layer.moments.items():
            tensors |= {f"{i}.{field}.{name}": getattr(m, name) for name in SUMS}
    return tensors


def unpack(tensors: Mapping[str, Tensor], layers: int, device: torch.device) -> list[Statistics]:
    """The statistics, of `layers` layers, that `pack` was given."""
    anchor = int(tensors["anchor"])
    names = [name for name in Statistics._fields if name != "anchor"]

    def moments(name: str) -> Any:
        if f"{name}.count" not in tensors:
            return None
        m = Moments(0, 0, device)
        m.count, m.origin, m.sum, m.gram = (tensors[f"{name}.{x}"].to(device) for x in SUMS)
        return m

    found = [Statistics(*(moments(f"{i}.{f}") for f in names)) for i in range(layers)]
    return [layer._replace(anchor=anchor) for layer in found]
