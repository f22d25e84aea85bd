"""What one of several processes holds of a model, and where the processes add their results.

With tensor parallelism each has some of the heads, of the latents, of the MLP's inner numbers and
of the vocabulary. Experts are whole in every process. So is a latent that serves all heads of a
layer: each process reads it with its own heads. With pipeline parallelism each has some layers.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    GroupCoordinator,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.utils import get_pp_indices

from ..hub_export.remote.parallel_eigen import WAYS
from ..zoo.models.config import Config
from ..zoo.models.families import new_model
from ..zoo.models.model import Model

COLUMNS = "rowwise"  # these weights are split by columns, and what they return is added; see WAYS
VOCABULARY = ("embed.weight", "head.weight")


class Share(NamedTuple):
    """Part `part` of `parts` of a model."""

    config: Config
    part: int
    parts: int

    @classmethod
    def own(cls, config: Config) -> "Share":
        """That of this process."""
        return cls(config, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())

    def of(self, name: str, x: Tensor) -> Tensor:
        """The part of a weight x, by its native name; x itself if it is whole in each process.

        Raises ValueError for a weight that cannot be split evenly.
        """
        module, _, last = name.rpartition(".")
        way = WAYS.get(re.sub(r"\.\d+", ".*", module))
        whole = way is None or way.startswith("replicated")
        if self.parts == 1 or whole or last == "k_pairs":  # of which attention takes its part
            return x
        if name in VOCABULARY:
            rows = -(-len(x) // self.parts)
            x = x[self.part * rows :][:rows]
            return F.pad(x, (0, 0, 0, rows - len(x)))
        if way == COLUMNS and last == "bias":  # it is added once
            return x if self.part == 0 else torch.zeros_like(x)
        side = re.match(r"layers\.(\d+)\.attn\.([kv])_(\w+)", name)
        if side and self.config.latents(int(side[1]))["kv".index(side[2])].heads == 1:
            dim = {"up": 2, "mean": 0}.get(side[3])
            return x if dim is None else self._cut(name, x, dim, self.config.num_key_value_heads)
        return self._cut(name, x, int(way == COLUMNS), self.parts)

    def _cut(self, name: str, x: Tensor, dim: int, units: int) -> Tensor:
        """This part of the units (heads, say) of a dimension; if there are fewer, one of them."""
        size = x.size(dim) // units
        if x.size(dim) % units or (units % self.parts and self.parts % units):
            raise ValueError(
                f"{name} has {x.size(dim)} numbers in {units} parts, which {self.parts} processes "
                "cannot share evenly: use a number of processes that divides both"
            )
        first = self.part * units // self.parts
        return x.narrow(dim, first * size, max(1, units // self.parts) * size)


def new_part(share: Share) -> Model:
    """A part of a native model, on meta. Raises ValueError if there are no equal parts."""
    with torch.device("meta"):
        model = new_model(share.config)
    if share.parts == 1:
        return model
    for layer in model.layers:
        layer.attn.split(share.part, share.parts, repeat=True)
        layer.attn.register_forward_hook(_add_up)
        if hasattr(layer.mlp, "down_proj"):  # experts are whole in each process
            layer.mlp.register_forward_hook(_add_up)
    for name, x in model.named_parameters():
        x.data = share.of(name, x.data)
    model.embed = PartOfEmbedding(model.embed, share.part)
    return model


def allocate(model: Model) -> Model:
    """Give a model on meta uninitialized weights on torch's default device."""
    model.to_empty(device=torch.get_default_device())
    if model.config.tie_word_embeddings and model.embed and model.head:
        model.head.weight = model.embed.weight
    return model


def stage_of(model: Model, group: GroupCoordinator) -> Model:
    """Leave a model only the layers of this process, of a group that passes on what they return.

    What runs before the layers is left in the first process, and what runs after them in the last.
    """
    children = [name for name, _ in model.named_children()]  # in the order in which they run
    layers = children.index("layers")
    first, end = get_pp_indices(len(model.layers), group.rank_in_group, group.world_size)
    model.layers = model.layers[first:end]
    before, after = children[:layers], children[layers + 1 :]
    for name in before * (not group.is_first_rank) + after * (not group.is_last_rank):
        setattr(model, name, None)
    return model


def native_weights(model: Model) -> dict[str, Tensor]:
    """The weights of a process's layers, and what runs before and after, by checkpoint name."""
    own = {name: x for name, x in model.state_dict().items() if not name.startswith("layers.")}
    for layer in model.layers:
        own |= layer.state_dict(prefix=f"layers.{layer.attn.layer}.")
    if model.config.tie_word_embeddings and "head.weight" in own:
        own["embed.weight"] = own["head.weight"]
    return own


class PartOfEmbedding(nn.Module):
    """An embedding of which each process has some rows."""

    def __init__(self, embed: nn.Embedding, part: int):
        super().__init__()
        self.weight, self.part = embed.weight, part
        self.scale = float(getattr(embed, "scale", 1.0))  # of families that multiply embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, width), complete in each process."""
        row = ids - self.part * len(self.weight)
        mine = (row >= 0) & (row < len(self.weight))
        return tensor_model_parallel_all_reduce(
            F.embedding(row.where(mine, 0), self.weight) * self.scale * mine[..., None]
        )


def _add_up(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return tensor_model_parallel_all_reduce(y)


def all_logits(part: Tensor, config: Config) -> Tensor:
    """The logits (N, vocabulary) of which each process has some columns."""
    return tensor_model_parallel_all_gather(part)[:, : config.vocab_size]
