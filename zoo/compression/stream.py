"""Compress a model that need not fit into memory: layer by layer, every step kept on disk.

There are three sweeps over the layers. The forward sweep computes the hidden states of all text,
and the statistics of methods without gradients. For methods with gradients a backward sweep runs
each layer once more from its inputs, and takes the gradient of the loss back through it. When the
ranks of all layers are chosen, the last sweep folds each layer, and refits it behind the compressed
ones. Peak memory: the weights outside layers, two layers, and one layer's activations of all text.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..inference.perplexity import row_losses
from ..inference.weights import LayerFiles
from ..models.cache import Rounding
from ..models.families import model_of
from ..models.model import Model
from ..utils.records import LayerRecord
from ..utils.resume import KeptFiles
from .allocate import Ranks
from .basis import LayerBasis
from .calibrate import gather_sums
from .compress import choose_ranks, mixed, report
from .fold import compressed_config, fold_attention
from .methods import METHODS, methods_that
from .moments import Statistics
from .refit import refit_layer, rounding
from .rounding import facts
from .settings import Settings, needs
from .solve import Basis
from .steps import Step, take_steps


def check_stream(settings: Settings) -> None:
    """Raise ValueError for a method whose ranks need all layers in memory."""
    if not METHODS[settings.method].streamed:
        raise ValueError(
            f"{settings.method} finds its ranks by looking at all layers together, so the model "
            "cannot be read layer by layer: leave --stream and --resume out, or choose "
            f"{methods_that(lambda m: m.streamed)}"
        )


class Stream:
    """The work, and the files that it goes on from."""

    def __init__(
        self,
        files: LayerFiles,
        model: Model,
        tokens: Tensor,
        windows: Tensor,
        settings: Settings,
        kept: KeptFiles,
        write: Callable[[int, dict[str, Tensor]], None],
    ):
        """Nothing long happens yet.

        model: `files.model()`. tokens: (N, T) to calibrate on. windows: (M, W) to measure
        perplexity on. settings: fitted to the model. write: is given the number and the
        weights of every folded layer, and keeps them.
        """
        self.files, self.model, self.settings, self.kept = files, model, settings, kept
        self.tokens, self.windows, self.write = tokens, windows, write
        self.method, self.count = METHODS[settings.method], model.config.num_hidden_layers
        self.needs, self.anchor = needs(settings, model.config), settings.anchor(model.config)

    def check_room(self) -> None:
        """Raise ValueError if the files of the steps do not fit on the disk."""
        one = self.tokens.numel() * self.model.config.hidden_size * self.model.dtype.itemsize
        need = one * (self.count + 3 if self.method.gradients else 4)
        weights = sum(p.nbytes for p in self.model.parameters())
        free = max(0, shutil.disk_usage(self.kept.folder).free - weights)
        if need > free:
            others = methods_that(lambda m: m.streamed and not m.gradients)
            less = f", or --method {others}, which needs {4 * one / 1e9:.1f} GB"
            raise ValueError(
                f"the hidden states of all layers take {need / 1e9:.1f} GB in {self.kept.folder}, "
                f"where {free / 1e9:.1f} GB are free beside the new weights: take fewer --samples"
                f"{less * self.method.gradients}"
            )

    def run(self, facts: Mapping[str, Any]) -> None:
        """Take the steps that are not done yet.

        facts: what the work depends on, see `provenance.work`. Raises ValueError if the folder was
        left by work on other facts or is damaged, or the disk is too small.
        """
        take_steps(self.kept, self._steps(), facts, self.check_room)

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
                (statistics,) = gather_sums(self.model, [block], self.needs, read, first=i)
                self._solve(i, block, statistics)
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

            (statistics,) = gather_sums(self.model, [block], self.needs, read, first=i)
            self._solve(i, block, statistics)
        self._put(f"gradient-{i}", text=torch.stack(below))
        return [f"dense-{i}", f"gradient-{i + 1}"]

    @torch.no_grad()
    def _solve(self, i: int, block: Any, statistics: Statistics) -> None:
        options = self.settings.basis_options
        basis = self.method.basis(self.model, block.attn, statistics, **options)
        tensors = {}
        for side, one in basis._asdict().items():
            if one and self.settings.rounded:  # ranks and bits are chosen without encoders
                one = one._replace(rounding=facts(one))
            for name, x in one._asdict().items() if one else ():
                if x is not None:
                    tensors[f"{side}.{name}"] = x.clone()  # encoder and decoder may be one
        self._put(f"basis-{i}", **tensors)

    @torch.no_grad()
    def _fold(self, i: int) -> list[str]:
        low, basis, refit = self.low, mixed(self._basis(i), self.ranks, i), self.settings.refit
        if i:
            rows = self._get(f"low-{i}")
        else:
            rows = {"test": self._begun(self.windows[:, :-1])}
            rows |= {name: self._begun(self.tokens) for name in ("want", "have") if refit}
        low_block = low.layers[i]
        with self.files.layer(self.model, i) as block:
            folded = fold_attention(low.config, block.attn, low_block.attn, basis)
            rest = {k: x for k, x in block.state_dict().items() if not k.startswith("attn.")}
            low_block.load_state_dict(
                rest | {f"attn.{k}": x for k, x in folded.items()}, assign=True
            )
            if refit:
                dense_at, low_at = (self._at(m, self.tokens.size(1)) for m in (self.model, low))
                want, have = (list(rows[name][:, None]) for name in ("want", "have"))
                outputs = refit_layer(block, low_block, want, have, dense_at, low_at)
                rows["want"] = torch.cat(outputs)
        self.write(i, low_block.state_dict())
        cache = rounding(low_block)
        if refit:
            rows["have"] = self._through(low, low_block, rows["have"], cache)
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
        """The bases of all layers, without encoders and decoders, which stay on disk."""
        return [self._basis(i, whole=False) for i in range(self.count)]

    @cached_property
    def ranks(self) -> Ranks:
        """The ranks of all layers."""
        return choose_ranks(self.model.config, self.bases, self.settings)

    @property
    def layers(self) -> list[LayerRecord]:
        """The ranks and errors of every layer, as in `Compressed`."""
        return cast(list[LayerRecord], report(self.bases, self.ranks))

    @property
    def losses(self) -> dict[str, Tensor]:
        """Losses in nats (M, W - 1) of the dense and of the compressed model on the windows."""
        return {name: self._get(f"loss-{name}")["losses"] for name in ("dense", "compressed")}

    def _basis(self, i: int, whole: bool = True) -> LayerBasis:
        sides: dict[str, dict[str, Any]] = {}
        path, device = self.kept.path(f"basis-{i}"), str(self.model.device)
        with safe_open(path, "pt", device=device) as file:
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
        self, model: Model, block: Any, rows: Tensor, cache: Rounding | None = None
    ) -> Tensor:
        at = self._at(model, rows.size(1))
        return torch.cat([block(x[None], *at, cache) for x in rows])

    @torch.no_grad()
    def _losses(self, model: Model, rows: Tensor) -> Tensor:
        pairs = zip(rows, self.windows[:, 1:], strict=True)
        return torch.stack([row_losses(model, model.finish(x[None])[0], y) for x, y in pairs])

    def _get(self, name: str) -> dict[str, Tensor]:
        return self.kept.read(name, self.model.device)

    def _put(self, name: str, **tensors: Tensor) -> None:
        self.kept.write(name, tensors)
