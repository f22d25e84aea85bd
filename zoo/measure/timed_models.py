"""Models whose decoding `bench` can time: this package's and transformers'.

A contestant is pure data, so that it can be sent to a process of its own; `start` makes a model of
it that decodes at the end of a full cache. The cache holds zeros: speed does not depend on content.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..inference.checkpoint import load, locate
from ..inference.generate import Generator
from ..inference.sampling import Sampling, choose
from ..models.config import Config
from ..models.model import Model
from ..utils.records import BenchExtra
from .shapes import random_model


class Cell(NamedTuple):
    """The circumstances under which all contestants decode."""

    context: int  # tokens that a sequence has in its cache at the end
    batch: int
    slots: int  # of static caches, at least the context
    steps: int  # in a round
    dtype: torch.dtype
    device: torch.device
    compile: bool
    graphs: bool = False  # compiled steps are replayed from CUDA graphs


class Run(NamedTuple):
    """A contestant that is ready."""

    round: Callable[[], list[float]]  # seconds of every decoding step of a round
    weight_bytes: int  # read in a step
    kv_bytes: int  # read in a step, at the full context
    dtype: str | None = None  # where it is not the cell's
    extra: BenchExtra | None = None  # more fields of the row
    peak: Callable[[], int] | None = None  # bytes, where a program of its own decodes


class Contestant(Protocol):
    """A model with a name that can be started."""

    @property
    def name(self) -> str:
        """As the rows have it."""

    def start(self, cell: Cell) -> Run:
        """Load or make the model and its cache."""


@dataclass(frozen=True)
class Native:
    """A model of this package: a checkpoint, or random weights of a config's shape.

    prepare: installs ops, for one. kv_bits: of a number in its cache; None leaves it to the model.
    """

    name: str
    source: str | Config
    prepare: Callable[[Model], Model]
    revision: str | None = None
    trust_remote_code: bool = False
    kv_bits: int | None = None

    def start(self, cell: Cell) -> Run:
        """See `Contestant`. A round takes tokens as `Generator.stream` does."""
        if isinstance(self.source, str):
            trust = self.revision, self.trust_remote_code
            model = load(self.source, cell.dtype, cell.device, *trust).model
        else:
            model = random_model(self.source, cell.dtype, cell.device)
        generator = Generator(
            *(self.prepare(model), cell.batch, cell.slots, cell.compile, False, self.kv_bits),
            graphs=cell.graphs,
        )
        weights = weight_bytes(model, model.head)

        def round() -> list[float]:
            times = []
            generator.filled = 0  # what slots hold does not matter here
            token = torch.zeros(cell.batch, dtype=torch.long, device=cell.device)
            for slot in range(cell.context - cell.steps, cell.context):
                start = time.perf_counter()
                token = choose(generator.advance(token[:, None], slot), Sampling())
                token.tolist()  # waits for the device, as a reader of the stream does
                times.append(time.perf_counter() - start)
            return times

        return Run(round, weights, generator.cache.bytes_read(cell.context))


@dataclass(frozen=True)
class Transformers:
    """transformers' own model and `generate`, with a dynamic cache or a static, compiled one."""

    name: str
    source: str | PreTrainedConfig
    static: bool
    revision: str | None = None

    def start(self, cell: Cell) -> Run:
        """See `Contestant`. A step is the time between two stopping checks of `generate`."""
        model = self._load(cell.dtype).eval().to(cell.device)
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        first = cell.context - cell.steps - 2  # a step for the prompt, one to warm up
        static = StaticCache(config, max_cache_len=cell.slots) if self.static else None
        if static is not None:
            static.early_initialization(cell.batch, heads, size, cell.dtype, cell.device)
        mode = "reduce-overhead" if cell.graphs else "default"
        compiled = CompileConfig(fullgraph=True, mode=mode)
        compiled._compile_all_devices = True  # type: ignore[assignment]  # on a CPU as well

        def filled() -> Cache:
            if static is not None:
                for layer in static.layers:
                    layer.cumulative_length.fill_(first)  # type: ignore[union-attr]
                return static
            cache = DynamicCache(config=config)
            held = torch.zeros(
                *(cell.batch, heads, first, size), dtype=cell.dtype, device=cell.device
            )
            for i in range(config.num_hidden_layers):
                cache.update(held, held, i)
            return cache

        def round() -> list[float]:
            stamp = _Stamp()
            model.generate(
                torch.zeros(cell.batch, 1, dtype=torch.long, device=cell.device),
                attention_mask=torch.ones(
                    *(cell.batch, first + 1), dtype=torch.long, device=cell.device
                ),
                cache=filled(),
                min_new_tokens=cell.steps + 2,
                max_new_tokens=cell.steps + 2,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([stamp]),
                disable_compile=not (self.static and cell.compile),
                compile_config=compiled if self.static and cell.compile else None,
            )
            return [b - a for a, b in pairwise(stamp.times[1:])]

        kv = 2 * config.num_hidden_layers * heads * size * cell.context * cell.batch
        weights = weight_bytes(model, model.get_output_embeddings())
        return Run(round, weights, kv * cell.dtype.itemsize)

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        if not isinstance(self.source, str):
            return AutoModelForCausalLM.from_config(self.source, dtype=dtype)
        path = locate(self.source, self.revision)
        gguf: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder: Path = path.parent if gguf else path
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **gguf)


class _Stamp(StoppingCriteria):
    """Notes the time of each token, and never stops the generation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        input_ids[:, -1].tolist()  # waits for the device, as a reader of the stream does
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def weight_bytes(model: nn.Module, head: nn.Module) -> int:
    """Bytes of weights that a decoding step reads: all but the tables it looks up."""
    looked_up = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    looked_up.discard(head.weight)
    return sum(p.nbytes for p in model.parameters() if p not in looked_up)
