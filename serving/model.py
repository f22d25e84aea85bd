"""vLLM's model class around the native models: their layers run, vLLM keeps their cache.

T new tokens, of all texts in a step.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from ..kernels.install import install
from ..zoo.inference.weights import fill
from ..zoo.models.families import new_model
from .native import native_config
from .pages import PagedLayer


@support_torch_compile
class EigenModel(nn.Module):
    """The layers of a native model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.native = install(new_model(native_config(vllm_config.model_config.hf_config)))
        self.caches = [
            PagedLayer(self.native, i, f"{prefix}.layers.{i}.attn", vllm_config)
            for i in range(len(self.native.layers))
        ]

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions (T,) -> the input of the head (T, width)."""
        model, position = self.native, positions[None]
        x, attn_metadata = model.start(input_ids[None], position), model.encoding_metadata(position)
        for layer, cache in zip(model.layers, self.caches, strict=True):
            x = layer(x, positions, attn_metadata, cache)
        return model.finish(x)[0]


class EigenForCausalLM(nn.Module):
    """The language model, as vLLM calls it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.model = EigenModel(vllm_config=vllm_config, prefix=prefix or "model")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The embeddings (T, width) of ids (T,)."""
        return self.model.native.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids and positions (T,) -> the input of the head (T, width)."""
        if inputs_embeds is not None:
            raise ValueError("embeddings in place of tokens are not served: give tokens")
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The input of the head (N, width) -> logits (N, vocabulary)."""
        native = self.model.native
        return native.linear(native.head, hidden_states[None])[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy weights as they are read; returns the names of all. Errors as in `fill`."""
        fill(self.model.native, weights)
        return {name for name, _ in self.named_parameters()}
