"""Compress a model that need not fit into memory: layer by layer, every step kept on disk.

Three sweeps over the layers. Forward, for the hidden states of all text, and for statistics where
no gradients are asked for. Backward, where they are: each layer is run once more from its inputs,
and the gradient of the loss goes back through it. Then, with the ranks of all layers chosen, each
is folded, and refitted behind the compressed ones. Memory is what is in no layer, two layers, and
what one layer sees of all text. A step that was killed is taken again, from the same files.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..inference.perplexity import Perplexity, mean_perplexity, row_losses
from ..inference.weights import LayerFiles
from ..models.cache import LayerCache, StaticCache
from ..models.families import model_of
from ..models.model import Model
from ..utils.records import LayerRecord
from ..utils.replace import replacing
from ..utils.resume import check_same
from .allocate import Ranks
from .basis import LayerBasis
from .calibrate import gather_sums
from .compress import choose_ranks, mixed, report
from .fold import compressed_config, fold_attention
from .methods import METHODS
from .mixing import rounding
from .moments import Statistics
from .refit import refit_layer
from .settings import Settings, needs
from .solve import Basis

PROGRESS = "progress.json"


def check_stream(settings: Settings) -> None:
    """Raise ValueError for what is not made layer by layer."""
    method = METHODS[settings.method]
    if settings.method == "eigen" or method.ranks is not None:
        raise ValueError(
            f"{settings.method} finds its ranks by looking at all layers together, so the model "
            "cannot be read layer by layer: leave --stream and --resume out, or choose another "
            "method"
        )


class Step(NamedTuple):
    """A step of the work: `take` leaves files, and returns which are needed no more."""

    name: str
    cost: float  # in forward passes through a layer
    take: Callable[[], Sequence[str]]


class Stream:
    """The work, and its files in a folder."""

    def __init__(
        self,
        files: LayerFiles,
        model: Model,
        tokens: Tensor,
        windows: Tensor,
        settings: Settings,
        folder: Path,
        write: Callable[[int, dict[str, Tensor]], None],
    ):
        """Nothing long is done yet.

        model: `files.model()`. tokens: (N, T) to calibrate on. windows: (M, W) to measure
        perplexity on. settings: fitted to the model. write: keeps the weights of a folded layer,
        given its number.
        """
        self.files, self.model, self.settings, self.folder = files, model, settings, folder
        self.tokens, self.windows, self.write = tokens, windows, write
        self.method, self.count = METHODS[settings.method], model.config.num_hidden_layers
        self.needs, self.anchor = needs(settings, model.config), settings.anchor(model.config)

    def check_room(self) -> None:
        """Raise ValueError if what the steps keep does not fit on the disk."""
        one = self.tokens.numel() * self.model.config.hidden_size * self.model.dtype.itemsize
        need = one * (self.count + 3 if self.method.gradients else 4)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            less = f", or --method attention, which needs {4 * one / 1e9:.1f} GB"
            raise ValueError(
                f"the hidden states of all layers take {need / 1e9:.1f} GB in {self.folder}, where "
                f"{free / 1e9:.1f} GB are free: take fewer --samples" + less * self.method.gradients
            )

    def run(self, facts: Mapping[str, Any]) -> None:
        """Take the steps that are not done yet. facts: what the work depends on, as JSON knows it.

        Raises ValueError if the folder was left by work on other facts, or the disk is too small.
        """
        steps, state = self._steps(), self.folder / PROGRESS
        if state.exists():
            left = json.loads(state.read_text())
            check_same(self.folder, facts, left["facts"])
            done = left["done"]
        else:
            self.check_room()
            done = 0
        costs = [step.cost for step in steps]
        shape = "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} layer passes [{elapsed}<"
        with tqdm(
            total=sum(costs),
            initial=sum(costs[:done]),
            bar_format=shape + "{remaining}, {rate_fmt}]",
            unit="pass",
            disable=None,
            leave=False,
        ) as bar:
            for number, step in enumerate(steps[done:], done + 1):
                bar.set_description(step.name)
                stale = step.take()
                with replacing(state) as part:
                    part.write_text(json.dumps({"facts": dict(facts), "done": number}))
                for name in stale:
                    self._path(name).unlink(missing_ok=True)
                bar.update(step.cost)

    def _steps(self) -> list[Step]:
        layers = range(self.count)
        steps = [Step("embedding", 0, self._embed)]
        steps += [Step(f"layer {i}, forward", 1, partial(self._forward, i)) for i in layers]
        steps.append(Step("loss", 0, self._loss))
        if self.method.gradients:
            steps += [
                Step(f"layer {i}, backward", 4.5, partial(self._backward, i))
                for i in reversed(layers)
            ]
        steps += [Step(f"layer {i}, folding", 3, partial(self._fold, i)) for i in layers]
        return [*steps, Step("measuring", 0, self._measure)]

    @torch.no_grad()
    def _embed(self) -> list[str]:
        self._put("dense-0", text=self._begun(self.tokens))
        self._put("test-0", text=self._begun(self.windows[:, :-1]))
        return []

    @torch.no_grad()
    def _forward(self, i: int) -> list[str]:
        text, test = self._get(f"dense-{i}")["text"], self._get(f"test-{i}")["text"]
        with self.files.layer(self.model, i) as block:
            made: list[Tensor] = []

            def read(step: int, doing: str) -> None:
                made.append(self._through(self.model, block, text))

            if self.method.gradients:
                read(1, "")
            else:
                (seen,) = gather_sums(self.model, [block], self.needs, read, first=i)
                self._solve(i, block, seen)
            self._put(f"dense-{i + 1}", text=made[0])
            self._put(f"test-{i + 1}", text=self._through(self.model, block, test))
        return [f"test-{i}"] if self.method.gradients else [f"test-{i}", f"dense-{i}"]

    def _loss(self) -> list[str]:
        last = f"dense-{self.count}"
        test = self._get(f"test-{self.count}")["text"]
        self._put("loss-dense", losses=self._losses(self.model, test))
        if self.method.gradients:
            grads = []
            for row, tokens in zip(self._get(last)["text"], self.tokens, strict=True):
                x = row[None, :-1].clone().requires_grad_()
                # the logits have no name, so that they are freed before the backward pass
                F.cross_entropy(
                    self.model.head(self.model.finish(x))[0].float(), tokens[1:], reduction="sum"
                ).backward()
                grads.append(x.grad[0])  # type: ignore[index]
            self._put(f"gradient-{self.count}", text=torch.stack(grads))
        return [f"test-{self.count}", last]

    def _backward(self, i: int) -> list[str]:
        text, grad = self._get(f"dense-{i}")["text"], self._get(f"gradient-{i + 1}")["text"]
        at = self._at(self.model, text.size(1) - 1)
        below: list[Tensor] = []
        with self.files.layer(self.model, i) as block:

            def read(step: int, doing: str) -> None:
                for row, above in zip(text[::step], grad[::step], strict=True):
                    x = row[None, :-1].clone().requires_grad_()
                    block(x, *at, None).backward(above[None])
                    if step == 1:
                        below.append(x.grad[0])  # type: ignore[index]

            (seen,) = gather_sums(self.model, [block], self.needs, read, first=i)
            self._solve(i, block, seen)
        self._put(f"gradient-{i}", text=torch.stack(below))
        return [f"dense-{i}", f"gradient-{i + 1}"]

    @torch.no_grad()
    def _solve(self, i: int, block: Any, seen: Statistics) -> None:
        options = self.settings.basis_options
        basis = self.method.basis(self.model, block.attn, seen, **options)
        tensors = {}
        for side, one in basis._asdict().items():
            if one and self.settings.rounded:  # ranks and bits are chosen without encoders
                one = one._replace(rounding=rounding(one, self.model.config.head_dim))
            for name, x in one._asdict().items() if one else ():
                if x is not None:
                    tensors[f"{side}.{name}"] = x.clone()  # encoder and decoder may be one
        self._put(f"basis-{i}", **tensors)

    @torch.no_grad()
    def _fold(self, i: int) -> list[str]:
        low, basis, parts = self.low, mixed(self._basis(i), self.ranks, i), self.settings.refit
        if i:
            rows = self._get(f"low-{i}")
        else:
            rows = {"test": self._begun(self.windows[:, :-1])}
            rows |= {name: self._begun(self.tokens) for name in ("want", "have") if parts}
        low_block = low.layers[i]
        with self.files.layer(self.model, i) as block:
            folded = fold_attention(low.config, block.attn, low_block.attn, basis)
            rest = {k: x for k, x in block.state_dict().items() if not k.startswith("attn.")}
            low_block.load_state_dict(
                rest | {f"attn.{k}": x for k, x in folded.items()}, assign=True
            )
            if parts:
                dense_at, low_at = (self._at(m, self.tokens.size(1)) for m in (self.model, low))
                want, have = (list(rows[name][:, None]) for name in ("want", "have"))
                layer = block, low_block, low.config, basis, parts
                rows["want"] = torch.cat(refit_layer(*layer, want, have, dense_at, low_at))
        self.write(i, low_block.state_dict())
        if parts:
            rows["have"] = self._through(low, low_block, rows["have"])
        kept = low.config.latents(i)  # what is measured is rounded, what is learned is not
        if min(latent.bits for latent in kept) < 16:
            where = 1, rows["test"].size(1), low.dtype, low.device
            cache = StaticCache([kept], *where).layer(0)
        else:
            cache = None
        rows["test"] = self._through(low, low_block, rows["test"], cache)
        self._put(f"low-{i + 1}", **rows)
        low_block.to("meta")
        return [f"low-{i}"]

    def _measure(self) -> list[str]:
        test = self._get(f"low-{self.count}")["test"]
        self._put("loss-compressed", losses=self._losses(self.low, test))
        return [f"low-{self.count}"]

    @cached_property
    def low(self) -> Model:
        """The compressed model, its layers on meta."""
        config = compressed_config(self.model.config, self.bases, self.ranks, self.anchor)
        outside = {k: x for k, x in self.model.state_dict().items() if not k.startswith("layers.")}
        return model_of(config, outside, whole=False)

    @cached_property
    def bases(self) -> list[LayerBasis]:
        """Those of all layers, without the encoders and decoders: those stay on disk."""
        return [self._basis(i, whole=False) for i in range(self.count)]

    @cached_property
    def ranks(self) -> Ranks:
        """The ranks of all layers."""
        return choose_ranks(self.model.config, self.bases, self.settings)

    @property
    def layers(self) -> list[LayerRecord]:
        """For every layer its ranks and errors, as `compress` tells them."""
        return cast(list[LayerRecord], report(self.bases, self.ranks))

    @property
    def perplexities(self) -> dict[str, Perplexity]:
        """Of the dense and of the compressed model on the windows."""
        names = "dense", "compressed"
        return {name: mean_perplexity(self._get(f"loss-{name}")["losses"]) for name in names}

    def _basis(self, i: int, whole: bool = True) -> LayerBasis:
        sides: dict[str, dict[str, Any]] = {}
        with safe_open(self._path(f"basis-{i}"), "pt", device=str(self.model.device)) as file:
            for key in file.keys():  # noqa: SIM118, the file is no mapping
                side, name = key.split(".")
                read = whole or name not in ("encoder", "decoder")
                sides.setdefault(side, {})[name] = file.get_tensor(key) if read else None
        return LayerBasis(Basis(**sides["k"]), Basis(**sides["v"]) if "v" in sides else None)

    def _begun(self, rows: Tensor) -> Tensor:
        return torch.cat([self.model.begin(row[None])[0] for row in rows])

    def _at(self, model: Model, length: int) -> tuple[Tensor, Any]:
        return model.begin(self.tokens.new_zeros(1, length))[1:]

    def _through(
        self, model: Model, block: Any, rows: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        at = self._at(model, rows.size(1))
        return torch.cat([block(x[None], *at, cache) for x in rows])

    @torch.no_grad()
    def _losses(self, model: Model, rows: Tensor) -> Tensor:
        pairs = zip(rows, self.windows[:, 1:], strict=True)
        return torch.stack([row_losses(model, model.finish(x[None])[0], y) for x, y in pairs])

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _get(self, name: str) -> dict[str, Tensor]:
        return load_file(self._path(name), device=str(self.model.device))

    def _put(self, name: str, **tensors: Tensor) -> None:
        save_file({k: x.contiguous() for k, x in tensors.items()}, self._path(name))
