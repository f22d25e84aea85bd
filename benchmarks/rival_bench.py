"""What `rivals.py` measures on and with: texts, models, and what was calibrated."""

import argparse
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rival_caches import GROUP, Rival, readers, rival_losses
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, QuantizedCache

from eigenzoo.zoo.compression.compress import compress, error_search, gather
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.moments import Statistics
from eigenzoo.zoo.compression.settings import Settings, needs
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import calibration_tokens, encode
from eigenzoo.zoo.inference.perplexity import token_losses
from eigenzoo.zoo.inference.python_texts import python_help, python_source
from eigenzoo.zoo.measure.calibrator import pack, unpack
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.models.model import Model

WINDOW, SAMPLES, LENGTH = 2048, 16, 1024
RESIDUAL, HF_GROUP = 128, 64  # transformers' defaults
Domains = dict[str, Tensor]  # by the name of a text: tokens, or losses


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser of what `Bench` reads. doc: of the script, whose first line describes it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--wiki", type=Path, required=True)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is calibrated")
    parser.add_argument("--windows", type=int, default=2, help="of every text")
    return parser


class Bench:
    """A model, the texts, and what was calibrated, each made when it is first needed."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.path = args, Path(args.model)
        self.model, self.tokenizer, *_ = load(args.model, torch.float32)
        texts = [path.read_text(encoding="utf-8") for path in (args.wiki, args.speech)]
        self.first, second = zip(
            *((x[: len(x) // 2], x[len(x) // 2 :]) for x in texts), strict=True
        )
        held_out = (*second, python_source(held_out=True), python_help(held_out=True))
        self.rows = {
            name: self.windows(text, WINDOW)[: args.windows]
            for name, text in zip(("wiki", "speech", "code", "help"), held_out, strict=True)
        }
        sizes = args.windows, WINDOW, SAMPLES, LENGTH
        weights = self.model.embed.weight[:64].numpy().tobytes()
        self.key = hashlib.sha256(f"{texts}{sizes}".encode() + weights).hexdigest()

    def windows(self, text: str, length: int) -> Tensor:
        """Token ids of a text in rows of `length`."""
        tokens = encode(self.tokenizer, text)
        return tokens[: len(tokens) // length * length].view(-1, length)

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, or returned before for this model and these texts."""
        path = self.args.cache / f"{name}.safetensors"
        if path.is_file():
            with safe_open(path, "pt") as file:
                if file.metadata() == {"made for": self.key}:
                    return load_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {x: t.contiguous().clone() for x, t in make().items()}
        save_file(tensors, path, {"made for": self.key})
        return tensors

    @cached_property
    def dense(self) -> Domains:
        """Losses of the uncompressed model."""
        return self.kept("dense", lambda: self.losses(self.model))

    @cached_property
    def mixture(self) -> Tensor:
        """The tokens to calibrate on, (samples, length)."""
        return self.mixed(SAMPLES)

    def mixed(self, samples: int) -> Tensor:
        """As many of the same sources: (samples, length)."""
        return self.kept(f"mixture-{samples}", lambda: {"tokens": self.mix(samples // 4)})["tokens"]

    def mix(self, count: int) -> Tensor:
        """So many each of both first halves, of Python's source and of own text."""
        rows = []
        for text in (*self.first, python_source(held_out=False)):
            windows = self.windows(text, LENGTH)
            rows.append(windows[torch.linspace(0, len(windows) - 1, count).round().long()])
        own = calibration_tokens("self", self.model, self.tokenizer, count, LENGTH)
        return torch.cat((*rows, own))

    @cached_property
    def readers(self) -> dict[str, Tensor]:
        """As `rival_caches.readers` says."""
        return self.kept("readers", lambda: readers(self.model, self.mixture))

    def statistics(self, settings: Settings) -> list[Statistics]:
        """What `gather` returns for settings that were fitted to the model."""
        need = repr(needs(settings, self.model.config)) + str(METHODS[settings.method].data)
        name = f"statistics-{hashlib.sha256(need.encode()).hexdigest()[:12]}"
        return self.layers(
            self.kept(name, lambda: pack(gather(self.model, self.mixture, settings)))
        )

    def layers(self, tensors: dict[str, Tensor]) -> list[Statistics]:
        """The statistics that `pack` made tensors of."""
        return unpack(tensors, len(self.model.layers), self.model.device)

    def losses(self, model: Model) -> Domains:
        """Losses of a model, over its own cache."""
        return {x: token_losses(model, rows.flatten(), WINDOW) for x, rows in self.rows.items()}

    def rival(self, make: Callable[[], Rival]) -> tuple[float, Domains]:
        """Share and losses of a rival's cache."""
        cache = make()
        losses = {x: rival_losses(self.model, rows, cache) for x, rows in self.rows.items()}
        return cache.share(WINDOW), losses

    def compressed(self, settings: Settings) -> tuple[float, Domains]:
        """Share and losses of a compressed model."""
        fitted = settings.fit(self.model.config)
        seen, search = self.statistics(fitted), None
        if METHODS[settings.method].searched:
            search = self.searched(fitted, seen)
        low = compress(self.model, self.mixture, settings, seen, search).model
        return kv_bytes(low.config)["kv_share"], self.losses(low)

    def searched(self, settings: Settings, seen: list[Statistics]) -> Any:
        """What `error_search` returns, once for all shares."""
        if not hasattr(self, "search"):
            self.search = error_search(self.model, self.mixture, settings, seen)
        return self.search

    @cached_property
    def theirs(self) -> Any:
        """The model as transformers has it."""
        gguf = {"gguf_file": self.path.name} if self.path.is_file() else {}
        folder = self.path.parent if gguf else self.path
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)

    @torch.inference_mode()
    def quantized(self, backend: str, bits: int) -> tuple[float, Domains]:
        """Share and losses of transformers' `QuantizedCache`, which is read in parts of `GROUP`.

        Its window grows to 128 tokens, and then everything is rounded again. HQQ takes axis 1, as
        transformers' guide says: groups are then of neighbors, as with quanto.
        """
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        options = {"nbits": bits, "q_group_size": HF_GROUP, "residual_length": RESIDUAL} | axis

        def losses(rows: Tensor) -> Tensor:
            cache, found = QuantizedCache(backend, self.theirs.config, **options), []
            parts = zip(rows[:, :-1].split(GROUP, 1), rows[:, 1:].split(GROUP, 1), strict=True)
            for part, targets in parts:
                logits = self.theirs(part, past_key_values=cache, use_cache=True).logits
                found.append(F.cross_entropy(logits.mT.float(), targets, reduction="none"))
            return torch.cat(found, 1)

        cache = Rival(None, None, bits + 32 / HF_GROUP, RESIDUAL)  # type: ignore[arg-type]
        return cache.share(WINDOW), {x: losses(rows) for x, rows in self.rows.items()}
